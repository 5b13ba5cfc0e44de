"""The demo pair inside larger Llama shapes: its text and its drafts at the cost of larger models.

What a shape adds (heads, units, layers) reads the residual stream like any layer and writes zeros to it, so
every weight takes part in the computation, and the function is that of the shipped weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .nested import nest_layer, random_layer, widen, write_parts
from .shipped import load_model


def grown_weights(model: LlamaForCausalLM, config: LlamaConfig, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield the model's float32 state in the larger shape `config` of `grown_config`, layer by layer."""
    inner, weights, width = model.config, model.state_dict(), config.hidden_size

    def norm(key: str) -> Tensor:
        # The mean square over the wider stream is smaller by the share of its channels that are in use.
        return widen(weights[key][None], width)[0] * math.sqrt(inner.hidden_size / width)

    yield {
        "model.embed_tokens.weight": widen(weights["model.embed_tokens.weight"], width),
        "model.norm.weight": norm("model.norm.weight"),
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        matrices = random_layer(config, seed, layer)
        norms = {f"{prefix}{key}_layernorm.weight": torch.ones(width) for key in ("input", "post_attention")}
        if layer < inner.num_hidden_layers:
            small = {key: weights[f"{prefix}{key}.weight"] for key in matrices}
            nest_layer(matrices, small, inner, config, epsilon=0.0)
            norms = {key: norm(key) for key in norms}
        else:
            matrices["self_attn.o_proj"].zero_()
            matrices["mlp.down_proj"].zero_()
        yield norms | {f"{prefix}{key}.weight": matrix for key, matrix in matrices.items()}


def grown_config(inner: LlamaConfig, shape: LlamaConfig) -> LlamaConfig:
    """Return the shape with what the wider residual stream needs.

    Raises:
        ValueError: if the shape is smaller than the model that goes in.
    """
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size")
    if any(getattr(inner, key) > getattr(shape, key) for key in keys) or inner.vocab_size != shape.vocab_size:
        raise ValueError("the shape must be no smaller than the shipped model's, with its vocabulary")
    changes = {
        "rms_norm_eps": inner.rms_norm_eps * inner.hidden_size / shape.hidden_size,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**{**shape.to_dict(), **changes})


def write_grown(out: Path, name: str, shape: LlamaConfig, seed: int, dtype: torch.dtype) -> None:
    """Write the shipped "target" or "draft" in this shape, in Hugging Face format with the tokenizer."""
    model = load_model(name)
    config = grown_config(model.config, shape)
    write_parts(out, config, dtype, grown_weights(model, config, seed))
