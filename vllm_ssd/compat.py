"""How SSD gets into vLLM, and every internal of it that moves between its versions, one function each.

Each function says why it exists, where upstream stands, and when it can go. A patch looks up what it
replaces by name first, so that a rename upstream is told to who asks for method "ssd", and to nobody else.
Patches of vLLM's faults are in `repairs`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

SUPPORTED_VERSIONS = ("0.32.", "0.33.")
_MARK = "_vllm_ssd"


def is_supported_version() -> bool:
    """Whether the installed vLLM is one this package was written for."""
    import vllm

    return vllm.__version__.startswith(SUPPORTED_VERSIONS)


def add_method_ssd() -> None:
    """Build an `SSDSpeculativeConfig` where method "ssd" is asked for.

    Why: `SpeculativeConfig.method` is a closed list and the only place that constructs it is
    `EngineArgs.create_speculative_config`; out-of-tree proposers can only be a `custom_class`, which sees
    neither request ids nor finished requests (https://github.com/vllm-project/vllm/issues/36219).
    Goes when vLLM lets plugins register a speculative method.
    """
    from vllm.engine.arg_utils import EngineArgs

    stock = EngineArgs.create_speculative_config
    if hasattr(stock, _MARK):
        return

    def create_speculative_config(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        if not _asks_for_ssd(self):
            if ours := sys.modules.get("vllm_ssd.cores"):  # of an earlier engine of this process
                ours.restore_binding()
            return stock(self, target_model_config, target_parallel_config)
        from vllm.platforms import current_platform

        from vllm_ssd.config import create_ssd_config
        from vllm_ssd.repairs import patch_kernel_scan

        if current_platform.is_cpu():
            patch_kernel_scan()  # before there is a worker, whose process is this one or forked from it
        return create_ssd_config(self, target_model_config, target_parallel_config)

    setattr(create_speculative_config, _MARK, True)
    EngineArgs.create_speculative_config = create_speculative_config


@contextmanager
def draft_of_any_name() -> Iterator[None]:
    """Keep `SpeculativeConfig.__post_init__` from guessing a method by the draft's path.

    Why: it takes a draft for EAGLE, DFlash or DSpark if its path or Hub id has such a word in it, as in
    "eagle-team/llama-1b", also where the method is given. While it configures itself the draft has no path to
    read. What it tells by the draft's own config stays.
    Goes when vLLM leaves a given method as it is. Upstream: "Automatically detect the method" there.
    """
    from vllm.config import speculative

    stock = speculative.ModelConfig
    built: list[tuple[Any, str]] = []

    def build(*args: Any, **options: Any) -> Any:
        model_config = stock(*args, **options)
        built.append((model_config, model_config.model))
        model_config.model = ""
        return model_config

    speculative.ModelConfig = build
    try:
        yield
    finally:
        speculative.ModelConfig = stock
        for model_config, name in built:
            model_config.model = name


def draft_heads() -> set[str]:
    """Architectures that draft from a target's hidden states, and cannot run by themselves.

    Why: vLLM has the list to itself. Goes when `ModelConfig` tells.
    """
    from vllm.model_executor.models import registry

    return set(registry._SPECULATIVE_DECODING_MODELS)


def allow_async_scheduling() -> None:
    """Let vLLM 0.32 schedule asynchronously for method "ssd", as it does by default for its own on V2.

    Why: it has a list of methods that may, made of these names. 0.33 asks V1 only.
    """
    from typing import Literal, get_args

    from vllm.config import vllm as module

    stock = module.NgramGPUTypes
    if "ssd" not in get_args(stock):
        module.NgramGPUTypes = Literal[(*get_args(stock), "ssd")]


def refuse_method_ssd(reason: str = "") -> None:
    """On an unsupported vLLM: one clear error for method "ssd", no change for anybody else.

    Args:
        reason: why it is, where its version does not tell.
    """
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    stock = getattr(EngineArgs, "create_speculative_config", None)
    if stock is None or hasattr(stock, _MARK):  # without it, vLLM itself refuses a method it does not know
        return

    def create_speculative_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _asks_for_ssd(self):
            versions = " and ".join(f"{version}x" for version in SUPPORTED_VERSIONS)
            raise ValueError(f"method 'ssd' needs vLLM {versions}; this is vLLM {vllm.__version__}{reason}")
        return stock(self, *args, **kwargs)

    setattr(create_speculative_config, _MARK, True)
    EngineArgs.create_speculative_config = create_speculative_config


def _asks_for_ssd(engine_args: Any) -> bool:
    asked = (engine_args.speculative_config or {}).get("method") or getattr(engine_args, "spec_method", None)
    return bool(asked == "ssd")


def add_metrics() -> None:
    """Show SSD's counters beside vLLM's own speculative metrics, on /metrics and in the log line.

    Why: the worker has no channel of its own to the frontend's metrics; vLLM builds its speculative metrics
    from these two names. Goes when vLLM lets plugins add to `SchedulerStats`.
    """
    from vllm.v1.metrics import loggers

    stock_prometheus = loggers.PrometheusStatLogger._spec_decoding_cls
    stock_init = loggers.LoggingStatLogger.__init__
    if hasattr(stock_init, _MARK):
        return
    from vllm_ssd.metrics import SSDSpecDecodingLogging, ssd_prometheus_class

    def __init__(self: Any, vllm_config: Any, engine_index: int = 0) -> None:
        stock_init(self, vllm_config, engine_index)
        speculative_config = vllm_config.speculative_config
        if getattr(speculative_config, "method", None) == "ssd":
            self.spec_decoding_logging = SSDSpecDecodingLogging(
                self.spec_decoding_logging, speculative_config
            )

    setattr(__init__, _MARK, True)
    loggers.LoggingStatLogger.__init__ = __init__
    loggers.PrometheusStatLogger._spec_decoding_cls = ssd_prometheus_class(stock_prometheus)


@contextmanager
def cpu_runner_class(runner_class: type, *, is_v2: bool) -> Iterator[None]:
    """Let `CPUWorker.init_device` build our model runner.

    Why: the CPU worker names its runner classes in code, where the GPU worker has `_make_model_runner`.
    Goes when the CPU worker gets the same hook.
    """
    place = "vllm.v1.worker.cpu.model_runner" if is_v2 else "vllm.v1.worker.cpu_worker"
    module: Any = importlib.import_module(place)
    stock = module.CPUModelRunner
    module.CPUModelRunner = runner_class
    try:
        yield
    finally:
        module.CPUModelRunner = stock


@contextmanager
def speculator_class(speculator_class: Callable[[Any, torch.device], Any]) -> Iterator[None]:
    """Let `GPUModelRunner.__init__` (V2) build our speculator from (vllm_config, device).

    Why: `init_speculator` raises on methods outside its list. Goes when vLLM lets plugins register one.
    """
    from vllm.v1.worker.gpu import model_runner

    stock = model_runner.init_speculator
    model_runner.init_speculator = lambda config, device, states: speculator_class(config, device)
    try:
        yield
    finally:
        model_runner.init_speculator = stock


@contextmanager
def no_stock_drafter(speculative_config: Any, drafter: object) -> Iterator[None]:
    """Let `GPUModelRunner.__init__` (V1) accept a method it does not know, with `drafter` in its place.

    Why: the V1 runner raises on methods outside its list; "custom_class" is the one that builds nothing else.
    Goes with the V1 runner, or when vLLM lets plugins register a speculative method.
    """
    from vllm.v1.worker import gpu_model_runner

    stock = gpu_model_runner.create_custom_proposer
    gpu_model_runner.create_custom_proposer = lambda vllm_config: drafter
    method, speculative_config.method = speculative_config.method, "custom_class"
    try:
        yield
    finally:
        speculative_config.method = method
        gpu_model_runner.create_custom_proposer = stock


@contextmanager
def sampling_replaced(
    sampler: Any,
    draw: Callable[[torch.Tensor], torch.Tensor],
    verify: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], list[list[int]]],
) -> Iterator[None]:
    """Draw and verify otherwise in vLLM's V1 samplers, which leave all else (constraints, logprobs) as it is.

    Why: the V1 runner's noise comes from one stream a request, so what is drawn depends on the drafts; the
    samplers take no noise of ours. Goes with the V1 runner, whose successor keys its noise.

    Args:
        sampler: the runner's `Sampler`.
        draw: constrained logits [B, V] -> tokens [B].
        verify: draft tokens [N], their constrained logits [N, V], bonus tokens [B] -> new tokens of each row.
    """
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    def sample(logits: torch.Tensor, generators: Any, k: Any, p: Any) -> tuple[torch.Tensor, Any]:
        """[B] tokens, and what requests for logprobs see if they are to see what was sampled from."""
        logits = apply_top_k_top_p(logits, k, p)
        if stage.logprobs_mode == "processed_logits":
            return draw(logits), logits
        if stage.logprobs_mode == "processed_logprobs":
            return draw(logits), logits.log_softmax(dim=-1)
        return draw(logits), None

    def rejection_sample(
        draft_token_ids: torch.Tensor,  # [N]
        num_draft_tokens: list[int],
        max_spec_len: int,
        cu_num_draft_tokens: torch.Tensor,
        draft_probs: Any,
        target_logits: torch.Tensor,  # [N, V]
        bonus_token_ids: torch.Tensor,  # [B, 1]
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[B, max_spec_len + 1], filled up with vLLM's placeholder."""
        empty = rejection_sampler.PLACEHOLDER_TOKEN_ID
        rows = verify(draft_token_ids, target_logits, bonus_token_ids.flatten())
        padded = [row + [empty] * (max_spec_len + 1 - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int32, device=target_logits.device)

    stage = sampler.topk_topp_sampler
    stock_sample, stock_rejection = stage.forward, rejection_sampler.rejection_sample
    stage.forward, rejection_sampler.rejection_sample = sample, rejection_sample
    try:
        yield
    finally:
        stage.forward, rejection_sampler.rejection_sample = stock_sample, stock_rejection


def kv_cache_config(vllm_config: Any, specs: dict[str, Any], memory_bytes: int) -> Any:
    """Plan one worker's KV cache. Why: the planning helpers moved in 0.33. Goes with the support of 0.32."""
    try:
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
    except ImportError:
        from vllm.v1.core import kv_cache_planning

        groups = kv_cache_planning.get_global_kv_cache_groups(vllm_config, [specs])
        return kv_cache_planning.get_kv_cache_configs(vllm_config, [specs], [memory_bytes], groups)[0]
    return get_kv_cache_configs(vllm_config, [specs], [memory_bytes])[0]


def leave_process_groups() -> None:
    """End the communication of a process that is a world of its own.

    Why: vLLM makes some fourteen Gloo contexts even then, and each has a thread that wakes a hundred times a
    second, on the draft's only core. The coordinators stay; with one rank they pass everything on.
    Goes when vLLM makes no groups for a world of one. Upstream: `vllm.distributed.parallel_state._groups`.
    """
    from vllm.distributed import parallel_state

    for coordinator in [find() for find in parallel_state._groups.values()]:
        if coordinator is not None:
            coordinator.destroy()
    torch.distributed.destroy_process_group()


def supported_kv_cache_layouts(vllm_config: Any) -> list[str]:
    """Names of the KV layouts that the loaded model's attention backends share, preferred first.

    Why: vLLM has this as `WorkerBase.get_supported_kv_cache_layouts` only, and the draft has no worker.
    Goes when vLLM has it as a function.
    """
    from vllm.v1.worker import worker_base

    backends = worker_base.get_current_attn_backends(vllm_config)
    return [layout.name for layout in worker_base.get_supported_kv_cache_layouts(backends)]


def match_ngram(tokens: Any, min_n: int, max_n: int, max_model_len: int, num_tokens: int) -> list[int]:
    """vLLM's own n-gram matcher on one request: what followed the longest earlier match of its suffix.

    Why: `NgramProposer` proposes for whole batches and warms up for them; a miss concerns single rows.
    Goes when vLLM proposes for single rows.
    """
    from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens

    return _find_longest_matched_ngram_and_propose_tokens(
        tokens, min_n, max_n, max_model_len, num_tokens
    ).tolist()
