# yolov7-deploy on Jetson Orin with JetPack 6.1 or later: TensorRT 10.3, CUDA 12.6. Build it in the root of the repository:
#
#   docker build --file docker/jetson-jetpack6.Dockerfile --tag yolov7-deploy:jetson-jetpack6 .
#
# The defaults of ARG are those of docker/images.env, which says where each was seen. hadolint's DL3008 (pin every
# package) is ignored for packages of the distribution only, whose security updates are wanted.
ARG JETPACK6_BUILDER=nvcr.io/nvidia/l4t-jetpack:r36.4.0
ARG JETPACK6_BASE=nvcr.io/nvidia/l4t-cuda:12.6.11-runtime

# ---- builder: collects TensorRT, installs the package, compiles the plugin ---------------------------------------------
FROM ${JETPACK6_BUILDER} AS builder
ARG JETPACK6_NUMPY=1.26.4
ARG JETPACK6_ARCHITECTURES=87
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends cmake g++ make python3-venv \
    && rm -rf /var/lib/apt/lists/*
# Shared libraries and Python bindings only: no static library, no header, no sample.
RUN mkdir -p /opt/tensorrt/lib /opt/tensorrt/python \
    && cp -a /usr/lib/*-linux-gnu/libnvinfer*.so.10* /usr/lib/*-linux-gnu/libnvonnxparser*.so.10* /opt/tensorrt/lib/ \
    && cp -a /usr/lib/python3*/dist-packages/tensorrt* /opt/tensorrt/python/
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY plugins plugins
COPY yolov7_deploy yolov7_deploy
RUN python3 -m venv /opt/y7 \
    && /opt/y7/bin/python -m pip install --no-cache-dir ".[cpu,engine]" "numpy==${JETPACK6_NUMPY}" \
    && /opt/y7/bin/y7 plugin --arch "${JETPACK6_ARCHITECTURES}" --output /opt/plugin/liby7_plugin.so
COPY docker/trim.py docker/trim.py
RUN python3 docker/trim.py /opt/y7

# ---- runtime: no compiler, no pip, no torch --------------------------------------------------------------------------
FROM ${JETPACK6_BASE}
ARG VERSION=0.2.0
ARG REVISION=unknown
ARG JETPACK6_BASE
LABEL org.opencontainers.image.title="yolov7-deploy jetson-jetpack6" \
      org.opencontainers.image.description="YOLOv7 detection with TensorRT 10.3 on Jetson Orin, JetPack 6" \
      org.opencontainers.image.source="https://github.com/yolov7-deploy/yolov7-deploy" \
      org.opencontainers.image.documentation="https://github.com/yolov7-deploy/yolov7-deploy/blob/main/docs/docker.md" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${JETPACK6_BASE}"
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
# /cache: compiled networks and engines. Everyone may write there and to /work, because `docker run --user` can be anyone.
RUN useradd --uid 10001 --home-dir /cache --no-create-home y7 \
    && install --directory --mode 1777 /cache /work
# The vendor's layer.
COPY --from=builder /opt/tensorrt /opt/tensorrt
RUN echo /opt/tensorrt/lib > /etc/ld.so.conf.d/tensorrt.conf \
    && ldconfig
COPY --from=builder /opt/plugin/liby7_plugin.so /usr/local/lib/
COPY --from=builder /opt/y7 /opt/y7
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    NVIDIA_VISIBLE_DEVICES=all \
    PATH="/opt/y7/bin:${PATH}" \
    PYTHONPATH=/opt/tensorrt/python \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cache
VOLUME ["/cache"]
WORKDIR /work
USER 10001
HEALTHCHECK --interval=30s --timeout=20s --start-period=30s CMD ["y7", "doctor", "--ready"]
ENTRYPOINT ["y7"]
CMD ["doctor"]
