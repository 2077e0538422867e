#!/usr/bin/env bash
# Everything that only a GPU can tell, in at most nine minutes: builds for this device, runs the benchmarks and the checks
# of tests/gpu, the scarcest figures first, and last the short checks again under compute-sanitizer, and the peers. From a
# bare checkout with torch, nvcc, ninja and pybind11, without a network:
#   MTP_COMMIT=$(git rev-parse HEAD) MTP_DIRTY=0 OUT=results bash benchmarks/on_gpu.sh
# MTP_COMMIT and MTP_DIRTY (0: as committed, else changed) go into every result; a checkout with its .git needs neither.
# $OUT gets ten plain files and no link: log.txt (every stage under a heading, and how it ended) and the JSON of the checks
# and of each benchmark, rewritten as they grow, so that a run that is cut off leaves what it found. Exits with 1 if a stage
# failed or the checks did not end; a stage that the time does not suffice for is named.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-build/on_gpu} limit=${MTP_ON_GPU_SECONDS:-530} python=${PYTHON:-python3} status=0 ends=""
mkdir -p "$out"
log=$out/log.txt
: >"$log"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

note() { # into the log, onto the terminal, and into the summary at the end
  echo "$1" | tee -a "$log"
  ends+="$1"$'\n'
}

stage() { # stage NAME MOST_SECONDS COMMAND...: 0, the command's exit status, or 124 where the time did not suffice
  local name=$1 most=$2 start=$SECONDS left=$((limit - SECONDS)) rc=0
  shift 2
  [ "$left" -lt "$most" ] && most=$left
  if [ "$most" -le 5 ]; then
    note "$name: no time left"
    return 124
  fi
  printf '\n== %s, at most %d s: %s\n' "$name" "$most" "$*" >>"$log"
  timeout --kill-after=10 "$most" "$@" >>"$log" 2>&1 || rc=$?
  case $rc in
    0) note "$name: passed after $((SECONDS - start)) s" ;;
    124 | 137)
      note "$name: cut off after $((SECONDS - start)) s"
      rc=124
      ;;
    *)
      tail -n 15 "$log"
      note "$name: exit $rc after $((SECONDS - start)) s"
      status=1
      ;;
  esac
  return "$rc"
}

capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || {
  note "no CUDA device that torch can use"
  exit 1
}
# setup.py needs the module `packaging`. setuptools brings one from version 71 on; before that, torch's copy has to do. It
# has not all of the modules, so in front of setuptools' own it would break setuptools.
if ! "$python" -c 'import setuptools, packaging.version' 2>/dev/null; then
  ln -s "$("$python" -c 'import torch._vendor.packaging as p; print(list(p.__path__)[0])')" "$scratch/packaging"
  PYTHONPATH=$scratch:${PYTHONPATH:-}
fi
# torch looks for the toolkit's headers next to nvcc, where a wrapper script named nvcc has none.
if [ -z "${CUDA_HOME:-}" ] && command -v nvcc >/dev/null; then
  export CUDA_HOME
  CUDA_HOME=$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
  [ -d "$CUDA_HOME/include" ] || unset CUDA_HOME
fi
export PYTHONPATH=python:.:${PYTHONPATH:-} PYTHONUNBUFFERED=1 MTP_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=$capability
export MAX_JOBS=${MAX_JOBS:-$(nproc)}

# The scarcest figures first: after three minutes there are a smoke test, the row pass and the first cells of the loss. The
# caps up to the late checks add up to less than the limit; sanitizers and peers share what is left.
stage build 100 "$python" setup.py build_ext --inplace || exit 1
stage smoke 30 "$python" -m tests.gpu.run --parts smoke --out "$out/smoke.json" || status=1
stage row_pass 45 "$python" -m benchmarks.suites.row_pass --device cuda --rounds 20 --out "$out/row_pass.json"
stage gpu_loss 120 "$python" -m benchmarks.suites.gpu_loss --device cuda --rounds 10 --out "$out/gpu_loss.json"
stage gpu_profile 25 "$python" -m benchmarks.suites.gpu_profile --device cuda --out "$out/gpu_profile.json"
stage checks 70 "$python" -m tests.gpu.run --parts early --out "$out/checks.json" || status=1
stage gpu_heads 25 "$python" -m benchmarks.suites.gpu_heads --device cuda --rounds 10 --out "$out/gpu_heads.json"
stage step_memory 35 "$python" -m benchmarks.suites.step_memory --device cuda --rounds 10 --out "$out/step_memory.json"
stage checks_late 70 "$python" -m tests.gpu.run --parts late --out "$out/checks_late.json" || status=1
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    stage "$tool" 25 compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-regex kns=mtp \
      "$python" -m tests.gpu.run --small --parts early --out "$scratch/$tool.json"
  done
else
  note "compute-sanitizer: not on this machine"
fi
stage gpu_peers 40 "$python" -m benchmarks.suites.gpu_peers --device cuda --rounds 10 --out "$out/gpu_peers.json"
printf '\n== in short\n%s' "$ends" | tee -a "$log"
exit "$status"
