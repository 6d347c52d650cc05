# syntax=docker/dockerfile:1
#
#   docker build --tag promptplex .                                     torch from pip's own index: with CUDA
#   docker build --tag promptplex --build-arg TORCH_INDEX_URL=... .     torch from the index for CPUs
#   docker build --tag promptplex --build-arg SERVE_ON=compiler .       for a GPU: Triton calls a C compiler there
#   docker run --publish 127.0.0.1:8000:8000 promptplex      serves the demo; the log names the file with the key
#
# docs/deployment.md is the guide. tests/docker/clean_root.py runs these instructions without a container engine.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm
# What the final stage stands on: python, or compiler.
ARG SERVE_ON=python

# The installation: a virtual environment at its final path.
FROM ${PYTHON_IMAGE} AS build
SHELL ["/bin/sh", "-eu", "-c"]
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
ENV PATH=/srv/promptplex/venv/bin:$PATH
WORKDIR /build
RUN python3 -m venv /srv/promptplex/venv

# The index for torch (PyTorch's installation page lists them); empty: pip's own, with a build for Linux that
# includes CUDA.
ARG TORCH_INDEX_URL=
COPY constraints.txt ./
RUN pip install --constraint constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL" --no-deps} torch

# Dependencies before Promptplex itself: a change of the code rebuilds only the last layers.
COPY docker/requirements.py pyproject.toml ./
RUN python requirements.py > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt

COPY README.md LICENSE ./
COPY app ./app
RUN pip wheel --no-deps --wheel-dir dist . \
    && pip install --no-deps dist/promptplex-*.whl \
    && pip check \
    && pip uninstall --yes pip

FROM ${PYTHON_IMAGE} AS python

# With what Triton compiles the launcher of its kernels with, at the first start: a C compiler and the C library's
# headers. Python's headers are in the base image, CUDA's in Triton's package.
FROM python AS compiler
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Docker builds only those stages that this one needs.
FROM ${SERVE_ON} AS serve
LABEL org.opencontainers.image.title="Promptplex" \
      org.opencontainers.image.description="One frozen language model, thousands of tasks, each a small trained prompt" \
      org.opencontainers.image.licenses="Apache-2.0"
# The ids are fixed, so that volumes and Kubernetes' securityContext can name them.
RUN groupadd --gid 10001 promptplex \
    && useradd --uid 10001 --gid 10001 --home-dir /cache --no-create-home --shell /usr/sbin/nologin promptplex \
    && install --directory --owner=10001 --group=10001 --mode=0750 /store /keys /metrics-key /cache
WORKDIR /srv/promptplex
COPY --from=build /srv/promptplex/venv ./venv
# safetensors writes files that only their owner may read, and a clone's owner isn't the image's user.
COPY --chmod=0755 demo/demo-causal ./demo/demo-causal
COPY --chmod=0755 prompts_store ./prompts_store
COPY docker/entrypoint.py docker/healthcheck.py ./

ENV PATH=/srv/promptplex/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    TRITON_CACHE_DIR=/cache/triton \
    PROMPTPLEX_HOST=0.0.0.0 \
    PROMPTPLEX_PORT=8000 \
    PROMPTPLEX_STORE=/store \
    PROMPTPLEX_KEYS_FILE=/keys/keys.json \
    PROMPTPLEX_LOG_FORMAT=json
# With these on volumes and /tmp on a tmpfs, the root file system may be read-only.
VOLUME ["/store", "/keys", "/metrics-key", "/cache"]
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --start-interval=2s --retries=3 \
    CMD ["python3", "healthcheck.py"]
ENTRYPOINT ["python3", "/srv/promptplex/entrypoint.py"]
CMD ["serve"]
