#!/usr/bin/env bash
# All that can be checked on a machine with one GPU, in under 8 minutes: the kernels against their references, the draft's
# branches against a plain run, method ssd end to end under vLLM's V2 runner, compute-sanitizer on the kernels, and the
# kernels' times.
#
#   bash scripts/gpu_check.sh OUT             # on the machine with the GPU; results go to OUT
#   bash scripts/gpu_check.sh OUT --dry-run   # anywhere: the same steps in Triton's interpreter, all but the device
#   bash scripts/gpu_check.sh DIR --carry     # on a machine with a registry: fetch into DIR what a bare machine lacks
#
# On a machine without a network, vLLM comes first (a payload that sets VLLM_SITE's environment); pytest and
# hypothesis come from the folder that --carry filled, named in GPU_CHECK_WHEELS.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${1:?usage: gpu_check.sh OUT [--dry-run | --carry]}
MODE=${2:-}
mkdir -p "$OUT"

if [[ $MODE == --carry ]]; then
  exec python3 -m pip download -q --only-binary=:all: --python-version 3.12 -d "$OUT" \
    pytest pytest-timeout hypothesis rich
fi

DRY=()
SITE_ENV=${VLLM_SITE:-/tmp/vllm_site}.env
if [[ $MODE == --dry-run ]]; then
  DRY=(--dry-run)
elif [[ -e $SITE_ENV ]]; then
  # shellcheck disable=SC1090
  source "$SITE_ENV"
  PLUGIN=/tmp/vllm_ssd_site
  rm -rf "$PLUGIN" vllm_ssd/kernels
  python3 -m pip install -q --no-index --no-deps --no-build-isolation --target "$PLUGIN" .
  if [[ -n ${GPU_CHECK_WHEELS:-} ]]; then
    python3 -m pip install -q --no-index --find-links "$GPU_CHECK_WHEELS" --target "$PLUGIN" \
      pytest pytest-timeout hypothesis rich
  fi
  # pytest takes the package from the checkout, where the kernels do not lie inside.
  ln -s ../kernels vllm_ssd/kernels
  export PYTHONPATH="$PLUGIN:$PYTHONPATH"
fi

FAILED=()
run_step() { # NAME SECONDS COMMAND...: its output goes to OUT/NAME.log
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  if (( limit > ALL - SECONDS )); then limit=$(( ALL > SECONDS ? ALL - SECONDS : 1 )); fi
  if timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1; then
    echo "ok      $name ($((SECONDS - began)) s): $(tail -n 1 "$OUT/$name.log")"
  else
    echo "failed  $name ($((SECONDS - began)) s): $(tail -n 1 "$OUT/$name.log")"
    FAILED+=("$name")
  fi
}

# A dry run is an interpreter's: slower by far, and tests/v2 runs in CI anyway. A GPU machine ends a call after ten
# minutes, and with it what comes back.
LIMIT=$([[ $MODE == --dry-run ]] && echo 1500 || echo 120)
ALL=$([[ $MODE == --dry-run ]] && echo 9000 || echo 480)
run_step kernels "$LIMIT" python3 -m pytest -q --junitxml="$OUT/kernels.xml" tests/v2/test_kernels.py
run_step draft "$LIMIT" python3 -m pytest -q --junitxml="$OUT/draft.xml" tests/v2/test_draft_on_device.py
run_step runner "$LIMIT" python3 -m pytest -q --junitxml="$OUT/runner.xml" \
  tests/v2/test_v2_runner.py tests/v2/test_deferred.py
run_step bench "$LIMIT" python3 scripts/gpu_bench.py --out "$OUT" --parts kernels "${DRY[@]}"
if [[ $MODE == --dry-run ]]; then
  run_step bench-rest 900 python3 scripts/gpu_bench.py --out "$OUT/rest" --parts verify,draft,end_to_end --dry-run
elif command -v compute-sanitizer >/dev/null; then
  run_step sanitizer "$LIMIT" compute-sanitizer --error-exitcode 9 \
    python3 scripts/gpu_bench.py --out "$OUT/sanitizer" --dry-run --single '["kernels_one"]'
else
  echo "skipped sanitizer: there is no compute-sanitizer here"
fi

printf '{"dry_run": %s, "seconds": %d, "failed": [%s]}\n' \
  "$([[ $MODE == --dry-run ]] && echo true || echo false)" "$SECONDS" \
  "$(printf '"%s",' "${FAILED[@]}" | sed 's/^"",$//; s/,$//')" >"$OUT/gpu_check.json"
cat "$OUT/gpu_check.json"
(( ! ${#FAILED[@]} ))
