"""The pure parts of scripts/soak.py: requests are the same for a seed, and verdicts fail when they should."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import soak_requests as requests  # noqa: E402
import soak_verdict as verdicts  # noqa: E402


def dealt(seed: int, table: dict[str, requests.Kind] = requests.HOSTILE, rounds: int = 3) -> list[Any]:
    return list(itertools.islice(requests.deal(table, seed, 512), rounds * len(table)))


def test_requests_are_the_same_for_a_seed() -> None:
    assert dealt(1) == dealt(1)
    assert dealt(1) != dealt(2)
    assert requests.good_requests() == requests.good_requests()


@pytest.mark.parametrize("table", [requests.HOSTILE, requests.HARMLESS])
def test_every_kind_has_its_turn(table: dict[str, requests.Kind]) -> None:
    counts = Counter(kind for kind, made in dealt(0, table) if made)
    assert counts == dict.fromkeys(table, 3)


def test_harmless_requests_are_in_order() -> None:
    for _, made in dealt(0, requests.HARMLESS):
        for request in made:
            fields = json.loads(request.body)
            prompts = fields["prompt"] if isinstance(fields["prompt"][0], list) else [fields["prompt"]]
            assert all(2 <= token < 512 for prompt in prompts for token in prompt)
            assert all(len(prompt) + fields["max_tokens"] < requests.MAX_MODEL_LEN for prompt in prompts)


def test_streams_fit_the_draft() -> None:
    good = requests.good_requests()
    assert len(good) == requests.STREAMS * requests.PROMPTS_PER_STREAM
    fields = [json.loads(request.body) for request in good.values()]
    # A token is a byte at least.
    assert all(len(f["prompt"].encode()) + f["max_tokens"] < requests.DRAFT_MAX_MODEL_LEN for f in fields)
    assert Counter(f["temperature"] == 0 for f in fields) == {True: 15, False: 15}
    assert all("seed" in f for f in fields if f["temperature"])


def stream(num_tokens: int, accepted: int, steps: int, end: str = "[DONE]") -> str:
    chunks: list[Any] = [{"choices": [{"token_ids": [7] * num_tokens}]}]
    metrics = {"num_accepted_draft_tokens": accepted, "num_spec_steps": steps}
    chunks.append({"choices": [], "metrics": {"speculative_decoding": metrics}})
    return "\n\n".join(f"data: {chunk}" for chunk in [*map(json.dumps, chunks), end])


def test_an_answer_is_read() -> None:
    answer = verdicts.read_answer(stream(requests.OUT_TOKENS, accepted=40, steps=30))
    assert answer == verdicts.Answer([7] * requests.OUT_TOKENS, rounds=requests.OUT_TOKENS - 41, hits=30)


@pytest.mark.parametrize(
    "body",
    [
        "",
        stream(requests.OUT_TOKENS - 1, 40, 30),
        stream(requests.OUT_TOKENS, 40, 30, end='{"choices": []}'),
        'data: {"error": {"message": "EngineCore died", "code": 500}}\n\ndata: [DONE]',
    ],
)
def test_half_an_answer_is_none(body: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        verdicts.read_answer(body)


def phase(hits: int = 50, token: int = 7) -> verdicts.Phase:
    """Every good request answered once; its last token is `token`."""
    made = verdicts.Phase()
    for name in requests.good_requests():
        made.answers[name].append(verdicts.Answer([7, 7, token], rounds=100, hits=hits))
    return made


def failed(alone: verdicts.Phase, beside: verdicts.Phase) -> list[str]:
    return [verdict.what.split()[0] for verdict in verdicts.judge(alone, beside) if not verdict.passed]


def test_a_good_run_passes() -> None:
    beside = phase(hits=46)
    beside.statuses["top_k"] = Counter({"200": 3, "400": 2, "hung up": 1})
    assert not failed(phase(), beside)
    assert not failed(phase(), phase(hits=80))


def test_hits_may_not_fall_or_be_absent() -> None:
    assert failed(phase(), phase(hits=44)) == ["hit"]
    assert failed(phase(hits=0), phase(hits=0)) == ["hit"]


def test_outputs_may_not_change() -> None:
    changed = phase()
    changed.answers["3.1"].append(verdicts.Answer([7, 8, 7], rounds=100, hits=50))
    for alone, beside in (phase(), changed), (changed, phase()):
        (verdict,) = [v for v in verdicts.judge(alone, beside) if not v.passed]
        assert verdict.what == "good outputs are identical"
        assert "3.1" in verdict.detail
        assert "from token 1 on" in verdict.detail


def test_no_output_may_be_missing() -> None:
    beside = phase()
    del beside.answers["3.1"]
    assert failed(phase(), beside) == ["good"]
    assert failed(beside, phase()) == ["good"]


def test_deaths_and_failures_fail() -> None:
    died, unanswered, error, unheard = phase(), phase(), phase(), phase()
    died.events.append("process 7 died")
    unanswered.failures.append("3.1: 500")
    error.statuses["top_k"] = Counter({"500": 1})
    unheard.statuses["top_k"] = Counter({"no answer": 1})
    assert failed(phase(), died) == failed(died, phase()) == ["no"]
    assert failed(phase(), unanswered) == failed(unanswered, phase()) == ["every"]
    assert failed(phase(), error) == failed(phase(), unheard) == ["hostile"]


def test_what_stock_answers_so_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "STOCK_5XX", frozenset({"top_k"}))
    beside = phase()
    beside.statuses["top_k"] = Counter({"500": 1})
    assert not failed(phase(), beside)
