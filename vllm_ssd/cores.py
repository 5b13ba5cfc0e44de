"""CPU cores: what there is, who takes which.

Draft and target must not share a core: OpenMP threads of both on the same cores are many times slower than no
speculation at all. So the draft has one core of its own, and vLLM binds the target's ranks to the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import groupby

import numpy as np
from vllm import envs
from vllm.logger import init_logger
from vllm.platforms import CpuArchEnum, current_platform
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_visible_memory_node, parse_id_list

from vllm_ssd.link.announcement import cores_of_others

logger = init_logger("vllm.ssd")

_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
_bound: str | None = None  # what an engine of this process has set that to


def parse_cores(text: str, option: str = "ssd_draft_cores") -> list[int]:
    """The cores that a text such as "0,4-6" names: [0, 4, 5, 6]. `option` is where it was given.

    Raises:
        ValueError: if the text is not a list of core numbers and ranges.
    """
    try:
        parts = [parse_id_list(part) for part in text.split(",")]
    except ValueError:
        parts = [[]]
    if not all(parts):
        raise ValueError(f"{option}={text!r} is not of the form '1' or '8-11,15'")
    return sorted({core for part in parts for core in part})


def format_cores(cores: Iterable[int]) -> str:
    """The text that names them, as in "0,4,5,6"."""
    return ",".join(map(str, cores))


def choose_draft_cores(given: str | None, device: str, engine_id: str) -> list[int]:
    """The draft's cores: those that the user named, or the last one that nobody else takes; with a GPU all.

    Args:
        given: `ssd_draft_cores`.
        device: the draft's.
        engine_id: of this engine, see `cores_of_others`.

    Raises:
        ValueError: if the user names a core that this process may not use.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if given is not None:
        cores = parse_cores(given)
        missing = sorted(set(cores) - set(allowed))
        if missing:
            raise ValueError(f"ssd_draft_cores: this process has no core {missing[0]}; choose from {allowed}")
        return cores
    if device != "cpu":
        return allowed
    left = set(allowed) - _bound_cores(_binding_by_user())
    free = left - cores_of_others(engine_id)
    return [max(free or left or allowed)]


def bind_target(draft_cores: Iterable[int], num_ranks: int, engine_id: str) -> None:
    """Leave the draft its cores: bind the target's ranks to the others, and warn where some are shared.

    Args:
        num_ranks: of the target on this host.
        engine_id: of this engine, see `cores_of_others`.

    Raises:
        ValueError: if there are too few cores for several ranks.
    """
    others = cores_of_others(engine_id)
    _leave_cores_to_draft(set(draft_cores), num_ranks, others)
    _warn_of_shared_cores(set(draft_cores), others)


def target_cores() -> set[int]:
    """The cores that the target is bound to; all of this process where it is bound to none."""
    return _bound_cores(os.environ.get(_BINDING, "auto")) or os.sched_getaffinity(0)


def restore_binding() -> None:
    """Before an engine without SSD: let vLLM choose its cores again, if an engine of ours has."""
    if _bound is not None and os.environ.get(_BINDING) == _bound:
        del os.environ[_BINDING]


def _bound_cores(binding: str) -> set[int]:
    """Cores a binding names for the target; empty where vLLM is left to choose."""
    if binding in ("", "auto", "nobind"):
        return set()
    return {core for part in binding.split("|") for core in parse_cores(part, _BINDING)}


def _binding_by_user() -> str:
    """What the user bound the target's cores to; not what an earlier engine of this process did."""
    binding = os.environ.get(_BINDING, "auto")
    return "auto" if binding == _bound else binding


def _leave_cores_to_draft(draft_cores: set[int], num_ranks: int, others: set[int]) -> None:
    """Bind the target's ranks to the remaining cores unless the user bound them.

    Args:
        others: cores of other engines, left to them where there are enough.
    """
    global _bound
    if _binding_by_user() != "auto":
        return
    shares = _shares_of_ranks(draft_cores | others, num_ranks)
    if not all(shares):
        shares = _shares_of_ranks(draft_cores, num_ranks)
    if num_ranks > 1 and not all(shares):
        raise ValueError(
            f"{num_ranks} ranks of the target need a core each beside the draft's; set {_BINDING}, such as "
            "'0|1', to let them share"
        )
    if any(shares):
        os.environ[_BINDING] = _bound = "|".join(format_cores(sorted(share)) for share in shares)


def _warn_of_shared_cores(draft_cores: set[int], others: set[int]) -> None:
    with_others = sorted((target_cores() | draft_cores) & others)
    if with_others:
        logger.warning(
            "another engine with SSD uses core %s as well, which may make both many times slower: give each "
            "engine cores of its own with ssd_draft_cores and %s",
            format_cores(with_others),
            _BINDING,
        )
    shared = sorted(target_cores() & draft_cores)
    if shared:
        logger.warning(
            "target and draft share core %s, which may be many times slower than no speculation at all: give "
            "the draft a core of its own with ssd_draft_cores, and the target others with %s",
            format_cores(shared),
            _BINDING,
        )


def _shares_of_ranks(taken: set[int], num_ranks: int) -> list[list[int]]:
    """The logical cores of each rank: those of vLLM's own "auto", less the physical cores that are taken.

    So each rank has a NUMA node where there are enough, one thread of each physical core on x86, and leaves a
    core to the engine's other processes.
    """
    cpus = sorted(get_allowed_cpu_list(), key=lambda cpu: (cpu.numa_node, cpu.physical_core, cpu.id))
    physical = [
        (node, [cpu.id for cpu in group])
        for (node, _), group in groupby(cpus, key=lambda cpu: (cpu.numa_node, cpu.physical_core))
    ]
    free = [(node, cores) for node, cores in physical if not set(cores) & taken]
    if len(free) < num_ranks:
        free = [(cpu.numa_node, [cpu.id]) for cpu in cpus if cpu.id not in taken]
    with_cores = {node for node, _ in free}
    nodes = [node for node in get_visible_memory_node() if node in with_cores]
    if len(nodes) >= num_ranks:
        shares = [[cores for of, cores in free if of == node] for node in nodes[:num_ranks]]
    else:
        shares = [[free[i][1] for i in share] for share in np.array_split(np.arange(len(free)), num_ranks)]
    is_x86 = current_platform.get_cpu_architecture() == CpuArchEnum.X86
    reserved = envs.VLLM_CPU_NUM_OF_RESERVED_CPU
    each = 1 if reserved is None else reserved // num_ranks
    kept = [share[: max(0, len(share) - each)] or share for share in shares]
    return [[core for cores in share for core in (cores[-1:] if is_x86 else cores)] for share in kept]
