#!/usr/bin/env bash
# Sets up everything, then checks style and types and runs all tests: unit tests first, then real vLLM.
#
#   bash scripts/test.sh                          # everything, as CI does
#   bash scripts/test.sh --fast                   # style, types and unit tests: before every commit
#   bash scripts/test.sh tests/unit -k fanout     # pytest alone, with these arguments

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/scripts/setup_env.sh"
cd "$ROOT"

# Tests start engines, servers and draft processes; whatever way this script ends, none of them stays.
trap stop_strays EXIT
trap 'exit 130' INT TERM HUP

FAILED=()

# check NAME COMMAND...: goes on after a failure, so that one run shows all that is wrong.
check_step() {
  local name=$1
  shift
  step "$name"
  "$@" || FAILED+=("$name")
}

# run_tests LIMIT_SECONDS PYTEST_ARGUMENTS...: the limit is far above what an idle machine needs, behind the limit of
# each test (pyproject.toml): no result may depend on how busy the machine is. pytest stops at it with its report of
# what failed so far; `timeout` is for a pytest that hangs itself.
# In the background, because bash runs a trap only between commands and `wait` can be interrupted.
run_tests() {
  local limit=$1 rc=0
  shift
  timeout --kill-after=20 $((limit + 600)) python -m pytest --session-timeout="$limit" "$@" &
  wait $! || rc=$?
  if (( rc == 124 || rc == 137 )); then echo "pytest hung and was ended" >&2; fi
  return "$rc"
}

# stage NAME LIMIT_SECONDS FOLDER PYTEST_ARGUMENTS...
stage() {
  local name=$1 limit=$2 folder=$3
  shift 3
  step "$name: $folder"
  run_tests "$limit" --durations=5 "$@" "$folder" || FAILED+=("$name")
  stop_strays
}

IS_FAST=0
if [[ ${1:-} == --fast && $# == 1 ]]; then
  IS_FAST=1
elif (( $# )); then
  run_tests 3600 "$@"
  exit
fi

check_step "style: ruff check" ruff check .
check_step "style: ruff format" ruff format --check --quiet .
check_step "types: mypy" mypy
# In all stages a module's tests stay together, for what they share is costly; each worker loads vLLM.
stage "unit tests" 900 tests/unit --numprocesses=auto --maxprocesses=8 --dist=loadscope
# The costly part, only on sound ground. Two engines side by side, each target on a core of its own (tests/conftest.py).
if (( ! IS_FAST && ! ${#FAILED[@]} )); then
  stage "tests with vLLM" 2700 tests/e2e --numprocesses=2 --dist=loadscope
  stage "tests with vLLM's V2 runner, interpreted" 2700 tests/v2 --numprocesses=2 --dist=loadscope
fi

if (( ${#FAILED[@]} )); then
  step "failed: $(printf '%s; ' "${FAILED[@]}")"
  exit 1
fi
