"""Predicts what speculation is worth for given costs: judge a pair and a machine before you buy it.

    python scripts/plan.py --verify-ms 30 --draft-ms 2.2 --acceptance 0.8 --batch 1,4,16
    python scripts/plan.py --verify-ms 5.2,0.12 --draft-ms 0.4,0.01 --acceptance 0.86 --plot plan.png

Times are of one step: the target's over no token and each further token, the draft's over no row and each
further row. For each batch size the table has decoding without speculation, the best K of a draft model that
takes turns with the target, and the best K and branch budget of SSD, with what the model of
`vllm_ssd.plan.speed_model` says they make of it. The plot shows tokens per second against K at the best
budget.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arguments import parse_number, parse_numbers
from provenance import write_json
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_ssd.plan.speed_model import (
    PairStatistics,
    Prediction,
    StepTimes,
    predict_in_turn,
    predict_plain,
    predict_ssd,
)


def parse_times(text: str) -> tuple[float, float]:
    """ "30" or "30,0.2" -> seconds of a step, and of each further token or row; for argparse."""
    try:
        base, *further = (float(part) / 1000 for part in text.split(","))
    except ValueError:
        base, further = 0.0, []
    if base <= 0 or len(further) > 1 or any(value < 0 for value in further):
        raise argparse.ArgumentTypeError(f"{text!r} is not one or two times in milliseconds")
    return base, further[0] if further else 0.0


def parse_share(text: str) -> float:
    """A number inside (0, 1); for argparse."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return value


def parse_arguments() -> argparse.Namespace:
    """The command line, complete and checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--verify-ms", type=parse_times, required=True, help="a step of the target: base[,per token]")
    add("--draft-ms", type=parse_times, required=True, help="a step of the draft: base[,per row]")
    add("--overhead-ms", type=float, default=0.2, help="of SSD on the target, per round (default: 0.2)")
    add("--acceptance", type=parse_share, default=0.8, help="of a draft token (default: 0.8)")
    add("--miss", type=parse_share, default=0.4, help="of outcomes, with a branch per length (default: 0.4)")
    add(
        "--exponent",
        type=float,
        default=1.0,
        help="r: F branches per length miss with miss * F^-r (default: 1)",
    )
    add("--batch", type=parse_numbers, default="1,4,8", help="batch sizes (default: 1,4,8)")
    add("--max-k", type=parse_number, default=8, help="most speculative tokens (default: 8)")
    add(
        "--budgets", type=parse_numbers, default="4,8,16,32", help="branches per request (default: 4,8,16,32)"
    )
    add("--max-rows", type=parse_number, default=256, help="rows of one draft step (default: 256)")
    add("--json", type=Path, help="where the figures go")
    add("--plot", type=Path, help="where the plot goes, a file with an image's suffix")
    return parser.parse_args()


def predictions(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each batch size, method, K and budget."""
    times = StepTimes(*args.verify_ms, *args.draft_ms, args.overhead_ms / 1000)
    pair = PairStatistics(args.acceptance, args.miss, args.exponent)
    rows = []

    def add(batch: int, method: str, k: int, budget: int, prediction: Prediction) -> None:
        rows.append({"batch": batch, "method": method, "k": k, "budget": budget, **asdict(prediction)})

    for batch in args.batch:
        add(batch, "ar", 0, 0, predict_plain(times, batch))
        for k in range(1, args.max_k + 1):
            add(batch, "draft_model", k, 0, predict_in_turn(times, pair, batch, k))
            for budget in args.budgets:
                add(batch, "ssd", k, budget, predict_ssd(times, pair, batch, k, budget, args.max_rows))
    return rows


def best(rows: list[dict[str, Any]], batch: int, method: str) -> dict[str, Any]:
    """The fastest choice of a method at a batch size."""
    mine = [row for row in rows if row["batch"] == batch and row["method"] == method]
    return max(mine, key=lambda row: row["tokens_per_second"])


def print_table(rows: list[dict[str, Any]], batches: list[int]) -> None:
    """The best of each method."""
    table = Table(title="Predicted", box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for heading in (
        "batch",
        "method",
        "K",
        "budget",
        "tok/s",
        "ms/round",
        "tok/round",
        "hits",
        "x ar",
        "x d_m",
    ):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for batch in batches:
        plain, in_turn = best(rows, batch, "ar"), best(rows, batch, "draft_model")
        for row in (plain, in_turn, best(rows, batch, "ssd")):
            speed, is_ssd = row["tokens_per_second"], row["method"] == "ssd"
            table.add_row(
                str(batch),
                row["method"],
                str(row["k"] or "-"),
                str(row["budget"] or "-"),
                f"{speed:.0f}",
                f"{1000 * row['round_seconds']:.2f}",
                f"{row['tokens_per_round']:.2f}",
                f"{row['hit_rate']:.2f}" if is_ssd else "-",
                f"{speed / plain['tokens_per_second']:.2f}",
                f"{speed / in_turn['tokens_per_second']:.2f}",
                end_section=is_ssd,
            )
    Console(width=None if sys.stdout.isatty() else 100).print(table)  # a log has no width of its own


def plot(rows: list[dict[str, Any]], batches: list[int], path: Path) -> None:
    """Tokens per second against K, one picture for each batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(batches), figsize=(4 * len(batches), 3.2), squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        mine = [row for row in rows if row["batch"] == batch]
        ks = sorted({row["k"] for row in mine if row["k"]})
        for method, marker in (("draft_model", "o"), ("ssd", "s")):
            speeds = [
                max(r["tokens_per_second"] for r in mine if r["method"] == method and r["k"] == k) for k in ks
            ]
            axis.plot(ks, speeds, marker=marker, label=method)
        axis.axhline(best(rows, batch, "ar")["tokens_per_second"], color="grey", linestyle=":", label="ar")
        axis.set(title=f"batch {batch}", xlabel="K", ylabel="tokens per second", ylim=(0, None))
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the command line."""
    args = parse_arguments()
    rows = predictions(args)
    print_table(rows, args.batch)
    if args.json is not None:
        settings = {name: value for name, value in vars(args).items() if name not in ("json", "plot")}
        write_json(args.json, {"settings": settings, "rows": rows})
    if args.plot is not None:
        plot(rows, args.batch, args.plot)


if __name__ == "__main__":
    main()
