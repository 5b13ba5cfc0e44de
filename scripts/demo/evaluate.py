"""Figures of a pair: acceptance, greedy and sampled; ranks of what the draft missed; loops; following."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from . import words
from .greedy import greedy
from .prompts import demo_prompts
from .text import document_chain

LOOP_LENGTH = 20


@torch.inference_mode()
def draft_ranks(draft: LlamaForCausalLM, prompts: list[list[int]], outputs: list[list[int]]) -> list[int]:
    """Return the draft's rank (1 = its greedy token) of every output token, given the true prefix."""
    ranks: list[int] = []
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = draft(input_ids=torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(output)[:, None])
        ranks += ((logits > chosen).sum(1) + 1).tolist()
    return ranks


def has_loop(tokens: Sequence[int]) -> bool:
    """Whether any 20 tokens in a row occur twice."""
    grams = [tuple(tokens[i : i + LOOP_LENGTH]) for i in range(len(tokens) - LOOP_LENGTH + 1)]
    return len(set(grams)) < len(grams)


def distinct_share(tokens: Sequence[int], length: int = 4) -> float:
    """Share of distinct runs of this many tokens among all such runs."""
    grams = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return len(set(grams)) / len(grams)


def renamed_prompts(
    tokenizer: PreTrainedTokenizerFast, n: int, seed: int
) -> list[tuple[list[int], list[int], str, str]]:
    """Return n pairs of prompts that differ in one person's name, with the two names.

    A prompt is a header and the first lines of a document: the name comes up again in what follows.
    """
    pairs: list[tuple[list[int], list[int], str, str]] = []
    rng = Random(f"renamed {seed}")
    while len(pairs) < n:
        lines = next(document_chain(f"renamed {seed}/{rng.random()}")).split("\n")
        named = [name for name in words.NAMES if f" {name}" in lines[0]]
        if not named or len(lines) < 12:
            continue
        old = rng.choice(named)
        new = rng.choice([name for name in words.NAMES if name not in lines[0]])
        text = "\n".join(lines[:2]) + "\n"
        first, second = (tokenizer(t)["input_ids"] for t in (text, text.replace(old, new)))
        pairs.append((first, second, old, new))
    return pairs


def context_share(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int, seed: int) -> float:
    """Share of renamed pairs whose 96-token continuations each name their own person and not the other."""
    pairs = renamed_prompts(tokenizer, n, seed)
    texts = [
        [tokenizer.decode(tokens) for tokens in greedy(model, [pair[side] for pair in pairs], 96)]
        for side in (0, 1)
    ]
    return sum(
        old in before and new not in before and new in after and old not in after
        for (_, _, old, new), before, after in zip(pairs, *texts, strict=True)
    ) / len(pairs)


@torch.inference_mode()
def sampled_figures(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, prompts: list[list[int]], new_tokens: int, seed: int
) -> dict[str, float]:
    """Return how open the target's law is on texts sampled at temperature 1, and how near the draft comes.

    Entropy in nats a token; acceptance by rejection sampling is 1 - total variation; agreement is the share
    of tokens that one Gumbel noise draws from both laws alike. Prompts have one length.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = chosen = torch.tensor(prompts)
    cache = None
    for _ in range(new_tokens):
        step = target(input_ids=chosen, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        chosen = torch.multinomial(step.logits[:, -1].softmax(-1), 1, generator=generator)
        texts = torch.cat([texts, chosen], 1)
    logs = [
        model(input_ids=texts).logits[:, len(prompts[0]) - 1 : -1].double().log_softmax(-1)
        for model in (target, draft)
    ]
    p, q = (law.exp() for law in logs)
    gumbel = -torch.rand(p.shape, generator=generator, dtype=torch.float64).log().neg().log()
    drawn = [(law + gumbel).argmax(-1) for law in logs]
    return {
        "sampled_entropy_nats": -(p * logs[0]).sum(-1).mean().item(),
        "sampled_acceptance_ratio": 1 - (p - q).abs().sum(-1).mean().item() / 2,
        "sampled_agreement_coupled": (drawn[0] == drawn[1]).float().mean().item(),
    }


def evaluate(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: int = 64,
    seed: int = 0,
) -> dict[str, float]:
    """Return the pair's figures on held-out prompts, of 30 to 120 tokens (greedy) and 64 (sampled)."""
    starts = demo_prompts(tokenizer, prompts, seed, 30, 120, 0.0)
    outputs = greedy(target, starts, 512)
    ranks = torch.tensor(draft_ranks(draft, starts, [output[:256] for output in outputs]))
    missed = ranks[ranks > 1]
    return {
        "acceptance": (ranks == 1).float().mean().item(),
        "within_top_2": (ranks <= 2).float().mean().item(),
        "within_top_3": (ranks <= 3).float().mean().item(),
        "within_top_4": (ranks <= 4).float().mean().item(),
        "missed_within_ranks_2_to_4": (missed <= 4).float().mean().item(),
        "no_loop_in_512_target": sum(not has_loop(output) for output in outputs) / prompts,
        "distinct_4_gram_share_target": sum(map(distinct_share, outputs)) / prompts,
        "ends_of_text_per_512_target": sum(o.count(tokenizer.eos_token_id) for o in outputs) / prompts,
        "follows_context_target": context_share(target, tokenizer, 32, seed),
        "follows_context_draft": context_share(draft, tokenizer, 32, seed),
        **sampled_figures(target, draft, demo_prompts(tokenizer, 24, seed, 64, 64, 0.0), 256, seed),
    }
