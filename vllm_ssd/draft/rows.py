"""One step: the batch that the server builds, and what the engine makes of it (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RowSampling:
    """How each of L wanted positions is sampled; see `vllm_ssd.link.messages.Sampling`."""

    temperatures: Float32Array  # [L], 0: greedy
    seeds: Int64Array  # [L], of the noise
    top_k: Int32Array  # [L], 0: all tokens
    top_p: Float32Array  # [L]


@dataclass(frozen=True)
class RowEntries:
    """Where in the outcome cache the drafts of L wanted positions go."""

    places: Int64Array  # [L], which of the entries of all slots, or NO_ENTRY (`link.outcome_cache`)
    depths: Int64Array  # [L], how many drafts it has


@dataclass(frozen=True)
class Rows:
    """A ragged batch: R rows, N tokens in all, L positions whose next token is wanted."""

    tokens: Int64Array  # [N]
    positions: Int64Array  # [N], absolute position of each token in its row
    query_lens: Int32Array  # [R], tokens of each row in this step; they sum to N
    block_tables: Int32Array  # [R, max_blocks], the blocks that hold each row's KV
    wanted: Int64Array  # [L], indices into the N tokens
    sampling: RowSampling | None = None  # None: all greedy
    entries: RowEntries | None = None  # None: what this step yields is not published


class Predictions(Protocol):
    """What a step made of its L wanted positions; see `Engine.likeliest` for more than the drafts."""

    @property
    def drafts(self) -> Int64Array:
        """[L] the next draft at each position."""

    @property
    def distributions(self) -> Float32Array | None:
        """[L, V] what the drafts were drawn from; None where they are the likeliest tokens."""


class Place(NamedTuple):
    """One of the wanted positions of a step."""

    predictions: Predictions
    row: int


@dataclass(frozen=True)
class Candidates:
    """The likeliest next tokens at L positions, most likely first; in coupled rows with the noise added."""

    tokens: Int64Array  # [L, num_candidates]
    log_probs: npt.NDArray[np.floating[Any]]  # [L, num_candidates], natural logarithms

    def __getitem__(self, row: int) -> Candidates:
        return Candidates(self.tokens[row], self.log_probs[row])


class Engine(Protocol):
    """What the server needs of the draft model (see `vllm_ssd.draft.engine.DraftEngine`)."""

    block_size: int
    num_blocks: int
    vocab_size: int
    max_model_len: int

    def forward(self, rows: Rows) -> Predictions: ...

    def advance(self) -> Predictions: ...

    def likeliest(self, places: list[Place], num_candidates: int) -> Candidates: ...

    def copy_blocks(self, sources: Int64Array, targets: Int64Array) -> None: ...

    def check(self) -> None:
        """Raises if no step can be run any more, whatever is in it."""
