"""Answers to requests of all kinds, and what it means that two are the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

CLOSE = 1e-4  # of log-probabilities


def ask(llm: Any, requests: Sequence[tuple[list[int], Any]]) -> list[Any]:
    """vLLM's outputs for (prompt, sampling parameters), all of them asked for at once."""
    from vllm.inputs import TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt, _ in requests]
    # Copies: vLLM writes into what it is given.
    return llm.generate(prompts, [params.clone() for _, params in requests], use_tqdm=False)


def sequences(outputs: Sequence[Any]) -> list[list[int]]:
    """Prompt and answer, of each answer."""
    return [[*out.prompt_token_ids, *one.token_ids] for out in outputs for one in out.outputs]


def difference(output: Any, expected: Any) -> str:
    """What two outputs of the same request differ in, "" if in nothing that a user can see."""
    if len(output.outputs) != len(expected.outputs):
        return f"{len(output.outputs)} answers instead of {len(expected.outputs)}"
    for one, other in zip(output.outputs, expected.outputs, strict=True):
        for name in ("token_ids", "text", "finish_reason", "stop_reason"):
            found, wanted = getattr(one, name), getattr(other, name)
            if found != wanted:
                return f"{name} {found!r} instead of {wanted!r}"
        if where := _first_difference(one.logprobs, other.logprobs):
            return f"logprobs: {where}"
        if not _is_close(one.cumulative_logprob, other.cumulative_logprob, len(one.token_ids)):
            return f"cumulative_logprob {one.cumulative_logprob} instead of {other.cumulative_logprob}"
    if output.prompt_token_ids != expected.prompt_token_ids:
        return "prompt_token_ids"
    if where := _first_difference(output.prompt_logprobs, expected.prompt_logprobs):
        return f"prompt_logprobs: {where}"
    return ""


def _first_difference(found: Any, wanted: Any) -> str:
    if found is None or wanted is None:
        return "" if found is wanted else f"{found} instead of {wanted}"
    if len(found) != len(wanted):
        return f"{len(found)} instead of {len(wanted)}"
    for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
        if one is None or other is None:
            if one is not other:
                return f"{one} instead of {other} at {place}"
            continue
        # Tokens that cannot be are equally unlikely: any of them may fill up the likeliest.
        one, other = ({t: v for t, v in some.items() if v.logprob > -math.inf} for some in (one, other))
        if one.keys() != other.keys():
            return f"of {sorted(one)} instead of {sorted(other)} at {place}"
        for token, value in one.items():
            wanted_value = other[token]
            same = (value.rank, value.decoded_token) == (wanted_value.rank, wanted_value.decoded_token)
            if not same or not _is_close(value.logprob, wanted_value.logprob):
                return f"{value} instead of {wanted_value} at {place}"
    return ""


def _is_close(found: float | None, wanted: float | None, count: int = 1) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return found == wanted or math.isclose(found, wanted, rel_tol=0, abs_tol=CLOSE * max(count, 1))
