"""Prompts for benchmarks: JSON lines, in Spec-Bench's form or plain, as a model's tokens."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_PROMPTS = Path(__file__).with_name("prompts.jsonl")

# Spec-Bench's reports count these eight as one.
MT_BENCH = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}


@dataclass(frozen=True)
class Prompt:
    """A prompt in a model's tokens, chat template included."""

    id: str
    category: str
    token_ids: list[int]


def read_prompts(
    path: Path, tokenizer: Any, max_tokens: int, per_category: int | None = None
) -> list[Prompt]:
    """Return the file's prompts of at most `max_tokens` tokens, in the file's order.

    `per_category` keeps that many of each category, evenly spaced over it. Raises ValueError for a line
    that is no prompt, and if no prompt is left.
    """
    prompts = []
    # Not splitlines: it also splits at characters that JSON allows within strings.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            name, category, text = _parse(line, number, f"{path}:{number}")
            prompts.append(Prompt(name, category, _tokens(tokenizer, text)))
    short = [prompt for prompt in prompts if len(prompt.token_ids) <= max_tokens]
    if len(short) < len(prompts):
        left_out = len(prompts) - len(short)
        print(f"{path}: left out {left_out} prompts of more than {max_tokens} tokens", file=sys.stderr)
    kept = short if per_category is None else _spread(short, per_category)
    if not kept:
        raise ValueError(f"{path}: no prompt is left")
    return kept


def _parse(line: str, number: int, place: str) -> tuple[str, str, str]:
    """Return a line's id, category and text."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{place}: not a JSON object")
    category = str(record.get("category", "all"))
    match record:
        case {"turns": [str(text), *_]}:
            name = record.get("question_id", number)
            return str(name), "mt_bench" if category in MT_BENCH else category, text
        case {"prompt": str(text)}:
            return str(record.get("id", number)), category, text
    raise ValueError(f"{place}: neither `turns` (a list of texts) nor `prompt` (a text)")


def _tokens(tokenizer: Any, text: str) -> list[int]:
    """As a user's only turn if the tokenizer has a chat template, else as it is."""
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(text))
    messages = [{"role": "user", "content": text}]
    # return_dict: what the default is depends on transformers' version.
    return list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    )


def _spread(prompts: list[Prompt], per_category: int) -> list[Prompt]:
    """Keep so many of each category, evenly spaced: the first ones of MT-Bench are all of one kind."""
    members: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(prompt.category, []).append(index)
    kept: set[int] = set()
    for indices in members.values():
        count = min(per_category, len(indices))
        kept.update(indices[i * len(indices) // count] for i in range(count))
    return [prompts[index] for index in sorted(kept)]
