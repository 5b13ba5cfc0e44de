"""What a step is fed with, on the device: made anew from rows, or advanced in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_ssd.draft.rows import Rows

SlotsByLayer = Callable[[Tensor], dict[str, Tensor]]


@dataclass
class StepInputs:
    """N tokens of R rows."""

    tokens: Tensor  # [N]
    positions: Tensor  # [N]
    row_of_token: Tensor  # [N]
    slots: Tensor  # [N], where each token's KV goes
    slots_by_layer: dict[str, Tensor]
    attention: CommonAttentionMetadata  # of R rows; block table [R, blocks]
    block_size: int

    def find_slots(self) -> None:
        """Where the KV of these positions goes."""
        blocks = self.attention.block_table_tensor[self.row_of_token, self.positions // self.block_size]
        torch.add(blocks * self.block_size, self.positions % self.block_size, out=self.slots)

    def advance(self, tokens: Tensor) -> None:
        """Go on by one token in each row, of which all have one; on the device alone."""
        self.tokens.copy_(tokens)
        self.positions += 1
        self.attention.seq_lens += 1
        self.find_slots()

    def note_advance(self) -> None:
        """Let what the host knows of the rows follow."""
        attention = self.attention
        attention.max_seq_len += 1
        if attention.seq_lens.device.type != "cpu":  # on the CPU both are one tensor
            attention.seq_lens_cpu_upper_bound += 1


def inputs_of(rows: Rows, block_size: int, slots_by_layer: SlotsByLayer, device: torch.device) -> StepInputs:
    """The inputs of a step over these rows.

    Args:
        slots_by_layer: from [N] slots to what vLLM's forward context wants; views of the same memory.
    """
    num_rows, num_tokens = len(rows.query_lens), len(rows.tokens)
    query_start = np.zeros(num_rows + 1, dtype=np.int32)
    np.cumsum(rows.query_lens, out=query_start[1:])
    seq_lens = rows.positions[query_start[1:] - 1].astype(np.int32) + 1
    query_start_cpu, seq_lens_cpu = torch.from_numpy(query_start), torch.from_numpy(seq_lens)
    positions = torch.from_numpy(rows.positions).to(device)
    slots = torch.empty_like(positions)
    inputs = StepInputs(
        tokens=torch.from_numpy(rows.tokens).to(device),
        positions=positions,
        row_of_token=torch.from_numpy(np.repeat(np.arange(num_rows), rows.query_lens)).to(device),
        slots=slots,
        slots_by_layer=slots_by_layer(slots),
        attention=CommonAttentionMetadata(
            query_start_loc=query_start_cpu.to(device),
            query_start_loc_cpu=query_start_cpu,
            seq_lens=seq_lens_cpu.to(device),
            seq_lens_cpu_upper_bound=seq_lens_cpu,
            num_reqs=num_rows,
            num_actual_tokens=num_tokens,
            max_query_len=int(rows.query_lens.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=torch.from_numpy(rows.block_tables).to(device),
            slot_mapping=slots,
            positions=positions,
        ),
        block_size=block_size,
    )
    inputs.find_slots()
    return inputs
