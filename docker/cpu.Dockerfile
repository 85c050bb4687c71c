# yolov7-deploy on CPUs: ONNX Runtime and OpenVINO. Build it in the root of the repository:
#
#   docker build --file docker/cpu.Dockerfile --tag yolov7-deploy:cpu .
#
# The defaults of ARG are those of docker/images.env, which says where each was seen.
ARG CPU_BASE=python:3.12-slim-bookworm

# ---- builder: installs the package -----------------------------------------------------------------------------------
FROM ${CPU_BASE} AS builder
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY plugins plugins
COPY yolov7_deploy yolov7_deploy
RUN python3 -m venv /opt/y7 \
    && /opt/y7/bin/python -m pip install --no-cache-dir ".[cpu,openvino]"
COPY docker/trim.py docker/trim.py
RUN python3 docker/trim.py /opt/y7

# ---- runtime: no compiler, no pip, no torch --------------------------------------------------------------------------
FROM ${CPU_BASE}
ARG VERSION=0.2.0
ARG REVISION=unknown
ARG CPU_BASE
LABEL org.opencontainers.image.title="yolov7-deploy cpu" \
      org.opencontainers.image.description="YOLOv7 detection with ONNX Runtime and OpenVINO" \
      org.opencontainers.image.source="https://github.com/yolov7-deploy/yolov7-deploy" \
      org.opencontainers.image.documentation="https://github.com/yolov7-deploy/yolov7-deploy/blob/main/docs/docker.md" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${CPU_BASE}"
# /cache: compiled networks and engines. Everyone may write there and to /work, because `docker run --user` can be anyone.
RUN useradd --uid 10001 --home-dir /cache --no-create-home y7 \
    && install --directory --mode 1777 /cache /work
COPY --from=builder /opt/y7 /opt/y7
ENV PATH="/opt/y7/bin:${PATH}" \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cache
VOLUME ["/cache"]
WORKDIR /work
USER 10001
HEALTHCHECK --interval=30s --timeout=20s --start-period=30s CMD ["y7", "doctor", "--ready"]
ENTRYPOINT ["y7"]
CMD ["doctor"]
