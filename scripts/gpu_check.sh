#!/usr/bin/env bash
# What can be checked on a machine with one GPU, in two calls, each of which ends within ten minutes.
#
#   bash scripts/gpu_check.sh OUT           # at most 8 minutes: look-ups on the device, the kernels against their
#                                           # references, the draft's branches against a plain run, method ssd end to
#                                           # end under vLLM's V2 runner, the kernels' times, compute-sanitizer
#   bash scripts/gpu_check.sh OUT runner    # at most 9.5 minutes: all tests of the V2 runner, some dozen engines
#   bash scripts/gpu_check.sh OUT [runner] --dry-run    # anywhere: in Triton's interpreter, all but the device
#
# Needed there: vLLM 0.32, this package installed, pytest, pytest-timeout, hypothesis and rich. Without a network,
# `pip install --no-index --no-deps --no-build-isolation --target FOLDER .` with FOLDER on PYTHONPATH does as well.
#
# Out come OUT/gpu_check.json or OUT/gpu_check_runner.json, with a row for each step, and the steps' logs beside it in
# one archive. Both are written after each step, so that a call that is cut off leaves what it found.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${1:?usage: gpu_check.sh OUT [runner] [--dry-run]}
NAME=gpu_check IS_DRY=false DRY=()
for word in "${@:2}"; do
  case $word in
    runner) NAME=gpu_check_runner ;;
    --dry-run) IS_DRY=true DRY=(--dry-run) ;;
    *) echo "gpu_check.sh: unknown argument $word" >&2; exit 2 ;;
  esac
done
mkdir -p "$OUT"
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT

# Seconds for all of it. A dry run is an interpreter's: slower by far.
ALL=$([[ $NAME == gpu_check ]] && echo 480 || echo 560)
if $IS_DRY; then ALL=9000; fi

ROWS=() FAILED=false
run_step() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS state=ok
  shift 2
  if $IS_DRY; then limit=1500; fi
  if (( limit > ALL - SECONDS )); then limit=$((ALL - SECONDS)); fi
  if (( limit > 0 )); then
    # Interrupted, not killed: pytest then still says what has passed.
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$LOGS/$name.log" 2>&1
    case $? in
      0) ;;
      124 | 137) state="stopped after $limit s" ;;
      *) state=failed ;;
    esac
  else
    state="not begun"
    echo "no time was left" >"$LOGS/$name.log"
  fi
  if [[ $state != ok ]]; then FAILED=true; fi
  echo "$name: $state ($((SECONDS - began)) s): $(tail -n 1 "$LOGS/$name.log")"
  ROWS+=("{\"step\": \"$name\", \"state\": \"$state\", \"seconds\": $((SECONDS - began))}")
  tar -czf "$OUT/$NAME-logs.tar.gz" -C "$LOGS" .
  printf '{"dry_run": %s, "seconds": %d, "steps": [%s]}\n' "$IS_DRY" "$SECONDS" "$(IFS=,; echo "${ROWS[*]}")" \
    >"$OUT/$NAME.json"
}

run_tests() { # NAME SECONDS PYTEST_ARGUMENTS...
  # -P: the installed package, which holds the kernels too, and not the checkout's.
  run_step "$1" "$2" python3 -P -m pytest -v --junitxml="$LOGS/$1.xml" "${@:3}"
}

if [[ $NAME == gpu_check_runner ]]; then
  run_tests runner 560 tests/v2/test_v2_runner.py tests/v2/test_v2_exactness.py
else
  run_tests deferred 90 tests/v2/test_outcome_gpu.py tests/v2/test_deferred.py
  run_tests kernels 150 tests/v2/test_kernels.py
  run_tests draft 120 tests/v2/test_draft_on_device.py
  run_tests engines 150 tests/v2/test_v2_runner.py -k "speculation[2] or grammars"
  run_step bench 90 python3 scripts/gpu_bench.py --out "$OUT" --parts kernels "${DRY[@]}"
  if $IS_DRY; then
    run_step bench-rest 900 python3 scripts/gpu_bench.py --out "$OUT/rest" --parts verify,draft,end_to_end --dry-run
  elif command -v compute-sanitizer >/dev/null; then
    # Libraries probe the driver by calls that fail; only what kernels do is of interest.
    run_step sanitizer 120 compute-sanitizer --error-exitcode 9 --report-api-errors no \
      python3 scripts/gpu_bench.py --out "$LOGS" --dry-run --single '["kernels_one"]'
  else
    echo "skipped sanitizer: there is no compute-sanitizer here"
  fi
fi
cat "$OUT/$NAME.json"
! $FAILED
