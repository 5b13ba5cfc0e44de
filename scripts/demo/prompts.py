"""Held-out prompts for benchmarks and for the check that output is lossless."""

from __future__ import annotations

from random import Random

from transformers import PreTrainedTokenizerFast

from .tokenizer import chain_tokens


def demo_prompts(
    tokenizer: PreTrainedTokenizerFast,
    n: int,
    seed: int = 0,
    min_tokens: int = 1,
    max_tokens: int = 1500,
    shared_prefix_fraction: float = 0.25,
) -> list[list[int]]:
    """Return n prompts of token ids, each opening with <s>, whose chains are never used in training.

    Lengths are uniform in min_tokens..max_tokens. A shared_prefix_fraction of the prompts (the first never
    is one of them) repeats the first quarter or more of an earlier prompt and then goes on with text of its
    own.
    """
    if not 1 <= min_tokens <= max_tokens:
        raise ValueError(f"need 1 <= min_tokens <= max_tokens, not {min_tokens} and {max_tokens}")
    rng = Random(f"prompts {seed}")
    prompts: list[list[int]] = []
    for index in range(n):
        length = rng.randint(min_tokens, max_tokens)
        prefix: list[int] = []
        if prompts and rng.random() < shared_prefix_fraction:
            shared = rng.choice(prompts)
            prefix = shared[: min(length, rng.randint((len(shared) + 3) // 4, len(shared)))]
        if 0 < len(prefix) < length:
            prefix = [*prefix, tokenizer.eos_token_id]
        prompts.append(prefix + chain_tokens(tokenizer, f"held out/{seed}/{index}", length - len(prefix)))
    return prompts
