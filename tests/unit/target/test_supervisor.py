"""The draft's states, with a process and a channel that do what the test says, and a clock of our own."""

from __future__ import annotations

import gc
import os
import socket
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from wire import configure

from vllm_ssd.link.counters import DRAFT_FIELDS, Counters, target_fields
from vllm_ssd.link.draft_probs import DraftProbs
from vllm_ssd.link.messages import (
    Configure,
    Failed,
    Ready,
    Reset,
    Stop,
)
from vllm_ssd.link.outcome_cache import Outcome, OutcomeCache
from vllm_ssd.target import supervisor as supervisor_module
from vllm_ssd.target.draft_link import News
from vllm_ssd.target.supervisor import (
    ENDING_TIMEOUT_S,
    HEALTHY_S,
    KILL_AFTER_STALLS,
    LONGEST_PAUSE_S,
    RESTART_PAUSE_S,
    AllocateTable,
    DraftFailed,
    DraftSupervisor,
    State,
)

READY = Ready(10, 32, 0.001, 0.0001, 64)
READY_TIMEOUT, STALL_TIMEOUT = 30.0, 2.0


class Process:
    """A draft process; the last one made is `Process.last`."""

    last: Process
    count = 0

    def __init__(self, asked: Configure) -> None:
        Process.count += 1
        Process.last = self
        assert asked.inherited is not None
        self.asked, self.inherited = asked, asked.inherited
        self.mapped = [os.dup(descriptor) for descriptor in asked.inherited.all()]
        self.pid = 1000 + Process.count
        self.code: int | None = None
        self.stopped = False
        self.can_be_killed = True

    def mapping(self, which: str) -> int:
        """A descriptor that this process has inherited, for one use."""
        return os.dup(self.mapped[self.inherited.all().index(getattr(self.inherited, which))])

    def exit_code(self) -> int | None:
        return self.code

    def kill(self) -> None:
        self.stopped = True
        if self.can_be_killed and self.code is None:
            self.code = -9

    def stop(self) -> None:
        self.stopped = True

    def forget(self) -> None:
        """What it has inherited."""
        while self.mapped:
            os.close(self.mapped.pop())


class Channel:
    """The way to the draft; the last one made is `Channel.last`."""

    last: Channel

    def __init__(self, end: socket.socket, **options: Any) -> None:
        Channel.last = self
        self.end = end
        self.inbox: list[Any] = []
        self.sent: list[Any] = []
        self.full = False
        self.closed = False
        self.takes = False  # more of what it was sent before
        self.has_hung_up = False

    def send(self, message: Any) -> bool:
        if self.full or self.has_hung_up:
            return False
        self.sent.append(message)
        return True

    def flush(self) -> bool:
        return self.takes

    def receive(self, timeout_ms: int = 0) -> Any:
        if not self.inbox and Process.last.code is not None:
            raise EOFError
        return self.inbox.pop(0) if self.inbox else None

    def close(self) -> None:
        self.closed = True
        self.end.close()


class Clock:
    """Stands for the module's `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Bench:
    """A supervisor and what it holds."""

    def __init__(self, clock: Clock, allocate: AllocateTable | None = None, **changes: Any) -> None:
        self.clock = clock
        self.counters = Counters(target_fields(3))
        self.supervisor = DraftSupervisor(
            configure(**changes), self.counters, READY_TIMEOUT, STALL_TIMEOUT, allocate
        )
        self.draft = Counters(DRAFT_FIELDS, Process.last.mapping("counters"))

    def make_ready(self, ready: Ready = READY) -> None:
        Channel.last.inbox.append(ready)
        assert self.supervisor.check() is News.READY
        assert self.supervisor.state is State.READY

    def stall(self) -> None:
        """The draft leaves a message unread until it counts as stalled."""
        self.supervisor.send(Stop(0, 1))
        self.supervisor.check()
        self.clock.now += STALL_TIMEOUT + 0.1
        assert self.supervisor.check() is News.NOTHING
        assert self.supervisor.state is State.STALLED

    def die(self) -> None:
        """The draft dies; the next one is started when its time has come."""
        was_serving = self.supervisor.state in (State.READY, State.STALLED)
        Process.last.code = -9
        assert self.supervisor.check() is (News.DIED if was_serving else News.NOTHING)
        if self.supervisor.state is State.ENDING:
            self.clock.now += LONGEST_PAUSE_S
            self.supervisor.check()
        assert self.supervisor.state is State.LOADING


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    clock = Clock()
    monkeypatch.setattr(supervisor_module, "DraftProcess", Process)
    monkeypatch.setattr(supervisor_module, "SocketChannel", Channel)
    monkeypatch.setattr(supervisor_module, "time", clock)
    Process.count = 0
    return Bench(clock)


def test_from_loading_to_ready(bench: Bench) -> None:
    assert bench.supervisor.state is State.LOADING
    assert bench.supervisor.cache is None
    assert bench.supervisor.check() is News.NOTHING
    bench.make_ready()
    assert bench.supervisor.cache is not None
    assert bench.supervisor.check() is News.NOTHING  # told once
    assert bench.counters["draft_alive"] == 1
    assert bench.supervisor.pid == Process.last.pid


def test_awaiting_a_draft_that_loads(bench: Bench) -> None:
    Channel.last.inbox += [None, None, READY]
    bench.supervisor.await_ready()
    assert bench.supervisor.state is State.READY
    bench.supervisor.await_ready()  # nothing more to wait for


def test_awaiting_a_draft_that_fails(bench: Bench) -> None:
    Channel.last.inbox.append(Failed("no such model"))
    with pytest.raises(DraftFailed, match="no such model"):
        bench.supervisor.await_ready()


def test_awaiting_a_draft_that_dies(bench: Bench) -> None:
    Process.last.code = -9
    with pytest.raises(DraftFailed, match=r"signal 9 \(out of memory\?\)"):
        bench.supervisor.await_ready()


def test_awaiting_ends_at_the_deadline(bench: Bench) -> None:
    with pytest.raises(DraftFailed, match="ssd_ready_timeout"):
        bench.supervisor.await_ready()
    assert bench.clock.now < READY_TIMEOUT + 1


@pytest.mark.parametrize("is_coupled", [True, False], ids=["coupled", "ratio"])
def test_what_a_draft_process_inherits(bench: Bench, is_coupled: bool) -> None:
    """Both ends of everything are connected, and nobody but the two has them."""
    bench = Bench(bench.clock, is_coupled=is_coupled)
    sizes = {"max_slots": 4, "num_speculative_tokens": 3, "vocab_size": 12}
    bench.make_ready()
    process = Process.last
    assert bench.supervisor.cache is not None
    theirs = OutcomeCache(branch_budget=8, **sizes, descriptor=process.mapping("outcome_cache"))
    theirs.open_branches(1, 0, 5, 2, np.array([0]), np.array([10]))
    assert bench.supervisor.cache.look_up([Outcome(1, 5, 2, 0, 10)]) == [[]]
    if is_coupled:
        assert process.inherited.draft_probs is None
        assert bench.supervisor.distributions is None
    else:
        distributions = DraftProbs(**sizes, descriptor=process.mapping("draft_probs"))
        distributions.publish(1, 5, 2, [np.ones(12, dtype=np.float32)])
        assert bench.supervisor.distributions is not None
        assert bench.supervisor.distributions.read(1, 5, 2, 1) is not None
    with socket.socket(fileno=process.mapping("socket")) as end:
        Channel.last.end.sendall(b"hello")
        assert end.recv(5) == b"hello"
    os.close(process.mapped[0])
    assert Channel.last.end.recv(1) == b""  # the target has kept no copy of the draft's end
    assert not any(map(os.get_inheritable, (*process.inherited.all()[1:], Channel.last.end.fileno())))


def test_the_counters_outlive_a_draft_process(bench: Bench) -> None:
    bench.make_ready()
    bench.draft.set("messages", 3)
    bench.die()
    bench.make_ready()
    of_next = Counters(DRAFT_FIELDS, Process.last.mapping("counters"))
    assert of_next["messages"] == 3
    of_next.set("messages", 5)
    assert bench.supervisor.draft_counters["messages"] == bench.draft["messages"] == 5


def test_starting_drafts_leaves_no_descriptors(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    def fail(asked: Configure) -> None:
        raise OSError("no room")

    Process.last.forget()
    before = count()
    for _ in range(3):
        old = Process.last
        bench.die()
        old.forget()
    monkeypatch.setattr(supervisor_module, "DraftProcess", fail)
    Process.last.code = -9
    for _ in range(3):
        bench.clock.now += 2 * LONGEST_PAUSE_S
        bench.supervisor.check()
    assert bench.supervisor.state is State.ENDING
    Process.last.forget()
    assert count() <= before


def test_an_idle_draft_is_not_stalled(bench: Bench) -> None:
    bench.make_ready()
    bench.supervisor.send(Stop(0, 1))
    bench.draft.set("messages", 1)
    for _ in range(10):
        bench.clock.now += STALL_TIMEOUT
        assert bench.supervisor.check() is News.NOTHING
    assert bench.supervisor.state is State.READY


def test_a_slow_draft_is_not_stalled(bench: Bench) -> None:
    """It is behind, but reads on."""
    bench.make_ready()
    for _ in range(30):
        bench.supervisor.send(Stop(0, 1))
    for _ in range(20):
        bench.draft.add("messages")
        bench.clock.now += STALL_TIMEOUT * 0.9
        bench.supervisor.check()
    assert bench.supervisor.state is State.READY


def test_a_draft_in_a_step_over_a_long_prompt_is_not_stalled(bench: Bench) -> None:
    """It reads between its steps, and this one's take longer than the timeout."""
    bench.make_ready(Ready(10, 32, STALL_TIMEOUT, 0.0, 64))
    bench.supervisor.send(Stop(0, 1))
    bench.supervisor.check()
    bench.clock.now += 2 * STALL_TIMEOUT
    bench.supervisor.check()
    assert bench.supervisor.state is State.READY
    bench.clock.now += 2 * STALL_TIMEOUT
    bench.supervisor.check()
    assert bench.supervisor.state is State.STALLED


def test_a_draft_that_had_nothing_to_read_for_long_is_not_stalled(bench: Bench) -> None:
    bench.make_ready()
    bench.clock.now += 10 * STALL_TIMEOUT
    bench.supervisor.send(Stop(0, 1))
    bench.supervisor.check()
    assert bench.supervisor.state is State.READY


def test_a_draft_that_still_takes_a_long_message_is_not_stalled(bench: Bench) -> None:
    bench.make_ready()
    bench.supervisor.send(Stop(0, 1))
    Channel.last.takes = True
    for _ in range(3):
        bench.clock.now += 2 * STALL_TIMEOUT
        bench.supervisor.check()
    assert bench.supervisor.state is State.READY
    Channel.last.takes = False
    bench.clock.now += 2 * STALL_TIMEOUT
    bench.supervisor.check()
    assert bench.supervisor.state is State.STALLED


def test_stall_and_recovery(bench: Bench) -> None:
    bench.make_ready()
    bench.stall()
    assert bench.supervisor.cache is None
    assert bench.counters["draft_alive"] == 0
    assert bench.counters["draft_stalls"] == 1
    assert bench.supervisor.check() is News.NOTHING
    bench.draft.set("messages", 1)
    assert bench.supervisor.check() is News.READY  # its requests must be introduced again
    assert bench.supervisor.state is State.READY
    assert Channel.last.sent[-1] == Reset()
    assert bench.supervisor.cache is not None
    assert bench.counters["draft_alive"] == 1
    assert Process.count == 1


def test_a_full_queue_is_a_stall(bench: Bench) -> None:
    bench.make_ready()
    Channel.last.full = True
    bench.supervisor.send(Stop(0, 1))
    bench.supervisor.send(Stop(0, 2))
    assert bench.supervisor.state is State.STALLED
    assert bench.counters["draft_stalls"] == 1
    bench.draft.set("messages", 1)
    assert bench.supervisor.check() is News.NOTHING  # still full: the reset could not be sent
    assert bench.supervisor.state is State.STALLED
    Channel.last.full = False
    bench.draft.set("messages", 2)
    assert bench.supervisor.check() is News.READY
    assert Channel.last.sent == [Reset()]


def test_a_draft_silent_for_long_is_started_again(bench: Bench) -> None:
    bench.make_ready()
    bench.stall()
    old, old_channel = Process.last, Channel.last
    bench.clock.now += KILL_AFTER_STALLS * STALL_TIMEOUT + 0.1
    assert bench.supervisor.check() is News.DIED
    assert old.stopped
    assert old_channel.closed
    assert Process.last is not old
    assert bench.supervisor.state is State.LOADING
    bench.make_ready()


def test_a_stalled_draft_that_takes_the_rest_and_falls_silent_is_started_again(bench: Bench) -> None:
    bench.make_ready()
    bench.stall()
    old = Process.last
    Channel.last.takes = True
    bench.supervisor.check()
    Channel.last.takes = False
    bench.clock.now += KILL_AFTER_STALLS * STALL_TIMEOUT + 0.1
    bench.supervisor.check()
    assert old.stopped


def test_a_killed_draft_is_not_waited_for(bench: Bench) -> None:
    bench.make_ready()
    bench.stall()
    old = Process.last
    old.can_be_killed = False
    bench.clock.now += KILL_AFTER_STALLS * STALL_TIMEOUT + 0.1
    for expected in (News.DIED, News.NOTHING, News.NOTHING):
        assert bench.supervisor.check() is expected
        bench.supervisor.send(Stop(0, 1))
        assert bench.supervisor.state is State.ENDING
        assert bench.supervisor.cache is None
    assert old.stopped
    assert Process.last is old
    old.code = -9
    assert bench.supervisor.check() is News.NOTHING
    assert Process.last is not old
    assert bench.counters["draft_restarts"] == 1
    bench.make_ready()


def test_a_draft_that_cannot_be_killed_is_waited_for(bench: Bench) -> None:
    """It hangs in a driver; another one is started once it is gone, be it late."""
    bench.make_ready()
    bench.stall()
    Process.last.can_be_killed = False
    bench.clock.now += KILL_AFTER_STALLS * STALL_TIMEOUT + 0.1
    bench.supervisor.check()
    bench.clock.now += 100 * ENDING_TIMEOUT_S
    assert bench.supervisor.check() is News.NOTHING
    assert bench.supervisor.state is State.ENDING
    assert Process.count == 1
    Process.last.code = -9
    bench.supervisor.check()
    assert bench.supervisor.state is State.LOADING


def test_a_draft_of_another_version_is_told_apart(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def receive() -> Any:
        raise msgspec.ValidationError("no such message")

    monkeypatch.setattr(Channel.last, "receive", receive)
    with pytest.raises(DraftFailed, match="another protocol"):
        bench.supervisor.await_ready()


def test_restarts_never_end(bench: Bench) -> None:
    bench.make_ready()
    for restart in range(50):
        old = Process.last
        table = os.fstat(old.mapped[-1]).st_ino
        bench.die()
        assert bench.counters["draft_restarts"] == restart + 1
        assert bench.counters["draft_stalls"] == 0
        assert Process.last is not old
        assert os.fstat(Process.last.mapped[-1]).st_ino != table
        old.forget()
        assert bench.supervisor.cache is None
        bench.make_ready()
    bench.supervisor.close()


def test_a_death_that_a_send_notices_is_counted_once(bench: Bench) -> None:
    """The socket closes before there is an exit code."""
    bench.make_ready()
    Channel.last.has_hung_up = True
    bench.supervisor.send(Stop(0, 1))
    assert bench.supervisor.check() is News.DIED
    assert bench.counters["draft_stalls"] == 0
    assert bench.counters["draft_restarts"] == 1
    assert bench.supervisor.state is State.LOADING


def test_a_draft_that_nobody_could_replace_is_given_up(bench: Bench) -> None:
    bench.make_ready()
    Process.last.code = -9
    bench.supervisor.check()
    Channel.last.inbox.append(Failed("its layers are of a kind that nobody knows", is_final=True))
    assert bench.supervisor.check() is News.NOTHING
    assert bench.supervisor.state is State.GONE
    bench.clock.now += 10 * LONGEST_PAUSE_S
    assert bench.supervisor.check() is News.NOTHING
    assert Process.count == 2


@pytest.mark.parametrize("state", [State.READY, State.STALLED, State.LOADING, State.ENDING, State.GONE])
def test_a_restart_that_somebody_asks_for(bench: Bench, state: State) -> None:
    """It is no death: all requests are introduced to the next one."""
    if state is not State.LOADING:
        bench.make_ready()
    if state is State.STALLED:
        bench.stall()
    elif state is State.ENDING:
        bench.die()
        Process.last.code = -9
        bench.supervisor.check()
    elif state is State.GONE:
        bench.supervisor.give_up("works for nobody any more")
    assert bench.supervisor.state is state
    count = Process.count
    bench.supervisor.restart()
    assert bench.supervisor.state is State.LOADING
    assert Process.count == count + 1
    bench.make_ready()


def test_what_the_system_refuses_is_one_more_death(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """No exception of the supervisor's reaches the target's round."""
    bench.make_ready()

    def fail() -> bool:
        raise OSError("too many open files")

    monkeypatch.setattr(Channel.last, "flush", fail)
    assert bench.supervisor.check() is News.DIED
    assert bench.supervisor.state is State.LOADING


def test_a_draft_that_dies_again_and_again_is_started_at_intervals(bench: Bench) -> None:
    bench.make_ready()
    Process.last.code = -9
    bench.supervisor.check()
    assert Process.count == 2  # at once
    Process.last.code = -9
    for _ in range(3):
        bench.supervisor.check()
        assert bench.supervisor.state is State.ENDING
    pause = RESTART_PAUSE_S
    for count in range(3, 15):
        bench.clock.now += pause - 0.1
        bench.supervisor.check()
        assert Process.count == count - 1
        bench.clock.now += 0.2
        bench.supervisor.check()
        assert Process.count == count
        assert bench.supervisor.state is State.LOADING
        Process.last.code = -9
        bench.supervisor.check()
        pause = min(2 * pause, LONGEST_PAUSE_S)


def test_deaths_are_forgotten_after_long_service(bench: Bench) -> None:
    for _ in range(5):
        bench.make_ready()
        bench.clock.now += HEALTHY_S + 1
        Process.last.code = -9
        bench.supervisor.check()
        assert bench.supervisor.state is State.LOADING  # each time at once


def test_a_draft_that_cannot_be_started_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as while the machine has no memory left."""

    def fail(asked: Configure) -> None:
        raise OSError("no room")

    bench.make_ready()
    monkeypatch.setattr(supervisor_module, "DraftProcess", fail)
    Process.last.code = -9
    bench.supervisor.check()
    assert bench.supervisor.state is State.ENDING
    assert bench.supervisor.cache is None
    monkeypatch.setattr(supervisor_module, "DraftProcess", Process)
    bench.clock.now += RESTART_PAUSE_S + 0.1
    bench.supervisor.check()
    assert bench.counters["draft_restarts"] == 1
    bench.make_ready()


def test_a_draft_that_was_given_up_does_not_stay_a_zombie(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    bench.make_ready()
    bench.supervisor.give_up("works for nobody any more")
    monkeypatch.setattr(Process.last, "exit_code", lambda: asked.append(1))
    assert bench.supervisor.check() is News.NOTHING
    assert asked


def test_messages_after_the_end_are_dropped(bench: Bench) -> None:
    bench.make_ready()
    bench.supervisor.give_up("works for nobody any more")
    bench.supervisor.send(Stop(0, 1))
    assert bench.supervisor.state is State.GONE


def test_a_restarted_draft_that_cannot_load(bench: Bench) -> None:
    bench.make_ready()
    Process.last.code = 1
    bench.supervisor.check()
    Channel.last.inbox.append(Failed("out of memory"))
    assert bench.supervisor.check() is News.NOTHING
    bench.clock.now += RESTART_PAUSE_S
    assert bench.supervisor.check() is News.NOTHING
    assert bench.counters["draft_restarts"] == 2
    bench.clock.now += READY_TIMEOUT + 1  # and one that takes too long
    assert bench.supervisor.check() is News.NOTHING
    assert bench.supervisor.state is State.ENDING


def test_a_restarted_draft_that_failed_and_is_gone_already_has_said_why(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(supervisor_module.logger, "warning", lambda text, *args: said.append(text % args))
    Channel.last.inbox.append(Failed("out of memory"))
    Process.last.code = 1
    bench.supervisor.check()
    assert "out of memory" in said[0]


def test_the_table_in_the_gpu_is_used_if_the_draft_can(bench: Bench) -> None:
    """Each draft process gets one of its own."""
    tables = [torch.full((4, 8, 8), i) for i in range(3)]
    answers = [(tables[0], b"one"), None, (tables[1], b"two"), (tables[2], b"three")]
    asked = []

    def allocate(shape: tuple[int, ...]) -> tuple[torch.Tensor, bytes] | None:
        asked.append(shape)
        return answers.pop(0)

    def table() -> torch.Tensor | None:
        cache = bench.supervisor.cache
        return None if cache is None else cache.gpu_entries

    bench.supervisor.close()
    bench = Bench(bench.clock, allocate)
    uses_it = msgspec.structs.replace(READY, uses_gpu_table=True)
    assert Process.last.asked.gpu_table == b"one"
    bench.make_ready(uses_it)
    assert table() is tables[0]
    for handle, ready, expected in (
        (None, READY, None),
        (b"two", READY, None),  # it could not open it
        (b"three", uses_it, tables[2]),
    ):
        bench.clock.now += HEALTHY_S + 1
        bench.die()
        assert table() is None
        assert Process.last.asked.gpu_table == handle
        bench.make_ready(ready)
        assert table() is expected
    assert asked == [(4, 8, 8)] * 4


def test_close_stops_the_draft(bench: Bench) -> None:
    bench.make_ready()
    bench.supervisor.close()
    assert Process.last.stopped
    assert Channel.last.closed
    assert bench.supervisor.cache is None
    assert bench.counters["draft_alive"] == 0
    assert bench.supervisor.check() is News.NOTHING
