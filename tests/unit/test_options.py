"""Options as the front ends hand them over, and as the documents have them."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configs import Pair, assert_one_line, create, on_cuda, refusal

pytestmark = pytest.mark.usefixtures("bound_target")

FIRST = min(os.sched_getaffinity(0))

# option, as written (for a shell and in JSON, or for Python alone), as it is then
WRITTEN: list[tuple[str, str | None, Any, Any]] = [
    ("num_speculative_tokens", "4", "4", 4),
    ("ssd_branch_budget", "10", 10, 10),
    ("ssd_branch_budget", None, np.int64(10), 10),
    ("ssd_branch_budget", None, 10.0, 10),
    ("ssd_branch_budget", None, "10", 10),
    ("ssd_fanout", "geometric", "geometric", "geometric"),
    ("ssd_fanout", "[4,1,1,1,1]", [4, 1, 1, 1, 1], [4, 1, 1, 1, 1]),
    ("ssd_fanout", "4,1,1,1,1", (4, 1, 1, 1, 1), [4, 1, 1, 1, 1]),
    ("ssd_max_rows", "1k", 1000, 1000),
    ("ssd_verify", "ratio", "ratio", "ratio"),
    ("ssd_saguaro_c", "1", 1, 1.0),
    ("ssd_backup", "ngram", "ngram", "ngram"),
    ("ssd_planner", "true", True, True),
    ("ssd_planner", "false", "false", False),
    ("ssd_planner", None, 1, True),
    ("ssd_draft_device", "cpu", torch.device("cpu"), "cpu"),
    ("ssd_draft_cores", str(FIRST), FIRST, str(FIRST)),
    ("ssd_draft_cores", f"{FIRST},{FIRST}", [FIRST, FIRST], str(FIRST)),
    ("ssd_draft_cores", f"{FIRST}-{FIRST}", (str(FIRST),), str(FIRST)),
    ("ssd_draft_cores", None, range(FIRST, FIRST + 1), str(FIRST)),
    ("ssd_draft_cores", None, np.array([FIRST]), str(FIRST)),
    ("ssd_draft_cores", None, np.int64(FIRST), str(FIRST)),
    ("ssd_draft_dtype", "bfloat16", torch.bfloat16, "bfloat16"),
    ("ssd_draft_memory", "1", 1, 1.0),
    ("ssd_draft_memory", "0.25", "0.25", 0.25),
    ("ssd_draft_memory", "1.5GiB", "1.5 GiB", 1.5),
    ("ssd_draft_memory", "512MiB", "512 mib", 0.5),
    ("ssd_draft_memory", None, "0.5G", 0.5),
    ("ssd_draft_memory", None, "1g", 1e9 / 2**30),
    ("ssd_draft_memory", None, "1GB", 1e9 / 2**30),
    ("ssd_prefill_chunk", "1k", 1000, 1000),
    ("ssd_wait_ms", "2", 2, 2.0),
    ("ssd_ready_timeout", "60", "60", 60.0),
    ("ssd_stall_timeout", "1e1", 10, 10.0),
]


@pytest.mark.parametrize(
    ("option", "text", "value", "expected"), WRITTEN, ids=[f"{row[0]}={row[2]!r}" for row in WRITTEN]
)
def test_what_the_front_ends_make_of_an_option(
    pair: Pair, tmp_path: Path, option: str, text: str | None, value: Any, expected: Any
) -> None:
    """Python, JSON, a dotted option of the command line, and YAML."""
    more: dict[str, Any] = {"ssd_verify": "ratio"} if option == "ssd_saguaro_c" else {}
    assert getattr(create(pair, **more | {option: value}).speculative_config, option) == expected
    if text is None:
        return
    options = {"method": "ssd", "model": str(pair[1]), "num_speculative_tokens": 4} | more
    options.pop(option, None)
    file = tmp_path / "engine.yaml"
    # Text with a comma or a dash is text in YAML too; numbers with a k are, unlike on the command line.
    value_in_yaml = json.dumps(value) if text.endswith("k") else text
    lines = [f"  {name}: {json.dumps(given)}" for name, given in options.items()]
    file.write_text(
        "\n".join(["speculative-config:", *lines, f"  {option}: {value_in_yaml}"]), encoding="utf-8"
    )
    dotted = [
        word for name, given in options.items() for word in (f"--speculative-config.{name}", str(given))
    ]
    for words in ([*dotted, f"--speculative-config.{option}", text], ["--config", str(file)]):
        assert getattr(from_command_line(pair, words).speculative_config, option) == expected, words


@functools.cache
def parser() -> Any:
    """vLLM's, of a server's options."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return EngineArgs.add_cli_args(FlexibleArgumentParser())


def from_command_line(pair: Pair, words: list[str]) -> Any:
    """The engine's config of a server with these options."""
    from vllm.engine.arg_utils import EngineArgs

    always = ["--model", str(pair[0]), "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    return EngineArgs.from_cli_args(parser().parse_args([*always, *words])).create_engine_config()


def test_a_size_that_is_more_than_there_is(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's command line makes 10^9 of 1g, and an option without a unit is in GiB."""
    dotted = ["method", "ssd", "model", str(pair[1]), "num_speculative_tokens", "4", "ssd_draft_memory", "1g"]
    words = [f"--speculative-config.{w}" if i % 2 == 0 else w for i, w in enumerate(dotted)]
    with pytest.raises(ValueError, match=r"ssd_draft_memory") as error:
        from_command_line(pair, words)
    assert_one_line(
        str(error.value).splitlines(), "ssd_draft_memory=1e+09", "GiB", "for 1000000000 bytes", "0.931"
    )
    assert_one_line(
        refusal(pair, ssd_draft_memory=1e5), "ssd_draft_memory=100000", "this machine has", "lower it"
    )
    assert_one_line(refusal(pair, ssd_draft_memory=float("inf")), "ssd_draft_memory=inf", "this machine has")
    on_cuda(monkeypatch, 2)
    assert_one_line(refusal(pair, ssd_draft_memory=41), "ssd_draft_memory=41", "cuda:1 has 41.0 GiB")
    create(pair, ssd_draft_memory=40)


@pytest.mark.parametrize("given", ["much", "1x", "", [1], "-1g", {}], ids=repr)
def test_sizes_that_are_none(pair: Pair, given: Any) -> None:
    assert any("ssd_draft_memory" in line for line in refusal(pair, ssd_draft_memory=given))


@pytest.mark.parametrize("given", [True, 1.5, [0.5], {"a": 1}, -1, [-1], "0,,1"], ids=repr)
def test_cores_that_are_none(pair: Pair, given: Any) -> None:
    assert any("ssd_draft_cores" in line for line in refusal(pair, ssd_draft_cores=given))


@pytest.mark.parametrize("document", ["docs/options.md", "README.md"])
def test_the_documents_have_the_options_with_their_defaults(document: str) -> None:
    """docs/options.md all of them."""
    from vllm_ssd.config import SSDSpeculativeConfig

    text = (Path(__file__).parents[2] / document).read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `ssd_")]
    told = {row[0].strip("| `"): row[1].strip("` ") for row in rows}
    defaults = {
        field.name: getattr(field.default, "default", field.default)
        for field in fields(SSDSpeculativeConfig)
        if field.name.startswith("ssd_")
    }
    assert told
    assert told.keys() <= defaults.keys()
    if document != "README.md":
        assert told.keys() == defaults.keys()
    for name, value in told.items():
        default = defaults[name]
        if default not in (None, "auto"):  # those are told in words
            assert value == default or json.loads(value) == default, name
