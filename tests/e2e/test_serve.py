"""`vllm serve` as in the README, by Hub ids: completions, chat, streaming, metrics, and a clean end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
import readme

pytestmark = pytest.mark.timeout(280)

START_PATIENCE_S, PATIENCE_S = 240.0, 60.0
MODEL = "toy"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def serve_command() -> list[str]:
    """`vllm serve MODEL`; the console script needs metadata that not every environment has."""
    script = Path(sys.executable).with_name("vllm")
    with suppress(metadata.PackageNotFoundError):
        if metadata.version("vllm") and script.exists():
            return [str(script), "serve"]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.log = log
        self._url = f"http://127.0.0.1:{port}"

    def wait(self) -> None:
        deadline = time.monotonic() + START_PATIENCE_S
        while True:
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")[-4000:]
            assert time.monotonic() < deadline, self.log.read_text(encoding="utf-8")[-4000:]
            try:
                self.get("/health")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
            else:
                return

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self._url + path, timeout=60) as response:
            return response.read().decode()

    def post(self, path: str, **body: Any) -> str:
        data = json.dumps({"model": MODEL, "temperature": 0, **body}).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        lines = [
            line for line in self.get("/metrics").splitlines() if line.startswith((f"{name}{{", f"{name} "))
        ]
        assert lines, name
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def ssd_metrics(self) -> list[str]:
        lines = self.get("/metrics").splitlines()
        return [line for line in lines if line.startswith(("vllm:ssd", "vllm:spec"))]

    def drafts(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "vllm_ssd.draft" in child.cmdline()]


@pytest.fixture(scope="module")
def server(
    engines: Any, hub_pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    engines.close()
    port = free_port()
    log = tmp_path_factory.mktemp("serve") / "log"
    options = {
        "--served-model-name": MODEL,
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": "float32",
        "--max-model-len": "512",
        "--max-num-seqs": "8",
    }
    environment = dict(os.environ)
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # processes, as users have them
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *serve_command(),
                *readme.serve_words(*hub_pair),
                *(word for pair in options.items() for word in pair),
                "--enforce-eager",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    server = Server(process, port, log)
    try:
        server.wait()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def test_completions_and_streaming_agree(server: Server) -> None:
    asked = {"prompt": "Once upon a time", "max_tokens": 48, "ignore_eos": True}
    whole = json.loads(server.post("/v1/completions", **asked))
    assert whole["usage"]["completion_tokens"] == 48
    streamed = server.post("/v1/completions", **asked, stream=True)
    chunks = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: ")]
    assert chunks[-1] == "[DONE]"
    text = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks[:-1])
    assert text == whole["choices"][0]["text"]
    assert len(chunks) > 2


def test_chat_and_its_streaming_agree(server: Server) -> None:
    messages = [{"role": "user", "content": "Tell me a story."}]
    asked = {"messages": messages, "max_tokens": 32, "ignore_eos": True}
    whole = json.loads(server.post("/v1/chat/completions", **asked))
    streamed = server.post("/v1/chat/completions", **asked, stream=True)
    chunks = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: ")]
    deltas = [json.loads(chunk)["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert (
        "".join(delta.get("content") or "" for delta in deltas) == whole["choices"][0]["message"]["content"]
    )


def test_seeded_sampling(server: Server) -> None:
    """Three answers that differ, which the seed brings back, whatever is drafted for them."""
    asked = {"prompt": "Once", "max_tokens": 16, "temperature": 0.8, "top_p": 0.9, "n": 3, "ignore_eos": True}
    first, again, other = (
        [
            choice["text"]
            for choice in json.loads(server.post("/v1/completions", **asked, seed=seed))["choices"]
        ]
        for seed in (5, 5, 1000)
    )
    assert first == again
    assert len({*first, *other}) == 6


def test_metrics(server: Server) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not server.metric("vllm:ssd_cache_hits_total"):  # a busy machine may miss many rounds
        assert time.monotonic() < deadline, server.ssd_metrics()
        server.post("/v1/completions", prompt="Metrics", max_tokens=100, ignore_eos=True)
    assert server.metric("vllm:ssd_cache_lookups_total") > 0
    assert server.metric("vllm:ssd_draft_steps_total") > 0
    assert server.metric("vllm:spec_decode_num_drafts_total") > 0
    assert server.metric("vllm:spec_decode_num_draft_tokens_total") > 0
    assert server.metric("vllm:ssd_draft_restarts_total") == 0


def test_it_ends_cleanly(server: Server) -> None:
    """The last test with this server."""
    processes = [*psutil.Process(server.process.pid).children(recursive=True)]
    assert len(server.drafts()) == 1
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(120)
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
