#!/usr/bin/env bash
# From a fresh clone to SSD at work: sets up everything, serves the demo models with method ssd, asks something,
# then compares plain decoding, draft_model and SSD. Safe to run again; ends within 12 minutes on two cores.
#
#   bash scripts/quickstart.sh
#
# What it makes lies in .demo/ (models, logs, figures) and .venv/.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/scripts/setup_env.sh"
cd "$ROOT"

DEMO=.demo
K=4
mkdir -p "$DEMO"

trap stop_strays EXIT
trap 'exit 130' INT TERM HUP

# logged LOG COMMAND...: runs it with its output in LOG; on failure shows the end of that.
# In the background, because bash runs a trap only between commands and `wait` can be interrupted.
logged() {
  local log=$1
  shift
  "$@" >"$log" 2>&1 &
  wait $! || show_and_fail "$log" "$1 $2 failed"
}

show_and_fail() {
  local log=$1
  shift
  echo "--- last 40 lines of $log ---" >&2
  tail -n 40 "$log" >&2 || true
  fail "$*"
}

# The models are current as long as the script that makes them has not changed.
make_models() {
  local stamp
  stamp=$({ cat scripts/make_demo_models.py; find scripts/demo -type f ! -name '*.pyc' -print0 | sort -z | xargs -0 cat; } |
    sha256sum | cut -d' ' -f1)
  if [[ -f $DEMO/models.stamp && $(<"$DEMO/models.stamp") == "$stamp" && -d $DEMO/target && -d $DEMO/draft ]]; then
    step "demo models: $DEMO/target and $DEMO/draft are current"
    return
  fi
  step "making the demo models (log: $DEMO/models.log)"
  logged "$DEMO/models.log" python scripts/make_demo_models.py --out "$DEMO"
  echo "$stamp" >"$DEMO/models.stamp"
}

serve_and_ask() {
  SSD_ELAPSED=$SECONDS python scripts/quickstart.py ask --target "$DEMO/target" --draft "$DEMO/draft" --k "$K" \
    --log "$DEMO/serve.log" --json "$DEMO/serve.json" &
  wait $! || show_and_fail "$DEMO/serve.log" "serving with method ssd failed"
}

# Ten minutes are never needed; the limit only keeps a hang from lasting for ever.
compare() {
  step "comparing plain decoding, draft_model and SSD at batch 1 and 4 (log: $DEMO/bench.log)"
  # pipefail makes the benchmark's exit status count.
  timeout --kill-after=20 600 python scripts/bench.py --target "$DEMO/target" --draft "$DEMO/draft" \
    --methods ar,draft_model,ssd --k "$K" --batch 1,4 --temperature 0 --out-tokens 128 --prompts "$DEMO/prompts.jsonl" \
    --engine-args '{"dtype":"float32"}' --json "$DEMO/bench.json" 2>"$DEMO/bench.log" &
  wait $! || show_and_fail "$DEMO/bench.log" "the benchmark failed"
}

make_models
serve_and_ask
compare
python scripts/quickstart.py summary --serve "$DEMO/serve.json" --bench "$DEMO/bench.json"
step "done"
