"""Ten well-behaved streams beside a client that sends the worst requests of all: none of it may reach them.

    soak.py                                   the demo pair, made larger; 3 minutes; exit code 1 on a failure
    soak.py --target DIR --draft DIR --minutes 30 --json FILE
    soak.py --only "huge top_k" --minutes 0.5       narrow a failure down
    soak.py --method draft_model                    what stock vLLM does with the same requests

One `vllm serve`, two phases. Alone: the streams beside as many harmless requests at once as there will be
hostile ones, since a larger batch alone costs hits. Beside: the same streams beside the hostile requests.
scripts/soak_requests.py has all of them.

Hit rate: of the streams' own requests, by vLLM's --per-request-spec-decode-metrics. A request's rounds are
its output tokens less those that were accepted drafts, less the one of the prefill; its hits are the rounds
that verified drafts. With ssd_backup "none" only a hit of the outcome cache gives a round drafts. (Drafts
accepted beyond a request's last token make its rounds K too few at most, in both phases alike.)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import aiohttp
import psutil
import torch
from arguments import parse_number, parse_object
from demo.grown import write_grown
from demo.nested import parse_shape
from harness import ENGINE_ENVIRONMENT, exit_on_signals
from prometheus_client.parser import text_string_to_metric_families
from provenance import describe_run, write_json
from quickstart import MODEL_NAME, QuickstartError, free_port, serving, step, wait_until_ready
from soak_requests import (
    DRAFT_MAX_MODEL_LEN,
    HARMLESS,
    HOSTILE,
    MAX_MODEL_LEN,
    STREAMS,
    Request,
    deal,
    good_requests,
)
from soak_verdict import Phase, Verdict, judge, read_answer

# The default pair's target is slow enough for a draft that shares its core with the server and this client.
SHAPES = {
    "target": "layers=28,hidden=384,intermediate=1056,heads=6,kv_heads=3",
    "draft": "layers=3,hidden=128,intermediate=352,heads=2,kv_heads=1",
}
MAX_NUM_SEQS = 16
KV_BLOCKS, BLOCK_SIZE = 64, 32  # 2,048 tokens for 16 requests: there are preemptions
HOSTILE_AT_ONCE = 6
PAUSE_S = 0.05  # between two requests of a hostile worker: many are refused at once, and this is no load test
PATIENCE_S = 120.0  # for one answer
SSD_OPTIONS = {
    "ssd_branch_budget": 4,
    "ssd_max_rows": 4 * MAX_NUM_SEQS,  # other requests' branches cost the streams none
    "ssd_draft_memory": 0.25,
    # So that hits and stalls depend on what is predicted and done, and not on how busy the machine is:
    "ssd_wait_ms": 200,
    "ssd_stall_timeout": 10,
    "ssd_prefill_chunk": 64,
}
# Counters that must not move: the last two count exceptions that were contained.
WATCHED = tuple(
    f"vllm:ssd_{name}_total" for name in ("draft_restarts", "draft_stalls", "failures", "draft_dropped")
)


class Client:
    """Sends to one server, and watches its processes."""

    def __init__(self, session: aiohttp.ClientSession, server: psutil.Process) -> None:
        self._session = session
        self._server = server
        self._watched = self._processes()  # the frontend, engine, workers and the draft, by id
        self._counted: Counter[str] = Counter()
        self._in_flight: Counter[str] = Counter()
        self._recent: set[str] = set()  # kinds that were in flight since the last look

    async def run(self, seconds: float, others: Iterator[tuple[str, list[Request]]]) -> Phase:
        """One phase: ten streams beside `HOSTILE_AT_ONCE` of `others` at a time."""
        phase = Phase()
        await self._look(phase)
        before, until = self._counted, time.monotonic() + seconds
        await asyncio.gather(
            self._watch(phase, until),
            *(self._stream(phase, stream, until) for stream in range(STREAMS)),
            *(self._send_others(phase, others, until) for _ in range(HOSTILE_AT_ONCE)),
        )
        await self._look(phase)
        totals = {name: value for name, value in self._counted.items() if name.endswith("_total")}
        phase.counted = {name: value - before[name] for name, value in totals.items()}
        return phase

    async def _stream(self, phase: Phase, stream: int, until: float) -> None:
        """Each of a stream's prompts once at least, then on until the time is over."""
        mine = [item for item in good_requests().items() if item[0].startswith(f"{stream}.")]
        sent = 0
        while sent < len(mine) or time.monotonic() < until:
            name, request = mine[sent % len(mine)]
            sent += 1
            status, body = await self._send(request)
            try:
                if status != "200":
                    raise ValueError(f"{status} {body[:200]}")
                phase.answers[name].append(read_answer(body))
            except ValueError as error:
                phase.failures.append(f"{name}: {error}")
                await asyncio.sleep(1)

    async def _send_others(
        self, phase: Phase, others: Iterator[tuple[str, list[Request]]], until: float
    ) -> None:
        while time.monotonic() < until:
            kind, requests = next(others)
            self._in_flight[kind] += 1
            self._recent.add(kind)
            for status, body in await asyncio.gather(*map(self._send, requests)):
                phase.statuses[kind][status] += 1
                phase.replies.setdefault(f"{kind}: {status}", body[:300])
            self._in_flight[kind] -= 1
            await asyncio.sleep(PAUSE_S)

    async def _send(self, request: Request) -> tuple[str, str]:
        """Status, or what came in its place, and body; a server's error inside a stream is a status too."""
        headers = {"Content-Type": "application/json", **request.headers}
        try:
            async with (
                asyncio.timeout(request.hang_up_s or PATIENCE_S),
                self._session.post(request.path, data=request.body, headers=headers) as reply,
            ):
                body = (await reply.read()).decode(errors="replace")
                inside = re.search(r'"error":\s*{[^{}]*"code":\s*(5\d\d)', body)
                return inside[1] if inside else str(reply.status), body
        except TimeoutError:
            return ("no answer" if request.hang_up_s is None else "hung up"), ""
        except aiohttp.ClientError as error:
            return type(error).__name__, ""

    async def _watch(self, phase: Phase, until: float) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(1)
            await self._look(phase)

    def _processes(self) -> dict[int, str]:
        found = {}
        with suppress(psutil.NoSuchProcess):
            for process in [self._server, *self._server.children(recursive=True)]:
                if process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = " ".join(process.cmdline())[-60:]
        return found

    async def _look(self, phase: Phase) -> None:
        """Note what died or was counted since the last look."""
        in_flight = f" (in flight: {', '.join(sorted(self._recent))})"
        self._recent = {kind for kind, count in self._in_flight.items() if count}
        alive = self._processes()
        for pid in self._watched.keys() - alive.keys():
            phase.events.append(f"process {pid} died: {self._watched.pop(pid)}{in_flight}")
        counted: Counter[str] = Counter()
        try:
            async with self._session.get("/metrics") as reply:
                text = await reply.text()
        except aiohttp.ClientError as error:
            phase.events.append(f"no metrics: {type(error).__name__}")
            return
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                counted[sample.name] += sample.value
        for name in WATCHED if self._counted else ():
            if counted[name] != self._counted[name]:
                phase.events.append(f"{name}: {self._counted[name]:g} to {counted[name]:g}{in_flight}")
        phase.running.append(counted["vllm:num_requests_running"])
        self._counted = counted


def serve_command(args: argparse.Namespace, port: int) -> list[str]:
    """Within what the requests are made for; see the constants."""
    speculation = {
        "method": args.method,
        "model": args.draft,
        "num_speculative_tokens": args.k,
        "max_model_len": DRAFT_MAX_MODEL_LEN,
        **(SSD_OPTIONS | args.ssd if args.method == "ssd" else {}),
    }
    thinking = {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}
    return [
        *(str(Path(sys.executable).with_name("vllm")), "serve", args.target),
        *("--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN)),
        *("--max-num-seqs", str(MAX_NUM_SEQS), "--max-num-batched-tokens", str(MAX_MODEL_LEN)),
        *("--num-gpu-blocks-override", str(KV_BLOCKS), "--block-size", str(BLOCK_SIZE)),
        *("--speculative-config", json.dumps(speculation), "--reasoning-config", json.dumps(thinking)),
        *("--per-request-spec-decode-metrics", "summary", "--enable-scale-out"),
        *("--enable-request-id-headers", "--disable-uvicorn-access-log"),
    ]


async def run(args: argparse.Namespace, address: str, server: psutil.Process) -> tuple[Phase, Phase]:
    """Both phases."""
    vocab_size = json.loads(Path(args.target, "config.json").read_text(encoding="utf-8"))["vocab_size"]
    hostile = {name: HOSTILE[name] for name in args.only or HOSTILE}
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # a kept one may close under a request
    async with aiohttp.ClientSession(address, connector=connector) as session:
        client = Client(session, server)
        step("the streams beside harmless requests, unmeasured")
        await client.run(args.lead_in, deal(HARMLESS, args.seed, vocab_size))
        step("the streams beside harmless requests")
        alone = await client.run(args.alone, deal(HARMLESS, args.seed + 1, vocab_size))
        step("the streams beside hostile requests")
        return alone, await client.run(60 * args.minutes, deal(hostile, args.seed, vocab_size))


def show(alone: Phase, beside: Phase, verdicts: list[Verdict]) -> None:
    """The statuses of each kind of request, and the verdicts."""
    for kind, counts in sorted(beside.statuses.items()):
        print(f"  {kind:26}", ", ".join(f"{count} x {status}" for status, count in sorted(counts.items())))
    for name, phase in ("alone", alone), ("beside", beside):
        running = sum(phase.running) / max(1, len(phase.running))
        preempted = phase.counted.get("vllm:num_preemptions_total", 0)
        print(f"{name:7}{phase.num_answers} answers, batches of {running:.1f}, {preempted:g} preemptions")
    for verdict in verdicts:
        print(f"{'passed' if verdict.passed else 'FAILED'} {verdict.what} {verdict.detail}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", help="folder; with --draft")
    parser.add_argument("--draft", help="folder; both with 512 positions at least")
    parser.add_argument("--method", default="ssd", help="ssd, or draft_model to compare with")
    parser.add_argument("--k", type=parse_number, default=3)
    parser.add_argument("--ssd", type=parse_object, default={}, help="further SSD options, as JSON")
    parser.add_argument("--minutes", type=float, default=3, help="beside hostile requests")
    parser.add_argument("--alone", type=float, default=90, help="seconds beside harmless requests")
    parser.add_argument("--lead-in", type=float, default=10, help="such seconds before, unmeasured")
    parser.add_argument("--seed", type=int, default=0, help="of the hostile requests")
    parser.add_argument(
        "--only", action="append", choices=HOSTILE, metavar="KIND", help="hostile ones to send"
    )
    parser.add_argument("--log", type=Path, default=Path("soak.log"), help="what the server prints")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if (args.target is None) != (args.draft is None):
        parser.error("--target and --draft go together")
    return args


def main() -> int:
    exit_on_signals()
    args = parse_arguments()
    os.environ.update(ENGINE_ENVIRONMENT)
    del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]  # processes, as users have them
    with tempfile.TemporaryDirectory(prefix="ssd-soak-") as folder:
        if args.target is None:
            args.target, args.draft = f"{folder}/target", f"{folder}/draft"
            for name, shape in SHAPES.items():
                write_grown(Path(folder, name), name, parse_shape(shape), 0, torch.float32)
        port = free_port()
        address = f"http://127.0.0.1:{port}"
        with serving(serve_command(args, port), args.log) as server:
            try:
                wait_until_ready(server, address, 300)
            except QuickstartError as error:
                print(f"error: {error}; see {args.log}", file=sys.stderr)
                return 1
            alone, beside = asyncio.run(run(args, address, psutil.Process(server.pid)))
    verdicts = judge(alone, beside)
    show(alone, beside, verdicts)
    if args.json:
        report = json.dumps({"verdicts": verdicts, "alone": alone, "beside": beside}, default=vars)
        write_json(args.json, describe_run() | json.loads(report))
    return 0 if all(verdict.passed for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
