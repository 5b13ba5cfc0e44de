"""The two demo models' shapes."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .tokenizer import MAX_POSITIONS, VOCAB_SIZE

TARGET_LAYERS = 28
DRAFT_LAYERS = 3


def llama_config(layers: int, **changes: int | float | bool) -> LlamaConfig:
    """Return the demo pair's Llama configuration with this many layers; changes override single fields."""
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
        **changes,
    }
    return LlamaConfig(
        num_hidden_layers=layers, bos_token_id=0, eos_token_id=1, pad_token_id=1, dtype=torch.float32, **shape
    )


def new_llama(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """Return a float32 model with random weights that depend on the seed only."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).float()
