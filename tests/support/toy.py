"""A toy language model and a draft engine on it whose KV store notices every bookkeeping mistake.

The toy's next tokens are a pure function of the whole token prefix. Its "KV" of a position is a digest of all
tokens up to there, computed from the digest that the row's block table holds for the position before. So a
wrong block, a copy left out, a wrong position or a block handed out twice changes what is published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import numpy as np
import numpy.typing as npt

from vllm_ssd.draft.rows import Candidates, Place, Rows

Int64Array = npt.NDArray[np.int64]

MODULUS = (1 << 61) - 1
START, NOTHING = 7, 0


def digest(before: int, token: int, position: int) -> int:
    """The digest of a prefix that ends with `token` at `position`."""
    return (before * 1_000_003 + token * 8_191 + position * 131 + 17) % MODULUS


@lru_cache(maxsize=1 << 16)
def ranked_tokens(prefix_digest: int, vocab_size: int) -> Int64Array:
    """[vocab_size] all tokens, most likely first; not to be changed."""
    ranked = np.random.default_rng(prefix_digest).permutation(vocab_size)
    ranked.flags.writeable = False
    return ranked


def rank_after(tokens: Sequence[int], vocab_size: int) -> Int64Array:
    """[vocab_size] all tokens by likelihood after these."""
    return ranked_tokens(_digest_of(tuple(tokens)), vocab_size)


@lru_cache(maxsize=1 << 14)
def _digest_of(tokens: tuple[int, ...]) -> int:
    """Remembered: what a branch holds is checked after every step."""
    state = START
    for position, token in enumerate(tokens):
        state = digest(state, token, position)
    return state


def fingerprint(state: int, seed: int) -> float:
    """What the toy's distribution has everywhere: it tells which prefix and which noise a draft came from."""
    return float((state * 31 + seed) % 65_521)


@dataclass(frozen=True)
class ToyPredictions:
    """`vllm_ssd.draft.rows.Predictions`; L positions."""

    states: list[int]  # [L] digests of the prefixes
    drafts: Int64Array
    distributions: npt.NDArray[np.float32] | None


class ToyEngine:
    """`vllm_ssd.draft.server.Engine` on the toy model.

    Args:
        num_blocks, block_size, vocab_size, max_model_len: as the server sees them.
        max_rows, max_tokens: what one step may hold at most, as the real engine is configured.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        max_model_len: int,
        max_rows: int = 1 << 30,
        max_tokens: int = 1 << 30,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        # [num_blocks, block_size, 2]: of each position the digest of the prefix before it, and up to it
        self.kv = np.full((num_blocks, block_size, 2), NOTHING, dtype=np.int64)
        self.row_counts: list[int] = []
        self.query_lens: list[int] = []
        self.num_copies = 0
        self.num_advances = 0
        self.num_checks = 0

    def forward(self, rows: Rows) -> ToyPredictions:
        num_rows = len(rows.query_lens)
        assert rows.block_tables.shape == (num_rows, -(-self.max_model_len // self.block_size))
        assert int(rows.query_lens.sum()) == len(rows.tokens) == len(rows.positions)
        assert num_rows <= self._max_rows, f"{num_rows} rows in a step of at most {self._max_rows}"
        assert len(rows.tokens) <= self._max_tokens
        assert rows.positions.min() >= 0
        assert rows.positions.max() < self.max_model_len
        assert ((rows.tokens >= 0) & (rows.tokens < self.vocab_size)).all()
        self.row_counts.append(num_rows)
        self.query_lens += rows.query_lens.tolist()
        before = self.kv.copy()
        written: dict[tuple[int, int], int] = {}
        states: list[int] = []
        first = 0
        for length, table in zip(rows.query_lens.tolist(), rows.block_tables, strict=True):
            states += self._run_row(rows, first, length, table, before, written)
            first += length
        wanted = [states[index] for index in rows.wanted]
        drafts = np.array([ranked_tokens(state, self.vocab_size)[0] for state in wanted], dtype=np.int64)
        self._rows, self._drafts = rows, drafts
        if rows.sampling is None:
            return ToyPredictions(wanted, drafts, None)
        distributions = [
            np.full(self.vocab_size, fingerprint(state, seed), dtype=np.float32)
            for state, seed in zip(wanted, rows.sampling.seeds.tolist(), strict=True)
        ]
        return ToyPredictions(wanted, drafts, np.array(distributions))

    def advance(self) -> ToyPredictions:
        assert (self._rows.query_lens == 1).all()
        self.num_advances += 1
        return self.forward(replace(self._rows, tokens=self._drafts, positions=self._rows.positions + 1))

    def check(self) -> None:
        self.num_checks += 1

    def likeliest(self, places: list[Place], num_candidates: int) -> Candidates:
        states = [cast(ToyPredictions, step).states[row] for step, row in places]
        tokens = np.array([ranked_tokens(state, self.vocab_size)[:num_candidates] for state in states])
        # Each token half as likely as the one before it.
        log_probs = np.tile(-np.log(2) * np.arange(1, num_candidates + 1, dtype=np.float32), (len(states), 1))
        return Candidates(tokens, log_probs)

    def copy_blocks(self, sources: Int64Array, targets: Int64Array) -> None:
        assert len(set(targets.tolist())) == len(targets)
        assert not set(targets.tolist()) & set(sources.tolist())
        self.kv[targets] = self.kv[sources]
        self.num_copies += len(sources)

    def _run_row(
        self,
        rows: Rows,
        first: int,
        length: int,
        table: npt.NDArray[np.int32],
        before: Int64Array,
        written: dict[tuple[int, int], int],
    ) -> list[int]:
        start = int(rows.positions[first])
        assert rows.positions[first : first + length].tolist() == list(range(start, start + length))
        # What the row builds on was written before this step: rows of one step must not need one another.
        state = self._prefix_digest(before, table, start)
        states = []
        for index in range(first, first + length):
            position, token = int(rows.positions[index]), int(rows.tokens[index])
            block, offset = divmod(position, self.block_size)
            place = (int(table[block]), offset)
            parent, state = state, digest(state, token, position)
            assert written.setdefault(place, state) == state, f"two rows write different KV to {place}"
            self.kv[place] = parent, state
            states.append(state)
        return states

    def _prefix_digest(self, kv: Int64Array, table: npt.NDArray[np.int32], length: int) -> int:
        """Attention reads all of the prefix, so every position must still hold what leads to the next."""
        block, offset = np.divmod(np.arange(length), self.block_size)
        parents, digests = kv[table[block], offset].T
        assert (digests != NOTHING).all(), "a row's prefix has a position without KV"
        chain = np.concatenate([[START], digests])
        assert (parents == chain[:-1]).all(), "a row's prefix mixes KV of different prefixes"
        return int(chain[-1])
