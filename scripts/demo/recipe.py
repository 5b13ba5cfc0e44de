"""The recipe of the shipped weights: how the target, and then the draft, are trained."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from . import attention  # noqa: F401  (registers the "blocks" kernel)
from .induction import plant_induction
from .models import DRAFT_LAYERS, TARGET_LAYERS, llama_config, new_llama
from .shipped import load_model, save_weights
from .tokenizer import train_tokenizer
from .train import chain_batches, train

# Few steps are enough because the copying circuit is planted.
SEED_LAYERS = 4
SEED_STEPS = 800
TARGET_STEPS = 900
LONG_STEPS = 16
DRAFT_STEPS = 3000
DISTIL_STEPS = 600
ROWS, LENGTH, LONG_LENGTH = 4, 512, 2048


def grow(small: LlamaForCausalLM, layers: int, seed: int) -> LlamaForCausalLM:
    """Return a deeper model that computes what the small one does: its new layers add nothing yet."""
    large = new_llama(llama_config(layers), seed)
    large.load_state_dict(small.state_dict(), strict=False)
    with torch.no_grad():
        for layer in large.model.layers[small.config.num_hidden_layers :]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return large


def train_seed_layers(tokenizer: PreTrainedTokenizerFast, seed: int, work: Path) -> LlamaForCausalLM:
    """Train the target's first layers alone, which is cheap."""
    small = new_llama(llama_config(SEED_LAYERS), seed)
    plant_induction(small, seed)
    small.set_attn_implementation("blocks")
    texts = chain_batches(tokenizer, f"{seed}/seed layers", ROWS, LENGTH)
    train(small, texts, SEED_STEPS, floor=0.3, checkpoint=work / "seed_layers.pt", label="seed layers")
    return small


def train_target(
    small: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, work: Path
) -> tuple[LlamaForCausalLM, float]:
    """Train the whole depth, from the trained first layers; the last steps see long rows.

    Returns the target and its final loss in nats per token; checkpoints go to the folder work.
    """
    target = grow(small, TARGET_LAYERS, seed + 1)
    target.set_attn_implementation("blocks")
    rows: Iterator[Tensor] = chain(
        islice(chain_batches(tokenizer, f"{seed}/target", ROWS, LENGTH), TARGET_STEPS),
        chain_batches(tokenizer, f"{seed}/target long", 1, LONG_LENGTH),
    )
    steps = TARGET_STEPS + LONG_STEPS
    loss = train(
        target, rows, steps, matrix_rate=0.006, other_rate=1e-3, checkpoint=work / "target.pt", label="target"
    )
    return target, loss


def train_draft(tokenizer: PreTrainedTokenizerFast, seed: int, work: Path) -> tuple[LlamaForCausalLM, float]:
    """Train the draft on texts of its own; returns it and its final loss in nats per token."""
    draft = new_llama(llama_config(DRAFT_LAYERS), seed + 2)
    plant_induction(draft, seed)
    draft.set_attn_implementation("blocks")
    texts = chain_batches(tokenizer, f"{seed}/draft", ROWS, LENGTH)
    loss = train(draft, texts, DRAFT_STEPS, floor=0.05, checkpoint=work / "draft.pt", label="draft")
    return draft, loss


def distil_draft(
    draft: LlamaForCausalLM,
    target: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    work: Path,
) -> float:
    """Teach the draft the target's own law of texts neither has seen; returns its final loss in nats.

    Learnt from texts alone, draft and target are two estimates of a law, and differ by the errors of both.
    """
    target.set_attn_implementation("blocks")
    draft.set_attn_implementation("blocks")
    texts = chain_batches(tokenizer, f"{seed}/distil", ROWS, LENGTH)
    return train(
        draft,
        texts,
        DISTIL_STEPS,
        matrix_rate=0.01,
        other_rate=1e-3,
        checkpoint=work / "distilled.pt",
        label="distil",
        teacher=target,
    )


def train_pair(seed: int, work: Path, weights: Path) -> None:
    """Train tokenizer, target and draft and write them, packed, to the folder weights."""
    work.mkdir(parents=True, exist_ok=True)
    weights.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(seed)
    tokenizer.backend_tokenizer.save(str(weights / "tokenizer.json"))
    target, loss = train_target(train_seed_layers(tokenizer, seed, work), tokenizer, seed, work)
    print(f"target: final loss {loss:.4f} nats per token")
    save_weights("target", target, weights)
    draft, loss = train_draft(tokenizer, seed, work)
    print(f"draft: final loss {loss:.4f} nats per token")
    loss = distil_draft(draft, load_model("target", weights), tokenizer, seed, work)
    print(f"distilled draft: final cross-entropy {loss:.4f} nats per token")
    save_weights("draft", draft, weights)
