# yolov7-deploy on the NVIDIA V100: TensorRT 10.4, the last for Volta, and CUDA 12.6. Build it in the root of the repository:
#
#   docker build --file docker/v100.Dockerfile --tag yolov7-deploy:v100 .
#
# The defaults of ARG are those of docker/images.env, which says where each was seen. hadolint's DL3008 (pin every
# package) is ignored for packages of the distribution only, whose security updates are wanted.
ARG V100_BUILDER=nvcr.io/nvidia/cuda:12.6.3-devel-ubuntu22.04
ARG V100_BASE=nvcr.io/nvidia/cuda:12.6.3-base-ubuntu22.04

# ---- builder: installs TensorRT and the package, compiles the plugin -------------------------------------------------
FROM ${V100_BUILDER} AS builder
ARG V100_TENSORRT=10.4.0
ARG V100_INDEX=https://pypi.nvidia.com
ARG V100_HEADERS=10.4.0.26-1+cuda12.6
ARG V100_ARCHITECTURES=70
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        cmake g++ "libnvinfer-headers-dev=${V100_HEADERS}" make python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/y7 \
    && NVIDIA_TENSORRT_DISABLE_INTERNAL_PIP=1 \
        /opt/y7/bin/python -m pip install --no-cache-dir --target /opt/tensorrt --extra-index-url "${V100_INDEX}" \
        "tensorrt-cu12==${V100_TENSORRT}" \
        "tensorrt-cu12-bindings==${V100_TENSORRT}" \
        "tensorrt-cu12-libs==${V100_TENSORRT}"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY plugins plugins
COPY yolov7_deploy yolov7_deploy
RUN /opt/y7/bin/python -m pip install --no-cache-dir ".[cpu,engine]" \
    && /opt/y7/bin/y7 plugin --arch "${V100_ARCHITECTURES}" --output /opt/plugin/liby7_plugin.so
COPY docker/trim.py docker/trim.py
RUN python3 docker/trim.py /opt/y7

# ---- runtime: no compiler, no pip, no torch --------------------------------------------------------------------------
FROM ${V100_BASE}
ARG VERSION=0.2.0
ARG REVISION=unknown
ARG V100_BASE
LABEL org.opencontainers.image.title="yolov7-deploy v100" \
      org.opencontainers.image.description="YOLOv7 detection with TensorRT 10.4 on NVIDIA V100" \
      org.opencontainers.image.source="https://github.com/yolov7-deploy/yolov7-deploy" \
      org.opencontainers.image.documentation="https://github.com/yolov7-deploy/yolov7-deploy/blob/main/docs/docker.md" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${V100_BASE}"
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
# /cache: compiled networks and engines. Everyone may write there and to /work, because `docker run --user` can be anyone.
RUN useradd --uid 10001 --home-dir /cache --no-create-home y7 \
    && install --directory --mode 1777 /cache /work
# The vendor's layer: TensorRT and the CUDA runtime that its wheel needs.
COPY --from=builder /opt/tensorrt /opt/tensorrt
COPY --from=builder /opt/plugin/liby7_plugin.so /usr/local/lib/
COPY --from=builder /opt/y7 /opt/y7
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    NVIDIA_VISIBLE_DEVICES=all \
    PATH="/opt/y7/bin:${PATH}" \
    PYTHONPATH=/opt/tensorrt \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cache
VOLUME ["/cache"]
WORKDIR /work
USER 10001
HEALTHCHECK --interval=30s --timeout=20s --start-period=30s CMD ["y7", "doctor", "--ready"]
ENTRYPOINT ["y7"]
CMD ["doctor"]
