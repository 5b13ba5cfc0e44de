"""Compares decoding without speculation, vLLM's draft_model and SSD, on the same prompts and target core.

    python scripts/bench.py --target T --draft D --methods ar,draft_model,ssd --k 4 --batch 1,4,8 --json F

Every engine lives in a process of its own, all at the same time, and only one works at a time: repeat by
repeat and batch size by batch size they take turns, so that a machine whose speed drifts is as fast for one
as for the other. Before each measurement its engine does the like for two seconds, unmeasured: what is
measured is an engine under load. Each measurement has prompts that no engine has seen. Figures are medians
over the repeats; ratios are taken within each repeat, and then their median. Targets run on the first core,
the draft process of SSD on the second. Time counts from the arrival of the prompts, so their prefill is in
it.

Exit status: 0 measured; 1 an engine failed.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from harness import (
    Cores,
    EngineFailed,
    EngineProcess,
    EngineSpec,
    GenerationResult,
    GenerationTask,
    Progress,
    choose_cores,
    describe_run,
    engine_args,
    exit_on_signals,
    parse_number,
    parse_numbers,
    parse_object,
    running_engines,
    write_json,
)
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

METHODS = ("ar", "draft_model", "ssd")
PROMPT_SEED = 1  # the check for losslessness uses others; none is used in training
QUIET_SHARE = 0.97  # of the target's core that its process got, if nothing else ran there
BLOCK_SIZE = 128  # vLLM's default on the CPU
SPARE_POSITIONS = 64  # so that no speculation is cut short at the longest length

console = Console(width=None if sys.stdout.isatty() else 100)  # a log has no width of its own


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


def contestants(methods: Sequence[str], ks: Sequence[int]) -> list[Contestant]:
    """Every method that speculates with every K."""
    return [Contestant(method, k) for method in methods for k in ([None] if method == "ar" else ks)]


def turn_order(count: int, turn: int) -> list[int]:
    """0..count-1, beginning with another one each turn."""
    return [(turn + i) % count for i in range(count)]


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


def room_for(num_requests: int, num_tokens: int) -> dict[str, Any]:
    """Engine arguments for so many requests at once of so many tokens each, and for no more."""
    length = num_tokens + SPARE_POSITIONS
    return {
        "max_model_len": length,
        "max_num_seqs": num_requests,
        "enable_prefix_caching": False,
        # All engines are in memory at once: KV blocks for all requests, twice if a draft needs its own.
        "block_size": BLOCK_SIZE,
        "num_gpu_blocks_override": 2 * num_requests * (length // BLOCK_SIZE + 2),
    }


def make_prompts(tokenizer_of: str, count: int, num_tokens: int) -> Iterator[list[int]]:
    """`count` prompts of `num_tokens` tokens, no two with a common beginning."""
    from demo.prompts import demo_prompts  # imports transformers and so torch: seconds
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    return iter(
        demo_prompts(tokenizer, count, PROMPT_SEED, num_tokens, num_tokens, shared_prefix_fraction=0.0)
    )


class Bench:
    """A benchmark run.

    Args:
        args: see `parse_arguments`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._cores = choose_cores()
        self._contestants = contestants(args.methods, args.k)
        num_turns = args.repeats * len(args.batch)
        self._num_steps = 1 + len(self._contestants) * num_turns
        self._measured = [
            Measurements(contestant, batch, []) for batch in args.batch for contestant in self._contestants
        ]

    def run(self) -> None:
        """Start all engines, then let them take turns."""
        with Progress(console, self._num_steps) as progress:
            progress.step("starting " + ", ".join(contestant.label for contestant in self._contestants))
            with running_engines([self._spec(contestant) for contestant in self._contestants]) as engines:
                prompts = self._make_prompts()
                for engine in engines:
                    engine.await_ready()
                leads = [self._task(list(islice(prompts, batch)), batch) for batch in self._args.batch]
                for repeat in range(self._args.repeats):
                    self._measure(repeat, engines, leads, prompts, progress)

    def rows(self) -> list[dict[str, Any]]:
        """The JSON file's rows."""
        rows = [summarise(measured, self._args.temperature, self._cores) for measured in self._measured]
        add_speedups(rows)
        return rows

    def _spec(self, contestant: Contestant) -> EngineSpec:
        args = self._args
        more = room_for(max(args.batch), args.prompt_tokens + args.out_tokens) | args.engine_args
        return EngineSpec(
            contestant.label,
            engine_args(
                args.target, contestant.method, args.draft, contestant.k, self._cores, args.ssd_config, **more
            ),
            self._cores,
        )

    def _num_prompts(self, batch: int) -> int:
        """Of one measurement: whole batches."""
        return batch * -(-self._args.prompts // batch)

    def _make_prompts(self) -> Iterator[list[int]]:
        args = self._args
        count = sum(args.batch) + args.repeats * sum(self._num_prompts(batch) for batch in args.batch)
        return make_prompts(args.target, count, args.prompt_tokens)

    def _task(self, prompts: list[list[int]], batch: int) -> GenerationTask:
        count = len(prompts)
        return GenerationTask(
            prompts, [self._args.out_tokens] * count, [batch] * count, self._args.temperature
        )

    def _measure(
        self,
        repeat: int,
        engines: list[EngineProcess],
        leads: list[GenerationTask],
        prompts: Iterator[list[int]],
        progress: Progress,
    ) -> None:
        for turn, (batch, lead) in enumerate(zip(self._args.batch, leads, strict=True)):
            task = self._task(list(islice(prompts, self._num_prompts(batch))), batch)
            for index in turn_order(len(engines), repeat + turn):
                engine = engines[index]
                progress.step(f"repeat {repeat + 1} of {self._args.repeats}, batch {batch}, {engine.label}")
                engine.lead_in(lead)
                self._measured[turn * len(engines) + index].results.append(engine.generate(task))


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


def print_tables(rows: list[dict[str, Any]]) -> None:
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


def parse_methods(text: str) -> list[str]:
    """ "ar,ssd" -> ["ar", "ssd"]; for argparse."""
    methods = text.split(",")
    for method in methods:
        if method not in METHODS:
            raise argparse.ArgumentTypeError(f"{method!r} is none of {', '.join(METHODS)}")
    return methods


def parse_arguments() -> argparse.Namespace:
    """The command line, complete and checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--target", required=True, help="target model, in Hugging Face format")
    add("--draft", required=True, help="draft model")
    add("--methods", type=parse_methods, default="ar,draft_model,ssd", help="default: ar,draft_model,ssd")
    add("--k", type=parse_numbers, default="4", help="speculative tokens, as in 4 or 2,3,4,5 (default: 4)")
    add("--batch", type=parse_numbers, default="1,4,8", help="batch sizes (default: 1,4,8)")
    add("--temperature", type=float, default=0.0, help="default: 0")
    add("--out-tokens", type=parse_number, default=256, help="output tokens of each prompt (default: 256)")
    add("--prompt-tokens", type=parse_number, default=64, help="tokens of each prompt (default: 64)")
    add(
        "--prompts",
        type=parse_number,
        default=1,
        help="prompts of one measurement, rounded up to whole batches",
    )
    add("--repeats", type=parse_number, default=5, help="measurements of each kind (default: 5)")
    add("--ssd-config", type=parse_object, default="{}", help="further SSD options, as JSON")
    add("--engine-args", type=parse_object, default="{}", help="further vLLM engine arguments, as JSON")
    add("--json", type=Path, required=True, help="where the figures go")
    return parser.parse_args()


def main() -> int:
    """Returns the exit status."""
    args = parse_arguments()
    exit_on_signals()
    bench = Bench(args)
    try:
        bench.run()
    except EngineFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    rows = bench.rows()
    settings = {
        name: getattr(args, name)
        for name in ("prompt_tokens", "out_tokens", "repeats", "ssd_config", "engine_args")
    }
    write_json(args.json, describe_run() | {"settings": settings, "rows": rows})
    print_tables(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
