"""A target for the draft's server: decides outcomes, looks them up, and checks all that is published."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pytest
from toy import ToyEngine, rank_after
from wire import configure

from vllm_ssd.draft.rows import Engine
from vllm_ssd.draft.server import BranchTable, DraftServer
from vllm_ssd.link.counters import DRAFT_FIELDS, Counters
from vllm_ssd.link.draft_probs import DraftProbs
from vllm_ssd.link.messages import (
    Configure,
    Missed,
    MissedRow,
    Outcomes,
    RoundOutcome,
    Sampling,
    Start,
    Stop,
)
from vllm_ssd.link.outcome_cache import (
    ACCEPTED,
    DEPTH,
    EPOCH,
    FIRST_DRAFT,
    ROUND,
    TOKEN,
    Outcome,
    OutcomeCache,
)

VOCAB = 12


class Oracle(Protocol):
    """Knows what the draft model must say."""

    def rank(self, tokens: list[int]) -> npt.NDArray[np.int64]:
        """[vocab] all tokens by likelihood after these."""
        ...


class ToyOracle:
    """For the toy model."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def rank(self, tokens: list[int]) -> npt.NDArray[np.int64]:
        return rank_after(tokens, self._vocab_size)


@dataclass
class Setup:
    """The sizes of one server; the defaults have room for everything."""

    num_drafts: int = 3
    budget: int = 8
    fanout: list[int] | str = "uniform"
    max_slots: int = 4
    max_rows: int = 64
    prefill_chunk: int = 16
    num_blocks: int = 400
    block_size: int = 4
    vocab: int = VOCAB
    max_model_len: int = 200

    def configure(self, **changes: object) -> Configure:
        """As the server is told."""
        return configure(
            vocab_size=self.vocab,
            num_speculative_tokens=self.num_drafts,
            fanout=self.fanout,
            branch_budget=self.budget,
            max_slots=self.max_slots,
            max_rows=self.max_rows,
            prefill_chunk=self.prefill_chunk,
            **changes,
        )


def toy_engine(setup: Setup) -> ToyEngine:
    """An engine that allows what DraftEngine is made for."""
    return ToyEngine(
        setup.num_blocks,
        setup.block_size,
        setup.vocab,
        setup.max_model_len,
        # Every request may have a trunk row beside the branches.
        max_rows=setup.max_rows + setup.max_slots,
        max_tokens=setup.max_rows + setup.prefill_chunk,
    )


@dataclass
class Live:
    """A request as the target knows it."""

    slot: int
    epoch: int
    tokens: list[int]
    drafts: list[int] = field(default_factory=list)
    round: int = 0
    awaited: tuple[int, int] | None = None  # the outcome (k, token) that the target waits for


class Target:
    """Plays the target: decides outcomes, looks them up, and checks everything the draft publishes."""

    def __init__(
        self,
        setup: Setup,
        engine: Engine | None = None,
        oracle: Oracle | None = None,
        draws: bool = False,
        table: Callable[[OutcomeCache], BranchTable] = lambda cache: cache,  # the draft's end of it
    ) -> None:
        self.setup = setup
        self.engine = engine or toy_engine(setup)
        self.oracle = oracle or ToyOracle(setup.vocab)
        self.cache = OutcomeCache(setup.max_slots, setup.budget, setup.num_drafts, setup.vocab)
        self.distributions = DraftProbs(setup.max_slots, setup.num_drafts, setup.vocab)
        self.counters = Counters(DRAFT_FIELDS)
        self.server = DraftServer(
            setup.configure(),
            self.engine,
            None,  # type: ignore[arg-type]  # the tests call `handle` themselves
            table(self.cache),
            self.counters,
            self.distributions if draws else None,
        )
        self.live: dict[int, Live] = {}
        self.epoch = 0
        self.hits = 0
        self.num_drafts, self.budget = setup.num_drafts, setup.budget  # what the target wants at present

    @property
    def num_free_blocks(self) -> int:
        return self.server._pool.num_available

    def start(self, slot: int, tokens: list[int], sampling: Sampling = Sampling()) -> Live:  # noqa: B008
        self.epoch += 1
        request = self.live[slot] = Live(slot, self.epoch, list(tokens))
        self.server.handle(Start(slot, self.epoch, np.array(tokens, dtype="<i4").tobytes(), sampling))
        return request

    def stop(self, slot: int) -> None:
        request = self.live.pop(slot)
        self.server.handle(Stop(slot, request.epoch))

    def step(self) -> bool:
        busy = self.server.step()
        self.check_cache()
        return busy

    def run_until_idle(self, limit: int = 500) -> None:
        """Let the draft work until it has nothing left to do."""
        for _ in range(limit):
            if not self.step():
                return
        pytest.fail(f"the draft is still busy after {limit} steps")

    def published(self, slot: int) -> list[tuple[int, int, list[int]]]:
        """(k, token, drafts) of the branches that this round's outcome of the slot can find."""
        request = self.live[slot]
        entries = self.cache.entries[slot]
        now = entries[(entries[:, EPOCH] == request.epoch) & (entries[:, ROUND] == request.round)]
        return [
            (int(e[ACCEPTED]), int(e[TOKEN]), e[FIRST_DRAFT : FIRST_DRAFT + int(e[DEPTH])].tolist())
            for e in now
        ]

    def check_cache(self) -> None:
        for slot, request in self.live.items():
            branches = self.published(slot)
            assert len({(k, token) for k, token, _ in branches}) == len(branches)
            for k, token, drafts in branches:
                assert 0 <= k <= len(request.drafts)
                prefix = [*request.tokens, *request.drafts[:k]]
                count = sum(1 for other, _, _ in branches if other == k)
                likely = self.oracle.rank(prefix)
                if k < len(request.drafts):
                    likely = likely[likely != request.drafts[k]]
                assert token in likely[:count] or (k, token) == request.awaited
                assert drafts == self.continuation([*prefix, token], len(drafts))

    def continuation(self, tokens: list[int], count: int) -> list[int]:
        """What the draft model itself continues with."""
        chain = list(tokens)
        for _ in range(count):
            chain.append(int(self.oracle.rank(chain)[0]))
        return chain[len(tokens) :]

    def await_drafts(self, slot: int, k: int, token: int, num_drafts: int) -> None:
        """The target missed this outcome and waits."""
        request = self.live[slot]
        request.awaited = k, token
        tokens = [*request.drafts[:k], token]
        self.server.handle(Missed([MissedRow(slot, request.epoch, request.round, tokens, num_drafts)]))

    def decide(
        self, slot: int, k: int, token: int, backup: list[int] | None = None, steps_meanwhile: int = 0
    ) -> list[int]:
        """The target accepts k drafts and adds `token`; returns what it verifies next.

        The draft may do some steps after the look-up, before it hears of the outcome.
        """
        request = self.live[slot]
        outcome = Outcome(slot, request.epoch, request.round, k, token)
        (served,) = self.cache.look_up([outcome])
        self.hits += bool(served)
        drafts = (backup or []) if served is None else served[: self.num_drafts]
        for _ in range(steps_meanwhile):
            self.step()
        tokens = [*request.drafts[:k], token]
        num_verified = len(request.drafts)
        message = RoundOutcome(slot, request.epoch, request.round, tokens, drafts, num_verified)
        request.tokens += tokens
        request.drafts = drafts
        request.round += 1
        request.awaited = None
        self.server.handle(Outcomes([message], self.num_drafts, self.budget))
        return drafts

    def decide_like(self, slot: int, rng: random.Random) -> None:
        """A random outcome: mostly predicted ones, sometimes any, sometimes with n-gram drafts."""
        request = self.live[slot]
        branches = self.published(slot)
        if branches and rng.random() < 0.7:
            k, token, _ = rng.choice(branches)
        else:
            k = rng.randint(0, len(request.drafts))
            token = rng.randrange(self.setup.vocab)
            if rng.random() < 0.3 and not any(branch[:2] == (k, token) for branch in branches):
                self.await_drafts(slot, k, token, rng.randint(1, self.setup.num_drafts))
                for _ in range(rng.randint(0, 4)):
                    self.step()
        backup = None
        if rng.random() < 0.4:
            backup = [rng.randrange(self.setup.vocab) for _ in range(rng.randint(1, self.setup.num_drafts))]
            if rng.random() < 0.5:  # n-gram drafts are often right
                tokens = [*request.tokens, *request.drafts[:k], token]
                backup = self.continuation(tokens, len(backup))
        self.decide(slot, k, token, backup, steps_meanwhile=rng.choice([0, 0, 0, 1, 3]))

    def finish(self) -> None:
        """Stop everything; all blocks must be free again."""
        for slot in list(self.live):
            self.stop(slot)
        assert not self.server.step()
        assert self.num_free_blocks == self.engine.num_blocks


def long_run(target: Target, rng: random.Random, turns: int) -> None:
    """Requests come, share prefixes and go; all that is published meanwhile is checked."""
    prefix = prompt(rng, 60)
    for turn in range(turns):
        for slot in range(target.setup.max_slots):
            if slot not in target.live and rng.random() < 0.3:
                target.start(slot, prefix[: rng.randint(1, 60)] + prompt(rng, rng.randint(0, 30)))
            elif slot in target.live and (rng.random() < 0.03 or len(target.live[slot].tokens) > 200):
                target.stop(slot)
        for _ in range(rng.randint(0, 5)):
            target.step()
        for slot in list(target.live):
            if turn % 3 or rng.random() < 0.5:
                target.decide_like(slot, rng)
    target.finish()


def prompt(rng: random.Random, length: int, vocab: int = VOCAB) -> list[int]:
    return [rng.randrange(vocab) for _ in range(length)]
