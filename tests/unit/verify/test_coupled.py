"""Coupled verification: the target's own samples decide, drafts only say how many of them one step yields."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.verify.coupled import verify
from vllm_ssd.verify.verification import Places, draw

VOCAB = 17


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 2**63 - 1), st.data())
def test_tokens_do_not_depend_on_the_drafts(
    num_drafts: list[int], first_seed: int, data: st.DataObject
) -> None:
    """Whatever the drafts, a row's tokens are a beginning of those that plain sampling takes one by one."""
    torch.manual_seed(0)
    seeds = torch.arange(len(num_drafts)) ^ first_seed
    starts = torch.arange(len(num_drafts)) * 3 + 2
    is_greedy = torch.arange(len(num_drafts)) % 2 == 1
    distributions = torch.randn(len(num_drafts), 6, VOCAB)  # of each row's next six tokens
    plain = [
        draw(Places(seeds, starts + i, torch.zeros_like(seeds), is_greedy, VOCAB), distributions[:, i])
        for i in range(6)
    ]
    drafts = [data.draw(st.integers(0, VOCAB - 1)) for _ in range(sum(num_drafts))]
    places = Places(seeds, starts, torch.tensor(num_drafts), is_greedy, VOCAB)
    rows = list(range(len(num_drafts)))
    bonus = draw(places, distributions[rows, num_drafts])
    logits = torch.cat([distributions[row, :count] for row, count in zip(rows, num_drafts, strict=True)])
    begin = 0
    for row, tokens in enumerate(verify(places, torch.tensor(drafts, dtype=torch.int64), logits, bonus)):
        mine = drafts[begin : begin + num_drafts[row]]
        begin += num_drafts[row]
        assert tokens == [int(plain[i][row]) for i in range(len(tokens))]
        assert tokens[:-1] == mine[: len(tokens) - 1]
        assert len(tokens) == num_drafts[row] + 1 or tokens[-1] != mine[len(tokens) - 1]
