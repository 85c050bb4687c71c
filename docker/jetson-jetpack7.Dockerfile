# yolov7-deploy on Jetson Orin and Thor with JetPack 7: TensorRT 10.16, CUDA 13.2. Build it in the root of the repository:
#
#   docker build --file docker/jetson-jetpack7.Dockerfile --tag yolov7-deploy:jetson-jetpack7 .
#
# The defaults of ARG are those of docker/images.env, which says where each was seen. hadolint's DL3008 (pin every
# package) is ignored for packages of the distribution only, whose security updates are wanted.
ARG JETPACK7_BUILDER=nvcr.io/nvidia/cuda:13.2.0-devel-ubuntu24.04
ARG JETPACK7_BASE=ubuntu:24.04

# ---- builder: installs TensorRT and the package, compiles the plugin -------------------------------------------------
FROM ${JETPACK7_BUILDER} AS builder
ARG JETPACK7_APT=https://repo.download.nvidia.com/jetson/common
ARG JETPACK7_SUITE=r39.2
ARG JETPACK7_KEY=https://repo.download.nvidia.com/jetson/jetson-ota-public.asc
ARG JETPACK7_FINGERPRINT=3C6D1FF3100C8C3ABB0869C0E6543461A9996195
ARG JETPACK7_TENSORRT=10.16.2.10-1+cuda13.2
ARG JETPACK7_ARCHITECTURES=87,110
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates cmake curl g++ gpg make python3-venv \
    && rm -rf /var/lib/apt/lists/*
# NVIDIA's repository for Jetson: its key is used only if it has the known fingerprint, and for this source only.
RUN mkdir -p /etc/apt/keyrings \
    && curl --fail --silent --show-error --location --output /tmp/jetson.asc "${JETPACK7_KEY}" \
    && gpg --batch --show-keys --with-colons /tmp/jetson.asc > /tmp/jetson.txt \
    && grep --quiet "^fpr:::::::::${JETPACK7_FINGERPRINT}:" /tmp/jetson.txt \
    && gpg --batch --dearmor --output /etc/apt/keyrings/jetson.gpg /tmp/jetson.asc \
    && echo "deb [signed-by=/etc/apt/keyrings/jetson.gpg] ${JETPACK7_APT} ${JETPACK7_SUITE} main" \
        > /etc/apt/sources.list.d/jetson.list
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        "libnvinfer-headers-dev=${JETPACK7_TENSORRT}" \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY plugins plugins
COPY yolov7_deploy yolov7_deploy
RUN python3 -m venv --system-site-packages /opt/y7 \
    && /opt/y7/bin/python -m pip install --no-cache-dir ".[cpu,engine]" \
    && /opt/y7/bin/y7 plugin --arch "${JETPACK7_ARCHITECTURES}" --output /opt/plugin/liby7_plugin.so
COPY docker/trim.py docker/trim.py
RUN python3 docker/trim.py /opt/y7

# ---- runtime: no compiler, no pip, no torch --------------------------------------------------------------------------
FROM ${JETPACK7_BASE}
ARG VERSION=0.2.0
ARG REVISION=unknown
ARG JETPACK7_BASE
LABEL org.opencontainers.image.title="yolov7-deploy jetson-jetpack7" \
      org.opencontainers.image.description="YOLOv7 detection with TensorRT 10.16 on Jetson Orin and Thor, JetPack 7" \
      org.opencontainers.image.source="https://github.com/yolov7-deploy/yolov7-deploy" \
      org.opencontainers.image.documentation="https://github.com/yolov7-deploy/yolov7-deploy/blob/main/docs/docker.md" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${JETPACK7_BASE}"
ARG JETPACK7_TENSORRT=10.16.2.10-1+cuda13.2
ARG JETPACK7_CUDART=cuda-cudart-13-2
COPY --from=builder /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=builder /etc/apt/keyrings/jetson.gpg /etc/apt/keyrings/
COPY --from=builder /etc/apt/sources.list.d/jetson.list /etc/apt/sources.list.d/
# The vendor's layer: TensorRT, its Python bindings and the CUDA runtime, and Ubuntu's Python.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        "${JETPACK7_CUDART}" \
        python3 \
        "python3-libnvinfer=${JETPACK7_TENSORRT}" \
        "tensorrt-libs=${JETPACK7_TENSORRT}" \
    && rm -rf /var/lib/apt/lists/*
# /cache: compiled networks and engines. Everyone may write there and to /work, because `docker run --user` can be anyone.
RUN useradd --uid 10001 --home-dir /cache --no-create-home y7 \
    && install --directory --mode 1777 /cache /work
COPY --from=builder /opt/plugin/liby7_plugin.so /usr/local/lib/
COPY --from=builder /opt/y7 /opt/y7
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    NVIDIA_VISIBLE_DEVICES=all \
    PATH="/opt/y7/bin:${PATH}" \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cache
VOLUME ["/cache"]
WORKDIR /work
USER 10001
HEALTHCHECK --interval=30s --timeout=20s --start-period=30s CMD ["y7", "doctor", "--ready"]
ENTRYPOINT ["y7"]
CMD ["doctor"]
