"""One training loop for both models: Muon for the matrices, AdamW for the rest, bfloat16 autocast."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .tokenizer import chain_tokens


def chain_batches(tokenizer: PreTrainedTokenizerFast, seed: str, rows: int, length: int) -> Iterator[Tensor]:
    """Yield batches [rows, length] of token ids; every row is the start of a chain of its own."""
    index = 0
    while True:
        chains = [chain_tokens(tokenizer, f"{seed}/{index + row}", length) for row in range(rows)]
        yield torch.tensor(chains)
        index += rows


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def imitation_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean cross-entropy of a teacher's law of the next token; both are logits [rows, length, vocabulary]."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.softmax(-1).flatten(0, 1))


def train(
    model: LlamaForCausalLM,
    batches: Iterator[Tensor],
    steps: int,
    matrix_rate: float = 0.02,
    other_rate: float = 3e-3,
    floor: float = 0.02,
    checkpoint: Path | None = None,
    label: str = "",
    teacher: LlamaForCausalLM | None = None,
) -> float:
    """Train in place for this many steps and return the mean loss of the last twentieth of them.

    The model learns the next tokens of the batches or, with a teacher, its law of them (distillation).
    The learning rate warms up over the first 3 % of the steps and falls along a cosine to floor x its peak.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.0),
        torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [matrix_rate, other_rate]
    losses: list[float] = []
    seen, started = 0, time.monotonic()
    model.train()
    for step, tokens in enumerate(islice(batches, steps)):
        fall = floor + (1 - floor) * (1 + math.cos(math.pi * step / steps)) / 2
        scale = min((step + 1) / (0.03 * steps + 1), fall)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=tokens, use_cache=False).logits
            with torch.no_grad():
                wanted = None if teacher is None else teacher(input_ids=tokens, use_cache=False).logits
        if wanted is None:
            loss = next_token_loss(logits.float(), tokens)
        else:
            loss = imitation_loss(logits.float(), wanted.float())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        seen += tokens.numel()
        if (step + 1) % 25 == 0 or step + 1 == steps:
            mean, rate = sum(losses[-25:]) / len(losses[-25:]), seen / (time.monotonic() - started)
            print(f"{label} step {step + 1}/{steps} loss {mean:.4f} {rate:.0f} tok/s", flush=True)
            if checkpoint is not None:
                torch.save(model.state_dict(), checkpoint)
    model.eval()
    tail = losses[-max(1, steps // 20) :]
    return sum(tail) / len(tail)
