#!/usr/bin/env bash
# Build an image and try it without a GPU: entry point, user, no secrets, `anchor doctor`, `anchor demo`; of the CUDA
# image also what it answers to a driver that is too old for its torch.
#
#   bash docker/test-image.sh                 the CPU image; with docker when its daemon answers, else with buildah (no daemon needed)
#   BASE=localhost/base bash docker/test-image.sh     on another base image; with buildah and no network to a registry
#                                             a base is made by debootstrap when BASE is not given
#   VARIANT=cuda bash docker/test-image.sh    the CUDA image: some 4 GB of wheels
#   BUILD=no bash docker/test-image.sh        try the image as it was built last
# Honoured when set: PIP_FIND_LINKS (a folder of wheels, mounted read-only), PIP_CERT, TORCH_INDEX, FLASH_ATTN, DEMO_STEPS,
# STORAGE_DRIVER (of buildah: overlay where it can be mounted, else vfs, which copies every layer: some 30 GB for a while).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${VARIANT:=cpu}" "${IMAGE:=localhost/anchor-test:$VARIANT}" "${DEMO_STEPS:=}" "${REVISION:=$(git rev-parse HEAD 2>/dev/null || echo unknown)}"
step() { printf '\n== %s\n' "$*"; }
fail() { printf 'test-image: %s\n' "$*" >&2; exit 1; }

buildah() { command buildah --storage-driver "$STORAGE_DRIVER" "$@"; }

make_base() {  # a stand-in for the public base image: Debian bookworm with its Python 3.11
    buildah inspect --type image localhost/base >/dev/null 2>&1 && return
    command -v debootstrap >/dev/null || fail "no BASE given, and debootstrap is not installed to make one"
    step "making localhost/base with debootstrap"
    folder="$(mktemp -d)"
    debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates bookworm "$folder/rootfs" >/dev/null
    printf 'FROM scratch\nCOPY rootfs /\n' >"$folder/Containerfile"
    buildah bud --isolation chroot -t localhost/base -f "$folder/Containerfile" "$folder" >/dev/null
    rm -rf "$folder"
}

build() {
    local arguments=(--build-arg "VARIANT=$VARIANT" --build-arg "REVISION=$REVISION" -t "$IMAGE")
    [ -z "${BASE:-}" ] || arguments+=(--build-arg "BASE=$BASE")
    [ -z "${FLASH_ATTN:-}" ] || arguments+=(--build-arg "FLASH_ATTN=$FLASH_ATTN")
    [ -z "${TORCH_INDEX+x}" ] || arguments+=(--build-arg "TORCH_INDEX=$TORCH_INDEX")
    if [ "$TOOL" = docker ]; then
        docker build "${arguments[@]}" .
        return
    fi
    arguments+=(--isolation chroot --layers -v /etc/ssl/certs:/etc/ssl/certs:ro)
    for folder in ${PIP_FIND_LINKS:-}; do arguments+=(-v "$folder:$folder:ro"); done
    for name in PIP_FIND_LINKS PIP_CERT PIP_INDEX_URL PIP_EXTRA_INDEX_URL; do
        [ -z "${!name:-}" ] || arguments+=(--env "$name=${!name}")
    done
    buildah bud "${arguments[@]}" .
}

config() {  # one field of the image's configuration, as JSON
    { if [ "$TOOL" = docker ]; then docker image inspect "$IMAGE"; else buildah inspect --type image "$IMAGE"; fi; } |
        python3 -c 'import json, sys
found = json.load(sys.stdin)
config = found[0]["Config"] if isinstance(found, list) else found["OCIv1"]["config"]
print(json.dumps(config.get(sys.argv[1]), separators=(",", ":")))' "$1"
}

in_image() {  # run a command line in the image as its own user, or as AS
    if [ "$TOOL" = docker ]; then
        docker run --rm --network none ${AS:+--user "$AS"} --entrypoint "$1" "$IMAGE" "${@:2}"
    else
        buildah run --isolation chroot ${AS:+--user "$AS"} "$CONTAINER" -- "$@"
    fi
}

if command -v docker >/dev/null && docker info >/dev/null 2>&1; then TOOL=docker
elif command -v buildah >/dev/null; then
    TOOL=buildah
    : "${STORAGE_DRIVER:=$(command buildah --storage-driver overlay info >/dev/null 2>&1 && echo overlay || echo vfs)}"
else fail "neither a docker daemon nor buildah is here"; fi

if command -v hadolint >/dev/null; then step "hadolint"; hadolint Dockerfile && echo "clean"
else echo "hadolint is not installed: skipped"; fi

if [ "$TOOL" = buildah ] && [ -z "${BASE:-}" ] && [ "${BUILD:-yes}" != no ]; then make_base; BASE=localhost/base; fi
[ -z "${PIP_FIND_LINKS:-}" ] || : "${TORCH_INDEX=}"

if [ "${BUILD:-yes}" != no ]; then
    step "building $IMAGE with $TOOL"
    began=$SECONDS
    build
    echo "built in $((SECONDS - began)) s"
fi
if [ "$TOOL" = buildah ]; then
    CONTAINER="$(buildah from "$IMAGE")"
    trap 'buildah rm "$CONTAINER" >/dev/null' EXIT
fi

step "configuration"
echo "entry point $(config Entrypoint), user $(config User), labels $(config Labels)"
[ "$(config Entrypoint)" = '["anchor"]' ] || fail "the entry point is not anchor"
[ "$(config User)" = '"1000:1000"' ] || fail "the image does not run as the user anchor (1000)"
[ "$(in_image id -u)" != 0 ] || fail "runs as root"
! config Env | grep -qiE 'token|api_key|password|secret' || fail "a secret's name is in the environment"
! in_image sh -c 'ls -a /src /work /home/anchor 2>/dev/null; true' | grep -qE '^(\.git|\.env|\.venv|\.netrc)$' || fail "more than the program is in it"
echo "venv: $(in_image du -sm /opt/anchor | cut -f1) MB"

step "anchor --version, anchor --help, also as a user whom the image does not know"
in_image anchor --version
in_image anchor --help >/dev/null
AS=4711:4711 in_image sh -ec 'for folder in "$HOME" "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR" /work; do touch "$folder/mine"; done
    anchor --version' || fail "another user (--user) cannot write its caches or start anchor"
in_image python -c 'from importlib.metadata import version, PackageNotFoundError
for name in ("torch", "liger-kernel", "flash-attn", "flash-attn-4"):
    try: print(name, version(name))
    except PackageNotFoundError: print(name, "is not installed")'

if [ "$VARIANT" = cuda ]; then
    step "a driver that is too old for this torch"
    # what anchor asks NVML and libcuda of one GPU, answered by libraries of our own: driver 550, CUDA 12.4
    old_driver='mkdir -p /tmp/driver && cd /tmp/driver && printf %s "$FAKE" >fake.c \
        && gcc -shared -fPIC -o libcuda.so.1 fake.c && cp libcuda.so.1 libnvidia-ml.so.1'
    in_image env FAKE='#include <string.h>
        int cuInit(unsigned f) { return 0; } int cuDriverGetVersion(int *v) { *v = 12040; return 0; }
        int nvmlInitWithFlags(unsigned f) { return 0; } int nvmlShutdown(void) { return 0; }
        int nvmlDeviceGetCount_v2(unsigned *n) { *n = 1; return 0; }
        int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { *h = (void *)1; return 0; }
        int nvmlDeviceGetName(void *h, char *s, unsigned n) { strcpy(s, "NVIDIA H100 80GB HBM3"); return 0; }
        int nvmlDeviceGetUUID(void *h, char *s, unsigned n) { strcpy(s, "GPU-0"); return 0; }
        int nvmlDeviceGetMemoryInfo(void *h, unsigned long long *m) { m[0] = m[1] = 80ull << 30; m[2] = 0; return 0; }
        int nvmlSystemGetDriverVersion(char *s, unsigned n) { strcpy(s, "550.54.15"); return 0; }' sh -c "$old_driver"
    answer="$(in_image env LD_LIBRARY_PATH=/tmp/driver HF_HUB_OFFLINE=1 anchor demo 2>&1)" \
        && fail "anchor demo went on, on the CPU: $answer"
    echo "$answer"
    [[ "$answer" == *"driver 550.54.15 runs CUDA 12.4 at most"*"needs driver 580 or newer"* ]] || fail "not what is wrong"
    [[ "$answer" == *"update the driver, or pip install torch"*"--device cpu"* ]] || fail "no remedy"
fi

step "anchor doctor"
in_image env HF_HUB_OFFLINE=1 anchor doctor

step "anchor demo${DEMO_STEPS:+ --steps $DEMO_STEPS}"
in_image sh -c "cd \"\$(mktemp -d)\" && HF_HUB_OFFLINE=1 anchor demo ${DEMO_STEPS:+--steps $DEMO_STEPS} && ls demo"

step "done"
echo "$IMAGE builds and runs"
