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
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from arguments import parse_number, parse_numbers, parse_object
from bench_rows import Contestant, Measurements, add_speedups, print_tables, summarise
from harness import (
    EngineFailed,
    EngineProcess,
    EngineSpec,
    GenerationTask,
    Progress,
    choose_cores,
    engine_args,
    exit_on_signals,
    running_engines,
)
from provenance import describe_run, write_json
from rich.console import Console

METHODS = ("ar", "draft_model", "ssd")
PROMPT_SEED = 1  # the check for losslessness uses others; none is used in training
BLOCK_SIZE = 128  # vLLM's default on the CPU
SPARE_POSITIONS = 64  # so that no speculation is cut short at the longest length

console = Console(width=None if sys.stdout.isatty() else 100)  # a log has no width of its own


def contestants(methods: Sequence[str], ks: Sequence[int]) -> list[Contestant]:
    """Every method that speculates with every K."""
    return [Contestant(method, k) for method in methods for k in ([None] if method == "ar" else ks)]


def turn_order(count: int, turn: int) -> list[int]:
    """0..count-1, beginning with another one each turn."""
    return [(turn + i) % count for i in range(count)]


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
    print_tables(console, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
