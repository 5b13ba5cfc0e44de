"""The table of laws: what is read is what was written for this very round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vllm_ssd.draft_laws import DraftLaws


@pytest.fixture
def table(tmp_path: Path) -> DraftLaws:
    return DraftLaws(tmp_path, 3, 4, 7, create=True)


def test_the_other_half_reads_what_was_written(table: DraftLaws, tmp_path: Path) -> None:
    laws = np.random.default_rng(0).random((3, 7), dtype=np.float32)
    DraftLaws(tmp_path, 3, 4, 7, create=False).publish(1, 20, 5, list(laws))
    for num_drafts in (1, 2, 3):
        found = table.read(1, 20, 5, num_drafts)
        assert found is not None
        assert np.array_equal(found[:num_drafts], laws[:num_drafts])


@pytest.mark.parametrize(
    ("slot", "epoch", "round_", "num_drafts"), [(0, 20, 5, 1), (1, 21, 5, 1), (1, 20, 4, 1), (1, 20, 5, 3)]
)
def test_nothing_else_matches(table: DraftLaws, slot: int, epoch: int, round_: int, num_drafts: int) -> None:
    table.publish(1, 20, 5, [np.ones(7, dtype=np.float32)] * 2)
    assert table.read(slot, epoch, round_, num_drafts) is None
