"""Measures each part of the algorithm by itself, on one pair: the figures of docs/ablations.

    python scripts/ablate.py --target .demo/target --draft .demo/draft --figures fanout --out docs/ablations

Each figure becomes FIGURE.json (all that was measured), FIGURE.md (a table with its command, commit and
machine) and FIGURE.png. The engines of a figure are in memory together and take turns repeat by repeat, as
in scripts/bench.py, whose measurements these are.

    fanout      hit rate against branches per accepted length, uniform; the fitted power law of the misses
    strategies  uniform, geometric and global fan-out at equal budget, against temperature
    saguaro     the weight C of Saguaro sampling: acceptance, hits, speed
    backups   what missed rows get, against batch size
    verifiers   ratio, Saguaro, coupled, and vLLM's draft_model with sampled drafts, at temperature 1
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from arguments import parse_number
from bench import make_prompts, room_for, turn_order
from bench_rows import Contestant, Measurements, summarise
from harness import (
    Cores,
    EngineSpec,
    GenerationTask,
    Progress,
    choose_cores,
    engine_args,
    exit_on_signals,
    running_engines,
)
from provenance import describe_run, provenance, write_json
from rich.console import Console

K = 6
PROMPT_TOKENS = 64
console = Console()


@dataclass(frozen=True)
class Point:
    """One measurement of a figure."""

    series: str
    x: float
    batch: int = 1
    temperature: float = 0.0
    method: str = "ssd"
    k: int = K
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # further speculative options

    @property
    def engine(self) -> str:
        """Points with the same text share an engine."""
        return json.dumps([self.method, self.k, self.options], sort_keys=True)


@dataclass(frozen=True)
class Figure:
    """What is measured, and what is shown of it."""

    points: list[Point]
    x_label: str
    shown: tuple[str, ...]  # fields of the JSON rows: one picture each, and columns of the table


def fanout() -> Figure:
    """Hit rate against F, and its power law."""
    points = [
        Point(
            f"temperature {temperature:g}",
            width,
            temperature=temperature,
            k=4,
            options={"ssd_branch_budget": 5 * width, "ssd_fanout": "uniform", "ssd_max_rows": 64},
        )
        for width in (1, 2, 3, 5, 8)
        for temperature in (0.0, 1.0)
    ]
    return Figure(points, "branches per accepted length", ("hit_rate", "tokens_per_round"))


def strategies() -> Figure:
    """Where the branches go."""
    points = [
        Point(
            f"{strategy}, K={k}",
            temperature,
            temperature=temperature,
            k=k,
            options={"ssd_fanout": strategy, "ssd_branch_budget": 16},
        )
        for strategy in ("uniform", "geometric", "global")
        for k in (K, 10)  # 16 branches: two or more for each of 7 lengths, one for most of 11
        for temperature in (0.0, 0.5, 1.0, 1.5)
    ]
    return Figure(points, "temperature", ("hit_rate", "tokens_per_round", "tok_s"))


def saguaro() -> Figure:
    """The sweep of C."""
    points = [
        Point("ratio", c, temperature=1.0, options={"ssd_verify": "ratio", "ssd_saguaro_c": c})
        for c in (1.0, 0.7, 0.5, 0.3, 0.1)
    ]
    return Figure(
        points, "weight C of the likeliest tokens", ("hit_rate", "first_accepted", "tokens_per_round")
    )


def backups() -> Figure:
    """What missed rows get."""
    points = [
        Point(f"{kind}, temperature {temperature:g}", batch, batch, temperature, options={"ssd_backup": kind})
        for kind in ("none", "ngram", "draft", "auto")
        for temperature in (0.0, 1.0)
        for batch in (1, 2, 4, 8)
    ]
    return Figure(points, "batch", ("tok_s", "tokens_per_round", "wait_ms_per_round"))


def verifiers() -> Figure:
    """Three verifiers, and what vLLM has, each with two K.

    SSD's draft computes in bfloat16; vLLM's draft_model in the target's float32, having no option for that.
    """
    ssd = {"ssd_branch_budget": 12, "ssd_max_rows": 32, "ssd_draft_dtype": "bfloat16"}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "coupled": ("ssd", ssd),
        "ratio": ("ssd", ssd | {"ssd_verify": "ratio"}),
        "Saguaro 0.5": ("ssd", ssd | {"ssd_verify": "ratio", "ssd_saguaro_c": 0.5}),
        "draft_model, sampled drafts": ("draft_model", {"draft_sample_method": "probabilistic"}),
    }
    points = [
        Point(f"{name}, K={k}", batch, batch, 1.0, method, k, options)
        for name, (method, options) in kinds.items()
        for k in (K, 10)
        for batch in (1, 4, 8)
    ]
    return Figure(points, "batch", ("tok_s", "tokens_per_round", "hit_rate"))


FIGURES: dict[str, Callable[[], Figure]] = {
    "fanout": fanout,
    "strategies": strategies,
    "saguaro": saguaro,
    "backups": backups,
    "verifiers": verifiers,
}


def engine_spec(point: Point, args: argparse.Namespace, cores: Cores, max_batch: int) -> EngineSpec:
    """The engine that measures this point."""
    more = room_for(max_batch, PROMPT_TOKENS + args.out_tokens)
    chosen = engine_args(args.target, point.method, args.draft, point.k, cores, {}, **more)
    chosen["speculative_config"] |= point.options
    return EngineSpec(point.engine, chosen, cores)


def measure(figure: Figure, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each point, in order."""
    cores, points = choose_cores(), figure.points
    by_engine = {point.engine: point for point in points}
    max_batch = max(point.batch for point in points)
    specs = [engine_spec(point, args, cores, max_batch) for point in by_engine.values()]
    measured = [Measurements(Contestant(point.method, point.k), point.batch, []) for point in points]
    with (
        Progress(console, 1 + args.repeats * len(points)) as progress,
        running_engines(specs) as running,
    ):
        progress.step(f"starting {len(specs)} engines")
        engines = dict(zip(by_engine, running, strict=True))
        # Every point of one repeat and batch size has the same prompts.
        prompts = make_prompts(args.target, max_batch * (args.repeats + 1), PROMPT_TOKENS)
        for engine in running:
            engine.await_ready()
        lead = list(islice(prompts, max_batch))
        for repeat in range(args.repeats):
            drawn = list(islice(prompts, max_batch))
            for index in turn_order(len(points), repeat):
                point = points[index]
                progress.step(f"repeat {repeat + 1} of {args.repeats}: {point.series}, {point.x:g}")
                engine = engines[point.engine]
                engine.lead_in(task(lead, point, args.out_tokens))
                measured[index].results.append(engine.generate(task(drawn, point, args.out_tokens)))
    return [row(point, found, cores) for point, found in zip(points, measured, strict=True)]


def task(prompts: Sequence[list[int]], point: Point, out_tokens: int) -> GenerationTask:
    """One batch of this point, all at once."""
    size = point.batch
    return GenerationTask(list(prompts[:size]), [out_tokens] * size, [size] * size, point.temperature)


def row(point: Point, found: Measurements, cores: Cores) -> dict[str, Any]:
    """A point's figures."""
    figures = summarise(found, point.temperature, cores)
    return {
        "series": point.series,
        "x": point.x,
        "options": point.options,
        **figures,
    }


def fit_power_distribution(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each series: miss(F) = miss * F^-r, by least squares of the logarithms."""
    fits = {}
    for series in dict.fromkeys(row["series"] for row in rows):
        mine = [row for row in rows if row["series"] == series and row["hit_rate"] < 1]
        if len(mine) > 1:
            slope, level = np.polyfit(
                np.log([row["x"] for row in mine]), np.log([1 - row["hit_rate"] for row in mine]), 1
            )
            fits[series] = {"miss": float(np.exp(level)), "r": float(-slope)}
    return fits


def write_table(
    path: Path, name: str, figure: Figure, run: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """The table as Markdown, with where it comes from."""
    header = ["series", figure.x_label, *figure.shown]
    lines = [
        f"# {name}",
        "",
        inspect.cleandoc(FIGURES[name].__doc__ or ""),
        *provenance(run),
        "",
        f"![{name}]({name}.png)",
        "",
        f"| {' | '.join(header)} |",
        f"|{' --- |' * len(header)}",
    ]
    for found in rows:
        cells = ["-" if found.get(key) is None else f"{found[key]:.4g}" for key in figure.shown]
        lines.append("| " + " | ".join([found["series"], f"{found['x']:g}", *cells]) + " |")
    if name == "fanout":
        for series, fit in fit_power_distribution(rows).items():
            lines.append(f"\n{series}: miss(F) = {fit['miss']:.3f} * F^-{fit['r']:.2f}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot(path: Path, figure: Figure, rows: list[dict[str, Any]]) -> None:
    """One picture for each field that is shown."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(
        1, len(figure.shown), figsize=(4.5 * len(figure.shown), 3.4), squeeze=False
    )
    for axis, shown in zip(axes[0], figure.shown, strict=True):
        for series in dict.fromkeys(row["series"] for row in rows):
            mine = [row for row in rows if row["series"] == series and row.get(shown) is not None]
            axis.plot([row["x"] for row in mine], [row[shown] for row in mine], marker="o", label=series)
        axis.set(xlabel=figure.x_label, ylabel=shown)
    axes[0][-1].legend(fontsize="x-small")
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)


def parse_figures(text: str) -> list[str]:
    """ "fanout,saguaro" -> ["fanout", "saguaro"]; for argparse."""
    names = text.split(",")
    for name in names:
        if name not in FIGURES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(FIGURES)}")
    return names


def parse_arguments() -> argparse.Namespace:
    """The command line, complete and checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--target", required=True, help="target model, in Hugging Face format")
    add("--draft", required=True, help="draft model")
    add("--figures", type=parse_figures, default=",".join(FIGURES), help="default: all")
    add("--out-tokens", type=parse_number, default=128, help="output tokens of each prompt (default: 128)")
    add("--repeats", type=parse_number, default=5, help="measurements of each point (default: 5)")
    add("--out", type=Path, required=True, help="folder for the figures")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = parse_arguments()
    exit_on_signals()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.figures:
        figure, run = FIGURES[name](), describe_run()
        rows = measure(figure, args)
        write_json(args.out / f"{name}.json", run | {"figure": name, "rows": rows})
        write_table(args.out / f"{name}.md", name, figure, run, rows)
        plot(args.out / f"{name}.png", figure, rows)
        console.print(f"{name}: {args.out / name}.json, .md, .png", highlight=False)


if __name__ == "__main__":
    main()
