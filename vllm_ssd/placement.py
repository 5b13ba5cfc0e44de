"""Where the draft runs and what it gets: what the user said, and a choice where they left it open."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from vllm.config import ParallelConfig
from vllm.platforms import current_platform

from vllm_ssd.cores import choose_draft_cores, target_cores
from vllm_ssd.link.announcement import new_engine_id

GIB = 1 << 30
_DRAFT_MEMORY = {"cpu": 0.5, "cuda": 4.0}  # GiB
_BYTES = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Placement:
    """The draft's place. Chosen once, in the engine's frontend; all its processes get it with the config."""

    device: str  # "cpu" or such as "cuda:1"
    cores: tuple[int, ...]  # CPU cores of the draft process
    memory_bytes: int  # of its KV cache
    engine_id: str  # by which other processes find the engine

    @property
    def engine_cores(self) -> set[int]:
        """Those of target and draft; none with a GPU, where neither is bound to any."""
        return target_cores() | set(self.cores) if self.device == "cpu" else set()


def place_draft(
    parallel: ParallelConfig,
    device: str | None,
    cores: str | None,
    memory: float | None,
) -> Placement:
    """Check what the user said of the draft's place, and choose the rest.

    Args:
        parallel: the target's.
        device, cores, memory: `ssd_draft_device`, `ssd_draft_cores` and `ssd_draft_memory` (GiB), None where
            the user gave none.

    Raises:
        ValueError: if there is no such device, core or memory; one line says what to change.
    """
    engine_id = new_engine_id()
    device = _choose_device(device, parallel)
    memory = memory or _DRAFT_MEMORY[device.partition(":")[0]]
    _check_memory(memory, device)
    chosen = choose_draft_cores(cores, device, engine_id)
    return Placement(device, tuple(chosen), int(memory * GIB), engine_id)


def parse_gib(text: str) -> Any:
    """GiB, as a number, of a text such as "1.5", "1.5 GiB", "512MB" or, as in vLLM's own options, "1g" (10^9
    bytes) and "1G" (2^30). Other text is left as it is."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kKmMgGtT])(i?[bB])?\s*", text)
    if match is None:
        return text
    number, unit, ending = match.groups()
    if ending:
        unit = unit.upper() if len(ending) > 1 else unit.lower()
    return float(number) * _BYTES[unit] / GIB


def _choose_device(chosen: str | None, parallel: ParallelConfig) -> str:
    if current_platform.is_cpu():
        if chosen not in (None, "cpu"):
            raise ValueError(f"ssd_draft_device={chosen!r}: there is no GPU here; remove it")
        return "cpu"
    num_devices = current_platform.device_count()
    targets = parallel.assigned_physical_gpu_ids
    if chosen is None and targets is not None:
        raise ValueError(
            f"the target is given GPUs {targets} (device_ids); name the draft's as well: ssd_draft_device"
        )
    if chosen is None and parallel.distributed_executor_backend == "ray":
        raise ValueError(
            "with Ray the target's worker sees its own GPUs only; name the draft's: ssd_draft_device"
        )
    if chosen is None:
        return f"cuda:{num_devices - 1}"  # the target's, if it has them all
    if chosen not in [f"cuda:{index}" for index in range(num_devices)]:
        raise ValueError(f"ssd_draft_device={chosen!r} is none of cuda:0 to cuda:{num_devices - 1}")
    return chosen


def _check_memory(asked: float, device: str) -> None:
    """Refuse more GiB than there are."""
    if device == "cpu":
        where, there = "this machine", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    else:
        where = device
        there = current_platform.get_device_total_memory(int(device.partition(":")[2])) / GIB
    if not asked < there:
        # vLLM's command line makes 1000000000 of "1g".
        meant = (
            f" for {asked:.0f} bytes write {asked / GIB:.3g}" if 1 << 20 <= asked < 1 << 50 else " lower it"
        )
        raise ValueError(f"ssd_draft_memory={asked:g} is in GiB, and {where} has {there:.1f} GiB;{meant}")
