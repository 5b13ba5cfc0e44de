"""The parts of scripts/quickstart.sh that talk to vLLM: serve and ask, and the summary at the end."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
from demo.text import document_chain
from prometheus_client.parser import text_string_to_metric_families

MODEL_NAME = "demo"
BEGAN = time.monotonic()


class QuickstartError(Exception):
    """Something that ends the quickstart, in one line for the user."""


def step(text: str) -> None:
    """Print one line of progress, in the form of scripts/common.sh."""
    print(f"[{int(os.environ.get('SSD_ELAPSED', '0')) + time.monotonic() - BEGAN:4.0f}s] {text}", flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve_command(args: argparse.Namespace, port: int) -> list[str]:
    """What a user would type, with settings that suit two cores and a small model."""
    speculation = {"method": args.method, "model": args.draft, "num_speculative_tokens": args.k}
    return [
        *(str(Path(sys.executable).with_name("vllm")), "serve", args.target),
        *("--speculative-config", json.dumps(speculation)),
        *("--served-model-name", MODEL_NAME),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"),
    ]


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and wait until nothing of its process group, which it alone started, is left.

    The server is asked first and alone, so that it can end its engine and the draft in good order.
    """
    for send, wish, patience_s in (
        (os.kill, signal.SIGTERM, 30.0),
        (os.killpg, signal.SIGTERM, 5.0),
        (os.killpg, signal.SIGKILL, 5.0),
    ):
        with contextlib.suppress(ProcessLookupError):
            send(server.pid, wish)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            server.poll()
            if not group_is_alive(server.pid):
                return
            time.sleep(0.2)


@contextlib.contextmanager
def serving(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server, for as long as the block runs; it is stopped however the block ends."""
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield server
    finally:
        if server.poll() is None:
            step("stopping the server")
        stop(server)


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return str(reply.read().decode())


def wait_until_ready(server: subprocess.Popen[bytes], address: str, deadline_s: float) -> None:
    """Wait for /health, telling every 15 s that we do."""
    began = told = time.monotonic()
    while time.monotonic() - began < deadline_s:
        if server.poll() is not None:
            raise QuickstartError(f"the server ended by itself with exit code {server.returncode}")
        try:
            fetch(f"{address}/health")
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        if time.monotonic() - told >= 15:
            told = time.monotonic()
            step(f"    waiting for the server, {told - began:.0f} of at most {deadline_s:.0f} s")
    raise QuickstartError(f"the server was not ready within {deadline_s:.0f} s")


def opening() -> str:
    """The first line of a text of the kind that the demo models write, long, and unseen by them."""
    text = next(text for text in document_chain("held out/quickstart") if len(text) > 1500)
    return text.splitlines()[0] + "\n"


def stream_completion(address: str, max_tokens: int) -> tuple[int, float]:
    """Print the text of one completion as it comes; return its tokens and the seconds that they took."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120, max_retries=0)
    prompt = opening()
    print(f"\n{prompt}", end="", flush=True)
    began, tokens, written = time.monotonic(), 0, 0
    for chunk in client.completions.create(
        model=MODEL_NAME,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        for choice in chunk.choices:
            print(choice.text, end="", flush=True)
            written += len(choice.text)
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
    print("\n", flush=True)
    if not written:
        raise QuickstartError("the server answered with an empty text")
    return tokens, time.monotonic() - began


def read_counters(address: str) -> dict[str, float]:
    """The sum over all labels of each counter that /metrics shows."""
    totals: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(fetch(f"{address}/metrics")):
        for sample in family.samples:
            totals[sample.name] += sample.value
    return dict(totals)


def figures(counters: dict[str, float], k: int) -> dict[str, float]:
    """What the counters say of speculation; a figure that they do not tell is left out."""
    rounds = counters.get("vllm:spec_decode_num_drafts_total", 0)
    drafted = counters.get("vllm:spec_decode_num_draft_tokens_total", 0)
    accepted = counters.get("vllm:spec_decode_num_accepted_tokens_total", 0)
    lookups = counters.get("vllm:ssd_cache_lookups_total", 0)
    found: dict[str, float] = {"k": k, "rounds": rounds, "drafted": drafted, "accepted": accepted}
    if rounds:
        found["tokens_per_round"] = 1 + accepted / rounds
    if drafted:
        found["acceptance"] = accepted / drafted
    if lookups:
        found["lookups"] = lookups
        found["hit_rate"] = counters.get("vllm:ssd_cache_hits_total", 0) / lookups
    return found


def describe(found: dict[str, float]) -> str:
    parts = []
    if "acceptance" in found:
        parts.append(f"{found['acceptance']:.0%} of the drafted tokens accepted")
        parts.append(f"{found['tokens_per_round']:.2f} tokens a round")
    if "hit_rate" in found:
        parts.append(f"outcome cache hit in {found['hit_rate']:.0%} of {found['lookups']:.0f} look-ups")
    return ", ".join(parts)


def ask(args: argparse.Namespace) -> None:
    """Serve, stream one completion, read the figures, stop the server."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = serve_command(args, port)
    step(f"starting: vllm {' '.join(command[1:5])} ... (log: {args.log})")
    with serving(command, args.log) as server:
        wait_until_ready(server, address, args.deadline)
        step("the server is ready; one completion, streamed by the OpenAI client:")
        tokens, seconds = stream_completion(address, args.out_tokens)
        found = figures(read_counters(address), args.k)
        found |= {"tokens": tokens, "seconds": seconds}
    if not found["drafted"]:
        raise QuickstartError("the server answered, but nothing was ever drafted")
    step(f"{tokens} tokens in {seconds:.1f} s: {describe(found)}")
    args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def speeds(rows: list[dict[str, Any]]) -> dict[int, dict[str, dict[str, Any]]]:
    """Batch size -> method -> row of the benchmark, of all kinds of prompts together."""
    table: defaultdict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["category"] != "all":
            continue
        table[int(row["batch"])][str(row["method"])] = row
    return dict(sorted(table.items()))


def summary(args: argparse.Namespace) -> None:
    """Five to eight plain lines: what was seen, and how to continue."""
    found: dict[str, float] = json.loads(args.serve.read_text(encoding="utf-8"))
    report: dict[str, Any] = json.loads(args.bench.read_text(encoding="utf-8"))
    print("\nSummary")
    print(f"  served with SSD, K={found['k']:.0f}: {describe(found)}")
    for batch, methods in speeds(report["rows"]).items():
        if "ssd" not in methods:
            continue
        ssd = methods["ssd"]
        # The benchmark's own ratios, taken repeat by repeat, so that they are those of its table.
        against = [
            f"{ssd[field]:.2f}x {label}"
            for field, label in (
                ("speedup_vs_ar", "plain decoding"),
                ("speedup_vs_draft_model_best_k", "draft_model"),
            )
            if ssd.get(field)
        ]
        print(f"  batch {batch}: SSD makes {ssd['tok_s']:.0f} tokens/s: {' and '.join(against)}")
    print(f"  figures: {args.serve}, {args.bench}; logs beside them")
    print("  serve your own pair (after `source .venv/bin/activate`):")
    print(
        "    vllm serve TARGET --speculative-config "
        '\'{"method":"ssd","model":"DRAFT","num_speculative_tokens":4}\''
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    asking = commands.add_parser("ask", help=ask.__doc__)
    asking.add_argument("--target", required=True)
    asking.add_argument("--draft", required=True)
    asking.add_argument("--method", default="ssd")
    asking.add_argument("--k", type=int, default=4)
    asking.add_argument("--out-tokens", type=int, default=160)
    asking.add_argument("--deadline", type=float, default=300, help="seconds until the server must be ready")
    asking.add_argument("--log", type=Path, required=True)
    asking.add_argument("--json", type=Path, required=True)
    asking.set_defaults(run=ask)
    closing = commands.add_parser("summary", help=summary.__doc__)
    closing.add_argument("--serve", type=Path, required=True)
    closing.add_argument("--bench", type=Path, required=True)
    closing.set_defaults(run=summary)
    return parser.parse_args()


def main() -> int:
    # So that `finally` runs and the server is stopped when somebody ends us.
    for wish in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(wish, lambda number, _frame: sys.exit(128 + number))
    args = parse_arguments()
    try:
        args.run(args)
    except (QuickstartError, openai.OpenAIError, OSError) as error:
        step(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
