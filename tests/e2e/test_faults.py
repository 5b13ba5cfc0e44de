"""A killed, stopped or absent draft: every request is answered as without speculation, and hits come back."""

from __future__ import annotations

import logging
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from engines import Engines, generate, greedy_params, is_running, ssd, stats

from vllm_ssd.link.counters import Counters
from vllm_ssd.link.messages import Configure, Sampling
from vllm_ssd.link.outcome_cache import OutcomeCache
from vllm_ssd.target import supervisor
from vllm_ssd.target.launch import DraftProcess
from vllm_ssd.target.proposer import Proposer
from vllm_ssd.target.supervisor import DraftSupervisor

pytestmark = pytest.mark.timeout(280)

NUM_TOKENS = 32
PATIENCE_S = 150.0  # for what is only a matter of time; nothing is asserted about how long it took


def prompts() -> list[list[int]]:
    rng = random.Random(21)
    return [[rng.randrange(2, 512) for _ in range(rng.randint(1, 90))] for _ in range(6)]


class Messages(logging.Handler):
    """What SSD says in the log."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def count(self, part: str) -> int:
        return sum(part in text for text in self.texts)


@pytest.fixture
def log() -> Iterator[Messages]:
    handler = Messages()
    logger = logging.getLogger("vllm.ssd")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


class Serving:
    """An engine with SSD whose every answer is compared with that without drafts."""

    def __init__(self, llm: Any, expected: list[list[int]]) -> None:
        self.llm = llm
        self.expected = expected

    def answer(self, after_steps: Callable[[], None] | None = None) -> None:
        """Answer all prompts at once; `after_steps` is called amid them."""
        from vllm.inputs import TokensPrompt

        if after_steps is None:
            assert generate(self.llm, prompts(), greedy_params(NUM_TOKENS)) == self.expected
            return
        engine = self.llm.llm_engine
        for index, prompt in enumerate(prompts()):
            engine.add_request(str(index), TokensPrompt(prompt_token_ids=prompt), greedy_params(NUM_TOKENS))
        answers: dict[int, list[int]] = {}
        steps = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    answers[int(output.request_id.split("-")[0])] = list(output.outputs[0].token_ids)
            steps += 1
            if steps == 5:
                after_steps()
        assert [answers[index] for index in range(len(prompts()))] == self.expected

    def answer_until(self, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Answer again and again, until the counters say so."""
        deadline = time.monotonic() + PATIENCE_S
        while not done(counted := stats(self.llm)):
            assert time.monotonic() < deadline, counted
            self.answer()
        return counted

    def wait_for_hits(self) -> None:
        before = stats(self.llm)["hits"]
        self.answer_until(lambda counted: counted["hits"] > before)

    @property
    def pid(self) -> int:
        return stats(self.llm)["draft"]["pid"]


@pytest.fixture(scope="module")
def serving(engines: Engines, pair: tuple[Path, Path]) -> Serving:
    llm = engines.get(pair[0], ssd(pair[1], 4, ssd_stall_timeout=1.0, ssd_backup="draft"))
    llm.collective_rpc("ssd_plan", args=(0,))  # without drafts; test_lossless.py compares with stock vLLM
    expected = generate(llm, prompts(), greedy_params(NUM_TOKENS))
    llm.collective_rpc("ssd_plan")
    serving = Serving(llm, expected)
    serving.answer()
    serving.wait_for_hits()
    return serving


def test_stopped_and_continued(serving: Serving, log: Messages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "KILL_AFTER_STALLS", math.inf)  # however long the answers take
    stalls = stats(serving.llm)["draft_stalls"]
    pid = serving.pid
    serving.answer(after_steps=lambda: os.kill(pid, signal.SIGSTOP))
    serving.answer_until(lambda counted: counted["draft_stalls"] > stalls)
    undrafted = stats(serving.llm)["undrafted"]
    serving.answer()
    serving.answer()
    counted = stats(serving.llm)
    assert counted["undrafted"] > undrafted
    assert counted["draft_stalls"] == stalls + 1
    assert log.count("stalled") == 1
    os.kill(pid, signal.SIGCONT)
    serving.answer_until(lambda counted: counted["draft"]["state"] == "ready")
    serving.wait_for_hits()
    assert log.count("answers again") >= 1  # a busy machine may let it stall once more
    assert serving.pid == pid


def test_killed(serving: Serving, log: Messages) -> None:
    pid = serving.pid
    restarts = stats(serving.llm)["draft_restarts"]
    serving.answer(after_steps=lambda: os.kill(pid, signal.SIGKILL))
    serving.answer_until(lambda counted: counted["draft_restarts"] > restarts)
    assert log.count("starting it again") == 1
    serving.answer_until(lambda counted: counted["draft"]["state"] == "ready")
    assert serving.pid != pid
    serving.wait_for_hits()
    assert log.count("starting it again") == 1
    assert stats(serving.llm)["draft_restarts"] == restarts + 1


def test_nothing_of_ours_has_a_name(serving: Serving) -> None:
    """No file and no folder: whatever kills whom leaves nothing, and no cleaner removes what is in use."""
    draft = psutil.Process(serving.pid)
    ours = {file for file in (*files_of(draft), *files_of(psutil.Process())) if "ssd" in Path(file).name}
    assert {file.removesuffix(" (deleted)") for file in ours} == {"/memfd:vllm-ssd"}
    places = ("/dev/shm/", tempfile.gettempdir())
    installed = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]))  # which may lie there, too
    named = {file for file in files_of(draft) if file.startswith(places) and not file.startswith(installed)}
    assert not [file for file in named if Path(file).exists() and not file.endswith(".safetensors")]


def files_of(process: psutil.Process) -> list[str]:
    """What a process has opened or mapped."""
    return [*(file.path for file in process.open_files()), *(area.path for area in process.memory_maps())]


class Sleeper(DraftProcess):
    """In place of a draft: lives, and never becomes ready."""

    def __init__(self, configure: Configure) -> None:
        assert configure.inherited is not None
        self._process = subprocess.Popen(
            ["sleep", "1000"], stdin=subprocess.PIPE, pass_fds=configure.inherited.all()
        )


class Quitter(DraftProcess):
    """In place of a draft: ends at once."""

    def __init__(self, configure: object) -> None:
        self._process = subprocess.Popen(["false"], stdin=subprocess.PIPE)


def test_never_ready_again(serving: Serving, log: Messages, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = serving.pid
    monkeypatch.setattr(supervisor, "RESTART_PAUSE_S", 0.01)
    monkeypatch.setattr(supervisor, "DraftProcess", Sleeper)
    os.kill(draft, signal.SIGKILL)
    serving.answer_until(lambda counted: counted["draft"]["pid"] != draft)
    serving.answer()
    monkeypatch.setattr(supervisor, "DraftProcess", Quitter)
    os.kill(serving.pid, signal.SIGKILL)
    restarts = stats(serving.llm)["draft_restarts"]
    serving.answer_until(lambda counted: counted["draft_restarts"] > restarts + 5)
    counted = stats(serving.llm)
    assert counted["draft_alive"] == 0
    assert counted["undrafted"] > 0
    monkeypatch.undo()
    serving.llm.collective_rpc("ssd_restart")
    serving.answer_until(lambda counted: counted["draft"]["state"] == "ready")
    serving.wait_for_hits()


@pytest.mark.parametrize(
    ("owner", "point"),
    [
        (Proposer, "start"),
        (Proposer, "stop"),
        (Proposer, "propose"),
        (Proposer, "_look_up"),
        (Proposer, "_back_up"),
        (Proposer, "_tell"),
        (OutcomeCache, "look_up"),
        (DraftSupervisor, "check"),
        (DraftSupervisor, "send"),
        (Sampling, "of"),
        (Counters, "add"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_an_exception_of_our_own_costs_drafts_and_nothing_else(
    serving: Serving, log: Messages, monkeypatch: pytest.MonkeyPatch, owner: type, point: str
) -> None:
    """In the target's process, where it would end the engine; at the third call, amid requests."""
    stock, calls = getattr(owner, point), [0]

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("planted")
        return stock(*args, **kwargs)

    failures = stats(serving.llm)["failures"]
    monkeypatch.setattr(owner, point, fail_once)
    serving.answer()
    assert calls[0] >= 3
    monkeypatch.undo()
    serving.wait_for_hits()
    assert stats(serving.llm)["failures"] == failures + 1
    assert stats(serving.llm)["draft"]["state"] == "ready"


def test_an_exception_that_stays_costs_one_request_its_drafts(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is about that request: the others have drafts again two rounds later."""
    stock, failures = Proposer._rows, stats(serving.llm)["failures"]
    poison: list[str] = []

    def fail_for_one(self: Proposer, request_ids: Any, *args: Any) -> Any:
        poison.extend(request_ids[: 1 - len(poison)])
        request = self._live.get(poison[0])
        if poison[0] in request_ids and request is not None and not request.is_excluded:
            raise RuntimeError("planted")
        return stock(self, request_ids, *args)

    monkeypatch.setattr(Proposer, "_rows", fail_for_one)
    serving.answer()
    # The step in which it showed, and once more by itself.
    assert stats(serving.llm)["failures"] == failures + 2
    serving.wait_for_hits()


def wait_until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


PARENT = """
import socket, sys, time
import msgspec
from vllm_ssd.link.counters import DRAFT_FIELDS, Counters
from vllm_ssd.link.messages import Configure, Descriptors, Failed, Ready
from vllm_ssd.link.outcome_cache import OutcomeCache
from vllm_ssd.link.transport import SocketChannel
from vllm_ssd.target.launch import DraftProcess
asked = msgspec.json.decode(sys.stdin.readline(), type=Configure)
ours, drafts = socket.socketpair()
counters = Counters(DRAFT_FIELDS)
sizes = asked.max_slots, asked.branch_budget, asked.num_speculative_tokens, asked.vocab_size
cache = OutcomeCache(*sizes)
inherited = Descriptors(
    socket=drafts.fileno(),
    counters=counters.descriptor,
    outcome_cache=cache.descriptor,
    draft_probs=None,
)
channel = SocketChannel(ours, receives=Ready | Failed)
process = DraftProcess(msgspec.structs.replace(asked, inherited=inherited))
drafts.close()
print("DRAFT", process.pid, channel.receive(150_000), flush=True)
time.sleep(1000)
"""


def test_the_draft_ends_when_its_parent_is_killed(pair: tuple[Path, Path]) -> None:
    import msgspec
    from wire import configure

    asked = configure(
        model=str(pair[1]),
        engine_args={"dtype": "float32", "max_model_len": 128, "block_size": 32},
        cores=[max(os.sched_getaffinity(0))],
    )
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(msgspec.json.encode(asked) + b"\n")
    parent.stdin.flush()
    # The draft's own log is on the same standard output.
    line = next(line for line in parent.stdout if line.startswith(b"DRAFT "))
    _, pid, said = line.decode().split(maxsplit=2)
    try:
        assert said.startswith("Ready")
        assert is_running(int(pid))
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not is_running(int(pid)), "the draft outlived its parent")
