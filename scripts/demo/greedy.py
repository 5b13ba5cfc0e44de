"""Batched greedy decoding that goes on past the end of text, as benchmarks with ignore_eos do."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Return the new_tokens greedy token ids that follow each prompt."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, outputs = None, []
    for _ in range(new_tokens):
        step = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, tokens = step.past_key_values, step.logits.argmax(-1)
        outputs.append(tokens)
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        positions = positions[:, -1:] + 1
    return torch.cat(outputs, 1).tolist()
