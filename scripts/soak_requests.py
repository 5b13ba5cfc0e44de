"""What scripts/soak.py sends: ten good streams, harmless requests, and the worst ones of all, as tables.

To add a kind of request, add a line to `HOSTILE`: its name, and a function that makes one (or a burst).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from demo.text import document_chain
from quickstart import MODEL_NAME

# What the server of scripts/soak.py has; the requests go up to these limits and beyond.
MAX_MODEL_LEN, DRAFT_MAX_MODEL_LEN = 512, 320
STREAMS, PROMPTS_PER_STREAM, OUT_TOKENS = 10, 3, 96


@dataclass(frozen=True)
class Request:
    """One HTTP POST; `hang_up_s`: seconds after which the client disconnects, answered or not."""

    body: bytes
    path: str = "/v1/completions"
    headers: Mapping[str, str] = field(default_factory=dict)
    hang_up_s: float | None = None


class Forge:
    """Makes requests.

    Args:
        rng: where all that is random in them comes from.
        vocab_size: the target's V.
    """

    def __init__(self, rng: random.Random, vocab_size: int) -> None:
        self.rng = rng
        self.vocab_size = vocab_size

    def pick(self, *values: Any) -> Any:
        return self.rng.choice(values)

    def ids(self, length: int) -> list[int]:
        """Token ids of the vocabulary, without the first few, which are often special."""
        return [self.rng.randrange(2, self.vocab_size) for _ in range(length)]

    def some(self) -> list[int]:
        return self.ids(self.rng.randint(4, 60))

    def post(self, path: str, headers: Mapping[str, str] | None = None, **fields: Any) -> list[Request]:
        return [Request(json.dumps(fields).encode(), path, headers or {})]

    def complete(self, headers: Mapping[str, str] | None = None, **fields: Any) -> list[Request]:
        """A completion that is in order but for the fields given."""
        usual = {
            "model": MODEL_NAME,
            "prompt": self.some(),
            "max_tokens": self.rng.randint(8, 64),
            "temperature": self.pick(0, 0.8),
            "stream": self.pick(True, False),
            "ignore_eos": True,
        }
        return self.post("/v1/completions", headers, **(usual | fields))

    def generate(self, token_ids: list[int], **sampling: Any) -> list[Request]:
        """By token ids alone, with vLLM's SamplingParams as they are."""
        return self.post("/inference/v1/generate", token_ids=token_ids, sampling_params=sampling)

    def structured(self, **structure: Any) -> list[Request]:
        return self.complete(structured_outputs=structure, ignore_eos=self.pick(True, False))

    def chat(self, content: Any, **fields: Any) -> list[Request]:
        messages = [{"role": "user", "content": content}]
        return self.post("/v1/chat/completions", model=MODEL_NAME, messages=messages, max_tokens=32, **fields)

    def hang_up(self, requests: list[Request], latest_s: float) -> list[Request]:
        return [replace(request, hang_up_s=self.rng.uniform(0, latest_s)) for request in requests]

    def burst(self, count: int, make: Callable[[], list[Request]]) -> list[Request]:
        return [request for _ in range(count) for request in make()]


Kind = Callable[[Forge], list[Request]]  # what is sent at once
NUMBERS = (float("nan"), float("inf"), float("-inf"), -1.0, 1e308, 5e-324, -0.0)
OUTSIDE = (-1, -(2**31), 2**31, 2**63, 2**64)  # no token ids
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"$ref": "#"}}, "b": {"type": "integer"}},
    "required": ["a", "b"],
}
GRAMMARS = ('root ::= "a" root | "b"', 'root ::= ("ab" | "a"){3}', "?? ::=", "")
REPETITIONS = {"max_pattern_size": 9, "min_count": 2}
ODD_TEXTS = (
    "\ud800",
    "\0" * 9,
    "\u202e\u200d\ufeff" * 40,
    "👩‍👩‍👧‍👦" * 15,
    "e" + "\u0301" * 150,
    "<s></s>" * 20,
)
TOOL = {"type": "function", "function": {"name": "x", "parameters": SCHEMA}}

# fmt: off
HOSTILE: dict[str, Kind] = {
    "top_k": lambda f: f.complete(top_k=f.pick(2**31 - 1, 2**31, 2**32 - 1, 2**63), temperature=1),
    "top_k, by ids": lambda f: f.generate(f.some(), top_k=f.pick(2**31, 2**63), max_tokens=32),
    "seeds": lambda f: f.complete(seed=f.pick(-1, -(2**63), 2**63 - 1, 2**63, 2**64), temperature=1),
    "seeds, by ids": lambda f: f.generate(f.some(), seed=f.pick(-9, 2**63, 2**64 - 1)),
    "beyond 64 bits": lambda f: f.complete(top_k=2**70, temperature=1),
    "beyond 64 bits, by ids": lambda f: f.generate(f.some(), seed=2**70),
    "temperatures": lambda f: f.complete(temperature=f.pick(*NUMBERS, 1e-9, 1e-5, 0.009, 2)),
    "top_p": lambda f: f.complete(top_p=f.pick(*NUMBERS, 0, 1e-12, 1 + 1e-9), temperature=0.8),
    "min_p": lambda f: f.complete(min_p=f.pick(*NUMBERS, 1, 1e-30), temperature=1),
    "repetition penalty": lambda f: f.complete(repetition_penalty=f.pick(*NUMBERS, 1e-30, 1e30)),
    "penalties": lambda f: f.complete(presence_penalty=f.pick(-2, 2, 3), frequency_penalty=f.pick(-2, 2)),
    "many of one prompt": lambda f: f.complete(n=f.pick(0, 8, 16, 40, 2**31), temperature=1),
    "beams": lambda f: f.complete(use_beam_search=True, n=f.pick(1, 4), temperature=0, stream=False),
    "max_tokens": lambda f: f.complete(max_tokens=f.pick(-1, 0, 1, 2, 300, 2**31, 2**63)),
    "min_tokens": lambda f: f.complete(min_tokens=f.pick(2, 8, 2**31, -1), stop="e", ignore_eos=False),
    "logprobs": lambda f: f.complete(logprobs=f.pick(-1, 0, 20, 20, 21, 2**31), echo=f.pick(True, False)),
    "prompt logprobs": lambda f: f.complete(prompt_logprobs=f.pick(-1, 0, 20, 20, 2**31), stream=False),
    "echo only": lambda f: f.complete(echo=True, max_tokens=0, logprobs=1, stream=False),
    "bad words": lambda f: f.complete(bad_words=[f.pick("a", "\ud7ff") * i for i in range(f.pick(0, 1), 99)]),
    "logit bias": lambda f: f.complete(logit_bias={str(i): f.pick(-100, 100, 1e30) for i in f.some()}),
    "logit bias outside": lambda f: f.complete(logit_bias={f.pick("-1", "x", str(f.vocab_size)): 1}),
    "allowed tokens": lambda f: f.complete(allowed_token_ids=f.pick([], [7], [-1], [f.vocab_size], f.ids(9))),
    "stop strings": lambda f: f.complete(stop=[chr(97 + i % 26) * (2 + i) for i in range(f.pick(30, 1000))]),
    "stop tokens": lambda f: f.complete(stop_token_ids=f.pick([2**63], [-1], [*range(f.vocab_size)], [9])),
    "JSON": lambda f: f.structured(json=f.pick(SCHEMA, {"type": "object"}, {"type": "?"})),
    "regex": lambda f: f.structured(regex=f.pick("[a-z]+", "(((", "(a|aa)+b{1,200}", "\\d{3}")),
    "grammar": lambda f: f.structured(grammar=f.pick(*GRAMMARS)),
    "grammar of nothing": lambda f: f.structured(grammar="root ::= root"),
    "choices": lambda f: f.structured(choice=[str(i) for i in range(f.pick(1, 500))]),
    "two structures": lambda f: f.structured(regex="a", json=SCHEMA),
    "thinking budget": lambda f: f.complete(prompt="<think>", thinking_token_budget=f.pick(-1, 0, 5, 2**31)),
    "budget without thoughts": lambda f: f.complete(thinking_token_budget=f.pick(0, 1)),
    "ids outside": lambda f: f.complete(prompt=[5, f.pick(*OUTSIDE, f.vocab_size), 7]),
    "ids outside, by ids": lambda f: f.generate([5, f.pick(*OUTSIDE, f.vocab_size), 7], max_tokens=32),
    "longest prompts": lambda f: f.complete(prompt=f.ids(MAX_MODEL_LEN + f.pick(-70, -2, -1, 0, 1, 5000))),
    "outgrows the model": lambda f: f.complete(prompt=f.ids(MAX_MODEL_LEN - 9), max_tokens=f.pick(9, None)),
    "outgrows the draft": lambda f: f.complete(prompt=f.ids(DRAFT_MAX_MODEL_LEN - 20), max_tokens=60),
    "longer than the draft": lambda f: f.complete(prompt=f.ids(DRAFT_MAX_MODEL_LEN + f.pick(-1, 0, 1, 100))),
    "hardly a prompt": lambda f: f.complete(prompt=f.pick([], [[]], "", [7], [1], None, [""])),
    "many prompts": lambda f: f.complete(prompt=[f.some() for _ in range(f.pick(20, 60))], max_tokens=4),
    "odd texts": lambda f: f.complete(prompt=f.pick(*ODD_TEXTS)),
    "odd chats": lambda f: f.chat(f.pick(*ODD_TEXTS, "", None, {}, [{"type": "image_url"}])),
    "tools": lambda f: f.chat("hi", tools=[TOOL], tool_choice=f.pick("auto", "required", TOOL)),
    "embeddings for a prompt": lambda f: f.complete(prompt=None, prompt_embeds=f.pick("AAAA", "?", "")),
    "disconnects": lambda f: f.hang_up(f.complete(max_tokens=400), 2),
    "disconnects in prefill": lambda f: f.hang_up(f.complete(prompt=f.ids(400), max_tokens=90), 0.2),
    "burst": lambda f: f.burst(24, lambda: f.complete(max_tokens=16)),
    "burst of long ones": lambda f: f.burst(8, lambda: f.complete(prompt=f.ids(300), max_tokens=8)),
    "burst of disconnects": lambda f: f.burst(16, lambda: f.hang_up(f.complete(max_tokens=99), 0.5)),
    "same request ids": lambda f: f.burst(3, lambda: f.complete({"X-Request-Id": "one"}, request_id="one")),
    "aborts": lambda f: f.post("/inference/v1/abort_requests", request_ids=f.pick(["", "one"], 7, [None])),
    "broken JSON": lambda f: [Request(f.pick(b"", b"{", b"\xff\xfe", b"[" * 99_999, b"null"))],
    "wrong types": lambda f: f.complete(**{f.pick("n", "top_k", "stop", "seed", "prompt"): {"a": [None]}}),
    "huge body": lambda f: f.complete(prompt=f.pick("a" * 3_000_000, [7] * 500_000)),
    "best of": lambda f: f.complete(best_of=f.pick(8, -1), n=2, temperature=1),
    "priority": lambda f: f.complete(priority=f.pick(-(2**31), 2**63, 1)),
    "cache salt": lambda f: f.complete(cache_salt=f.pick("a", "", "\ud800", "x" * 5000)),
    "transfers": lambda f: f.complete(kv_transfer_params={"do_remote_prefill": True}),
    "extra arguments": lambda f: f.complete(vllm_xargs={"a": f.pick(1, 2**63, 2**64, "x" * 99_999)}),
    "repetitions": lambda f: f.complete(prompt=[7] * 200, repetition_detection=REPETITIONS),
    "truncation": lambda f: f.complete(prompt=f.ids(999), truncate_prompt_tokens=f.pick(-1, 0, 1, 99, 2**31)),
}

HARMLESS: dict[str, Kind] = {  # keep the engine as busy
    "short": lambda f: f.complete(),
    "long": lambda f: f.complete(prompt=f.ids(300)),
    "several of one prompt": lambda f: f.complete(n=8, temperature=1),
    "many prompts": lambda f: f.complete(prompt=[f.some() for _ in range(20)], max_tokens=4),
    "disconnects": lambda f: f.hang_up(f.complete(max_tokens=300), 2),
    "burst": lambda f: f.burst(24, lambda: f.complete(max_tokens=16)),
}
# fmt: on


def deal(table: Mapping[str, Kind], seed: int, vocab_size: int) -> Iterator[tuple[str, list[Request]]]:
    """Kinds and their requests without end: all kinds once in a random order, then again in another."""
    rng = random.Random(seed)
    forge = Forge(rng, vocab_size)
    while True:
        for name in rng.sample(sorted(table), len(table)):
            yield name, table[name](forge)


def good_requests() -> dict[str, Request]:
    """Name -> request: `PROMPTS_PER_STREAM` of each stream; half of the streams greedy, half with seeds."""
    made = {}
    for stream in range(STREAMS):
        for number in range(PROMPTS_PER_STREAM):
            name = f"{stream}.{number}"
            sampled = {
                "temperature": 0.7 + stream / 20,
                "top_p": 0.95,
                "top_k": 50,
                "seed": stream + 100 * number,
            }
            fields = {
                "model": MODEL_NAME,
                "prompt": next(document_chain(f"soak {name}"))[:200],
                "max_tokens": OUT_TOKENS,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "return_token_ids": True,
                **(sampled if stream % 2 else {"temperature": 0}),
            }
            made[name] = Request(json.dumps(fields).encode())
    return made
