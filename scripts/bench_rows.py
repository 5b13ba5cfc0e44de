"""What the benchmark makes of its measurements: a row for each method and batch size, and tables of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from harness import Cores, GenerationResult
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

QUIET_SHARE = 0.97  # of the target's core that its process got, if nothing else ran there


@dataclass(frozen=True)
class Contestant:
    """A method and, where it speculates, its number of speculative tokens."""

    method: str
    k: int | None

    @property
    def label(self) -> str:
        """For people."""
        return self.method if self.k is None else f"{self.method} K={self.k}"


@dataclass
class Measurements:
    """One contestant at one batch size: a result for each repeat, in order."""

    contestant: Contestant
    batch: int
    results: list[GenerationResult]

    @property
    def speeds(self) -> list[float]:
        """Output tokens per second of each repeat."""
        return [sum(map(len, result.outputs)) / result.seconds for result in self.results]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Least, greatest, and the range of the middle half."""
    quarters = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [0.0, 0.0, 0.0]
    return {
        "min": rounded(min(values)),
        "max": rounded(max(values)),
        "iqr": rounded(quarters[2] - quarters[0]),
    }


def rounded(value: float) -> float:
    """To four significant digits, which is more than any measurement here has."""
    return float(f"{value:.4g}")


def ratio(part: float, whole: float) -> float | None:
    """None where there was nothing to count."""
    return rounded(part / whole) if whole else None


def summarise(measured: Measurements, temperature: float, cores: Cores) -> dict[str, Any]:
    """One row of the JSON file; comparisons are added by `add_speedups`."""
    contestant, results, speeds = measured.contestant, measured.results, measured.speeds
    num_cores = cores.count_with_draft if contestant.method == "ssd" else 1
    steps = [seconds for result in results for seconds in result.decode_seconds]
    row: dict[str, Any] = {
        "method": contestant.method,
        "batch": measured.batch,
        "k": contestant.k,
        "temperature": temperature,
        "tok_s": rounded(median(speeds)),
        "tok_s_spread": spread(speeds),
        "tok_s_repeats": speeds,
        "tok_s_per_core": rounded(median(speeds) / num_cores),
        "cores": num_cores,
        "target_core_share": rounded(median(result.cpu_seconds / result.seconds for result in results)),
        "round_ms": rounded(1000 * median(steps)) if steps else None,
        "tokens_per_round": ratio(
            sum(result.decode_tokens for result in results), sum(result.decode_rows for result in results)
        ),
    }
    if contestant.k is not None:
        row |= summarise_acceptance(results, contestant.k)
        if contestant.method == "ssd":
            row |= summarise_ssd(results, contestant.k) | summarise_rounds(results, measured.batch)
    return row


def summarise_acceptance(results: Sequence[GenerationResult], k: int) -> dict[str, Any]:
    """How often the draft token at each position was accepted, of those that were verified there.

    A token counts as accepted only if all before it were, as in vLLM's own metric.
    """
    drafted = [sum(result.drafted_per_position[i] for result in results) for i in range(k)]
    accepted = [sum(result.accepted_per_position[i] for result in results) for i in range(k)]
    return {
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


def summarise_ssd(results: Sequence[GenerationResult], k: int) -> dict[str, Any]:
    """What SSD's own counters say, prefill included; times in milliseconds."""
    totals: defaultdict[str, int] = defaultdict(int)
    for result in results:
        for name, value in result.ssd.items():
            totals[name] += value
    rounds, steps = totals["rounds"], totals["draft.steps"]
    return {
        "hit_rate": ratio(totals["hits"], totals["lookups"]),
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
    """Compare each row with the ones of its batch size: ratios within each repeat, then their median."""
    for row in rows:
        peers = [other for other in rows if other["batch"] == row["batch"]]
        plain = [other for other in peers if other["method"] == "ar"]
        stock = [other for other in peers if other["method"] == "draft_model"]
        if plain and row["method"] != "ar":
            row |= speedup("speedup_vs_ar", row, plain[0])
        if stock and row["method"] == "ssd":
            best = max(stock, key=lambda other: other["tok_s"])
            row |= speedup("speedup_vs_draft_model_best_k", row, best) | {"draft_model_best_k": best["k"]}


def speedup(name: str, row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`name` and its spread: how many times as fast as `other` this row is."""
    ratios = [a / b for a, b in zip(row["tok_s_repeats"], other["tok_s_repeats"], strict=True)]
    return {name: rounded(median(ratios)), f"{name}_spread": spread(ratios)}


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
    "method": lambda row: Contestant(row["method"], row["k"]).label,
    "tok/s": lambda row: shown(row["tok_s"]),
    "range": lambda row: f"{row['tok_s_spread']['min']:.0f}-{row['tok_s_spread']['max']:.0f}",
    "/core": lambda row: shown(row["tok_s_per_core"]),
    "ms/round": lambda row: shown(row["round_ms"]),
    "tok/round": lambda row: shown(row["tokens_per_round"]),
    "x ar": lambda row: shown(row.get("speedup_vs_ar")),
    "x d_m": lambda row: shown(row.get("speedup_vs_draft_model_best_k")),
}
SPECULATION_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "batch": SPEED_COLUMNS["batch"],
    "method": SPEED_COLUMNS["method"],
    "accepted %": lambda row: shown(row["acceptance_per_position"]),
    "hits": lambda row: shown(row.get("hit_rate")),
    "by k %": lambda row: shown(row.get("hit_rate_by_k")),
    "ssd ms": lambda row: shown(row.get("critical_path_ms_per_round")),
    "draft ms": lambda row: shown(row.get("draft_step_ms")),
}


def make_table(
    title: str, columns: dict[str, Callable[[dict[str, Any]], str]], rows: list[dict[str, Any]]
) -> Table:
    """Rows in the order given, a rule between batch sizes."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True)
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], rows[-1]], strict=True):
        table.add_row(
            *(cell(row) for cell in columns.values()), end_section=row["batch"] != following["batch"]
        )
    return table


def print_tables(console: Console, rows: list[dict[str, Any]]) -> None:
    """The figures that matter most; the JSON file has all."""
    console.print(make_table("Speed (medians)", SPEED_COLUMNS, rows))
    speculating = [row for row in rows if row["k"] is not None]
    if speculating:
        console.print(make_table("Speculation", SPECULATION_COLUMNS, speculating))
    console.print(
        "x ar, x d_m: speed relative to no speculation and to draft_model at its best K. accepted: at each "
        "draft position. hits: outcomes predicted, then by accepted length k. ssd ms: what SSD costs the "
        "target in a round. draft ms: one step of the draft process."
    )
    if min(row["target_core_share"] for row in rows) < QUIET_SHARE:
        console.print("[yellow]The target's core also worked for others (or for the host): rough figures.")
