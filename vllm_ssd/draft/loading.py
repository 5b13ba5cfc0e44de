"""What comes before the draft's first step: its config, its place in vLLM's world of one, its KV cache."""

from __future__ import annotations

from importlib import import_module

import torch
from vllm import ir
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment
from vllm.v1.worker.workspace import init_workspace_manager

from vllm_ssd.compat import kv_cache_config, supported_kv_cache_layouts
from vllm_ssd.link.memory import anonymous_file
from vllm_ssd.link.messages import Configure

_RESERVED_BLOCKS = 2  # vLLM's null block, and one for what fills up a graph's batch

logger = init_logger("vllm.ssd")


class UnsupportedDraft(ValueError):
    """The draft model cannot be run with branches; the message says why."""


def engine_config(configure: Configure) -> VllmConfig:
    """vLLM's config of an engine that has the draft alone."""
    max_rows = configure.max_rows + configure.max_slots  # branches, and a trunk row for every request
    args = EngineArgs(
        model=configure.model,
        tokenizer=configure.model,
        skip_tokenizer_init=True,
        max_num_seqs=max_rows,
        # Of the warm-up's first step too, which has two tokens a row: nothing is compiled for longer ones.
        max_num_batched_tokens=max_rows + max(configure.prefill_chunk, configure.max_rows),
        enforce_eager=configure.enforce_eager,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **configure.engine_args,
    )
    # Offline, vLLM has replaced the model's id by its folder in the Hub cache; by its id the loader finds the
    # weights in `download_dir` too.
    args.model = args.tokenizer = configure.model
    return args.create_engine_config()


def init_device(config: VllmConfig, device: torch.device) -> None:
    """What a vLLM worker does before it loads a model, for a world of one process."""
    if device.type == "cpu":
        import_module("vllm.v1.worker.cpu.shm")
    else:
        torch.accelerator.set_device_index(device)
        init_workspace_manager(device, 1)
    current_platform.import_kernels()
    config.kernel_config.ir_op_priority.set_default()
    ir.set_default_torch_wrap(config.compilation_config.ir_enable_torch_wrap)
    # By which vLLM's processes find one another; without a name, and in use until this process ends.
    rendezvous = f"file:///proc/self/fd/{anonymous_file()}"
    with set_current_vllm_config(config):
        init_worker_distributed_environment(
            config, 0, rendezvous, device.index or 0, current_platform.dist_backend
        )


def plan_kv_cache(config: VllmConfig, memory_bytes: int) -> KVCacheConfig:
    """Plan the KV cache, in one layout for all layers.

    Where it is too small for a request of the full length, `max_model_len` is lowered to what it holds:
    longer requests are served, and continue without drafts.

    Args:
        memory_bytes: for all of it.

    Raises:
        UnsupportedDraft: if the layers are not all full attention, or not alike, or the memory holds nothing.
    """
    specs = get_kv_cache_spec(config)
    if not all(type(spec) is FullAttentionSpec for spec in specs.values()):
        kinds = sorted({type(spec).__name__ for spec in specs.values()})
        raise UnsupportedDraft(
            f"draft layers are {', '.join(kinds)}; choose a draft with full attention only"
        )
    block_bytes = sum(spec.page_size_bytes for spec in specs.values())
    usable_blocks = memory_bytes // block_bytes - _RESERVED_BLOCKS
    if usable_blocks < 1:
        raise UnsupportedDraft(f"its KV cache needs {block_bytes} bytes a block; raise ssd_draft_memory")
    length = usable_blocks * config.cache_config.block_size
    if length < config.model_config.max_model_len:
        logger.warning(
            "ssd_draft_memory holds the KV of %d tokens: longer requests continue without drafts", length
        )
        config.model_config.max_model_len = length
    resolve_kv_cache_layout(config, [supported_kv_cache_layouts(config)], specs.values())
    plan = kv_cache_config(config, specs, memory_bytes)
    if len(plan.kv_cache_groups) != 1:
        raise UnsupportedDraft("draft layers need KV caches of different kinds; choose a uniform draft")
    return plan
