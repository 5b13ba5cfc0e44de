"""Thinking budgets with drafts end thinking where they do without (`vllm_ssd.target.thinking_budget`)."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

VOCAB, K, NUM_TOKENS = 9, 4, 24
BEGIN, END = [3], [4, 5]


def holder(num_speculative_tokens: int) -> Any:
    from vllm_ssd.target.thinking_budget import ThinkingBudgets

    reasoning = SimpleNamespace(reasoning_start_token_ids=BEGIN, reasoning_end_token_ids=END)
    return ThinkingBudgets(
        reasoning,  # type: ignore[arg-type]
        8,
        num_speculative_tokens,
        torch.device("cpu"),
        False,
    )


def update(**changes: Any) -> Any:
    return SimpleNamespace(**({"removed": [], "added": [], "moved": []} | changes))


def logits(tokens: list[int]) -> torch.Tensor:
    """[VOCAB] of a model whose next token depends on the last ones."""
    rng = random.Random(str(tokens[-5:]))
    return torch.tensor([rng.random() for _ in range(VOCAB)])


def without_drafts(prompt: list[int], budget: int | None) -> list[int]:
    state, output = holder(0), list[int]()
    state.sync_batch(update(added=[(0, SimpleNamespace(thinking_token_budget=budget), prompt, output)]))
    while len(output) < NUM_TOKENS:
        state.update_state([output], [[]])
        output.append(int(state.apply_to_logits(logits(prompt + output)[None], False, [[]]).argmax()))
    return output


def with_drafts(prompts: list[list[int]], budgets: list[int | None], rng: random.Random) -> list[list[int]]:
    """As vLLM's rejection sampler continues: the last place of each row first, then all before it."""
    state = holder(K)
    outputs: list[list[int]] = [[] for _ in prompts]
    asked = [SimpleNamespace(thinking_token_budget=budget) for budget in budgets]
    state.sync_batch(
        update(added=[(row, *one) for row, one in enumerate(zip(asked, prompts, outputs, strict=True))])
    )
    wanted = [without_drafts(*one) for one in zip(prompts, budgets, strict=True)]
    while any(len(output) < NUM_TOKENS for output in outputs):
        drafts = []
        for output, right in zip(outputs, wanted, strict=True):
            row = right[len(output) : len(output) + rng.randint(0, K)]
            drafts.append([token if rng.random() < 0.7 else rng.randrange(VOCAB) for token in row])
        state.update_state(outputs, drafts)
        texts = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
        last = torch.stack([logits(text + row) for text, row in zip(texts, drafts, strict=True)])
        bonus = state.apply_to_logits(last, True, drafts).argmax(-1).tolist()
        before = [
            logits(text + row[:n]) for text, row in zip(texts, drafts, strict=True) for n in range(len(row))
        ]
        own = state.apply_to_logits(torch.stack([*before, torch.zeros(VOCAB)])[:-1], False, drafts)
        places = iter(own.argmax(-1).tolist())
        for output, row, end in zip(outputs, drafts, bonus, strict=True):
            tokens = [next(places) for _ in row]
            agreed = next((n for n, draft in enumerate(row) if tokens[n] != draft), len(row))
            output += [*tokens, end][: agreed + 1]
    return [output[:NUM_TOKENS] for output in outputs]


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)
budgets = st.none() | st.integers(-1, 9)


@given(st.lists(st.tuples(prompts, budgets), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_the_end_is_forced_where_it_is_without_drafts(
    rows: list[tuple[list[int], int | None]], rng: random.Random
) -> None:
    texts, limits = [row[0] for row in rows], [row[1] for row in rows]
    wanted = [without_drafts(*row) for row in rows]
    assert with_drafts(texts, limits, rng) == wanted


def test_who_moves_to_the_place_of_a_finished_request_does_not_take_over_its_budget() -> None:
    from vllm.v1.sample.logits_processor.interface import MoveDirectionality

    for num_speculative_tokens in (0, K):
        state = holder(num_speculative_tokens)
        asked = SimpleNamespace(thinking_token_budget=2)
        nothing = SimpleNamespace(thinking_token_budget=None)
        state.sync_batch(update(added=[(0, asked, BEGIN, []), (1, nothing, [1], [])]))
        state.sync_batch(update(moved=[(1, 0, MoveDirectionality.UNIDIRECTIONAL)]))
        assert not state.has_tracked_requests()
