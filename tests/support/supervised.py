"""A supervisor of the draft, with a process and a channel that do what the test says, and a clock."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
from wire import configure

from vllm_ssd.link.counters import DRAFT_FIELDS, Counters, target_fields
from vllm_ssd.link.messages import (
    Configure,
    Ready,
    Stop,
)
from vllm_ssd.target import supervisor as supervisor_module
from vllm_ssd.target.draft_link import News
from vllm_ssd.target.supervisor import (
    LONGEST_PAUSE_S,
    AllocateTable,
    DraftSupervisor,
    State,
)

READY_TIMEOUT, STALL_TIMEOUT = 30.0, 2.0
READY = Ready(10, 32, 0.001, 0.0001, 64)


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


def make_bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A supervisor whose draft loads; for a test's fixture."""
    clock = Clock()
    monkeypatch.setattr(supervisor_module, "DraftProcess", Process)
    monkeypatch.setattr(supervisor_module, "SocketChannel", Channel)
    monkeypatch.setattr(supervisor_module, "time", clock)
    Process.count = 0
    return Bench(clock)
