#!/usr/bin/env bash
# Install anchor, editable, with everything its tests need, at the versions of constraints.txt, into $PYTHON's environment.
#   PYTHON=.venv/bin/python EXTRAS=dev,tensorboard TORCH_INDEX=https://download.pytorch.org/whl/cpu bash tools/install.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${PYTHON:=python3}" "${EXTRAS:=dev}" "${TORCH_INDEX:=}"

index=()
if [ -n "$TORCH_INDEX" ]; then
    if "$PYTHON" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)' "$TORCH_INDEX/torch/" 2>/dev/null; then
        index=(--extra-index-url "$TORCH_INDEX")
    else
        echo "tools/install.sh: $TORCH_INDEX is out of reach; taking torch from pip's own index" >&2
    fi
fi
# DeepSpeed is published as source only: its build wants these, and finds no torch, so nothing is compiled now
"$PYTHON" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip setuptools wheel
"$PYTHON" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
    ${index[@]+"${index[@]}"} --editable ".[$EXTRAS]"
