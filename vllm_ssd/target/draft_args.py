"""What the draft process is told of its model: fields of vLLM's `EngineArgs`, all of them plain values.

A user's options reach the target as objects of vLLM, torch and Hugging Face. What crosses to the draft
process is made of JSON's types alone, by `plain`.
"""

from __future__ import annotations

import enum
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.transformers_utils.config import get_config

if TYPE_CHECKING:
    from vllm_ssd.config import SSDSpeculativeConfig

# The smallest that the attention backends take: a fork copies one block per branch.
DRAFT_BLOCK_SIZES = {"cpu": 32, "cuda": 16}

logger = init_logger("vllm.ssd")


def plain(value: Any) -> Any:
    """The same of None, bool, int, float, str, list and dict, none of them a subclass.

    Raises:
        ValueError: if it is, or has in it, anything else.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # str() would name the member of an enumeration
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain(item) for item in value]
    raise ValueError(f"{value!r} is of type {type(value).__name__}, which the draft process cannot be sent")


def draft_engine_args(ssd: SSDSpeculativeConfig, vllm_config: VllmConfig) -> dict[str, Any]:
    """Fields of `EngineArgs` with which the draft process makes the draft's config anew.

    Args:
        ssd: as configured.
        vllm_config: the target's.
    """
    draft = ssd.draft_model_config
    backend = ssd.attention_backend
    arguments = {
        "dtype": draft.dtype if ssd.ssd_draft_dtype == "auto" else ssd.ssd_draft_dtype,  # vLLM: the target's
        "max_model_len": draft.max_model_len,
        "block_size": DRAFT_BLOCK_SIZES[ssd.placement.device.partition(":")[0]],
        "quantization": draft.quantization,
        # Of a Hub model vLLM has found out the commit: a draft that is started again is the same one.
        "revision": getattr(draft.revision, "resolved", draft.revision),
        "code_revision": draft.code_revision,
        "config_format": draft.config_format,
        "hf_overrides": _overrides(draft) if callable(ssd.target_model_config.hf_overrides) else {},
        "trust_remote_code": draft.trust_remote_code,
        "kv_cache_dtype": ssd.kv_cache_dtype or "auto",
        "attention_backend": backend.name if isinstance(backend, enum.Enum) else backend,
        "moe_backend": ssd.moe_backend or "auto",
        "seed": draft.seed,
        **load_args(draft_load_config(ssd, vllm_config.load_config)),
    }
    return {name: plain(value) for name, value in arguments.items()}


def load_args(load: LoadConfig) -> dict[str, Any]:
    """Fields of `EngineArgs` that make this config: those that have not their default.

    Raises:
        ValueError: if there are none, or the draft process cannot be sent one.
    """
    default, known = LoadConfig(), {field.name for field in fields(EngineArgs)}
    arguments = {}
    for name in (field.name for field in fields(load)):
        value = getattr(load, name)
        if value == getattr(default, name):
            continue
        if name not in known:  # such as the device, which is the draft's
            raise ValueError(
                f"method 'ssd' does not support {name}={value!r} in draft_load_config; remove it"
            )
        try:
            arguments[name] = plain(value)
        except ValueError as error:
            raise ValueError(f"draft_load_config: {name}: {error}") from error
    return arguments


def draft_load_config(ssd: SSDSpeculativeConfig, target: LoadConfig) -> LoadConfig:
    """The draft's own: its files may be of another format than the target's."""
    given = ssd.draft_load_config
    if given is None and ssd.draft_model_config.model_weights:
        given = target  # in object storage, which no default loader reads
    load = LoadConfig(**{field.name: getattr(given, field.name) for field in fields(given)} if given else {})
    if given is None and target.load_format == "dummy":
        logger.warning("load_format 'dummy': target and draft both have random weights, and agree on nothing")
        load.load_format = "dummy"
    load.download_dir = load.download_dir or target.download_dir
    return load


def _overrides(draft: ModelConfig) -> dict[str, Any]:
    """What the target's `hf_overrides` have changed of the draft's config.

    As for vLLM's draft_model: overrides that are a function concern both models, a dict the target alone.
    """
    unchanged = get_config(
        draft.model, draft.trust_remote_code, draft.revision, draft.code_revision, draft.config_format
    ).to_dict()
    changed = draft.hf_config.to_dict()
    return {name: value for name, value in changed.items() if unchanged.get(name) != value}
