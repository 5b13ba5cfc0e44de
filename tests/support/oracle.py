"""Drafts made of known answers, so that steps have none, some or all of them, whatever the clock says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_ssd.plan.costs import NGRAM
from vllm_ssd.target.backup import MissedOutcome
from vllm_ssd.target.draft_link import DraftLink
from vllm_ssd.target.live import NOTHING, Drafts

MODES = ("none", "some", "all")


class Oracle:
    """Stands where a proposer has its backup: drafts that continue a known sequence, a third of them wrong.

    Args:
        runner: the target's model runner.
        vocab_size: wrong drafts are below it.
    """

    def __init__(self, runner: Any, vocab_size: int) -> None:
        self._runner, self._vocab_size = runner, vocab_size
        self.sequences: list[list[int]] = []  # prompts with their answers
        self.mode = "all"

    def propose(self, missed: Sequence[MissedOutcome], num_drafts: int, draft: DraftLink) -> list[Drafts]:
        """See `vllm_ssd.target.backup.Backup`."""
        rows = [self._continue(self._runner.token_history(row.request_id), num_drafts) for row in missed]
        return [Drafts(NGRAM, row) if row else NOTHING for row in rows]

    def _continue(self, history: list[int], num_drafts: int) -> list[int]:
        length = len(history)
        if self.mode == "some" and sum(history) % 2:
            return []
        rest = next((known[length:] for known in self.sequences if known[:length] == history), [])
        drafts = (rest + [length % self._vocab_size] * num_drafts)[:num_drafts]
        if length % 3 == 0:
            wrong = length // 3 % num_drafts
            drafts[wrong] = (drafts[wrong] + 1) % self._vocab_size
        return drafts[: 1 + length % num_drafts] if self.mode == "some" else drafts


def with_oracle(worker: Any) -> Oracle:
    """Let the worker's proposer miss every outcome and ask an oracle; the draft process works beside it."""
    runner = worker.model_runner
    oracle = Oracle(runner, runner.input_batch.vocab_size)
    proposer = runner.proposer.proposer  # within its guard
    proposer._backup = oracle
    proposer._look_up = lambda rows, plan: [None] * len(rows) if plan.num_drafts else None
    return oracle


def without_oracle(worker: Any) -> None:
    """Look outcomes up again; the oracle stays for those that miss."""
    del worker.model_runner.proposer.proposer._look_up
