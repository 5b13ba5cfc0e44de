"""Sets measured speed beside the speed model's, and the planner beside the best of a full sweep.

    python scripts/sweep.py --target .demo/target --draft .demo/draft --out docs/ablations

One engine runs all choices of K, branch budget and batch size in turns, repeat by repeat; what it is to do is
set before each measurement. The model is given what was measured of the parts, over all points together: the
time of a round by the tokens it verifies, of a draft step by its rows, the acceptance, and how misses fall
with more branches. From that it has to predict how fast each point is. Then the fastest point of each batch
size and the planner, which has seen some rounds of that batch size, take turns. Out come model.json,
model.md and model.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from arguments import parse_number
from bench import make_prompts, room_for, turn_order
from bench_rows import rounded
from harness import (
    EngineProcess,
    EngineSpec,
    GenerationResult,
    GenerationTask,
    Progress,
    choose_cores,
    engine_args,
    exit_on_signals,
    running_engines,
)
from provenance import describe_run, provenance, write_json
from rich.console import Console
from scipy.optimize import brentq, least_squares

from vllm_ssd.plan.speed_model import PairStatistics, Prediction, StepTimes, predict_ssd

DRAFTS = (1, 2, 3, 4, 5, 6, 7)
BUDGETS = (5, 8, 16, 32)
BATCHES = (1, 2, 4, 8)
MAX_ROWS = 32
PROMPTS = max(BATCHES)  # of one measurement, whatever its batch size
PROMPT_TOKENS = 64
LEARNING_TASKS = 12  # of the planner, at each batch size
console = Console()


@dataclass
class Point:
    """One choice of K and branch budget at a batch size, and what was measured of it."""

    batch: int
    plan: tuple[int, int] | None  # None: the planner's
    results: list[GenerationResult] = field(default_factory=list)

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of each repeat, while the batch is full and no prompt is prefilled."""
        return [
            self.batch * result.decode_tokens / result.decode_rows / mean(result.decode_seconds)
            for result in self.results
        ]

    def total(self, counter: str) -> int:
        """A counter of SSD over all repeats."""
        return sum(result.ssd[counter] for result in self.results)

    @property
    def verified_per_round(self) -> float:
        """Tokens of the whole batch that a round verifies."""
        drafted = sum(sum(result.drafted_per_position) for result in self.results)
        return (self.total("lookups") + drafted) / self.total("rounds")

    @property
    def round_seconds(self) -> float:
        """Of rounds at full batch: the median repeat, since the machine pauses now and then."""
        return median(mean(result.decode_seconds) for result in self.results)

    @property
    def hit_rate(self) -> float:
        """Rows whose outcome found drafts."""
        return self.total("hits") / self.total("lookups")


def grid() -> list[Point]:
    """All choices that differ: more branches than fit the draft's rows are no choice of their own."""
    return [
        Point(batch, (k, budget))
        for batch in BATCHES
        for k in DRAFTS
        for budget in BUDGETS
        if budget == BUDGETS[0] or budget <= MAX_ROWS // batch
    ]


def step_times(points: Sequence[Point]) -> StepTimes:
    """A round by its tokens and requests, and a draft step by its rows: linear, through all points."""
    verified = np.array([[point.verified_per_round, point.batch, 1] for point in points])
    rounds = np.array([point.round_seconds for point in points])
    per_token, per_request, base = np.linalg.lstsq(verified, rounds)[0].tolist()
    rows = [point.total("draft.rows") / point.total("draft.steps") for point in points]
    seconds = [point.total("draft.step_ns") / 1e9 / point.total("draft.steps") for point in points]
    per_row, draft_base = np.polyfit(rows, seconds, 1)
    return StepTimes(base, per_token, float(draft_base), float(per_row), verify_per_request=per_request)


def acceptance(points: Sequence[Point]) -> float:
    """The a whose powers yield as many accepted drafts, of those verified at each position, as there were."""
    drafted, accepted = np.zeros(max(DRAFTS)), 0
    for point in points:
        for result in point.results:
            drafted += result.drafted_per_position
            accepted += sum(result.accepted_per_position)
    powers = np.arange(1, len(drafted) + 1)
    return float(brentq(lambda a: (drafted * a**powers).sum() - accepted, 0.01, 0.999))


def pair_statistics(points: Sequence[Point], times: StepTimes, a: float) -> PairStatistics:
    """The level and the exponent of misses with which the model's hit rates are nearest to those measured."""

    def errors(parameters: Sequence[float]) -> list[float]:
        pair = PairStatistics(a, *parameters)
        return [predict(point, times, pair).hit_rate - point.hit_rate for point in points]

    found = least_squares(errors, (0.3, 1.0), bounds=((0.01, 0.1), (1.0, 3.0)))
    return PairStatistics(a, *found.x.tolist())


def predict(point: Point, times: StepTimes, pair: PairStatistics) -> Prediction:
    """The model's figures for a point."""
    assert point.plan is not None
    k, budget = point.plan
    return predict_ssd(times, pair, point.batch, k, budget, MAX_ROWS)


class Sweep:
    """The engine and the prompts of one run."""

    def __init__(self, engine: EngineProcess, prompts: Iterator[list[int]], out_tokens: int) -> None:
        self._engine = engine
        self._prompts = prompts
        self._out_tokens = out_tokens

    def measure(self, points: Sequence[Point], repeat: int, progress: Progress) -> None:
        """Each point once, all with the same prompts, since acceptance differs from prompt to prompt."""
        drawn = self._draw()
        for index in turn_order(len(points), repeat):
            point = points[index]
            progress.step(f"repeat {repeat + 1}: batch {point.batch}, {point.plan or 'planner'}")
            point.results.append(self._run(drawn, point.batch, point.plan))

    def learn(self, batch: int) -> None:
        """Let the planner see this batch size."""
        for _ in range(LEARNING_TASKS):
            self._run(self._draw(), batch, None)

    def _draw(self) -> list[list[int]]:
        return list(islice(self._prompts, PROMPTS))

    def _run(self, prompts: list[list[int]], batch: int, plan: tuple[int, int] | None) -> GenerationResult:
        count = len(prompts)
        task = GenerationTask(prompts, [self._out_tokens] * count, [batch] * count, plan=plan)
        return self._engine.generate(task)


def measure(args: argparse.Namespace, points: list[Point]) -> list[tuple[Point, Point]]:
    """Measure the grid; returns, for each batch size, its fastest point measured anew, and the planner."""
    cores = choose_cores()
    options = {"ssd_branch_budget": max(BUDGETS), "ssd_max_rows": MAX_ROWS, "ssd_planner": True}
    room = room_for(max(BATCHES), PROMPT_TOKENS + args.out_tokens)
    chosen = engine_args(args.target, "ssd", args.draft, max(DRAFTS), cores, options, **room)
    steps = 1 + args.repeats * (len(points) + 2 * len(BATCHES)) + len(BATCHES)
    with (
        Progress(console, steps) as progress,
        running_engines([EngineSpec("ssd", chosen, cores)]) as (engine,),
    ):
        progress.step("starting the engine")
        num_prompts = PROMPTS * (args.repeats * (1 + len(BATCHES)) + LEARNING_TASKS * len(BATCHES))
        prompts = make_prompts(args.target, num_prompts, PROMPT_TOKENS)
        engine.await_ready()
        sweep = Sweep(engine, prompts, args.out_tokens)
        for repeat in range(args.repeats):
            sweep.measure(points, repeat, progress)
        duels = []
        for batch in BATCHES:
            progress.step(f"the planner learns batch {batch}")
            sweep.learn(batch)
            fastest = max(
                (point for point in points if point.batch == batch), key=lambda point: median(point.speeds)
            )
            duels.append((Point(batch, fastest.plan), Point(batch, None)))
            for repeat in range(args.repeats):
                sweep.measure(duels[-1], repeat, progress)
    return duels


def write_report(
    path: Path,
    run: dict[str, Any],
    parts: dict[str, Any],
    rows: list[dict[str, Any]],
    duels: list[dict[str, Any]],
) -> None:
    """The figures as Markdown, with where they come from."""
    errors = [abs(row["error"]) for row in rows]
    lines = [
        "# model",
        "",
        "Measured speed beside the speed model's, and the planner beside the fastest point of the sweep.",
        *provenance(run),
        "",
        "![model](model.png)",
        "",
        "The parts: " + ", ".join(f"{name} {value:.3g}" for name, value in parts.items()) + ".",
        "",
        f"Errors of the {len(rows)} points: median {median(errors):.1%}, largest {max(errors):.1%}, "
        f"{sum(error <= 0.15 for error in errors)} within 15 %.",
        "",
        "| batch | planner / fastest | of each repeat | fastest |",
        "| --- | --- | --- | --- |",
        *(
            f"| {duel['batch']} | {duel['ratio']:.3f} | {duel['lowest']:.2f}..{duel['highest']:.2f} | "
            f"K={duel['fastest'][0]}, budget {duel['fastest'][1]} |"
            for duel in duels
        ),
        "",
        "| batch | K | budget | tok/s | model | error | hits | model |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row['batch']} | {row['k']} | {row['budget']} | {row['tok_s']:.0f} | "
            f"{row['predicted']:.0f} | {row['error']:+.1%} | "
            f"{row['hit_rate']:.3f} | {row['predicted_hit_rate']:.3f} |"
            for row in rows
        ),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Predicted against measured speed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(4.5, 4.2))
    most = 1.1 * max(row["tok_s"] for row in rows)
    line = np.array([0, most])
    axis.fill_between(line, 0.85 * line, 1.15 * line, color="lightgrey", label="15 %")
    for batch in BATCHES:
        mine = [row for row in rows if row["batch"] == batch]
        axis.plot(
            [row["tok_s"] for row in mine], [row["predicted"] for row in mine], "o", label=f"batch {batch}"
        )
    axis.set(xlabel="measured tokens per second", ylabel="predicted", xlim=(0, most), ylim=(0, most))
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse_arguments() -> argparse.Namespace:
    """The command line, complete and checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--target", required=True, help="target model, in Hugging Face format")
    add("--draft", required=True, help="draft model")
    add("--out-tokens", type=parse_number, default=128, help="output tokens of each prompt (default: 128)")
    add("--repeats", type=parse_number, default=7, help="measurements of each point (default: 7)")
    add("--out", type=Path, required=True, help="folder for the figures")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = parse_arguments()
    exit_on_signals()
    args.out.mkdir(parents=True, exist_ok=True)
    run, points = describe_run(), grid()
    duels = measure(args, points)
    times = step_times(points)
    pair = pair_statistics(points, times, acceptance(points))
    rows = []
    for point in points:
        assert point.plan is not None
        speed, prediction = median(point.speeds), predict(point, times, pair)
        rows.append(
            {
                "batch": point.batch,
                "k": point.plan[0],
                "budget": point.plan[1],
                "tok_s": rounded(speed),
                "predicted": rounded(prediction.tokens_per_second),
                "error": rounded(prediction.tokens_per_second / speed - 1),
                "hit_rate": rounded(point.hit_rate),
                "predicted_hit_rate": rounded(prediction.hit_rate),
                "round_ms": rounded(1000 * point.round_seconds),
                "verified_per_round": rounded(point.verified_per_round),
                "speeds": [rounded(value) for value in point.speeds],
            }
        )
    compared = []
    for fastest, planned in duels:
        ratios = [a / b for a, b in zip(planned.speeds, fastest.speeds, strict=True)]
        compared.append(
            {
                "batch": fastest.batch,
                "ratio": rounded(median(ratios)),
                "lowest": rounded(min(ratios)),
                "highest": rounded(max(ratios)),
                "fastest": fastest.plan,
            }
        )
    parts = asdict(times) | asdict(pair)
    write_json(args.out / "model.json", run | {"parts": parts, "rows": rows, "planner": compared})
    write_report(args.out / "model.md", run, parts, rows, compared)
    plot(args.out / "model.png", rows)
    console.print(f"{args.out / 'model'}.json, .md, .png", highlight=False)


if __name__ == "__main__":
    main()
