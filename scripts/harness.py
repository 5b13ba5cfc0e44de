"""What the benchmark and the lossless check share: engines in processes of their own, prompts, provenance.

An engine process holds one in-process vLLM engine on one core and does nothing until it is sent a
`GenerationTask`, so several can be alive at once without disturbing each other. Its own side of the
conversation is scripts/engine_process.py; this module imports neither vLLM nor torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.status import Status

SCRIPTS = Path(__file__).parent
READY_TIMEOUT_S = 600.0
TASK_TIMEOUT_S = 900.0
IDLE_EXIT_S = 8.0
BUSY_EXIT_S = 10.0
LEAD_IN_S = 2.0
LOG_LINES_SHOWN = 25
SSD_METHODS = ("ssd", "ssd_planned")

# Why each of these: scripts/setup_env.sh.
ENGINE_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_SSD_PATCH": "1",  # vLLM's own speculation is to sample rightly too
}


@dataclass(frozen=True)
class Cores:
    """The CPU cores that engines use: all targets the same one, an SSD draft another if there is one."""

    target: int
    draft: int
    available: int = 1  # cores that this process may use

    @property
    def count_with_draft(self) -> int:
        return len({self.target, self.draft})


@dataclass(frozen=True)
class EngineSpec:
    """One engine to start: `engine_args` are fields of vllm.EngineArgs."""

    label: str
    engine_args: dict[str, Any]
    cores: Cores
    all_cores: bool = False  # the target has a thread on each of this process's cores, not on one alone

    @property
    def target_cores(self) -> list[int]:
        return sorted(os.sched_getaffinity(0)) if self.all_cores else [self.cores.target]


@dataclass(frozen=True)
class GenerationTask:
    """Prompts for an engine; the three lists are equally long.

    `max_in_flight[i]` requests at most are in the engine once prompt i is added, so a list that rises and
    falls makes batches of many sizes, with requests that join and leave.
    """

    prompts: list[list[int]]  # token ids
    out_tokens: list[int]  # number of output tokens: exact, unless the text may end before
    max_in_flight: list[int]
    temperature: float = 0.0
    want_top_two: bool = False
    plan: tuple[int, int] | None = None  # K and branch budget, of an engine with SSD; None: as configured
    may_end: bool = False  # with the model's end of text


@dataclass(frozen=True)
class TopTwo:
    """The target's two likeliest tokens at a position, and the first one's lead in log probability (nats)."""

    first: int
    second: int
    gap: float


@dataclass
class GenerationResult:
    """What an engine made of a `GenerationTask`."""

    outputs: list[list[int]]  # token ids per prompt
    seconds: float = 0.0  # from the first request's arrival to the last one's end
    cpu_seconds: float = 0.0  # of the target's process in that time; the rest its core worked for others
    decode_seconds: list[float] = field(
        default_factory=list
    )  # engine steps at full batch without any prefill
    drafted_rows: list[int] = field(default_factory=list)  # requests that had drafts, of these same steps
    decode_rows: int = 0  # requests, summed over all steps without any prefill
    decode_tokens: int = 0  # output tokens of these steps
    in_flight: list[int] = field(default_factory=list)  # requests in the engine, per step
    # Per prompt, from its arrival to each of its outputs.
    output_seconds: list[list[float]] = field(default_factory=list)
    preemptions: int = 0
    drafted_per_position: list[int] = field(default_factory=list)  # draft tokens verified
    accepted_per_position: list[int] = field(default_factory=list)
    top_two: list[list[TopTwo]] = field(default_factory=list)  # per prompt and output position, if wanted
    ssd: dict[str, int] = field(default_factory=dict)  # SSD's counters; the draft's have the prefix "draft."


class EngineFailed(Exception):
    """An engine process ended or hung; the message holds the end of its log."""


class EngineProcess:
    """One engine in a process group of its own.

    Args:
        spec: the engine.
        log: file for everything the process prints.
    """

    def __init__(self, spec: EngineSpec, log: Path) -> None:
        self.label = spec.label
        self._log = log
        self._connection, child_end = Pipe()
        environment = {
            **os.environ,
            **ENGINE_ENVIRONMENT,
            "OMP_NUM_THREADS": str(len(spec.target_cores)),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, spec.target_cores)),
        }
        with child_end, log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, str(SCRIPTS / "engine_process.py"), str(child_end.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[child_end.fileno()],
                start_new_session=True,
            )
        self._connection.send(spec)

    def await_ready(self) -> None:
        """Wait until the engine has loaded.

        Raises:
            EngineFailed: if it does not.
        """
        self._receive(READY_TIMEOUT_S)

    def generate(self, task: GenerationTask) -> GenerationResult:
        """Run a task to its end.

        Raises:
            EngineFailed: if the process ends or takes too long.
        """
        try:
            self._connection.send(task)
        except BrokenPipeError:
            self._fail("ended")
        result = self._receive(TASK_TIMEOUT_S)
        assert isinstance(result, GenerationResult)
        return result

    def lead_in(self, task: GenerationTask) -> None:
        """Run a task again and again, unmeasured, until the machine runs as it does under lasting load.

        Where one virtual core has slept, the host may have both on one physical core, and take a second of
        work on both to part them. It slows SSD down, and methods that use one core not at all.

        Raises:
            EngineFailed: as `generate` does.
        """
        until = time.monotonic() + LEAD_IN_S
        while time.monotonic() < until:
            self.generate(task)

    def ask_to_end(self) -> None:
        """Let a process that waits for a task end in good order."""
        self._connection.close()

    def end(self) -> None:
        """Wait for the process to end; end what is left of its process group, which holds nothing but it."""
        self.ask_to_end()
        if not self._ends_within(IDLE_EXIT_S):
            self._process.terminate()  # it loads or is at work
            self._ends_within(BUSY_EXIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ends_within(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _receive(self, timeout_s: float) -> Any:
        try:
            if self._connection.poll(timeout_s):
                return self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._fail("ended")
        self._fail(f"did not answer within {timeout_s:g} s")

    def _fail(self, what: str) -> NoReturn:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        shown = "\n".join(lines[-LOG_LINES_SHOWN:])
        raise EngineFailed(f"engine {self.label} {what}; the last lines of its output:\n{shown}")


@contextlib.contextmanager
def running_engines(specs: Sequence[EngineSpec]) -> Iterator[list[EngineProcess]]:
    """Engines that are still loading; all of them are ended, however the block ends."""
    engines: list[EngineProcess] = []
    with tempfile.TemporaryDirectory(prefix="ssd-engines-") as folder:
        try:
            for number, spec in enumerate(specs):
                engines.append(EngineProcess(spec, Path(folder) / f"{number}.log"))
            yield engines
        finally:
            for engine in engines:
                engine.ask_to_end()
            for engine in engines:
                engine.end()


def receive_until_closed(connection: Connection) -> Iterator[Any]:
    """What the parent sends, until it hangs up or dies."""
    while True:
        try:
            yield connection.recv()
        except (EOFError, ConnectionResetError):
            return


class Progress:
    """One line that says what runs: rewritten in place on a terminal, else a line each time.

    Args:
        console: where to.
        total: how many steps there will be.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._done = 0
        self._began = time.monotonic()
        self._status: Status | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._status = self._console.status("")
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status is not None:
            self._status.stop()

    def step(self, what: str) -> None:
        """The next step begins."""
        self._done += 1
        line = f"{time.monotonic() - self._began:4.0f} s, {self._done} of {self._total}: {what}"
        if self._status is not None:
            self._status.update(line)
        else:
            self._console.print(line, highlight=False, soft_wrap=True)


def choose_cores() -> Cores:
    """The target gets this process's first core and the draft the next, if there is one."""
    allowed = sorted(os.sched_getaffinity(0))
    return Cores(allowed[0], allowed[min(1, len(allowed) - 1)], len(allowed))


def engine_args(
    target: str,
    method: str,
    draft: str,
    k: int | None,
    cores: Cores,
    ssd_config: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """Arguments of one engine; `more` overrides the common ones.

    Args:
        target, draft: model folders or names.
        method: "ar" (no speculation), "ngram", "draft_model", "ssd" or "ssd_planned".
        k: speculative tokens; None for "ar".
        cores: where the SSD draft runs.
        ssd_config: further SSD options.
    """
    args: dict[str, Any] = {
        "model": target,
        "dtype": "float32",
        "disable_log_stats": False,
        "seed": 0,
    }
    if method == "ngram":
        args["speculative_config"] = {"method": method, "num_speculative_tokens": k}
    elif method != "ar":
        name = "ssd" if method in SSD_METHODS else method
        args["speculative_config"] = {"method": name, "model": draft, "num_speculative_tokens": k}
    if method in SSD_METHODS:
        # Several engines may compile at once, each with its draft.
        more_time = {"ssd_ready_timeout": READY_TIMEOUT_S}
        more_time |= {"ssd_planner": True} if method == "ssd_planned" else {}
        args["speculative_config"] |= {"ssd_draft_cores": str(cores.draft)} | more_time | ssd_config
    return args | more


def exit_on_signals() -> None:
    """Make SIGTERM and SIGHUP end this process the way Ctrl-C does, so that engines are ended too."""

    def leave(number: int, _frame: object) -> None:
        print(f"ended by {signal.Signals(number).name}", file=sys.stderr)
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
