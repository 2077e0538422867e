#!/usr/bin/env bash
# Configures, builds and tests csrc/ with CMake: .ci/native.sh BUILD_DIRECTORY [cmake option ...]
# Quiet: the compiler's output, with the register report of the CUDA kernels, is in BUILD_DIRECTORY/build.log.
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1
shift
mkdir -p "$build"
log=$build/build.log
cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$(command -v python)" "$@" >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
sed -n 's/^-- mtp_ext: //p' "$log"
cmake --build "$build" >>"$log" 2>&1 || { cat "$log" >&2; exit 1; }
ctest --test-dir "$build" --output-on-failure --no-tests=error
