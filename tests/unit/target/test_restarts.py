"""A draft that dies, is killed or given up, and the next one that is started for it."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest
from supervised import READY_TIMEOUT, STALL_TIMEOUT, Bench, Channel, Process, make_bench

from vllm_ssd.link.messages import (
    Configure,
    Failed,
    Stop,
)
from vllm_ssd.target import supervisor as supervisor_module
from vllm_ssd.target.draft_link import News
from vllm_ssd.target.supervisor import (
    ENDING_TIMEOUT_S,
    HEALTHY_S,
    KILL_AFTER_STALLS,
    LONGEST_PAUSE_S,
    RESTART_PAUSE_S,
    DraftFailed,
    State,
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return make_bench(monkeypatch)


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
