"""The draft's states: it loads, serves, stalls and recovers."""

from __future__ import annotations

import gc
import os
import socket

import msgspec
import numpy as np
import pytest
import torch
from supervised import READY, READY_TIMEOUT, STALL_TIMEOUT, Bench, Channel, Process, make_bench

from vllm_ssd.link.counters import DRAFT_FIELDS, Counters
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
    HEALTHY_S,
    KILL_AFTER_STALLS,
    LONGEST_PAUSE_S,
    DraftFailed,
    State,
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return make_bench(monkeypatch)


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


def test_messages_after_the_end_are_dropped(bench: Bench) -> None:
    bench.make_ready()
    bench.supervisor.give_up("works for nobody any more")
    bench.supervisor.send(Stop(0, 1))
    assert bench.supervisor.state is State.GONE


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
