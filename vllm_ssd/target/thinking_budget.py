"""Thinking budgets that end where they would without speculation (vLLM's V1 runner).

Two failures of vLLM 0.32's `ThinkingBudgetStateHolder`, which its other methods of speculation share:

1. A request that moves to the place of one that has finished, as batches are condensed, takes over its state:
   another user's text gets an end mark in it, even without speculation.
2. Where there are drafts, it works out from their number what to force, and does not go back when they are
   rejected: an end mark of several tokens comes late or stays unfinished.

Here its own state continues token by token, as without speculation, and on trial for each draft. Goes when
upstream does that; its V2 runner has no such state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor.interface import MoveDirectionality
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder


class ThinkingBudgets(ThinkingBudgetStateHolder):
    """See its base for the methods; `repairs.patch_thinking_budgets` makes one of it."""

    def sync_batch(self, batch_update: Any) -> None:
        for _, place, direction in batch_update.moved if batch_update else ():
            if direction == MoveDirectionality.UNIDIRECTIONAL:  # its last owner has gone
                self._state.pop(place, None)
        super().sync_batch(batch_update)

    def update_state(
        self,
        output_token_ids: list[list[int]],
        spec_token_ids: list[list[int]] | None,
        repeat_indices: torch.Tensor | None = None,
    ) -> None:
        if not self.in_spec_mode:
            super().update_state(output_token_ids, spec_token_ids, repeat_indices)
            return
        for row, state in self._state.items():
            output, drafts = output_token_ids[row], spec_token_ids[row] if spec_token_ids else []
            if len(output) < state.get("num_seen", -1):  # some were discarded
                state |= self._init_state_entry(state["prompt_tok_ids"], state["thinking_token_budget"])
                del state["num_seen"]
            for count in range(state.get("num_seen", -1) + 1, len(output) + 1):
                state["forced"] = [self._forced_next(state, output[:count])]
            state["num_seen"] = len(output)
            trial = dict(state)
            state["forced"] = state["forced"][:1] + [
                self._forced_next(trial, [*output, *drafts[: count + 1]]) for count in range(len(drafts))
            ]

    def apply_to_logits(
        self,
        logits: torch.Tensor,  # of each row's last place, or of all before it
        predict_bonus_token: bool,
        spec_token_ids: list[list[int]] | None,
        *args: Any,
    ) -> torch.Tensor:
        if not self.in_spec_mode:
            return super().apply_to_logits(logits, predict_bonus_token, spec_token_ids, *args)
        begins = np.cumsum([0, *(len(drafts) for drafts in spec_token_ids or [])]).tolist()
        for row, state in self._state.items():
            forced = state["forced"]
            places = {row: forced[-1]} if predict_bonus_token else dict(enumerate(forced[:-1], begins[row]))
            for place, token in places.items():
                if token is not None:
                    logits[place, token] = 1e9  # as upstream
        return logits

    def _forced_next(self, state: dict[str, Any], output: list[int]) -> int | None:
        """The token that must follow this output, if any must; outputs come in order, each once."""
        state.update(output_tok_ids=output, spec_token_ids=[], force_index=[])
        self._update_think_state(state)
        mark, place = self.think_end_token_ids, state["end_count"]
        return mark[place] if state["in_end"] and state["force_index"] and place < len(mark) else None
