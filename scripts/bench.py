"""Compares decoding without speculation, vLLM's own speculation and SSD, on the same prompts and target core.

    python scripts/bench.py --target T --draft D --methods ar,draft_model,ssd --k 4 --batch 1,4,8 --json F

The prompts are those of scripts/prompts.jsonl, or of Spec-Bench or any other file with --prompts. Each task
is as many of one category as the batch size; where a category has fewer, some come twice. Figures are of
all tasks together and of each category, with bootstrap intervals over the tasks.

Every engine lives in a process of its own, all at the same time, and only one works at a time: some tasks
at a time they take turns, so that a machine whose speed drifts is as fast for one as for the other. Before
each turn its engine works for two seconds, unmeasured: what is measured is an engine under load. Targets run
on the first core, the draft process of SSD on the second; with --all-cores, the methods without a draft
process are also measured with a thread on each core. Time counts from the arrival of the prompts, so their
prefill is in it.

Exit status: 0 measured; 1 an engine failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from arguments import parse_number, parse_numbers, parse_object
from bench_rows import Contestant, Measurements, add_speedups, print_tables, summarise
from harness import (
    SSD_METHODS,
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
from prompts import DEFAULT_PROMPTS, Prompt, read_prompts
from provenance import describe_run, write_json
from rich.console import Console

METHODS = ("ar", "ngram", "draft_model", "ssd", "ssd_planned")
TURN_PROMPTS = 8  # at least, before the next engine's turn
LEAD_TOKENS = 32
PROMPT_SEED = 1  # the check for losslessness uses others; none is used in training
BLOCK_SIZE = 128  # vLLM's default on the CPU
SPARE_POSITIONS = 64  # so that no speculation is cut short at the longest length

console = Console(width=None if sys.stdout.isatty() else 120)  # a log has no width of its own


def contestants(methods: Sequence[str], ks: Sequence[int], all_cores: bool = False) -> list[Contestant]:
    """Every method that speculates with every K; with the planner, K is a ceiling."""
    of_method = dict.fromkeys(methods, ks) | {"ar": [None], "ssd_planned": [max(ks)]}
    found = [Contestant(method, k) for method in methods for k in of_method[method]]
    if all_cores:
        found += [Contestant(one.method, one.k, True) for one in found if one.method not in SSD_METHODS]
    return found


@dataclass(frozen=True)
class Group:
    """The prompts of one task, all of one category."""

    category: str
    prompts: list[list[int]]  # token ids


def group_prompts(prompts: Sequence[Prompt], batch: int) -> list[Group]:
    """Return groups of `batch` prompts of one category, every prompt in one at least."""
    groups = []
    for category in dict.fromkeys(prompt.category for prompt in prompts):
        mine = [prompt.token_ids for prompt in prompts if prompt.category == category]
        for start in range(0, len(mine), batch):
            chosen = list(islice(cycle(mine), start, start + batch))
            groups.append(Group(category, chosen))
    return groups


def turns(groups: Sequence[Group], batch: int) -> Iterator[list[int]]:
    """Yield the indices of the groups that an engine works off in one turn."""
    size = -(-TURN_PROMPTS // batch)
    for start in range(0, len(groups), size):
        yield list(range(start, min(start + size, len(groups))))


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
        prompts: what the engines are given.
    """

    def __init__(self, args: argparse.Namespace, prompts: Sequence[Prompt]) -> None:
        self._args = args
        self._cores = choose_cores()
        self._contestants = contestants(args.methods, args.k, args.all_cores)
        self._groups = {batch: group_prompts(prompts, batch) for batch in args.batch}
        self._longest = max(len(prompt.token_ids) for prompt in prompts)
        self._measured = {
            batch: [
                Measurements(contestant, batch, [], [group.category for group in groups])
                for contestant in self._contestants
            ]
            for batch, groups in self._groups.items()
        }

    def run(self) -> None:
        """Start all engines, then let them take turns."""
        num_turns = sum(len(list(turns(groups, batch))) for batch, groups in self._groups.items())
        with Progress(console, 1 + num_turns * len(self._contestants)) as progress:
            progress.step("starting " + ", ".join(contestant.label for contestant in self._contestants))
            with running_engines([self._spec(contestant) for contestant in self._contestants]) as engines:
                for engine in engines:
                    engine.await_ready()
                for batch in self._args.batch:
                    self._measure(batch, engines, progress)

    def rows(self) -> list[dict[str, Any]]:
        """The JSON file's rows."""
        rows = [
            {"category": category} | summarise(part, self._args.temperature, self._cores)
            for batch in self._args.batch
            for measured in self._measured[batch]
            for category, part in measured.by_category().items()
        ]
        add_speedups(rows)
        return rows

    def _spec(self, contestant: Contestant) -> EngineSpec:
        args = self._args
        room = room_for(max(args.batch), self._longest + args.out_tokens)
        more = {"dtype": "auto"} | room | args.engine_args
        return EngineSpec(
            contestant.label,
            engine_args(
                args.target, contestant.method, args.draft, contestant.k, self._cores, args.ssd_config, **more
            ),
            self._cores,
            contestant.all_cores,
        )

    def _task(self, prompts: list[list[int]], out_tokens: int) -> GenerationTask:
        count = len(prompts)
        return GenerationTask(
            prompts, [out_tokens] * count, [count] * count, self._args.temperature, may_end=True
        )

    def _measure(self, batch: int, engines: list[EngineProcess], progress: Progress) -> None:
        groups = self._groups[batch]
        for turn, indices in enumerate(turns(groups, batch)):
            lead = self._task(groups[indices[0]].prompts, LEAD_TOKENS)
            for which in turn_order(len(engines), turn):
                engine = engines[which]
                progress.step(f"batch {batch}, {groups[indices[0]].category}, {engine.label}")
                engine.lead_in(lead)
                for index in indices:
                    result = engine.generate(self._task(groups[index].prompts, self._args.out_tokens))
                    self._measured[batch][which].results.append(result)


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
    add("--out-tokens", type=parse_number, default=256, help="output tokens at most (default: 256)")
    add(
        "--prompts",
        type=Path,
        default=DEFAULT_PROMPTS,
        help="JSON lines: Spec-Bench's, or a prompt each",
    )
    add("--per-category", type=parse_number, help="so many of each category, evenly spaced (default: all)")
    add("--prompt-tokens", type=parse_number, default=2048, help="leave longer prompts out (default: 2048)")
    add("--all-cores", action="store_true", help="also methods without a draft process on all cores")
    add("--ssd-config", type=parse_object, default="{}", help="further SSD options, as JSON")
    add("--engine-args", type=parse_object, default="{}", help="further vLLM engine arguments, as JSON")
    add("--json", type=Path, required=True, help="where the figures go")
    return parser.parse_args()


def main() -> int:
    """Returns the exit status."""
    args = parse_arguments()
    exit_on_signals()
    from transformers import AutoTokenizer  # seconds

    tokenizer = AutoTokenizer.from_pretrained(args.target)
    prompts = read_prompts(args.prompts, tokenizer, args.prompt_tokens, args.per_category)
    bench = Bench(args, prompts)
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
        for name in ("per_category", "prompt_tokens", "out_tokens", "ssd_config", "engine_args")
    }
    settings |= {"prompts": args.prompts.name, "num_prompts": len(prompts)}
    write_json(args.json, describe_run() | {"settings": settings, "rows": rows})
    print_tables(console, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
