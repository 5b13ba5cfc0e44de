"""Starts, awaits, watches, restarts and stops the draft process.

The draft is in one of five states. `check`, which the target calls once a round, moves between them:

    loading --Ready--> ready --silent too long--> stalled --signs of life--> ready
       ^                 |                           |
       |               died              died, or silent for longer still
       |                 |                           |
       +--- it is gone --+------- ending <-----------+

    loading --says that no draft process could serve--> gone

Nothing here waits, once the draft has loaded for the first time: a killed process takes what time it takes to
go, and one that dies again and again is started at growing intervals, but always again. Serving never fails
because of the draft: outside of `ready` there is no outcome cache to ask.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from enum import Enum

import msgspec
from torch import Tensor
from vllm.logger import init_logger

from vllm_ssd.link.counters import DRAFT_FIELDS, Counters
from vllm_ssd.link.draft_probs import DraftProbs
from vllm_ssd.link.messages import (
    Configure,
    Descriptors,
    Failed,
    Ready,
    Reset,
    ToDraft,
)
from vllm_ssd.link.outcome_cache import OutcomeCache
from vllm_ssd.link.transport import Channel, SocketChannel
from vllm_ssd.target.draft_link import News
from vllm_ssd.target.launch import DraftProcess

logger = init_logger("vllm.ssd")

AllocateTable = Callable[[tuple[int, ...]], tuple[Tensor, bytes] | None]

KILL_AFTER_STALLS = 15  # a draft silent for this many stall timeouts is killed and started again
LONGEST_STEPS = (
    3  # in which a draft has to read something: it reads between steps, and prompts make them long
)
HEALTHY_S = 600.0  # having served for so long, a draft's earlier deaths are forgotten
RESTART_PAUSE_S = 5.0  # before the second restart in a row; before each further one it is twice as long
LONGEST_PAUSE_S = 300.0
ENDING_TIMEOUT_S = 30.0  # a process that is not gone by then hangs in a driver; its device may do so too
AWAIT_POLL_S = 0.02


class DraftFailed(RuntimeError):
    """The draft process could not start."""


class State(Enum):
    """What the target knows of its draft."""

    LOADING = "loading"
    READY = "ready"
    STALLED = "stalled"
    ENDING = "ending"  # killed, or waiting to be started again
    GONE = "gone"


class DraftSupervisor:
    """Owns the draft process, the channel to it and its outcome cache.

    Args:
        configure: what the draft is told; what it inherits is filled in for each process.
        counters: the target's counters.
        ready_timeout_s: how long a draft may take to load.
        stall_timeout_s: how long a draft may leave messages unread; longer where its steps are.
        allocate: makes a table in the memory of the target's GPU (`outcome_gpu.allocate_table`); None where
            the host needs to read it.
    """

    def __init__(
        self,
        configure: Configure,
        counters: Counters,
        ready_timeout_s: float,
        stall_timeout_s: float,
        allocate: AllocateTable | None = None,
    ) -> None:
        self._configure = configure
        self._counters = counters
        self._ready_timeout_s = ready_timeout_s
        self._stall_timeout_s = self._patience_s = stall_timeout_s
        self._allocate = allocate
        self.draft_counters = Counters(DRAFT_FIELDS)
        self._gpu_entries: Tensor | None = None
        self._num_deaths = 0  # in a row
        self._ready_since: float | None = None
        self.max_model_len = 0  # tokens that the draft can serve, once it is ready
        self.step_times = (0.0, 0.0)  # of the draft, once it is ready: seconds, and of each further row
        self._spawn()

    @property
    def state(self) -> State:
        return self._state

    @property
    def pid(self) -> int:
        """Of the current draft process."""
        return self._process.pid

    @property
    def cache(self) -> OutcomeCache | None:
        """The outcome cache, while the draft is ready."""
        return self._cache if self._state is State.READY else None

    @property
    def distributions(self) -> DraftProbs | None:
        """What drafts were drawn from, while the draft is ready and draws any."""
        return self._distributions if self._state is State.READY else None

    @property
    def step_seconds(self) -> float:
        """What a step of the draft without prompts took of late, 0 before the first."""
        return self.draft_counters["recent_step_ns"] / 1e9

    def await_ready(self) -> None:
        """Wait until the draft has loaded; it need not know of any request yet.

        Raises:
            DraftFailed: if it gives up, dies, or takes longer than the ready timeout.
        """
        while self._state is State.LOADING:
            exit_code = self._process.exit_code()  # before the message: one that failed says why, then exits
            message = self._receive()
            if isinstance(message, Failed):
                raise DraftFailed(f"the draft process cannot serve: {message.reason}")
            if isinstance(message, Ready):
                self._become_ready(message)
                return
            if exit_code is not None:
                raise DraftFailed(f"the draft process {_how_it_ended(exit_code)}; see its output above")
            if time.monotonic() > self._deadline:
                raise DraftFailed(f"no draft after {self._ready_timeout_s:g} s; raise ssd_ready_timeout")
            time.sleep(AWAIT_POLL_S)

    def check(self) -> News:
        """Notice what happened to the draft."""
        if self._state is State.GONE:
            self._process.exit_code()  # or it stays a zombie
            return News.NOTHING
        served = self._state in (State.READY, State.STALLED)
        try:
            is_news = self._check()
        except OSError as error:  # such as no memory or no descriptors
            self._restart(f"cannot be attended to ({error})")
            is_news = False
        if served and self._state not in (State.READY, State.STALLED):
            return News.DIED
        return News.READY if is_news else News.NOTHING

    def _check(self) -> bool:
        """Move to the state that the draft is in; True if it has become ready and knows no request yet."""
        if self._state is State.ENDING:
            self._start_again()
            return False
        exit_code = self._process.exit_code()
        if exit_code is not None:
            message = self._receive()  # one that failed says why, then exits
            if isinstance(message, Failed):
                self._restart(message.reason, message.is_final)
            else:
                self._restart(_how_it_ended(exit_code))
            return False
        self._flush()
        if self._channel.has_hung_up:  # it is about to exit
            self._restart("hung up")
            return False
        if self._state is State.READY:
            self._check_progress()
            return False
        if self._state is State.STALLED:
            return self._check_recovery()
        return self._check_loaded()

    def send(self, message: ToDraft) -> bool:
        """Tell the draft; one that cannot be told counts as stalled, or is seen to be dead by `check`."""
        self._flush()
        if self.draft_counters["messages"] >= self._num_sent:
            self._last_progress = time.monotonic()  # it has had nothing to read until now
        if self._channel.send(message):
            self._num_sent += 1
            return True
        if self._state is State.READY and not self._channel.has_hung_up:
            self._stall("it takes no more messages")
        return False

    def restart(self) -> None:
        """Start another draft process in place of this one, or of one that was given up."""
        logger.info("SSD draft is started again, as asked")
        self._num_deaths = 0
        self._end_for_now(pause_s=0.0)

    def give_up(self, reason: str) -> None:
        """End the draft until somebody asks for a restart; decoding continues without it."""
        self._end()
        self._state = State.GONE
        logger.error("SSD draft %s; decoding continues without it, until ssd_restart is called", reason)

    def close(self) -> None:
        """Stop the draft."""
        self._state = State.GONE
        self._counters.set("draft_alive", 0)
        self._process.stop()
        self._channel.close()

    def _spawn(self) -> None:
        cache = OutcomeCache(
            self._configure.max_slots,
            self._configure.branch_budget,
            self._configure.num_speculative_tokens,
            self._configure.vocab_size,
        )
        distributions = None if self._configure.is_coupled else self._make_distributions()
        self._cache: OutcomeCache | None = cache
        self._distributions: DraftProbs | None = distributions
        in_gpu = self._allocate(cache.entries.shape) if self._allocate is not None else None
        self._gpu_entries, handle = in_gpu or (None, None)
        ours, drafts = socket.socketpair()
        self._channel: Channel = SocketChannel(ours, receives=Ready | Failed)
        with drafts:  # or nobody would see that the draft has hung up
            inherited = Descriptors(
                socket=drafts.fileno(),
                counters=self.draft_counters.descriptor,
                outcome_cache=cache.descriptor,
                draft_probs=None if distributions is None else distributions.descriptor,
            )
            self._process = DraftProcess(
                msgspec.structs.replace(self._configure, inherited=inherited, gpu_table=handle)
            )
        self._state = State.LOADING
        self._deadline = time.monotonic() + self._ready_timeout_s
        self._last_progress = time.monotonic()
        self._num_sent: int = 0
        self._num_read = 0

    def _make_distributions(self) -> DraftProbs:
        return DraftProbs(
            self._configure.max_slots, self._configure.num_speculative_tokens, self._configure.vocab_size
        )

    def _become_ready(self, message: Ready) -> None:
        assert self._cache is not None
        self._cache.gpu_entries = self._gpu_entries if message.uses_gpu_table else None
        self.max_model_len = message.max_model_len
        self.step_times = (message.step_base, message.step_per_row)
        longest_step_s = message.step_base + message.step_per_row * self._configure.prefill_chunk
        self._patience_s = max(self._stall_timeout_s, LONGEST_STEPS * longest_step_s)
        self._state = State.READY
        self._last_progress = self._ready_since = time.monotonic()
        self._counters.set("draft_alive", 1)
        logger.info(
            "SSD draft is ready: process %d, cores %s, %d KV blocks of %d tokens",
            self._process.pid,
            self._configure.cores,
            message.num_blocks,
            message.block_size,
        )

    def _flush(self) -> None:
        if self._channel.flush():  # a draft that takes more of a long message is alive
            self._last_progress = time.monotonic()

    def _receive(self) -> Ready | Failed | None:
        try:
            message: Ready | Failed | None = self._channel.receive()
        except EOFError:  # its exit code tells more
            return None
        except msgspec.DecodeError as error:
            return Failed(f"speaks another protocol: {error}")
        return message

    def _check_loaded(self) -> bool:
        message = self._receive()
        if isinstance(message, Ready):
            self._become_ready(message)
            return True
        if isinstance(message, Failed):
            self._restart(message.reason, message.is_final)
        elif time.monotonic() > self._deadline:
            self._restart(f"was not ready after {self._ready_timeout_s:g} s")
        return False

    def _check_progress(self) -> None:
        num_read = self.draft_counters["messages"]
        now = time.monotonic()
        if num_read != self._num_read or num_read >= self._num_sent:
            self._num_read, self._last_progress = num_read, now
        elif now - self._last_progress > self._patience_s:
            self._stall(f"it has read nothing for {self._patience_s:.3g} s")

    def _check_recovery(self) -> bool:
        if self.draft_counters["messages"] != self._num_read:
            self._num_read, self._last_progress = self.draft_counters["messages"], time.monotonic()
            if not self._channel.send(Reset()):  # it has much to read yet
                return False
            self._num_sent += 1
            logger.warning("SSD draft answers again; speculation resumes")
            self._state = State.READY
            self._counters.set("draft_alive", 1)
            return True
        if time.monotonic() - self._last_progress > KILL_AFTER_STALLS * self._patience_s:
            self._restart("did not answer any more")
        return False

    def _stall(self, reason: str) -> None:
        self._state = State.STALLED
        self._counters.set("draft_alive", 0)
        self._counters.add("draft_stalls")
        self._num_read = self.draft_counters["messages"]
        self._last_progress = time.monotonic()
        logger.warning("SSD draft is stalled (%s); decoding continues without it", reason)

    def _restart(self, reason: str, is_final: bool = False) -> None:
        """End this process and start another one; none if it would fail as well."""
        if is_final:
            self.give_up(reason)
            return
        if self._ready_since is not None and time.monotonic() - self._ready_since > HEALTHY_S:
            self._num_deaths = 0
        self._num_deaths += 1
        pause_s = 0.0
        if self._num_deaths > 1:
            pause_s = min(RESTART_PAUSE_S * 2 ** (self._num_deaths - 2), LONGEST_PAUSE_S)
        logger.warning(
            "SSD draft %s; starting it again%s, decoding continues meanwhile",
            reason,
            f" in {pause_s:g} s" if pause_s else "",
        )
        self._end_for_now(pause_s)

    def _end_for_now(self, pause_s: float) -> None:
        self._ready_since = None
        self._state = State.ENDING
        self._deadline = time.monotonic() + ENDING_TIMEOUT_S
        self._not_before = time.monotonic() + pause_s
        self._end()
        self._start_again()

    def _start_again(self) -> None:
        """Start another process once it is time, and the killed one is gone and with it what it held."""
        now = time.monotonic()
        if self._process.exit_code() is None:
            if now > self._deadline:
                logger.error("SSD draft has been killed %g s ago and is still there", ENDING_TIMEOUT_S)
                self._deadline = now + LONGEST_PAUSE_S
            return
        if now < self._not_before:
            return
        try:
            self._spawn()
        except OSError as error:
            self._restart(f"cannot be started again ({error})")
        else:
            self._counters.add("draft_restarts")

    def _end(self) -> None:
        """Kill the process, without waiting, and let go of what was shared with it."""
        self._process.kill()
        self._channel.close()
        self._counters.set("draft_alive", 0)
        self._cache = self._distributions = self._gpu_entries = (
            None  # memory that the next one's tables may need
        )


def _how_it_ended(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    return f"was ended by signal {-exit_code}" + (" (out of memory?)" if exit_code == -signal.SIGKILL else "")
