# syntax=docker/dockerfile:1
# The serving image: no torch, no compiler, no source tree. Needs BuildKit (the default since Docker 23).

FROM python:3.12-slim AS build
WORKDIR /source
RUN python -m venv --without-pip /opt/sotto
COPY . .
# `postgres` is in every image, so that growing past one replica is a setting and not a rebuild.
# Dependencies come as wheels or not at all: the base has no compiler to fall back on.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/sotto install --disable-pip-version-check --only-binary :all: ".[postgres]"

FROM python:3.12-slim
RUN groupadd --gid 10001 sotto \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin sotto \
    && install --directory --owner=10001 --group=10001 --mode=0700 /data
COPY --from=build /opt/sotto /opt/sotto
# The root file system may be read-only: bytecode was compiled at installation, data goes to /data.
# ONNX Runtime from 1.29 reports to Microsoft by default, on Linux too; a service for voices reports to nobody.
ENV PATH=/opt/sotto/bin:$PATH \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SOTTO_HOST=0.0.0.0 \
    SOTTO_DATA_DIR=/data
# By number: Kubernetes cannot tell whether a name is root's.
USER 10001:10001
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=6 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ.get(\"SOTTO_PORT\", 8000)}/healthz', timeout=2)"]
CMD ["sotto", "serve"]
