"""Which tokens a step yields, once a verifier has judged the drafts."""

from __future__ import annotations

import pytest
import torch

from vllm_ssd.verify.verification import Places, new_tokens


@pytest.mark.parametrize(
    ("is_kept", "tokens", "expected"),
    [
        ([], [], [9]),
        ([True], [4], [4, 9]),
        ([False], [5], [5]),
        ([True, False, True], [4, 7, 6], [4, 7]),
        ([True, True, True], [4, 5, 6], [4, 5, 6, 9]),
    ],
)
def test_up_to_the_first_draft_not_kept(is_kept: list[bool], tokens: list[int], expected: list[int]) -> None:
    assert new_tokens([len(tokens)], is_kept, tokens, [9]) == [expected]


def test_rows_are_apart() -> None:
    assert new_tokens([2, 0, 1], [True, False, True], [1, 5, 3], [7, 8, 9]) == [[1, 5], [8], [3, 9]]


def test_each_draft_stands_after_the_one_before_it() -> None:
    none = torch.zeros(3, dtype=torch.int64)
    places = Places(none, torch.tensor([10, 20, 30]), torch.tensor([2, 0, 3]), none.bool(), 5)
    rows, positions = places.of_drafts
    assert rows.tolist() == [0, 0, 2, 2, 2]
    assert positions.tolist() == [10, 11, 30, 31, 32]
