# shellcheck shell=bash
# Small shell functions that the scripts share. Source it; it runs nothing.

SECONDS=0

# step TEXT...: one plain line of progress with the seconds since the script began.
step() { printf '[%4ds] %s\n' "$SECONDS" "$*"; }

# fail TEXT...: one line that says what to do, then out.
fail() { printf '[%4ds] error: %s\n' "$SECONDS" "$*" >&2; exit 1; }

# Whatever a script starts, directly or not, inherits this mark in its environment. Engine and draft processes
# have process groups and parents of their own, so the mark is the one sure way to tell ours from other people's.
export SSD_RUN_MARK="ssd-$$-${RANDOM}${RANDOM}"

# With shell builtins alone: a grep would find itself.
marked_processes() {
  local environ entries
  for environ in /proc/[0-9]*/environ; do
    # Processes end while we look and not all may be read; neither is an error.
    { mapfile -d '' -t entries <"$environ"; } 2>/dev/null || continue
    if [[ " ${entries[*]} " == *" SSD_RUN_MARK=${SSD_RUN_MARK} "* ]]; then
      environ=${environ%/environ}
      echo "${environ#/proc/}"
    fi
  done
}

# stop_strays: ends what this script started and what is still there; nothing else.
stop_strays() {
  local signal pids i
  for signal in TERM KILL; do
    mapfile -t pids < <(marked_processes)
    (( ${#pids[@]} )) || return 0
    kill -s "$signal" "${pids[@]}" 2>/dev/null || true
    for ((i = 0; i < 10; i++)); do
      sleep 0.5
      mapfile -t pids < <(marked_processes)
      (( ${#pids[@]} )) || return 0
    done
  done
}
