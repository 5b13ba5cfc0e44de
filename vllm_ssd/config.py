"""SSDSpeculativeConfig: every option of method "ssd", its default, its check, and every refusal."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from dataclasses import Field as DataclassField
from itertools import groupby
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from vllm import envs
from vllm.config.speculative import SpeculativeConfig
from vllm.config.utils import config
from vllm.logger import init_logger
from vllm.platforms import CpuArchEnum, current_platform
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_visible_memory_node

from vllm_ssd import compat
from vllm_ssd.link.announcement import cores_of_others, new_engine_id
from vllm_ssd.target.draft_args import load_args
from vllm_ssd.vocabularies import warn_of_other_tokens

logger = init_logger("vllm.ssd")

GIB = 1 << 30
MAX_SPECULATIVE_TOKENS = 16

# Options of `SpeculativeConfig` that SSD honours. Any other, also of a later vLLM, is refused unless it has
# its default.
_HONOURED = frozenset(
    {
        "method",
        "model",
        "num_speculative_tokens",
        "draft_tensor_parallel_size",  # 1 only
        "enforce_eager",
        "quantization",
        "kv_cache_dtype",
        "attention_backend",
        "moe_backend",
        "max_model_len",
        "revision",
        "code_revision",
        "draft_load_config",
    }
)
# Fields of it that are no options: vLLM's own.
_INTERNAL = ("target_model_config", "target_parallel_config", "draft_model_config", "draft_parallel_config")
_ORDERED_STORES = ("x86_64", "AMD64")  # names of CPUs whose stores other cores see in order
_SHORT_FLAGS = {"spec_method": "method", "spec_model": "model", "spec_tokens": "num_speculative_tokens"}
_DRAFT_MEMORY = {"cpu": 0.5, "cuda": 4.0}  # GiB
_BYTES = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
_bound: str | None = None  # what an engine of this process has set that to

# Of the target's kinds of parallelism, those that SSD does not know.
_ONE_OF_EACH = ("data_parallel_size", "prefill_context_parallel_size")


@config
class SSDSpeculativeConfig(SpeculativeConfig):
    """Configuration of Speculative Speculative Decoding.

    Only `model` and `num_speculative_tokens` are needed. The options of `SpeculativeConfig` that concern the
    draft model (`max_model_len`, `quantization`, `revision`, ...) keep their meaning.
    """

    method: Literal["ssd"] | None = "ssd"  # type: ignore[assignment]
    ssd_branch_budget: int = Field(default=8, ge=1, le=4096)
    """Branches per request: outcomes of a verification that the draft speculates for."""
    ssd_fanout: Literal["global", "geometric", "uniform"] | list[int] = "global"
    """How the budget is spent on the accepted lengths k = 0..K: on the outcomes that are likeliest this very
    round, by the measured acceptance (Theorem 12), evenly, or as K + 1 numbers of your own."""
    ssd_max_rows: int = Field(default=24, ge=1, le=65536)
    """Rows of one draft step over all requests. More requests than fit share it, each with fewer branches;
    so a draft round keeps fitting inside one verification."""
    ssd_verify: Literal["coupled", "ratio"] = "coupled"
    """How sampled requests (temperature > 0) are verified; both ways are exact. coupled: draft and target
    share keyed noise, so that the draft foresees what is sampled, and a seeded request has the same tokens
    whatever the draft does. ratio: rejection sampling of drafts that the draft samples by itself."""
    ssd_saguaro_c: float = Field(default=1.0, gt=0, le=1)
    """With ssd_verify "ratio": weight of the likeliest tokens when the draft samples. Less than 1 means more
    hits and less acceptance."""
    ssd_fallback: Literal["none", "ngram", "draft", "auto"] = "none"
    """Drafts of a row whose outcome was not foreseen: none (one exact autoregressive step), ngram, draft
    (of the draft model, just in time: the batch waits), or auto: whichever of the two is measured to pay."""
    ssd_planner: bool = False
    """Choose K and the branch budget for each batch size by what is measured to pay, at most what is set; do
    not speculate where nothing pays."""
    ssd_draft_device: str | None = None
    """On CUDA, the draft's GPU, as in "cuda:1", counted as CUDA_VISIBLE_DEVICES leaves them. Default: the
    last one, which may be the target's own: then both take turns on it."""
    ssd_draft_cores: str | None = None
    """CPU cores of the draft process, as in "1" or "8-11,15". Default: the last core the target leaves; on
    CUDA, all."""
    ssd_draft_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Type of the draft's weights and activations, and of its KV cache unless `kv_cache_dtype` is given.
    auto: the target's. It decides how much is accepted, never the law of what is generated."""
    ssd_draft_memory: float | None = Field(default=None, gt=0)
    """GiB of KV cache in the draft process, for all requests. Default: 0.5, on CUDA 4. Requests that find no
    room go on without drafts."""
    ssd_prefill_chunk: int = Field(default=256, ge=1, le=65536)
    """Prompt tokens the draft prefills in one step, over all requests, between rounds of the others."""
    ssd_wait_ms: float = Field(default=0.0, ge=0, le=1000)
    """Longest time the target waits in a round for a foreseen outcome's drafts to reach full depth."""
    ssd_ready_timeout: float = Field(default=300.0, gt=0)
    """Seconds the draft process may take to load before the start-up fails."""
    ssd_stall_timeout: float = Field(default=2.0, gt=0)
    """Seconds without a sign of life after which the target stops asking the draft."""
    engine_id: str = Field(default_factory=new_engine_id)
    """Not an option: the name by which the engine's processes find one another."""

    __repr__ = SpeculativeConfig.__repr__

    @field_validator("ssd_draft_cores", mode="before")
    @classmethod
    def _read_cores(cls, given: Any) -> Any:
        """A core may be given as a number, and several as a list."""
        if isinstance(given, bool | dict) or not isinstance(given, Integral | Iterable):
            return given
        listed = [given] if isinstance(given, Integral | str) else given
        return _format_cores(sorted({core for part in listed for core in parse_cores(str(part))}))

    @field_validator("ssd_draft_device", mode="before")
    @classmethod
    def _read_device(cls, given: Any) -> Any:
        if isinstance(given, int) and not isinstance(given, bool):
            return f"cuda:{given}"
        return str(given) if isinstance(given, torch.device) else given

    @field_validator("ssd_draft_dtype", mode="before")
    @classmethod
    def _read_dtype(cls, given: Any) -> Any:
        return str(given).removeprefix("torch.") if isinstance(given, torch.dtype) else given

    @field_validator("ssd_draft_memory", mode="before")
    @classmethod
    def _read_memory(cls, given: Any) -> Any:
        return parse_gib(given) if isinstance(given, str) else given

    @field_validator("ssd_fanout", mode="before")
    @classmethod
    def _read_fanout(cls, given: Any) -> Any:
        """On the command line a list is text, as in 4,3,1."""
        return given.strip("[] ").split(",") if isinstance(given, str) and "," in given else given

    def __post_init__(self) -> None:
        _check_platform(self)
        _refuse_foreign_options(self)
        self.draft_tensor_parallel_size = 1  # where the target has more, vLLM would give the draft as many
        with _presented_as_draft_model(self):
            super().__post_init__()
        self.prompt_lookup_min = self.prompt_lookup_max = None  # as given: vLLM makes both of them 0
        _check_models(self)
        _check_branches(self)
        self.ssd_draft_device = _choose_draft_device(self)
        self.ssd_draft_memory = self.ssd_draft_memory or _DRAFT_MEMORY[self.draft_device.partition(":")[0]]
        _check_memory(self)
        self.ssd_draft_cores = _format_cores(_choose_draft_cores(self))

    @property
    def draft_device(self) -> str:
        """Device of the draft process: "cpu" or such as "cuda:1"."""
        assert self.ssd_draft_device is not None  # chosen in __post_init__ where the user gave none
        return self.ssd_draft_device

    @property
    def draft_cores(self) -> list[int]:
        """CPU cores of the draft process."""
        assert self.ssd_draft_cores is not None  # chosen in __post_init__ where the user gave none
        return parse_cores(self.ssd_draft_cores)

    def draft_shares_target_positions(self) -> bool:
        """The draft keeps its own positions, so vLLM 0.33 must not shorten the target to its length."""
        return True


def create_ssd_config(engine_args: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
    """Build the config from what the user gave; called where vLLM builds its own `SpeculativeConfig`."""
    options = _merged_options(engine_args)
    for name in (*_INTERNAL, "engine_id"):
        if options.pop(name, None) is not None:
            raise ValueError(f"method 'ssd' does not support {name} in the speculative config; remove it")
    ssd = SSDSpeculativeConfig(
        **options, target_model_config=target_model_config, target_parallel_config=target_parallel_config
    )
    _check_scheduler(engine_args, ssd.num_speculative_tokens)
    warn_of_other_tokens(target_model_config, ssd.draft_model_config)
    if target_parallel_config.worker_cls != "auto":
        worker = target_parallel_config.worker_cls
        raise ValueError(f"method 'ssd' brings its own worker; remove worker_cls={worker!r}")
    if current_platform.is_cpu():
        target_parallel_config.worker_cls = "vllm_ssd.target.worker_cpu.SSDWorker"
        others = cores_of_others(ssd.engine_id)
        _leave_cores_to_draft(ssd.draft_cores, target_parallel_config.local_world_size, others)
        _warn_of_shared_cores(ssd.draft_cores, others)
    else:
        target_parallel_config.worker_cls = "vllm_ssd.target.worker_cuda.SSDWorker"
    if not _on_v2_runner():
        engine_args.async_scheduling = False  # the V1 runner hands async drafters an empty list of tokens
    elif ssd.ssd_planner:
        _schedule_what_is_planned(engine_args)
    return ssd


def _on_v2_runner() -> bool:
    """On CUDA the worker refuses the other; on the CPU vLLM has to be told to use it."""
    return not current_platform.is_cpu() or bool(envs.VLLM_USE_V2_MODEL_RUNNER)


def _merged_options(engine_args: Any) -> dict[str, Any]:
    """The speculative config, and what the command line's --spec-method and its kin add to it."""
    given = engine_args.speculative_config or {}
    options = {name.replace("-", "_"): value for name, value in given.items()}
    for flag, name in _SHORT_FLAGS.items():
        value = getattr(engine_args, flag, None)
        if value is None:
            continue
        if name in options:
            short = f"--{flag.replace('_', '-')}"
            raise ValueError(f"{short} and {name!r} in --speculative-config: give one of them")
        options[name] = value
    return options


def _schedule_what_is_planned(engine_args: Any) -> None:
    """Where vLLM schedules asynchronously, K drafts of every row are verified whatever is planned."""
    if engine_args.async_scheduling:
        raise ValueError("ssd_planner needs a scheduler that waits for the drafts; remove async_scheduling")
    engine_args.async_scheduling = False


def parse_cores(text: str, option: str = "ssd_draft_cores") -> list[int]:
    """The cores that a text such as "0,4-6" names: [0, 4, 5, 6]. `option` is where it was given.

    Raises:
        ValueError: if the text is not a list of core numbers and ranges.
    """
    cores: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            named = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            named = range(0)
        if not named:
            raise ValueError(f"{option}={text!r} is not of the form '1' or '8-11,15'")
        cores.extend(named)
    return cores


def _format_cores(cores: list[int]) -> str:
    return ",".join(map(str, cores))


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


@contextmanager
def _presented_as_draft_model(ssd: SSDSpeculativeConfig) -> Iterator[None]:
    """Reuse what vLLM does for method "draft_model": the draft's model and parallel configs."""
    ssd.method = "draft_model"  # type: ignore[assignment]
    try:
        with compat.draft_of_any_name():
            yield
        kind: str | None = ssd.method
        if heads := compat.draft_heads() & set(ssd.draft_model_config.architectures):
            kind = min(heads)
        if kind != "draft_model":
            raise ValueError(
                f"method 'ssd' needs a stand-alone draft model; {ssd.model!r} is of kind {kind!r}"
            )
    finally:
        ssd.method = "ssd"


def _refuse_foreign_options(ssd: SSDSpeculativeConfig) -> None:
    if ssd.model is None:
        raise ValueError("method 'ssd' needs a draft: set 'model' in the speculative config")
    if ssd.num_speculative_tokens is None:
        raise ValueError("method 'ssd' needs 'num_speculative_tokens' in the speculative config")
    for field in fields(SpeculativeConfig):
        name, value = field.name, getattr(ssd, field.name)
        if name not in _HONOURED and name not in _INTERNAL and value != _default(field):
            raise ValueError(f"method 'ssd' does not support {name}={value!r}; remove it")
    if ssd.draft_tensor_parallel_size not in (None, 1):
        raise ValueError("the draft runs on one device; remove draft_tensor_parallel_size")
    if ssd.draft_load_config is not None:
        load_args(ssd.draft_load_config)


def _default(field: DataclassField[Any]) -> Any:
    """Of a field as pydantic keeps it."""
    default = field.default
    if default is MISSING:
        return None if field.default_factory is MISSING else field.default_factory()
    return default.get_default(call_default_factory=True) if hasattr(default, "get_default") else default


def _check_platform(ssd: SSDSpeculativeConfig) -> None:
    if platform.system() != "Linux":
        raise ValueError(f"this version of method 'ssd' runs on Linux only, and this is {platform.system()}")
    if not current_platform.is_cpu() and not current_platform.is_cuda():
        raise ValueError("this version of method 'ssd' runs on CUDA and on the CPU only")
    model = ssd.target_model_config
    if model.enable_sleep_mode:
        raise ValueError(
            "the draft does not know sleep mode and would keep its memory; remove enable_sleep_mode"
        )
    if ssd.ssd_verify == "coupled" and model.use_fp64_gumbel:
        raise ValueError(
            "the draft's noise is of 32 bits: remove use_fp64_gumbel, or choose ssd_verify='ratio'"
        )
    if ssd.ssd_verify == "ratio" and platform.machine() not in _ORDERED_STORES:
        raise ValueError(
            f"ssd_verify='ratio' needs an x86-64 CPU, and this is {platform.machine()}; choose 'coupled'"
        )
    parallel = ssd.target_parallel_config
    for name in _ONE_OF_EACH:
        if getattr(parallel, name) != 1:
            raise ValueError(f"this version of method 'ssd' needs {name}=1, not {getattr(parallel, name)}")
    if parallel.pipeline_parallel_size > 1 and not _on_v2_runner():
        raise ValueError(
            "pipeline_parallel_size needs vLLM's V2 model runner; "
            "on the CPU its V1 runner fails with it, with or without speculation"
        )
    if parallel.world_size > 1 and parallel.distributed_executor_backend == "external_launcher":
        # There each rank has a scheduler of its own, which would not hear of the leader's drafts.
        raise ValueError("method 'ssd' with several ranks needs distributed_executor_backend 'mp' or 'ray'")


def _check_models(ssd: SSDSpeculativeConfig) -> None:
    target, draft = ssd.target_model_config, ssd.draft_model_config
    target_vocab, draft_vocab = target.get_vocab_size(), draft.get_vocab_size()
    if target_vocab != draft_vocab:
        raise ValueError(
            f"target and draft need the same vocabulary, these have {target_vocab} and {draft_vocab} tokens; "
            "choose a draft of the target's family"
        )
    if target.has_inner_state or target.is_hybrid or target.is_attention_free:
        raise ValueError(
            f"the target {target.model!r} has recurrent layers, whose state cannot be taken back when a "
            "draft is rejected (no test has shown them right with SSD yet); serve it without speculation"
        )
    unsupported = {
        "is a multimodal model": draft.is_multimodal_model,
        "is an encoder-decoder model": draft.is_encoder_decoder,
        "has recurrent layers": draft.has_inner_state,
        "uses latent attention (MLA)": draft.use_mla,
        "uses sliding-window attention": draft.get_sliding_window() is not None,
    }
    for what, is_so in unsupported.items():
        if is_so:
            raise ValueError(f"the draft {draft.model!r} {what}; choose a decoder with full attention only")


def _check_branches(ssd: SSDSpeculativeConfig) -> None:
    k, budget, fanout = ssd.num_speculative_tokens, ssd.ssd_branch_budget, ssd.ssd_fanout
    if k > MAX_SPECULATIVE_TOKENS:
        raise ValueError(f"num_speculative_tokens={k} is too many; use at most {MAX_SPECULATIVE_TOKENS}")
    if k + 1 >= ssd.draft_model_config.max_model_len:
        raise ValueError(f"num_speculative_tokens={k} fills the draft's whole context; lower it")
    if ssd.ssd_saguaro_c < 1 and ssd.ssd_verify != "ratio":
        raise ValueError(
            f"ssd_saguaro_c={ssd.ssd_saguaro_c:g} is for ssd_verify='ratio'; set that or remove it"
        )
    if isinstance(fanout, str):
        if fanout == "uniform" and budget < k + 1:
            raise ValueError(
                f"ssd_branch_budget={budget} is less than the {k + 1} accepted lengths of "
                f"num_speculative_tokens={k}; raise it or set ssd_fanout to 'global'"
            )
        return
    if len(fanout) != k + 1:
        raise ValueError(f"ssd_fanout needs {k + 1} numbers (k = 0..{k}), not {len(fanout)}")
    most = ssd.draft_model_config.get_vocab_size() - 1  # every token but the one that was sent
    if min(fanout) < 0 or max(fanout) > most:
        raise ValueError(f"ssd_fanout={fanout} has a number outside 0..{most}")
    if sum(fanout) != budget:
        raise ValueError(f"ssd_fanout sums to {sum(fanout)}; set ssd_branch_budget={sum(fanout)}")


def _choose_draft_device(ssd: SSDSpeculativeConfig) -> str:
    chosen = ssd.ssd_draft_device
    if current_platform.is_cpu():
        if chosen not in (None, "cpu"):
            raise ValueError(f"ssd_draft_device={chosen!r}: there is no GPU here; remove it")
        return "cpu"
    num_devices = current_platform.device_count()
    targets = ssd.target_parallel_config.assigned_physical_gpu_ids
    if chosen is None and targets is not None:
        raise ValueError(
            f"the target is given GPUs {targets} (device_ids); name the draft's as well: ssd_draft_device"
        )
    if chosen is None and ssd.target_parallel_config.distributed_executor_backend == "ray":
        raise ValueError(
            "with Ray the target's worker sees its own GPUs only; name the draft's: ssd_draft_device"
        )
    if chosen is None:
        return f"cuda:{num_devices - 1}"  # the target's, if it has them all
    if chosen not in [f"cuda:{index}" for index in range(num_devices)]:
        raise ValueError(f"ssd_draft_device={chosen!r} is none of cuda:0 to cuda:{num_devices - 1}")
    return chosen


def _check_memory(ssd: SSDSpeculativeConfig) -> None:
    asked = ssd.ssd_draft_memory
    assert asked is not None
    if current_platform.is_cpu():
        where, there = "this machine", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    else:
        where = ssd.draft_device
        there = current_platform.get_device_total_memory(int(where.partition(":")[2])) / GIB
    if not asked < there:
        # vLLM's command line makes 1000000000 of "1g".
        meant = (
            f" for {asked:.0f} bytes write {asked / GIB:.3g}" if 1 << 20 <= asked < 1 << 50 else " lower it"
        )
        raise ValueError(f"ssd_draft_memory={asked:g} is in GiB, and {where} has {there:.1f} GiB;{meant}")


def _check_scheduler(engine_args: Any, num_speculative_tokens: int) -> None:
    """A verification that does not fit a step is never scheduled. vLLM's defaults are large enough."""
    for name in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        limit = getattr(engine_args, name, None)
        if limit is not None and num_speculative_tokens + 1 > limit:
            raise ValueError(
                f"{name}={limit} has no room for a verification of num_speculative_tokens + 1 = "
                f"{num_speculative_tokens + 1} tokens; raise it or lower num_speculative_tokens"
            )


def _choose_draft_cores(ssd: SSDSpeculativeConfig) -> list[int]:
    allowed = sorted(os.sched_getaffinity(0))
    if ssd.ssd_draft_cores is not None:
        cores = parse_cores(ssd.ssd_draft_cores)
        missing = sorted(set(cores) - set(allowed))
        if missing:
            raise ValueError(f"ssd_draft_cores: this process has no core {missing[0]}; choose from {allowed}")
        return cores
    if not current_platform.is_cpu():
        return allowed
    left = set(allowed) - _bound_cores(_binding_by_user())
    free = left - cores_of_others(ssd.engine_id)
    return [max(free or left or allowed)]


def engine_cores(ssd: SSDSpeculativeConfig) -> set[int]:
    """The cores that the engine uses, target and draft; none with a GPU, where neither is bound to any."""
    if ssd.draft_device != "cpu":
        return set()
    return _target_cores() | set(ssd.draft_cores)


def _target_cores() -> set[int]:
    return _bound_cores(os.environ.get(_BINDING, "auto")) or os.sched_getaffinity(0)


def _bound_cores(binding: str) -> set[int]:
    """Cores a binding names for the target; empty where vLLM is left to choose."""
    if binding in ("", "auto", "nobind"):
        return set()
    return {core for part in binding.split("|") for core in parse_cores(part, _BINDING)}


def _binding_by_user() -> str:
    """What the user bound the target's cores to; not what an earlier engine of this process did."""
    binding = os.environ.get(_BINDING, "auto")
    return "auto" if binding == _bound else binding


def _leave_cores_to_draft(draft_cores: list[int], num_ranks: int, others: set[int]) -> None:
    """Bind the target's ranks to the remaining cores unless the user bound them: sharing one core with the
    draft, or OpenMP threads of both on all cores, is many times slower than no speculation at all.

    Args:
        others: cores of other engines, left to them where there are enough.
    """
    global _bound
    if _binding_by_user() != "auto":
        return
    shares = _shares_of_ranks([*draft_cores, *others], num_ranks)
    if not all(shares):
        shares = _shares_of_ranks(draft_cores, num_ranks)
    if num_ranks > 1 and not all(shares):
        raise ValueError(
            f"{num_ranks} ranks of the target need a core each beside the draft's; set {_BINDING}, such as "
            "'0|1', to let them share"
        )
    if any(shares):
        os.environ[_BINDING] = _bound = "|".join(_format_cores(sorted(share)) for share in shares)


def _warn_of_shared_cores(draft_cores: list[int], others: set[int]) -> None:
    with_others = sorted((_target_cores() | set(draft_cores)) & others)
    if with_others:
        logger.warning(
            "another engine with SSD uses core %s as well, which may make both many times slower: give each "
            "engine cores of its own with ssd_draft_cores and %s",
            _format_cores(with_others),
            _BINDING,
        )
    shared = sorted(_target_cores() & set(draft_cores))
    if shared:
        logger.warning(
            "target and draft share core %s, which may be many times slower than no speculation at all: give "
            "the draft a core of its own with ssd_draft_cores, and the target others with %s",
            _format_cores(shared),
            _BINDING,
        )


def _shares_of_ranks(draft_cores: list[int], num_ranks: int) -> list[list[int]]:
    """The logical cores of each rank: those of vLLM's own "auto", less the draft's physical cores.

    So each rank has a NUMA node where there are enough, one thread of each physical core on x86, and leaves a
    core to the engine's other processes.
    """
    cpus = sorted(get_allowed_cpu_list(), key=lambda cpu: (cpu.numa_node, cpu.physical_core, cpu.id))
    physical = [
        (node, [cpu.id for cpu in group])
        for (node, _), group in groupby(cpus, key=lambda cpu: (cpu.numa_node, cpu.physical_core))
    ]
    free = [(node, cores) for node, cores in physical if not set(cores) & set(draft_cores)]
    if len(free) < num_ranks:
        free = [(cpu.numa_node, [cpu.id]) for cpu in cpus if cpu.id not in draft_cores]
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


def restore_binding() -> None:
    """Before an engine without SSD: let vLLM choose its cores again, if an engine of ours has."""
    if _bound is not None and os.environ.get(_BINDING) == _bound:
        del os.environ[_BINDING]
