"""The outcome cache in the memory of the target's GPU, which the draft process writes over CUDA IPC.

A look-up on the device then reads its own memory, and a step of the draft publishes from device to device
(NVLink or PCIe): no host takes part. The target allocates the table and hands out its handle. Where one of
them cannot, the table in the host's memory (`vllm_ssd.link.outcome_cache`) has to do.
"""

from __future__ import annotations

import math
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.device_communicators.cuda_wrapper import CudaRTLibrary, cudaIpcMemHandle_t
from vllm.logger import init_logger

from vllm_ssd.kernels.publish import replace
from vllm_ssd.link.outcome_cache import (
    ACCEPTED,
    DECLINED,
    EPOCH,
    FIRST_DRAFT,
    ROUND,
    TOKEN,
    Int64Array,
    Outcome,
)

logger = init_logger("vllm.ssd")

_FAILURES = (RuntimeError, AssertionError, AttributeError, OSError)  # of the driver, or to find its library


class _Memory:
    """What torch makes a tensor of; it lives as long as the tensor does."""

    def __init__(self, pointer: int, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "<i8",
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }


def allocate_table(shape: tuple[int, int, int], device: torch.device) -> tuple[Tensor, bytes] | None:
    """An empty table [S, F, FIRST_DRAFT + K] int64 on the device, and the handle that opens it elsewhere.

    None where this device or driver cannot share memory so.
    """
    try:
        return _allocate(shape, device)
    except _FAILURES as error:
        _note(error)
        return None


def open_table(handle: bytes, shape: tuple[int, int, int], device: torch.device) -> Tensor | None:
    """The table of another process, as kernels on this device write it; None if they cannot reach it."""
    try:
        library = CudaRTLibrary()
        with torch.cuda.device(device):
            pointer = library.cudaIpcOpenMemHandle(cudaIpcMemHandle_t.from_buffer_copy(handle))
            return torch.as_tensor(_Memory(_address(pointer), shape))
    except _FAILURES as error:
        _note(error)
        return None


def _allocate(shape: tuple[int, int, int], device: torch.device) -> tuple[Tensor, bytes]:
    library = CudaRTLibrary()
    num_bytes = 8 * math.prod(shape)
    with torch.cuda.device(device):
        # By itself: a handle is that of a whole allocation, and those of torch hold other tensors too.
        pointer = library.cudaMalloc(num_bytes)
        memory = _Memory(_address(pointer), shape)
        weakref.finalize(memory, library.cudaFree, pointer).atexit = False  # the driver ends before it
        library.cudaMemset(pointer, 0, num_bytes)
        library.cudaDeviceSynchronize()
        return torch.as_tensor(memory), bytes(library.cudaIpcGetMemHandle(pointer))


def _note(error: Exception) -> None:
    with suppress(*_FAILURES):
        CudaRTLibrary().cudaGetLastError()  # or the next call of torch raises it
    logger.warning("SSD: the outcome cache stays in the host's memory, where look-ups are slower: %s", error)


def _address(pointer: Any) -> int:
    assert pointer.value
    return int(pointer.value)


class GpuOutcomeCache:
    """The draft's end of the table: branches are announced by kernels, in the order of its steps.

    Args:
        entries: [max_slots, branch_budget, FIRST_DRAFT + K] int64, the table.
        device: the draft's.
    """

    def __init__(self, entries: Tensor, device: torch.device) -> None:
        self._entries = entries
        self._device = device
        self._budget, self._width = entries.shape[1:]
        self.close_branches(0)  # nothing is open yet: this compiles what does it

    def open_branches(
        self, slot: int, first: int, epoch: int, round_: int, ks: Int64Array, tokens: Int64Array
    ) -> None:
        """See `OutcomeCache.open_branches`."""
        new = np.zeros((len(ks), self._width), dtype=np.int64)
        new[:, EPOCH], new[:, ROUND], new[:, ACCEPTED], new[:, TOKEN] = epoch, round_, ks, tokens
        self._replace(slot, first, new)

    def publish(self, slot: int, first: int, depth: int, tokens: Int64Array) -> None:
        """The step that yielded these tokens has done so (`DraftEngine.publish_by`)."""

    def close_branches(self, slot: int) -> None:
        """See `OutcomeCache.close_branches`."""
        self._replace(slot, 0, np.zeros((self._budget, self._width), dtype=np.int64))

    def decline(self, outcome: Outcome) -> None:
        """See `OutcomeCache.decline`."""
        entry = (outcome.epoch, outcome.round, outcome.k, outcome.token, DECLINED)
        new = np.zeros((1, self._width), dtype=np.int64)
        new[:, :FIRST_DRAFT] = entry
        self._replace(outcome.slot, 0, new)

    def _replace(self, slot: int, first: int, new: Int64Array) -> None:
        replace(self._entries, slot * self._budget + first, torch.from_numpy(new).to(self._device))
