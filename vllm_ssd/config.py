"""SSDSpeculativeConfig: every option of method "ssd", its default, its check, and every refusal."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from dataclasses import Field as DataclassField
from dataclasses import field as dataclass_field
from numbers import Integral
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from vllm import envs
from vllm.config.speculative import SpeculativeConfig
from vllm.config.utils import config
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_ssd import compat
from vllm_ssd.cores import bind_target, format_cores, parse_cores
from vllm_ssd.placement import Placement, parse_gib, place_draft
from vllm_ssd.target.draft_args import load_args
from vllm_ssd.vocabularies import check_tokens

logger = init_logger("vllm.ssd")

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
    share keyed noise, so that the draft predicts what is sampled, and a seeded request has the same tokens
    whatever the draft does. ratio: rejection sampling of drafts that the draft samples by itself."""
    ssd_saguaro_c: float = Field(default=1.0, gt=0, le=1)
    """With ssd_verify "ratio": weight of the likeliest tokens when the draft samples. Less than 1 means more
    hits and less acceptance."""
    ssd_backup: Literal["none", "ngram", "draft", "auto"] = "none"
    """Drafts of a row whose outcome was not predicted: none (one exact autoregressive step), ngram, draft
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
    auto: the target's. It decides how much is accepted, never the distribution of what is generated."""
    ssd_draft_memory: float | None = Field(default=None, gt=0)
    """GiB of KV cache in the draft process, for all requests. Default: 0.5, on CUDA 4. Requests that find no
    room continue without drafts."""
    ssd_prefill_chunk: int = Field(default=256, ge=1, le=65536)
    """Prompt tokens the draft prefills in one step, over all requests, between rounds of the others."""
    ssd_wait_ms: float = Field(default=0.0, ge=0, le=1000)
    """Longest time the target waits in a round for a predicted outcome's drafts to reach full depth."""
    ssd_ready_timeout: float = Field(default=300.0, gt=0)
    """Seconds the draft process may take to load before the start-up fails."""
    ssd_stall_timeout: float = Field(default=2.0, gt=0)
    """Seconds without a sign of life after which the target stops asking the draft."""
    placement: Placement = dataclass_field(init=False)
    """No option: where the draft runs and what it gets, as the user said or as was chosen."""

    __repr__ = SpeculativeConfig.__repr__

    @field_validator("ssd_draft_cores", mode="before")
    @classmethod
    def _read_cores(cls, given: Any) -> Any:
        """A core may be given as a number, and several as a list."""
        if isinstance(given, bool | dict) or not isinstance(given, Integral | Iterable):
            return given
        listed = [given] if isinstance(given, Integral | str) else given
        return format_cores(sorted({core for part in listed for core in parse_cores(str(part))}))

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
        if not hasattr(self, "placement"):  # vLLM runs this again in the engine's processes
            self.placement = place_draft(
                self.target_parallel_config,
                self.ssd_draft_device,
                self.ssd_draft_cores,
                self.ssd_draft_memory,
            )

    @property
    def common_vocab_size(self) -> int:
        """Tokens that target and draft both have, the first ones of each: only these are drafted.

        Models of one tokenizer may have embeddings of different sizes, since these are padded.
        """
        return min(self.target_model_config.get_vocab_size(), self.draft_model_config.get_vocab_size())

    def draft_shares_target_positions(self) -> bool:
        """The draft keeps its own positions, so vLLM 0.33 must not shorten the target to its length."""
        return True


def create_ssd_config(engine_args: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
    """Build the config from what the user gave; called where vLLM builds its own `SpeculativeConfig`."""
    options = _merged_options(engine_args)
    for name in _INTERNAL:
        if options.pop(name, None) is not None:
            raise ValueError(f"method 'ssd' does not support {name} in the speculative config; remove it")
    ssd = SSDSpeculativeConfig(
        **options, target_model_config=target_model_config, target_parallel_config=target_parallel_config
    )
    _check_scheduler(engine_args, ssd.num_speculative_tokens)
    check_tokens(target_model_config, ssd.draft_model_config)
    if target_parallel_config.worker_cls != "auto":
        worker = target_parallel_config.worker_cls
        raise ValueError(f"method 'ssd' brings its own worker; remove worker_cls={worker!r}")
    if current_platform.is_cpu():
        target_parallel_config.worker_cls = "vllm_ssd.target.worker_cpu.SSDWorker"
        place = ssd.placement
        bind_target(place.cores, target_parallel_config.local_world_size, place.engine_id)
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
    most = ssd.common_vocab_size - 1  # every token but the one that was sent
    if min(fanout) < 0 or max(fanout) > most:
        raise ValueError(f"ssd_fanout={fanout} has a number outside 0..{most}")
    if sum(fanout) != budget:
        raise ValueError(f"ssd_fanout sums to {sum(fanout)}; set ssd_branch_budget={sum(fanout)}")


def _check_scheduler(engine_args: Any, num_speculative_tokens: int) -> None:
    """A verification that does not fit a step is never scheduled. vLLM's defaults are large enough."""
    for name in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        limit = getattr(engine_args, name, None)
        if limit is not None and num_speculative_tokens + 1 > limit:
            raise ValueError(
                f"{name}={limit} has no room for a verification of num_speculative_tokens + 1 = "
                f"{num_speculative_tokens + 1} tokens; raise it or lower num_speculative_tokens"
            )
