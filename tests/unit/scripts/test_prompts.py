"""Reading prompts: both forms, limits, errors, and the project's own set."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

from prompts import DEFAULT_PROMPTS, MT_BENCH, read_prompts


class Plain:
    """A tokenizer without a chat template; a token is a character."""

    chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        return [ord(char) for char in text]


class Templated(Plain):
    chat_template = "..."

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool, tokenize: bool, return_dict: bool
    ) -> list[int]:
        assert tokenize
        assert not return_dict
        text = "".join(f"<{message['role']}>{message['content']}<end>" for message in messages)
        return self.encode(text + "<assistant>" * add_generation_prompt)


def write(tmp_path: Path, *records: Any) -> Path:
    path = tmp_path / "set.jsonl"
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def spelled(token_ids: list[int]) -> str:
    return "".join(map(chr, token_ids))


def test_spec_benchs_form(tmp_path: Path) -> None:
    path = write(tmp_path, {"question_id": 81, "category": "qa", "turns": ["first", "second"]})
    (prompt,) = read_prompts(path, Plain(), 100)
    assert (prompt.id, prompt.category, spelled(prompt.token_ids)) == ("81", "qa", "first")


def test_mt_benchs_categories_are_one_and_others_stay(tmp_path: Path) -> None:
    others = ["translation", "math_reasoning", "rag"]
    records = [{"question_id": 1, "category": name, "turns": ["x"]} for name in [*sorted(MT_BENCH), *others]]
    categories = [prompt.category for prompt in read_prompts(write(tmp_path, *records), Plain(), 100)]
    assert categories == ["mt_bench"] * 8 + others


def test_the_plain_form_and_its_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, {"id": "a-1", "category": "math", "prompt": "x"}, "", {"prompt": "y\u2028z"})
    first, second = read_prompts(path, Plain(), 100)
    assert (first.id, first.category, spelled(first.token_ids)) == ("a-1", "math", "x")
    assert (second.id, second.category, spelled(second.token_ids)) == ("3", "all", "y\u2028z")


def test_a_line_separator_within_a_text_ends_no_line(tmp_path: Path) -> None:
    (prompt,) = read_prompts(write(tmp_path, '{"prompt": "y\u2028z"}'), Plain(), 100)
    assert spelled(prompt.token_ids) == "y\u2028z"


def test_the_chat_template_is_used_where_there_is_one(tmp_path: Path) -> None:
    (prompt,) = read_prompts(write(tmp_path, {"prompt": "hello"}), Templated(), 100)
    assert spelled(prompt.token_ids) == "<user>hello<end><assistant>"


def test_long_prompts_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, *[{"prompt": "x" * length} for length in (5, 6, 4, 9)])
    assert [prompt.id for prompt in read_prompts(path, Plain(), 5)] == ["1", "3"]
    assert "left out 2 prompts of more than 5 tokens" in capsys.readouterr().err
    read_prompts(path, Plain(), 9)
    assert capsys.readouterr().err == ""


def test_so_many_of_each_category_evenly_spaced(tmp_path: Path) -> None:
    records = [{"id": f"a{i}", "category": "a", "prompt": "x"} for i in range(10)]
    records[3:3] = [{"id": f"b{i}", "category": "b", "prompt": "x"} for i in range(2)]
    kept = read_prompts(write(tmp_path, *records), Plain(), 100, per_category=4)
    assert [prompt.id for prompt in kept] == ["a0", "a2", "b0", "b1", "a5", "a7"]


def test_the_spread_is_over_prompts_short_enough(tmp_path: Path) -> None:
    path = write(tmp_path, *[{"prompt": "x" * length} for length in (9, 1, 1, 9)])
    assert [prompt.id for prompt in read_prompts(path, Plain(), 5, per_category=2)] == ["2", "3"]


@pytest.mark.parametrize("line", ["{", "[1]", "7"])
def test_a_line_that_is_no_object_is_named(line: str, tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "x"}, line)
    with pytest.raises(ValueError, match=r"set\.jsonl:2: not a JSON object"):
        read_prompts(path, Plain(), 100)


@pytest.mark.parametrize("record", [{}, {"turns": []}, {"turns": "x"}, {"turns": [1]}, {"prompt": None}])
def test_a_line_without_a_text_is_named(record: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "x"}, record)
    with pytest.raises(ValueError, match=r"set\.jsonl:2: neither `turns`"):
        read_prompts(path, Plain(), 100)


@pytest.mark.parametrize("records", [[], [{"prompt": "too long"}]])
def test_a_set_of_no_prompts_is_refused(records: list[dict[str, str]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set\.jsonl: no prompt is left"):
        read_prompts(write(tmp_path, *records), Plain(), 3)


def test_the_projects_own_set_is_ten_of_each_of_spec_benchs_categories() -> None:
    assert len(DEFAULT_PROMPTS.read_text(encoding="utf-8").splitlines()) == 60
    prompts = read_prompts(DEFAULT_PROMPTS, Plain(), 10_000)
    names = ["mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag"]
    assert Counter(prompt.category for prompt in prompts) == dict.fromkeys(names, 10)
    assert len({prompt.id for prompt in prompts}) == 60
    texts = [spelled(prompt.token_ids) for prompt in prompts]
    assert len(set(texts)) == 60
    assert all(text == text.strip() for text in texts)
    assert set("".join(texts)) <= {chr(code) for code in range(32, 127)} | set("äöüÄÖÜß\n")
