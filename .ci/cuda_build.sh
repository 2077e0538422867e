#!/usr/bin/env bash
# Builds the extension with CUDA on a machine without a GPU, and imports it: the compile, the link and the registrations
# are checked, nothing runs on a device. The environment (torch's CUDA build, about 6 GB) is kept between calls in
# MTP_CI_CUDA_CACHE. Exits 0 with the reason when the machine cannot do it; MTP_CI_CUDA=0 skips it, MTP_CI_CUDA_TORCH is
# the version of torch.
set -euo pipefail
cd "$(dirname "$0")/.."
tree=$PWD

torch=${MTP_CI_CUDA_TORCH:-2.14.1} cuda_major=13 need_gb=20
cache=${MTP_CI_CUDA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mtp_ext/cuda-$torch}
skip() { echo "CUDA build skipped: $1"; exit 0; }

[ "${MTP_CI_CUDA:-1}" != 0 ] || skip "MTP_CI_CUDA=0"
compgen -G "csrc/kernels/*.cu" >/dev/null || skip "csrc/kernels has no .cu file"
command -v nvcc >/dev/null || skip "no nvcc on PATH"
nvcc --version | grep -q "release $cuda_major\." || skip "nvcc is not of CUDA $cuda_major, which torch $torch is built with"

if [ ! -e "$cache/ready" ]; then
  mkdir -p "$cache"
  free_gb=$(($(df -Pk "$cache" | awk 'NR == 2 {print $4}') / 1048576))
  [ "$free_gb" -ge "$need_gb" ] || skip "$free_gb GB free under $cache, $need_gb needed"
  echo "Installing torch $torch with CUDA into $cache"
  python3 -m venv --clear "$cache/venv"
  "$cache/venv/bin/pip" install -q --disable-pip-version-check "torch==$torch" numpy setuptools ninja packaging pybind11 \
    >"$cache/install.log" 2>&1 || skip "torch $torch could not be installed (see $cache/install.log)"
  touch "$cache/ready"
fi
python=$cache/venv/bin/python
[ "$("$python" -c 'import torch; print(bool(torch.version.cuda))')" = True ] || skip "the installed torch $torch has no CUDA"

# A copy: the CUDA module must not replace the one in the tree. cp -a keeps times, so ninja rebuilds only what changed.
rm -rf "$cache/src/csrc" "$cache/src/python"
mkdir -p "$cache/src"
cp -a setup.py pyproject.toml cmake csrc python "$cache/src"
rm -f "$cache"/src/python/mtp_ext/_C*.so
cd "$cache/src"

CUDA_HOME=$(echo | nvcc --dryrun -x cu - 2>&1 | sed -n 's/^#\$ TOP=//p')  # the toolkit, also behind a wrapper script
headers=$("$python" -c 'import nvidia; print(list(nvidia.__path__)[0])')/cu$cuda_major/include  # cuBLAS and its like
export CUDA_HOME MTP_EXT_CUDA=1 CPATH="$headers${CPATH:+:$CPATH}" PYTHONPATH=python
"$python" setup.py build_ext --inplace >"$cache/build.log" 2>&1 || { cat "$cache/build.log" >&2; exit 1; }
"$python" - <<'EOF'
import torch

import mtp_ext
from mtp_ext import _C

assert _C.build_info()["cuda"] is True, _C.build_info()
ops = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("mtp_ext::_")]
cuda = [name for name in ops if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")]
assert cuda, f"none of {ops} has a CUDA kernel"
print(f"CUDA build: torch {torch.__version__}, {len(cuda)} of {len(ops)} operators have a CUDA kernel, import works")
EOF
"$python" "$tree/.ci/trace_cuda.py"
