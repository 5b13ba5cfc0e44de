"""Steps that the host does not launch kernel by kernel: one CUDA graph for each size of batch.

A captured step advances its rows by one token, feeds each with the draft of the step before, and chooses the
next, so that a round of K steps is K replays. Rows are therefore loaded as they were one token ago. A batch
is filled up to the next size with rows that only touch a block of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vllm_ssd.draft.inputs import StepInputs
from vllm_ssd.draft.rows import Int64Array, Rows
from vllm_ssd.link.outcome_cache import NO_ENTRY

Replay = Callable[[], None]
Capture = Callable[[Replay], Replay]
Perturb = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Publish = Callable[[Tensor, Tensor, Tensor], None]


class StepGraph:
    """A step over at most so many rows of one token each.

    Args:
        inputs: of that many rows; the memory that the graph reads. It is taken over.
        compute: the logits [R, V] of the inputs.
        perturb: logits [R, V], temperatures, seeds, positions [R] -> what drafts are chosen by, [R, V].
        capture: makes of a function one that does again, on the device, what that did.
        publish: puts drafts at places, which have depths, all [R] (`kernels.publish`); None: the host does.
    """

    def __init__(
        self,
        inputs: StepInputs,
        compute: Callable[[], Tensor],
        perturb: Perturb,
        capture: Capture,
        publish: Publish | None,
    ) -> None:
        self._inputs, self._compute, self._perturb, self._publish = inputs, compute, perturb, publish
        self._filling = inputs.attention.block_table_tensor.clone()
        self._drafts = torch.zeros_like(inputs.tokens)
        self._temperatures = torch.zeros(len(inputs.tokens), device=inputs.tokens.device)
        self._seeds = torch.zeros_like(inputs.tokens)
        self._places = torch.full_like(inputs.tokens, NO_ENTRY)
        self._depths = torch.zeros_like(inputs.tokens)
        self._logits = torch.empty(0)
        self._num_rows = 0
        self._replay = capture(self._step)

    def load(self, rows: Rows) -> None:
        """Put these rows in, each with its next token."""
        self._num_rows = here = len(rows.tokens)
        attention = self._inputs.attention
        table = attention.block_table_tensor
        table.copy_(self._filling)
        table[:here, : rows.block_tables.shape[1]] = torch.from_numpy(rows.block_tables)
        self._inputs.positions.zero_()
        self._inputs.positions[:here] = torch.from_numpy(rows.positions - 1)
        attention.seq_lens.copy_(self._inputs.positions + 1)
        self._drafts[:here] = torch.from_numpy(rows.tokens)
        self._temperatures.zero_()
        if rows.sampling is not None:
            self._temperatures[:here] = torch.from_numpy(rows.sampling.temperatures)
            self._seeds[:here] = torch.from_numpy(rows.sampling.seeds)
        self._places.fill_(NO_ENTRY)
        if rows.entries is not None:
            self._places[:here] = torch.from_numpy(rows.entries.places)
            self._depths[:here] = torch.from_numpy(rows.entries.depths)

    def step(self) -> tuple[Tensor, Int64Array]:
        """Of the rows that were loaded: what drafts are chosen by [n, V], and the drafts [n]; both copies."""
        self._replay()
        drafts = self._drafts[: self._num_rows].to("cpu", copy=True)
        return self._logits[: self._num_rows].clone(), drafts.numpy()

    def _step(self) -> None:
        self._inputs.advance(self._drafts)
        self._logits = self._perturb(self._compute(), self._temperatures, self._seeds, self._inputs.positions)
        torch.argmax(self._logits, dim=-1, out=self._drafts)
        if self._publish is not None:
            self._publish(self._places, self._depths, self._drafts)


class StepGraphs:
    """A graph for each of some sizes, captured the largest first, since they share their memory.

    Args:
        sizes: numbers of rows.
        build: the graph of a size.
    """

    def __init__(self, sizes: Sequence[int], build: Callable[[int], StepGraph]) -> None:
        self._graphs = {size: build(size) for size in sorted(sizes, reverse=True)}

    def load(self, rows: Rows) -> StepGraph | None:
        """The graph for these rows, loaded with them; None where they are not what a graph can do."""
        fitting = [size for size in self._graphs if size >= len(rows.query_lens)]
        if not fitting or not _can_be_replayed(rows):
            return None
        graph = self._graphs[min(fitting)]
        graph.load(rows)
        return graph


def sizes_up_to(max_rows: int) -> list[int]:
    """Numbers of rows to capture: none is filled up by more than half of itself, past the first."""
    most = min(max_rows, 512)
    return [*(size for size in (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384) if size < most), most]


def capture_cuda_graphs() -> Capture:
    """Captures CUDA graphs that share their memory."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Replay) -> Replay:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # what is compiled or allocated at a first use
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
        return graph.replay

    return capture


def _can_be_replayed(rows: Rows) -> bool:
    """Whether they are branches, all with a token each, and only perturbed by noise."""
    if len(rows.tokens) > len(rows.query_lens) or len(rows.wanted) < len(rows.tokens):
        return False
    sampling = rows.sampling
    return sampling is None or not (np.any(sampling.top_k > 0) or np.any(sampling.top_p < 1))
