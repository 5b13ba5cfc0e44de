"""What the draft's loop saves: setting up steps anew, and sleeping between rounds."""

from __future__ import annotations

import random

import pytest
from target import Setup, Target, prompt
from toy import ToyEngine


def test_steps_of_the_same_branches_only_advance() -> None:
    target = Target(Setup())
    engine = target.engine
    assert isinstance(engine, ToyEngine)
    target.start(0, prompt(random.Random(0), 10))
    target.run_until_idle()
    # The prompt, the branches' first step, and then, up to the tips, what the step before leads to.
    assert (len(engine.row_counts), engine.num_advances) == (
        2 + target.setup.num_drafts,
        target.setup.num_drafts,
    )
    target.start(1, prompt(random.Random(1), 10))
    target.step()
    assert engine.num_advances == target.setup.num_drafts  # a trunk is in this one
    target.run_until_idle()
    target.finish()


class ScriptedChannel:
    """Two quiet looks for news, then the target hangs up."""

    def __init__(self) -> None:
        self.waits: list[int] = []

    def receive(self, timeout_ms: int = 0) -> None:
        self.waits.append(timeout_ms)
        if len(self.waits) == 3:
            raise EOFError


@pytest.mark.parametrize(("seconds", "waits"), [(1e9, [200, 0, 0]), (-1.0, [200, 200, 200])])
def test_after_work_it_looks_for_news_before_it_sleeps(
    seconds: float, waits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_ssd.draft.server.SPIN_SECONDS", seconds)
    target, channel = Target(Setup()), ScriptedChannel()
    target.server._channel = channel  # type: ignore[assignment]
    target.start(0, prompt(random.Random(0), 3))
    target.server.run()
    assert channel.waits == waits
    target.stop(0)
    target.finish()
