"""Checks that SSD's greedy output is, token by token, that of the same engine without speculation.

    python scripts/check_lossless.py --target T --draft D --prompts 200 --json F

One engine without speculation answers every prompt; then, for each K, an SSD engine with the same
scheduling limits does. Prompts have 1 to 1500 tokens and some share prefixes; batches of 1 to 16 requests
form and dissolve; prefill is chunked, prefixes are cached, and KV blocks are so few that requests are
preempted.

Exit status: 0 no difference; 1 a difference, with all there is to know about the first ones; 2 the check
itself fell short: an engine failed, nothing was preempted, or nothing was speculated.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from arguments import parse_number, parse_numbers, parse_object
from harness import (
    EngineFailed,
    EngineProcess,
    EngineSpec,
    GenerationResult,
    GenerationTask,
    Progress,
    TopTwo,
    choose_cores,
    engine_args,
    exit_on_signals,
    running_engines,
)
from provenance import describe_run, write_json
from rich.console import Console

MIN_OUT_TOKENS, MAX_OUT_TOKENS = 48, 64
# (shortest, longest, share): prefill costs most of the time, so most prompts are short and some very long.
LENGTH_BANDS = ((1, 1, 0.02), (2, 64, 0.38), (65, 400, 0.35), (401, 1499, 0.23), (1500, 1500, 0.02))
# Requests in flight at most, and for how many prompts on end: more than fit at once, so that some join late.
BATCH_PATTERN = ((1, 1), (2, 4), (4, 7), (8, 12), (16, 26))
LIMITS = {
    "max_model_len": 1600,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "block_size": 32,
    "num_gpu_blocks_override": 64,
    "scheduler_reserve_full_isl": False,  # admit more than fits, so that requests are preempted
}
TIE_NATS = 1e-3  # differences in rounding are some 1e-6
DIFFERENCES_SHOWN = 5

console = Console()


@dataclass(frozen=True)
class Difference:
    """The first differing output token of one prompt."""

    k: int  # speculative tokens
    prompt: int
    prompt_tokens: int
    position: int  # in the output, from 0
    expected: int | None  # token ids; None: the output ends here
    found: int | None
    target_first: int | None  # the target's likeliest two tokens here, in the engine without speculation
    target_second: int | None
    target_gap: float | None  # nats between them

    @property
    def is_tie(self) -> bool:
        """Whether rounding alone can explain it."""
        return (
            self.target_gap is not None
            and self.target_gap < TIE_NATS
            and {self.expected, self.found} == {self.target_first, self.target_second}
        )

    def describe(self) -> str:
        """All facts, in plain lines."""
        verdict = "a numerical tie: rounding can decide it" if self.is_tie else "not a tie: this is a bug"
        return (
            f"K={self.k}, prompt {self.prompt} ({self.prompt_tokens} tokens), position {self.position}\n"
            f"  output token there: {self.expected} without speculation, {self.found} with SSD\n"
            f"  the target's own first two tokens here: {self.target_first} and {self.target_second}, "
            f"{self.target_gap} nats apart; {verdict}"
        )


def find_difference(
    k: int, prompt: int, prompt_tokens: int, expected: list[int], found: list[int], top_two: list[TopTwo]
) -> Difference | None:
    """Compare one prompt's outputs; None if they are the same."""
    if expected == found:
        return None
    shorter = min(len(expected), len(found))
    position = next((i for i in range(shorter) if expected[i] != found[i]), shorter)
    top = top_two[position] if position < len(top_two) else None
    return Difference(
        k=k,
        prompt=prompt,
        prompt_tokens=prompt_tokens,
        position=position,
        expected=expected[position] if position < len(expected) else None,
        found=found[position] if position < len(found) else None,
        target_first=top.first if top else None,
        target_second=top.second if top else None,
        target_gap=top.gap if top else None,
    )


def band_sizes(count: int) -> list[int]:
    """How many of `count` prompts fall into each of LENGTH_BANDS: one at least while there are enough."""
    sizes = [math.ceil(share * count) for _, _, share in LENGTH_BANDS]
    while sum(sizes) > count:
        sizes[sizes.index(max(sizes))] -= 1
    return sizes


def batch_limits(count: int) -> list[int]:
    """The most requests in flight when each of `count` prompts is added."""
    pattern = [limit for limit, repeats in BATCH_PATTERN for _ in range(repeats)]
    return (pattern * math.ceil(count / len(pattern)))[:count]


def make_task(tokenizer_of: str, count: int) -> GenerationTask:
    """All prompts, in an order that mixes their lengths."""
    from demo.prompts import demo_prompts  # imports transformers and so torch: seconds
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    rng = Random(0)
    prompts: list[list[int]] = []
    for seed, ((shortest, longest, _), size) in enumerate(zip(LENGTH_BANDS, band_sizes(count), strict=True)):
        prompts += demo_prompts(tokenizer, size, seed, shortest, longest)
    rng.shuffle(prompts)
    return GenerationTask(
        prompts=prompts,
        out_tokens=[rng.randint(MIN_OUT_TOKENS, MAX_OUT_TOKENS) for _ in prompts],
        max_in_flight=batch_limits(count),
    )


def parts_of(task: GenerationTask) -> Iterator[tuple[int, GenerationTask]]:
    """The task cut where the batch pattern begins anew, so that differences show soon; with each offset."""
    length = sum(repeats for _, repeats in BATCH_PATTERN)
    for begin in range(0, len(task.prompts), length):
        part = slice(begin, begin + length)
        yield begin, GenerationTask(task.prompts[part], task.out_tokens[part], task.max_in_flight[part])


def stamp_models(models: Iterable[str]) -> list[tuple[str, int, int]]:
    """Path, size and time of every file of those models that are local folders."""
    files = sorted(file for model in models for file in Path(model).glob("*") if file.is_file())
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def compare(
    k: int, offset: int, part: GenerationTask, reference: GenerationResult, found: GenerationResult
) -> list[Difference]:
    """The first difference of each prompt of a part that has one."""
    differences = (
        find_difference(k, offset + i, len(part.prompts[i]), expected, found.outputs[i], reference.top_two[i])
        for i, expected in enumerate(reference.outputs)
    )
    return [difference for difference in differences if difference is not None]


def summarise(results: list[GenerationResult]) -> dict[str, Any]:
    """Figures of one engine over its parts."""
    lookups = sum(result.ssd.get("lookups", 0) for result in results)
    return {
        "tokens": sum(len(output) for result in results for output in result.outputs),
        "seconds": round(sum(result.seconds for result in results), 1),
        "preemptions": sum(result.preemptions for result in results),
        "batch_sizes_seen": sorted({size for result in results for size in result.in_flight}),
        "drafts_accepted": sum(sum(result.accepted_per_position) for result in results),
        "hit_rate": round(sum(result.ssd["hits"] for result in results) / lookups, 4) if lookups else None,
    }


class Check:
    """The whole run: the reference first, then one SSD engine after the other."""

    def __init__(
        self,
        target: str,
        draft: str,
        prompts: int,
        ks: list[int],
        ssd_config: dict[str, Any],
        more_args: dict[str, Any],
    ) -> None:
        self._models = target, draft
        self._stamp = stamp_models(self._models)
        self._cores = choose_cores()
        self._ssd_config = ssd_config
        self._limits = LIMITS | more_args
        self._ks = ks
        self._task = make_task(target, prompts)
        self._parts = list(parts_of(self._task))
        self.reference: list[GenerationResult] = []
        self.per_k: dict[int, dict[str, Any]] = {}
        self.differences: list[Difference] = []

    def run(self) -> None:
        """Stop at the first part of the prompts that shows a difference."""
        with Progress(console, (len(self._ks) + 1) * (len(self._parts) + 1)) as progress:
            with self._engine("ar", None, progress) as engine:
                for offset, part in self._parts:
                    progress.step(f"without speculation: prompts from {offset}")
                    self.reference.append(engine.generate(replace(part, want_top_two=True)))
            for k in self._ks:
                with self._engine("ssd", k, progress) as engine:
                    self._check(k, engine, progress)
                if self.differences:
                    return

    @contextmanager
    def _engine(self, method: str, k: int | None, progress: Progress) -> Iterator[EngineProcess]:
        target, draft = self._models
        if stamp_models(self._models) != self._stamp:
            raise EngineFailed("the model files changed during the check, so its outputs cannot be compared")
        args = engine_args(target, method, draft, k, self._cores, self._ssd_config, **self._limits)
        label = "without speculation" if k is None else f"SSD K={k}"
        progress.step(f"{label}: starting the engine")
        with running_engines([EngineSpec(label, args, self._cores)]) as (engine,):
            engine.await_ready()
            yield engine

    def _check(self, k: int, engine: EngineProcess, progress: Progress) -> None:
        results = []
        for (offset, part), reference in zip(self._parts, self.reference, strict=True):
            progress.step(f"SSD K={k}: prompts from {offset}")
            results.append(engine.generate(part))
            self.differences = compare(k, offset, part, reference, results[-1])
            if self.differences:
                break
        self.per_k[k] = summarise(results)

    def shortfalls(self) -> list[str]:
        """What the check did not exercise; without these, finding no difference means little."""
        found = []
        for k, figures in self.per_k.items():
            if not figures["preemptions"]:
                found.append(
                    f"K={k}: no request was preempted; lower num_gpu_blocks_override with --engine-args"
                )
            if not figures["drafts_accepted"]:
                found.append(f"K={k}: no draft token was accepted, so nothing was speculated")
        return found

    def report(self, result: str) -> dict[str, Any]:
        """The JSON file's content."""
        gaps = [top.gap for part in self.reference for tops in part.top_two for top in tops]
        figures = self.per_k.values()
        lengths = [len(prompt) for prompt in self._task.prompts]
        return {
            **describe_run(),
            "result": result,
            "prompts": len(lengths),
            "prompt_tokens": {"min": min(lengths), "max": max(lengths), "sum": sum(lengths)},
            "k": list(self.per_k),
            "tokens_compared": sum(figure["tokens"] for figure in figures),
            "preemptions": sum(figure["preemptions"] for figure in figures),
            "per_k": {str(k): figure for k, figure in self.per_k.items()},
            "without_speculation": summarise(self.reference),
            "smallest_target_gap": min(gaps, default=None),
            "engine_args": self._limits,
            "ssd_config": self._ssd_config,
            "differences": [
                asdict(difference) | {"is_tie": difference.is_tie} for difference in self.differences
            ],
        }


def print_outcome(check: Check, report: dict[str, Any], shortfalls: list[str]) -> None:
    """The result in plain lines."""
    for k, figures in check.per_k.items():
        console.print(
            f"K={k}: {figures['tokens']} tokens compared, {figures['preemptions']} preemptions, "
            f"hit rate {figures['hit_rate']}, {figures['seconds']} s",
            highlight=False,
        )
    for line in shortfalls:
        console.print(f"fell short: {line}", style="yellow", soft_wrap=True)
    for difference in check.differences[:DIFFERENCES_SHOWN]:
        console.print(f"difference: {difference.describe()}", style="red", highlight=False, soft_wrap=True)
    if len(check.differences) > DIFFERENCES_SHOWN:
        console.print(
            f"... and {len(check.differences) - DIFFERENCES_SHOWN} more prompts differ; see the JSON"
        )
    console.print(
        f"{report['result']}: {report['prompts']} prompts, {report['tokens_compared']} tokens compared, "
        f"{report['preemptions']} preemptions",
        style="bold",
        highlight=False,
        soft_wrap=True,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--target", required=True, help="target model, in Hugging Face format")
    parser.add_argument("--draft", required=True, help="draft model")
    parser.add_argument("--prompts", type=parse_number, default=200, help="number of prompts (default: 200)")
    parser.add_argument(
        "--k", type=parse_numbers, default="1,2,3,4,5,6,7", help="speculative tokens (default: 1 to 7)"
    )
    parser.add_argument("--ssd-config", type=parse_object, default="{}", help="further SSD options, as JSON")
    parser.add_argument(
        "--engine-args", type=parse_object, default="{}", help="further vLLM engine arguments, as JSON"
    )
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    return parser.parse_args()


def main() -> int:
    """Returns the exit status."""
    args = parse_arguments()
    exit_on_signals()
    check = Check(args.target, args.draft, args.prompts, args.k, args.ssd_config, args.engine_args)
    try:
        check.run()
    except EngineFailed as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    shortfalls = check.shortfalls()
    result = "different" if check.differences else "inconclusive" if shortfalls else "identical"
    report = check.report(result)
    write_json(args.json, report)
    print_outcome(check, report, shortfalls)
    return {"identical": 0, "different": 1, "inconclusive": 2}[result]


if __name__ == "__main__":
    sys.exit(main())
