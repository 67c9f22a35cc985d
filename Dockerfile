# syntax=docker/dockerfile:1
# anchor in a container: a build stage with compilers, a run stage without them where possible, never root.
#
#   docker build -t anchor .                                    CUDA: torch with CUDA, Liger
#   docker build -t anchor:cpu --build-arg VARIANT=cpu .        CPU only: small, for demos and CI
#
# BASE        an image of Debian 12 with python3 (3.11 or newer) and python3-venv, and no user 1000 (ubuntu:24.04 has one);
#             another Debian or Ubuntu where flash-attn is not compiled: nvcc comes from NVIDIA's packages for Debian 12
# VARIANT     cuda or cpu
# FLASH_ATTN  none: PyTorch's own varlen attention is used; flash-attn-4: its wheel and what that needs; build: compile
#             flash-attn 2 here (an hour, MAX_JOBS x 8 GB memory); else what pip installs, such as a ready wheel's URL
# TORCH_INDEX the wheel index of torch; CUDA: empty is PyPI's build, which wants a driver for REQUIRE_CUDA;
#             docs/how-to/containers.md has the table of drivers and builds
# REQUIRE_CUDA what the container toolkit asks of the driver before it starts the image
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
ARG TORCH_INDEX=
ARG FLASH_ATTN=none
ARG FLASH_ATTN_VERSION=2.8.3
ARG FLASH_ATTN_CUDA_ARCHS=80;90
ARG MAX_JOBS=4
RUN python3 requirements.py sentence-transformers tensorboard liger >requirements.txt \
    && pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        --requirement requirements.txt
# nvcc of the CUDA release that torch was built for, from NVIDIA's own repository; this stage is thrown away.
# Debian and NVIDIA drop old package versions from their repositories, so pins would break the build within weeks;
# pip's are in constraints.txt.
# hadolint ignore=DL3008,DL3013
RUN set -eu; case "$FLASH_ATTN" in \
    none) exit 0 ;; \
    build) ;; \
    flash-attn-4*) pip install --pre --constraint constraints.txt "$FLASH_ATTN" && exit 0 ;; \
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
# Triton (Liger, our kernels) compiles a small launcher on the user's machine at first use, torch_compile C++ besides.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
ARG REQUIRE_CUDA=cuda>=13.0
ENV NVIDIA_REQUIRE_CUDA="${REQUIRE_CUDA}"

# hadolint ignore=DL3006
FROM runtime-${VARIANT} AS image
ARG VARIANT
ARG REVISION=unknown
LABEL org.opencontainers.image.title="anchor" \
      org.opencontainers.image.description="Anchor Embedding, Stages I and II: train text-embedding language models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      ai.anchor.variant="${VARIANT}"
RUN useradd --create-home --uid 1000 anchor \
    && mkdir -p /work /home/anchor/.cache/triton /home/anchor/.cache/torchinductor \
    && chown -R anchor:anchor /work /home/anchor \
    && chmod -R a+rwX /work /home/anchor
ENV PATH=/opt/anchor/bin:$PATH \
    HOME=/home/anchor \
    LOGNAME=anchor \
    TRITON_CACHE_DIR=/home/anchor/.cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/home/anchor/.cache/torchinductor \
    PYTORCH_ALLOC_CONF=expandable_segments:True \
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
