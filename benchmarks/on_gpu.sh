#!/usr/bin/env bash
# Everything that only a GPU can tell, in at most nine minutes: builds for this device, runs the checks of tests/gpu, runs
# the short ones again under compute-sanitizer, then the benchmarks. From a bare checkout with torch, nvcc, ninja and
# pybind11, without a network:
#   OUT=results bash benchmarks/on_gpu.sh
# Results are JSON in $OUT, each rewritten as it grows, so that a run that is cut off leaves what it found. Exits with 1
# if a check failed; a stage that the time does not suffice for is named.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-build/on_gpu} limit=${MTP_ON_GPU_SECONDS:-530} python=${PYTHON:-python3} status=0
mkdir -p "$out"
left() { echo $((limit - SECONDS)); }

stage() { # stage NAME MOST_SECONDS COMMAND...: its output goes to $out/NAME.log, its end to $out/stages.txt
  local name=$1 most=$2 start=$SECONDS rc=0
  shift 2
  [ "$(left)" -lt "$most" ] && most=$(left)
  if [ "$most" -le 5 ]; then
    echo "$name: no time left" | tee -a "$out/stages.txt"
    return 1
  fi
  timeout "$most" "$@" >"$out/$name.log" 2>&1 || rc=$?
  echo "$name: exit $rc after $((SECONDS - start)) s" | tee -a "$out/stages.txt"
  [ "$rc" -eq 0 ] || { tail -n 15 "$out/$name.log"; status=1; }
  return "$rc"
}

: >"$out/stages.txt"
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || {
  echo "no CUDA device that torch can use"
  exit 1
}
# torch brings a copy of the module `packaging`, which setup.py needs, where the machine has none.
if ! "$python" -c 'import packaging.version' 2>/dev/null; then
  mkdir -p "$out/modules"
  ln -sfn "$("$python" -c 'import torch._vendor.packaging as p; print(list(p.__path__)[0])')" "$out/modules/packaging"
  PYTHONPATH=$(realpath "$out/modules"):${PYTHONPATH:-}
fi
export PYTHONPATH=python:.:${PYTHONPATH:-} MTP_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=$capability MAX_JOBS=${MAX_JOBS:-$(nproc)}

stage build 150 "$python" setup.py build_ext --inplace || exit 1
stage checks 150 "$python" -m tests.gpu.run --out "$out/checks.json"
stage bench_row_pass 60 "$python" -m benchmarks.bench_row_pass --device cuda --rounds 20 --out "$out/row_pass.json"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    stage "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m tests.gpu.run --small --out "$out/$tool.json"
  done
else
  echo "compute-sanitizer: not on this machine" | tee -a "$out/stages.txt"
fi
stage bench_gpu_loss 400 "$python" -m benchmarks.bench_gpu_loss --device cuda --rounds 10 --out "$out/gpu_loss.json"
cat "$out/stages.txt"
exit "$status"
