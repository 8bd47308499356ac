# The images of Glimpse, for CPUs. Targets:
#   gateway     HTTP and gRPC in front of Tritons that run elsewhere; no weights, no ONNX Runtime
#   triton-cpu  the bundled Triton with the models, watched by `glimpse triton`
#   all-in-one  both in one container: `glimpse serve`
# BASE is a Debian with Python 3.11 to 3.13 and its shared library: python:3.11-slim-bookworm works as well.
# docs/deployment.md says how to build and run them.
# MEDIA are the extras of the gateway's image: "pdf video" for MP4 and WebM too, which is 80 MB more.
ARG BASE=python:3.13-slim-trixie

# hadolint ignore=DL3006
FROM ${BASE} AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# PID 1 that collects the model processes that died: Triton does not.
RUN apt-get update \
 && apt-get install -y --no-install-recommends tini=0.19.* \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*

# What pip makes. Nothing of this stage but /opt/glimpse reaches an image.
FROM base AS build
WORKDIR /src
# slim_environment.sh compiles.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends binutils \
 && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml constraints.txt ./
COPY scripts scripts
ARG MEDIA=pdf
# hadolint ignore=SC2086
RUN python3 -m venv /opt/glimpse \
 && python3 scripts/requirements.py gateway ${MEDIA} > gateway.txt \
 && python3 scripts/requirements.py serve pdf > serve.txt \
 && python3 scripts/requirements.py group:triton > triton.txt \
 && /opt/glimpse/bin/pip install --constraint constraints.txt --requirement gateway.txt

FROM build AS wheel
COPY LICENSE README.md ./
COPY service service
COPY triton_models triton_models
RUN /opt/glimpse/bin/pip wheel --no-deps --wheel-dir /wheels .

FROM build AS build-gateway
COPY --from=wheel /wheels /wheels
RUN /opt/glimpse/bin/pip install --no-deps /wheels/*.whl && scripts/slim_environment.sh /opt/glimpse

FROM build AS build-serve
RUN /opt/glimpse/bin/pip install --constraint constraints.txt --requirement serve.txt \
 && /opt/glimpse/bin/pip install --no-deps --requirement triton.txt
COPY --from=wheel /wheels /wheels
RUN /opt/glimpse/bin/pip install --no-deps /wheels/*.whl && scripts/slim_environment.sh /opt/glimpse

# A checkout under umask 077 has files that only its owner reads; images run under any user id.
FROM base AS models
COPY model_repository /models
RUN chmod -R a+rX /models

# What the gateway reads of the models: card, tokenizers and configurations.
FROM models AS cards
RUN find /models -name '*.onnx*' -delete

FROM base AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Glimpse" \
      org.opencontainers.image.description="Visual question answering as a service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Any user id will do, and no file outside /tmp is written. "-": Triton's log goes to stderr.
ENV PATH=/opt/glimpse/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    GLIMPSE_HTTP_HOST=0.0.0.0 \
    GLIMPSE_LOG_DIR=- \
    GLIMPSE_MODEL_REPOSITORY=/models
WORKDIR /
USER 10001:10001
ENTRYPOINT ["tini", "--"]

FROM runtime AS gateway
COPY --from=build-gateway /opt/glimpse /opt/glimpse
COPY --from=cards /models /models
EXPOSE 8080 8081
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 CMD ["glimpse", "health"]
CMD ["glimpse", "serve"]

FROM runtime AS triton-cpu
COPY --from=build-serve /opt/glimpse /opt/glimpse
COPY --from=models /models /models
EXPOSE 8001 8002
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 CMD ["glimpse", "health", "--triton", "127.0.0.1:8001"]
CMD ["glimpse", "triton", "--host", "0.0.0.0"]

FROM runtime AS all-in-one
COPY --from=build-serve /opt/glimpse /opt/glimpse
COPY --from=models /models /models
EXPOSE 8080 8081
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 CMD ["glimpse", "health"]
CMD ["glimpse", "serve"]
