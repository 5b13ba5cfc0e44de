"""What the benchmark makes of its measurements: a row for each method and batch size, and tables of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
from harness import SSD_METHODS, Cores, GenerationResult
from intervals import draw_weights, interval, percentiles, ratios
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

QUIET_SHARE = 0.97  # of the target's core that its process got, if nothing else ran there


@dataclass(frozen=True)
class Contestant:
    """A method and, where it speculates, its number of speculative tokens (at most, if planned)."""

    method: str
    k: int | None
    all_cores: bool = False  # of the machine; else one, and one more for the draft process of SSD

    @property
    def label(self) -> str:
        """For people."""
        text = self.method if self.k is None else f"{self.method} K={self.k}"
        return text + ", all cores" if self.all_cores else text


@dataclass
class Measurements:
    """One contestant at one batch size: a result for each task, in order.

    `categories` are the tasks' categories; the tasks of two contestants at one batch size are the same.
    """

    contestant: Contestant
    batch: int
    results: list[GenerationResult]
    categories: list[str] | None = None

    @property
    def speeds(self) -> list[float]:
        """Output tokens per second of each task."""
        return [sum(map(len, result.outputs)) / result.seconds for result in self.results]

    def by_category(self) -> dict[str, Measurements]:
        """Those of each category, and of all as "all"."""
        parts = {"all": self}
        names = list(dict.fromkeys(self.categories or []))
        for name in names if len(names) > 1 else []:
            chosen = [
                result
                for result, category in zip(self.results, self.categories or [], strict=True)
                if category == name
            ]
            parts[name] = replace(self, results=chosen, categories=[name] * len(chosen))
        return parts


def rounded(value: float) -> float:
    """To four significant digits, which is more than any measurement here has."""
    return float(f"{value:.4g}")


def ratio(part: float, whole: float) -> float | None:
    """None where there was nothing to count."""
    return rounded(part / whole) if whole else None


def with_interval(name: str, draws: np.ndarray) -> dict[str, Any]:
    """Return a figure and its bootstrap interval, 95 %."""
    value, around = float(draws[0]), interval(draws)
    return {
        name: None if np.isnan(value) else rounded(value),
        f"{name}_interval": around and [rounded(bound) for bound in around],
    }


def summarise(measured: Measurements, temperature: float, cores: Cores) -> dict[str, Any]:
    """One row of the JSON file; comparisons are added by `add_speedups`."""
    contestant, results = measured.contestant, measured.results
    num_cores = cores.count_with_draft if contestant.method in SSD_METHODS else 1
    if contestant.all_cores:
        num_cores = cores.available
    tokens = [sum(map(len, result.outputs)) for result in results]
    seconds = [result.seconds for result in results]
    steps = [each for result in results for each in result.decode_seconds]
    weights = draw_weights(len(results))
    speed = ratios(weights, tokens, seconds)
    row: dict[str, Any] = {
        "method": contestant.method,
        "all_cores": contestant.all_cores,
        "batch": measured.batch,
        "k": contestant.k,
        "temperature": temperature,
        "tasks": len(results),
        "tokens": sum(tokens),
        **with_interval("tok_s", speed),
        "task_tokens": tokens,
        "task_seconds": [rounded(each) for each in seconds],
        "tok_s_per_core": rounded(float(speed[0]) / num_cores),
        "cores": num_cores,
        "target_core_share": rounded(sum(result.cpu_seconds for result in results) / sum(seconds)),
        "round_ms": rounded(1000 * median(steps)) if steps else None,
        **with_interval(
            "tokens_per_round",
            ratios(weights, [one.decode_tokens for one in results], [one.decode_rows for one in results]),
        ),
        **summarise_latency(results, weights),
    }
    if contestant.k is not None:
        row |= summarise_acceptance(results, contestant.k, weights)
        if contestant.method in SSD_METHODS:
            row |= summarise_ssd(results, contestant.k, weights) | summarise_rounds(results, measured.batch)
    return row


def summarise_latency(results: Sequence[GenerationResult], weights: np.ndarray) -> dict[str, Any]:
    """Time to first token, time per output token after it, and between outputs, in milliseconds.

    As `vllm bench serve` defines them, but inside the engine: without a server's HTTP.
    """
    found: dict[str, Any] = {}
    first, per_token, between = [], [], []
    for result in results:
        of_requests = list(zip(result.outputs, result.output_seconds, strict=False))
        first.append([1000 * seconds[0] for _, seconds in of_requests])
        per_token.append(
            [
                1000 * (seconds[-1] - seconds[0]) / (len(output) - 1)
                for output, seconds in of_requests
                if len(output) > 1
            ]
        )
        between.append([1000 * gap for _, seconds in of_requests for gap in np.diff(seconds)])
    for name, values in (("ttft", first), ("tpot", per_token), ("itl", between)):
        for percent in (50, 99):
            found |= with_interval(f"{name}_ms_p{percent}", percentiles(weights, values, percent))
    return found


def summarise_acceptance(results: Sequence[GenerationResult], k: int, weights: np.ndarray) -> dict[str, Any]:
    """How often the draft token at each position was accepted, of those that were verified there.

    A token counts as accepted only if all before it were, as in vLLM's own metric.
    """
    drafted = [sum(result.drafted_per_position[i] for result in results) for i in range(k)]
    accepted = [sum(result.accepted_per_position[i] for result in results) for i in range(k)]
    first = [
        [result.accepted_per_position[0] for result in results],
        [result.drafted_per_position[0] for result in results],
    ]
    return {
        **with_interval("first_accepted", ratios(weights, *first)),
        "acceptance_per_position": [ratio(a, d) for a, d in zip(accepted, drafted, strict=True)],
        "accepted_per_position": accepted,
        "drafted_per_position": drafted,
    }


def summarise_rounds(results: Sequence[GenerationResult], batch: int) -> dict[str, Any]:
    """Milliseconds of a round in which all rows had drafts, and of one in which only some had."""
    rounds = [
        pair for result in results for pair in zip(result.decode_seconds, result.drafted_rows, strict=True)
    ]
    all_hit = [seconds for seconds, drafted in rounds if drafted == batch]
    mixed = [seconds for seconds, drafted in rounds if 0 < drafted < batch]
    return {
        "rounds_all_hit": len(all_hit),
        "round_ms_all_hit": rounded(1000 * median(all_hit)) if all_hit else None,
        "rounds_mixed": len(mixed),
        "round_ms_mixed": rounded(1000 * median(mixed)) if mixed else None,
    }


def summarise_ssd(results: Sequence[GenerationResult], k: int, weights: np.ndarray) -> dict[str, Any]:
    """What SSD's own counters say, prefill included; times in milliseconds."""
    totals: defaultdict[str, int] = defaultdict(int)
    for result in results:
        for name, value in result.ssd.items():
            totals[name] += value
    rounds, steps = totals["rounds"], totals["draft.steps"]
    hits = [[result.ssd[name] for result in results] for name in ("hits", "lookups")]
    return {
        **with_interval("hit_rate", ratios(weights, *hits)),
        "hit_rate_by_k": [ratio(totals[f"hits_k{i}"], totals[f"lookups_k{i}"]) for i in range(k + 1)],
        "lookups_by_k": [totals[f"lookups_k{i}"] for i in range(k + 1)],
        "late": totals["late"],
        "undrafted": totals["undrafted"],
        "drafts_per_hit": ratio(totals["drafts_served"], totals["hits"]),
        "wait_ms_per_round": ratio(totals["wait_ns"] / 1e6, rounds),
        "critical_path_ms_per_round": ratio(totals["critical_path_ns"] / 1e6, rounds),
        "draft_step_ms": ratio(totals["draft.step_ns"] / 1e6, steps),
        "draft_steps_per_round": ratio(steps, rounds),
        "draft_rows_per_step": ratio(totals["draft.rows"], steps),
        "branches": totals["draft.branches"],
        "adopted": totals["draft.adopted"],
        "draft_restarts": totals["draft_restarts"],
        "draft_stalls": totals["draft_stalls"],
    }


def add_speedups(rows: list[dict[str, Any]]) -> None:
    """Compare each row with those of its batch size and category on one core: the ratio of speeds."""
    for row in rows:
        peers = [
            other
            for other in rows
            if not other["all_cores"] and all(other.get(key) == row.get(key) for key in ("batch", "category"))
        ]
        plain = [other for other in peers if other["method"] == "ar"]
        stock = [other for other in peers if other["method"] == "draft_model"]
        if plain and row is not plain[0]:
            row |= speedup("speedup_vs_ar", row, plain[0])
        if stock and row["method"] in SSD_METHODS:
            best = max(stock, key=lambda other: other["tok_s"])
            row |= speedup("speedup_vs_draft_model_best_k", row, best) | {"draft_model_best_k": best["k"]}


def speedup(name: str, row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`name` and its interval: how many times as fast as `other` this row is."""
    weights = draw_weights(row["tasks"])
    ours, theirs = (ratios(weights, each["task_tokens"], each["task_seconds"]) for each in (row, other))
    return with_interval(name, ours / theirs)


def shown(value: Any) -> str:
    """A table's cell; lists are shares, shown as percentages."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join("-" if item is None else f"{100 * item:.0f}" for item in value)
    return f"{value:.2f}" if isinstance(value, float) and abs(value) < 10 else f"{value:.0f}"


# Heading -> cell. The first table is for every method, the second for those that speculate.
SPEED_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "batch": lambda row: shown(row["batch"]),
    "method": lambda row: Contestant(row["method"], row["k"], row["all_cores"]).label,
    "tok/s": lambda row: shown(row["tok_s"]),
    "95 %": lambda row: "{:.0f}-{:.0f}".format(*row["tok_s_interval"]),
    "/core": lambda row: shown(row["tok_s_per_core"]),
    "ms/round": lambda row: shown(row["round_ms"]),
    "tok/round": lambda row: shown(row["tokens_per_round"]),
    "TTFT ms": lambda row: shown(row["ttft_ms_p50"]),
    "ITL p99": lambda row: shown(row["itl_ms_p99"]),
    "x ar": lambda row: shown(row.get("speedup_vs_ar")),
    "x d_m": lambda row: shown(row.get("speedup_vs_draft_model_best_k")),
}
SPECULATION_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "batch": SPEED_COLUMNS["batch"],
    "method": SPEED_COLUMNS["method"],
    "accepted %": lambda row: shown(row.get("acceptance_per_position")),
    "hits": lambda row: shown(row.get("hit_rate")),
    "by k %": lambda row: shown(row.get("hit_rate_by_k")),
    "ssd ms": lambda row: shown(row.get("critical_path_ms_per_round")),
    "draft ms": lambda row: shown(row.get("draft_step_ms")),
}


CATEGORY_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "batch": SPEED_COLUMNS["batch"],
    "kind": lambda row: row["category"],
    **{name: SPEED_COLUMNS[name] for name in ("method", "tok/s", "tok/round", "x ar", "x d_m")},
    "accepted %": SPECULATION_COLUMNS["accepted %"],
    "hits": SPECULATION_COLUMNS["hits"],
}


def make_table(
    title: str, columns: dict[str, Callable[[dict[str, Any]], str]], rows: list[dict[str, Any]]
) -> Table:
    """Rows in the order given, a rule between batch sizes and between categories."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True)
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], rows[-1]], strict=True):
        table.add_row(
            *(cell(row) for cell in columns.values()),
            end_section=any(row[key] != following[key] for key in ("batch", "category")),
        )
    return table


def print_tables(console: Console, rows: list[dict[str, Any]]) -> None:
    """The figures that matter most; the JSON file has all."""
    overall = [row for row in rows if row["category"] == "all"]
    console.print(make_table("Speed", SPEED_COLUMNS, overall))
    speculating = [row for row in overall if row["k"] is not None]
    if speculating:
        console.print(make_table("Speculation", SPECULATION_COLUMNS, speculating))
    if len(overall) < len(rows):
        ordered = sorted(rows, key=lambda row: (row["batch"], row["category"]))
        console.print(make_table("By kind of prompt", CATEGORY_COLUMNS, ordered))
    console.print(
        "95 %: bootstrap interval over prompts. x ar, x d_m: speed relative to no speculation and to "
        "draft_model at its best K, with the target on the same core. accepted: at each "
        "draft position. hits: outcomes predicted, then by accepted length k. ssd ms: what SSD costs the "
        "target in a round. draft ms: one step of the draft process."
    )
    if min(row["target_core_share"] for row in rows) < QUIET_SHARE:
        console.print("[yellow]The target's core also worked for others (or for the host): rough figures.")
