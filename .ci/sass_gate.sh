#!/usr/bin/env bash
# Compiles every CUDA kernel for every architecture with warnings as errors, and reads the machine code of two of them:
# see .ci/sass_gate.py. The disassembler (two small packages) is kept between calls beside the environment of
# cuda_build.sh. Exits 0 with the reason when the machine cannot do it; MTP_CI_CUDA=0 skips it.
set -euo pipefail
cd "$(dirname "$0")/.."

tools="nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37"
cache=${MTP_CI_CUDA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mtp_ext}/sass
skip() { echo "SASS gate skipped: $1"; exit 0; }

[ "${MTP_CI_CUDA:-1}" != 0 ] || skip "MTP_CI_CUDA=0"
command -v nvcc >/dev/null || skip "no nvcc on PATH"
if ! command -v cuobjdump >/dev/null || ! command -v nvdisasm >/dev/null; then
  if [ ! -e "$cache/ready" ]; then
    mkdir -p "$cache"
    python3 -m venv --clear "$cache/venv"
    # shellcheck disable=SC2086
    "$cache/venv/bin/pip" install -q --disable-pip-version-check $tools >"$cache/install.log" 2>&1 ||
      skip "cuobjdump and nvdisasm could not be installed (see $cache/install.log)"
    touch "$cache/ready"
  fi
  PATH=$(dirname "$(find "$cache/venv" -name cuobjdump -type f | head -n 1)"):$PATH
fi
PYTHONPATH=python:${PYTHONPATH:-} python3 .ci/sass_gate.py "$@"
