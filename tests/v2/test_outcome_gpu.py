"""The outcome cache in the target's GPU: kernels announce branches, and steps publish by themselves."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from device import DEVICE
from target import Setup, Target, long_run
from toy import ToyEngine, ToyPredictions

from vllm_ssd.draft.rows import RowEntries, Rows
from vllm_ssd.kernels.publish import publish
from vllm_ssd.link.outcome_cache import FIRST_DRAFT, OutcomeCache
from vllm_ssd.link.outcome_cache_gpu import GpuOutcomeCache, allocate_table, open_table

SHAPE = (3, 4, FIRST_DRAFT + 2)


class PublishingToy(ToyEngine):
    """Its steps publish by themselves, as those of `DraftEngine` do."""

    table: torch.Tensor
    _entries: RowEntries | None = None

    def forward(self, rows: Rows) -> ToyPredictions:
        predictions = super().forward(rows)
        assert rows.entries is not None
        if rows.entries is not self._entries:  # else the last step's rows continued
            self._entries = rows.entries
            self._places, self._depths = map(torch.from_numpy, (rows.entries.places, rows.entries.depths))
        publish(self.table, self._places, self._depths, torch.from_numpy(predictions.drafts))
        return predictions


@pytest.mark.skipif(DEVICE == "cuda", reason="the target of these tests reads a table in the host's memory")
@pytest.mark.parametrize("seed", range(2))
def test_what_steps_publish_is_what_the_host_would(seed: int) -> None:
    rng = random.Random(seed)
    setup = Setup(num_drafts=3, fanout="global", num_blocks=[60, 400][seed], max_model_len=400)
    toy = PublishingToy(setup.num_blocks, setup.block_size, setup.vocab, setup.max_model_len)

    def table(cache: OutcomeCache) -> GpuOutcomeCache:
        toy.table = torch.from_numpy(cache.entries)
        return GpuOutcomeCache(toy.table, torch.device("cpu"))

    target = Target(setup, toy, table=table)
    long_run(target, rng, 80)
    assert target.hits > 10
    assert toy.num_advances > 10


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no CUDA IPC")
def test_another_process_writes_the_table() -> None:
    device = torch.device("cuda:0")
    allocated = allocate_table(SHAPE, device)
    assert allocated is not None
    entries, handle = allocated
    assert entries.is_cuda
    assert not entries.any()
    subprocess.run([sys.executable, "-c", WRITER, handle.hex(), str(SHAPE)], check=True, timeout=60)
    expected = torch.zeros(SHAPE, dtype=torch.int64)
    expected[1, 2:] = torch.tensor([[7, 5, 0, 40, 1, 60, 0], [7, 5, 2, 41, 1, 61, 0]])
    assert torch.equal(entries.cpu(), expected)


WRITER = """
import sys
import numpy as np
import torch
from vllm_ssd.kernels.publish import publish
from vllm_ssd.link.outcome_cache_gpu import GpuOutcomeCache, open_table

device = torch.device("cuda:0")
entries = open_table(bytes.fromhex(sys.argv[1]), eval(sys.argv[2]), device)
cache = GpuOutcomeCache(entries, device)
cache.open_branches(1, 2, 7, 5, np.array([0, 2]), np.array([40, 41]))
places, depths, drafts = torch.tensor([[6, 7, -1], [0, 0, 0], [60, 61, 62]], device=device)
publish(entries, places, depths, drafts)
torch.cuda.synchronize()
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="there is CUDA IPC")
def test_where_memory_cannot_be_shared_the_hosts_has_to_do(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cpu")
    assert allocate_table(SHAPE, device) is None
    assert open_table(bytes(128), SHAPE, device) is None
    assert [record.message.count("stays in the host's memory") for record in caplog.records] == [1, 1]
