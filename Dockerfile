# syntax=docker/dockerfile:1
# anchor in a container: a build stage with compilers, a run stage without them where possible, never root.
#
#   docker build -t anchor .                                    CUDA: torch with CUDA, flash-attn, Liger
#   docker build -t anchor:cpu --build-arg VARIANT=cpu .        CPU only: small, for demos and CI
#
# BASE        an image of Debian 12 with python3 (3.11 or newer) and python3-venv, and no user 1000 (ubuntu:24.04 has one);
#             another Debian or Ubuntu where flash-attn is not compiled: nvcc comes from NVIDIA's packages for Debian 12
# VARIANT     cuda or cpu
# FLASH_ATTN  build: compile it here (an hour, MAX_JOBS x 8 GB memory); none: PyTorch's own varlen attention is used;
#             else anything pip installs, such as the URL of a ready wheel
# TORCH_INDEX the wheel index of the CPU build of torch (PyPI has the CUDA one)
ARG BASE=python:3.11-slim-bookworm
ARG VARIANT=cuda

FROM ${BASE} AS builder
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /src
RUN python3 -m venv /opt/anchor
ENV PATH=/opt/anchor/bin:$PATH
# what it needs first, without the program: this layer, gigabytes large, is made anew only when versions change
COPY constraints.txt pyproject.toml docker/requirements.py ./

FROM builder AS builder-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 requirements.py sentence-transformers tensorboard >requirements.txt \
    && pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        --requirement requirements.txt

FROM builder AS builder-cuda
ARG FLASH_ATTN=build
ARG FLASH_ATTN_VERSION=2.8.3
ARG FLASH_ATTN_CUDA_ARCHS=80;90
ARG MAX_JOBS=4
RUN python3 requirements.py sentence-transformers tensorboard liger >requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt
# nvcc of the CUDA release that torch was built for, from NVIDIA's own repository; this stage is thrown away.
# Debian and NVIDIA drop old package versions from their repositories, so pins would break the build within weeks;
# pip's are in constraints.txt.
# hadolint ignore=DL3008,DL3013
RUN set -eu; case "$FLASH_ATTN" in \
    none) exit 0 ;; \
    build) ;; \
    *) pip install --no-deps "$FLASH_ATTN" && pip install --constraint constraints.txt einops && exit 0 ;; \
    esac; \
    cuda="$(python3 -c 'import torch; print(torch.version.cuda.replace(".", "-"))')"; \
    apt-get update; \
    apt-get install --yes --no-install-recommends ca-certificates curl g++ ninja-build python3-dev; \
    curl --fail --silent --show-error --location --output /tmp/keyring.deb \
        https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/cuda-keyring_1.1-1_all.deb; \
    dpkg --install /tmp/keyring.deb; \
    apt-get update; \
    apt-get install --yes --no-install-recommends "cuda-minimal-build-$cuda" "cuda-libraries-dev-$cuda"; \
    export CUDA_HOME=/usr/local/cuda FLASH_ATTENTION_FORCE_BUILD=TRUE; \
    export MAX_JOBS="$MAX_JOBS" FLASH_ATTN_CUDA_ARCHS="$FLASH_ATTN_CUDA_ARCHS"; \
    pip install --constraint constraints.txt packaging ninja psutil setuptools wheel einops; \
    pip install --no-build-isolation --no-deps "flash-attn==$FLASH_ATTN_VERSION"; \
    rm -rf /var/lib/apt/lists/* /tmp/keyring.deb

FROM builder AS wheel
COPY README.md LICENSE ./
COPY docs/spec.schema.json docs/spec.schema.json
COPY ds_configs ds_configs
COPY train_configs train_configs
COPY anchor_cli anchor_cli
RUN pip wheel --no-deps --wheel-dir /dist .

# hadolint ignore=DL3006
FROM builder-${VARIANT} AS installed
COPY --from=wheel /dist /dist
RUN pip install --no-cache-dir --no-deps /dist/*.whl \
    && find /opt/anchor -name __pycache__ -type d -prune -exec rm -rf {} + \
    && find /opt/anchor -path '*/site-packages/*/tests' -type d -prune -exec rm -rf {} +

FROM ${BASE} AS runtime-cpu

# hadolint ignore=DL3006
FROM ${BASE} AS runtime-cuda
# Triton (Liger, torch_compile) compiles a small launcher on the user's machine at first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3006
FROM runtime-${VARIANT} AS image
ARG VARIANT
ARG REVISION=unknown
LABEL org.opencontainers.image.title="anchor" \
      org.opencontainers.image.description="Stage I of Anchor Embedding: train text-embedding language models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      ai.anchor.variant="${VARIANT}"
RUN useradd --create-home --uid 1000 anchor \
    && mkdir -p /work /home/anchor/.cache \
    && chown -R anchor:anchor /work /home/anchor
ENV PATH=/opt/anchor/bin:$PATH \
    HOME=/home/anchor \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# a number, so that Kubernetes can tell that it is not root
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["anchor"]
CMD ["--help"]
# last, so that nothing above is repeated for it
COPY --from=installed /opt/anchor /opt/anchor
