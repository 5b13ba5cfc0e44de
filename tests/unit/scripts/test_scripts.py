"""The pure parts of the benchmark and of the lossless check."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

SCRIPTS = Path(__file__).parents[3] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import arguments  # noqa: E402
import bench  # noqa: E402
import bench_rows  # noqa: E402
import check_lossless as check  # noqa: E402
import harness  # noqa: E402
import provenance  # noqa: E402
from bench_rows import add_speedups, summarise, summarise_rounds  # noqa: E402
from prompts import Prompt  # noqa: E402

CORES = harness.Cores(target=0, draft=1, available=2)


def result(seconds: float, tokens: int, **more: Any) -> harness.GenerationResult:
    return harness.GenerationResult(outputs=[[1] * tokens], seconds=seconds, cpu_seconds=seconds / 2, **more)


def measured(
    method: str, k: int | None, results: list[harness.GenerationResult], batch: int = 1
) -> bench_rows.Measurements:
    return bench_rows.Measurements(bench_rows.Contestant(method, k), batch, results)


def speculative(seconds: float, **ssd: int) -> harness.GenerationResult:
    return result(seconds, 100, drafted_per_position=[10, 8], accepted_per_position=[9, 4], ssd=ssd)


SSD_COUNTERS = {
    "rounds": 10,
    "lookups": 20,
    "hits": 15,
    "late": 1,
    "undrafted": 0,
    "drafts_served": 45,
    "wait_ns": 0,
    "critical_path_ns": 5_000_000,
    "draft_restarts": 0,
    "draft_stalls": 0,
    "lookups_k0": 4,
    "hits_k0": 1,
    "lookups_k1": 16,
    "hits_k1": 14,
    "lookups_k2": 0,
    "hits_k2": 0,
    "draft.steps": 40,
    "draft.step_ns": 80_000_000,
    "draft.rows": 400,
    "draft.branches": 150,
    "draft.adopted": 15,
}


def rows_of_a_run() -> list[dict[str, Any]]:
    """Three tasks on a machine that got slower: absolute speeds vary and ratios do not."""
    drift = (1.0, 2.0, 4.0)
    rows = [
        summarise(measured("ar", None, [result(6 * d, 100) for d in drift]), 0.0, CORES),
        summarise(measured("draft_model", 1, [speculative(4 * d) for d in drift]), 0.0, CORES),
        summarise(measured("draft_model", 2, [speculative(3 * d) for d in drift]), 0.0, CORES),
        summarise(measured("ssd", 2, [speculative(2 * d, **SSD_COUNTERS) for d in drift]), 0.0, CORES),
    ]
    rows = [{"category": "all"} | row for row in rows]
    add_speedups(rows)
    return rows


def test_a_row_is_of_all_tasks_and_has_an_interval() -> None:
    row = summarise(measured("ar", None, [result(1, 10), result(2, 20), result(1, 60)]), 0.0, CORES)
    assert (row["method"], row["k"], row["batch"], row["temperature"]) == ("ar", None, 1, 0.0)
    assert row["tok_s"] == row["tok_s_per_core"] == 22.5
    assert row["tok_s_interval"] == [10, 60]  # three tasks alike are among a thousand draws of three
    assert (row["tasks"], row["tokens"]) == (3, 90)
    assert row["target_core_share"] == 0.5
    assert row["ttft_ms_p50"] is row["ttft_ms_p50_interval"] is None
    assert "acceptance_per_position" not in row
    assert "hit_rate" not in row


def test_decode_figures_are_per_round_and_request() -> None:
    one = result(1, 10, decode_seconds=[0.01, 0.02, 0.03], decode_rows=6, decode_tokens=15)
    row = summarise(measured("ar", None, [one]), 0.0, CORES)
    assert row["round_ms"] == 20
    assert row["tokens_per_round"] == 2.5


def test_acceptance_counts_only_what_was_drafted_there() -> None:
    row = summarise(measured("draft_model", 2, [speculative(1), speculative(1)]), 0.0, CORES)
    assert row["acceptance_per_position"] == [0.9, 0.5]
    assert (row["accepted_per_position"], row["drafted_per_position"]) == ([18, 8], [20, 16])


def test_an_ssd_row() -> None:
    row = summarise(measured("ssd", 2, [speculative(1, **SSD_COUNTERS)] * 2), 0.0, CORES)
    assert row["cores"] == 2
    assert row["tok_s_per_core"] == row["tok_s"] / 2
    assert row["hit_rate"] == 0.75
    assert row["hit_rate_by_k"] == [0.25, 0.875, None]
    assert row["late"] == 2
    assert row["drafts_per_hit"] == 3
    assert row["critical_path_ms_per_round"] == 0.5
    assert row["wait_ms_per_round"] == 0
    assert row["draft_step_ms"] == 2
    assert row["draft_steps_per_round"] == 4
    assert row["draft_rows_per_step"] == 10
    assert (row["branches"], row["adopted"]) == (300, 30)


def test_latencies_are_those_of_a_server() -> None:
    one = harness.GenerationResult(
        outputs=[[1] * 5, [1]], output_seconds=[[0.1, 0.2, 0.5], [0.3]], seconds=1, cpu_seconds=1
    )
    row = summarise(measured("ar", None, [one]), 0.0, CORES)
    assert (row["ttft_ms_p50"], row["ttft_ms_p99"]) == (100, 300)
    assert row["tpot_ms_p50"] == 100  # 0.4 s for the four tokens after the first
    assert (row["itl_ms_p50"], row["itl_ms_p99"]) == (100, 300)


def test_all_cores_are_counted_and_compared_with_one() -> None:
    one, all_of_them = (bench_rows.Contestant("ar", None, each) for each in (False, True))
    rows = [
        {"category": "all"} | summarise(bench_rows.Measurements(each, 1, [result(s, 100)]), 0.0, CORES)
        for each, s in ((one, 2), (all_of_them, 1))
    ]
    add_speedups(rows)
    assert rows[1]["cores"] == 2
    assert rows[1]["tok_s_per_core"] == rows[0]["tok_s_per_core"] == 50
    assert rows[1]["speedup_vs_ar"] == 2


def test_each_category_has_figures_of_its_own() -> None:
    found = bench_rows.Measurements(
        bench_rows.Contestant("ar", None), 1, [result(1, 10), result(1, 20), result(1, 30)], ["a", "b", "a"]
    )
    tokens = {name: summarise(part, 0.0, CORES)["tokens"] for name, part in found.by_category().items()}
    assert tokens == {"all": 60, "a": 40, "b": 20}
    found.categories = ["a", "a", "a"]
    assert list(found.by_category()) == ["all"]


def test_one_core_for_both_counts_once() -> None:
    row = summarise(measured("ssd", 2, [speculative(1, **SSD_COUNTERS)]), 0.0, harness.Cores(0, 0))
    assert row["tok_s_per_core"] == row["tok_s"]


def test_every_counter_that_is_read_exists() -> None:
    counters = pytest.importorskip("vllm_ssd.link.counters")
    names = {*counters.target_fields(2), *(f"draft.{name}" for name in counters.DRAFT_FIELDS)}
    assert set(SSD_COUNTERS) <= names


def test_speedups_are_those_of_the_same_tasks_and_against_the_best_k() -> None:
    ar, slow, fast, ssd = rows_of_a_run()
    assert "speedup_vs_ar" not in ar
    assert (slow["speedup_vs_ar"], fast["speedup_vs_ar"], ssd["speedup_vs_ar"]) == (1.5, 2, 3)
    assert ssd["speedup_vs_ar_interval"] == [3, 3]
    assert ssd["speedup_vs_draft_model_best_k"] == 1.5
    assert ssd["draft_model_best_k"] == 2


def test_speedups_compare_equal_batch_sizes_only() -> None:
    rows = [
        summarise(measured("ar", None, [result(1, 10)], batch=4), 0.0, CORES),
        summarise(measured("ssd", 2, [speculative(1, **SSD_COUNTERS)], batch=1), 0.0, CORES),
    ]
    rows = [{"category": "all"} | row for row in rows]
    add_speedups(rows)
    assert "speedup_vs_ar" not in rows[1]


def test_rows_are_plain_json() -> None:
    rows = rows_of_a_run()
    assert json.loads(json.dumps(rows)) == rows


def test_the_tables_show_every_method() -> None:
    rows = rows_of_a_run()
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(bench_rows.make_table("speed", bench_rows.SPEED_COLUMNS, rows))
    console.print(bench_rows.make_table("speculation", bench_rows.SPECULATION_COLUMNS, rows[1:]))
    text = console.export_text()
    for row in rows:
        assert bench_rows.Contestant(row["method"], row["k"]).label in text
    assert "25 88 -" in text


def test_speculating_methods_get_every_k() -> None:
    labels = [one.label for one in bench.contestants(["ar", "draft_model", "ssd", "ssd_planned"], [2, 4])]
    assert labels == ["ar", "draft_model K=2", "draft_model K=4", "ssd K=2", "ssd K=4", "ssd_planned K=4"]
    labels = [one.label for one in bench.contestants(["ar", "ngram", "ssd"], [2], all_cores=True)]
    assert labels == ["ar", "ngram K=2", "ssd K=2", "ar, all cores", "ngram K=2, all cores"]


PROMPTS = [Prompt(str(number), "abb"[number % 3], [number]) for number in range(9)]


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_every_prompt_is_in_a_group_of_its_category(batch: int) -> None:
    groups = bench.group_prompts(PROMPTS, batch)
    assert all(len(group.prompts) == batch for group in groups)
    for name in "ab":
        mine = [prompt.token_ids for prompt in PROMPTS if prompt.category == name]
        grouped = [prompt for group in groups if group.category == name for prompt in group.prompts]
        assert {prompt[0] for prompt in grouped} == {prompt[0] for prompt in mine}
        assert len(grouped) == -(-len(mine) // batch) * batch


def test_a_turn_has_enough_prompts() -> None:
    assert list(bench.turns([bench.Group("a", [])] * 10, 1)) == [[*range(8)], [8, 9]]
    assert list(bench.turns([bench.Group("a", [])] * 3, 4)) == [[0, 1], [2]]
    assert list(bench.turns([bench.Group("a", [])] * 2, 16)) == [[0], [1]]


def test_everyone_begins_a_turn_once() -> None:
    orders = [bench.turn_order(3, turn) for turn in range(3)]
    assert [order[0] for order in orders] == [0, 1, 2]
    assert all(sorted(order) == [0, 1, 2] for order in orders)


class RecordingEngine:
    """Stands in for an engine process; notes what it is asked."""

    label = "ar"

    def __init__(self) -> None:
        self.led: list[harness.GenerationTask] = []
        self.measured: list[harness.GenerationTask] = []

    def await_ready(self) -> None:
        pass

    def lead_in(self, task: harness.GenerationTask) -> None:
        self.led.append(task)

    def generate(self, task: harness.GenerationTask) -> harness.GenerationResult:
        self.measured.append(task)
        return result(1.0, 100)


def test_before_each_turn_the_engine_does_the_like(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = RecordingEngine()
    monkeypatch.setattr(bench, "running_engines", lambda specs: contextlib.nullcontext([engine]))
    options = {"target": "T", "draft": "D", "methods": ["ar"], "k": [4], "batch": [1, 4], "all_cores": False}
    more = {"out_tokens": 8, "temperature": 0.0}
    configs: dict[str, Any] = {"ssd_config": {}, "engine_args": {}}
    run = bench.Bench(argparse.Namespace(**options, **more, **configs), PROMPTS)
    run.run()
    assert [len(task.prompts) for task in engine.measured] == [1] * 9 + [4] * 3
    assert [len(task.prompts) for task in engine.led] == [1, 1, 4, 4]  # two turns at each batch size
    assert all(task.may_end for task in engine.measured)
    by_category = {(row["category"], row["batch"]): row["tasks"] for row in run.rows()}
    expected = {("all", 1): 9, ("a", 1): 3, ("b", 1): 6, ("all", 4): 3, ("a", 4): 1, ("b", 4): 2}
    assert by_category == expected


@pytest.mark.parametrize("text", ["", "4,", "0", "-1", "four", "1.5"])
def test_a_wrong_list_of_numbers_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        arguments.parse_numbers(text)


def test_command_line_values() -> None:
    assert arguments.parse_numbers("1,4,8") == [1, 4, 8]
    assert arguments.parse_object('{"ssd_branch_budget": 7}') == {"ssd_branch_budget": 7}
    assert bench.parse_methods("ar,ssd") == ["ar", "ssd"]
    for parse, text in (
        (arguments.parse_object, "[1]"),
        (arguments.parse_object, "{"),
        (bench.parse_methods, "eagle"),
    ):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


def test_the_machine_is_described() -> None:
    machine = provenance.describe_machine()
    assert set(machine) == {"cpu", "cores", "memory_gib", "python", "torch", "vllm"}
    assert machine["cores"] >= 1
    assert provenance.describe_run()["commit"]


def test_engine_arguments_of_each_method() -> None:
    def args(method: str, k: int | None) -> dict[str, Any]:
        return harness.engine_args("T", method, "D", k, CORES, {"ssd_branch_budget": 9}, max_num_seqs=2)

    assert "speculative_config" not in args("ar", None)
    assert args("draft_model", 3)["speculative_config"] == {
        "method": "draft_model",
        "model": "D",
        "num_speculative_tokens": 3,
    }
    ssd = args("ssd", 3)["speculative_config"]
    assert ssd["ssd_draft_cores"] == "1"
    assert ssd["ssd_branch_budget"] == 9
    assert args("ssd", 3)["max_num_seqs"] == 2


TOP = harness.TopTwo(first=7, second=8, gap=0.5)


def test_no_difference() -> None:
    assert check.find_difference(4, 0, 10, [1, 2], [1, 2], [TOP, TOP]) is None


def test_a_difference_is_told_with_all_facts() -> None:
    found = check.find_difference(4, 3, 10, [1, 7, 9], [1, 8, 9], [TOP, TOP, TOP])
    assert found == check.Difference(4, 3, 10, 1, 7, 8, 7, 8, 0.5)
    assert not found.is_tie
    for fact in ("K=4", "prompt 3", "10 tokens", "position 1", "0.5 nats", "bug"):
        assert fact in found.describe()


def test_a_shorter_output_is_a_difference() -> None:
    found = check.find_difference(4, 3, 10, [1, 7], [1], [TOP, TOP])
    assert found is not None
    assert (found.position, found.expected, found.found) == (1, 7, None)


@pytest.mark.parametrize(("gap", "token", "is_tie"), [(1e-6, 8, True), (1e-6, 5, False), (0.1, 8, False)])
def test_only_close_first_two_tokens_are_a_tie(gap: float, token: int, is_tie: bool) -> None:
    found = check.find_difference(4, 0, 10, [7], [token], [harness.TopTwo(7, 8, gap)])
    assert found is not None
    assert found.is_tie is is_tie


def test_a_changed_model_is_noticed(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    before = check.stamp_models([str(tmp_path), "some/hub-name"])
    assert check.stamp_models([str(tmp_path), "some/hub-name"]) == before
    weights.write_bytes(b"22")
    assert check.stamp_models([str(tmp_path)]) != before


@pytest.mark.parametrize("count", [1, 4, 10, 40, 200])
def test_every_prompt_has_a_length_and_a_place(count: int) -> None:
    sizes = check.band_sizes(count)
    assert sum(sizes) == count
    if count >= 10:
        assert min(sizes) >= 1
    limits = check.batch_limits(count)
    assert len(limits) == count
    assert set(limits) <= {1, 2, 4, 8, 16}
    task = harness.GenerationTask([[index] for index in range(count)], [1] * count, limits)
    parts = list(check.parts_of(task))
    assert [prompt for _, part in parts for prompt in part.prompts] == task.prompts
    assert [task.prompts[offset] for offset, _ in parts] == [part.prompts[0] for _, part in parts]
    assert sum(check.batch_limits(200).count(limit) for limit in (1, 16)) > 8


def test_rounds_are_told_apart_by_how_many_rows_had_drafts() -> None:
    results = [
        result(1, 10, decode_seconds=[0.01, 0.02, 0.03], drafted_rows=[4, 2, 4]),
        result(1, 10, decode_seconds=[0.05, 0.07], drafted_rows=[3, 0]),
    ]
    assert summarise_rounds(results, 4) == {
        "rounds_all_hit": 2,
        "round_ms_all_hit": 20,
        "rounds_mixed": 2,
        "round_ms_mixed": 35,
    }
    assert summarise_rounds([result(1, 10)], 4)["round_ms_mixed"] is None
