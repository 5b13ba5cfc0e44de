"""One step's batch, as the server builds it and the engine runs it (pure)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """A ragged batch: R rows, N tokens in all, L positions whose next token is wanted."""

    tokens: Int64Array  # [N]
    positions: Int64Array  # [N], absolute position of each token in its row
    query_lens: Int32Array  # [R], tokens of each row in this step; they sum to N
    block_tables: Int32Array  # [R, max_blocks], the blocks that hold each row's KV
    wanted: Int64Array  # [L], indices into the N tokens
