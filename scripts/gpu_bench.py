"""What SSD takes on a GPU: our kernels, steps of target and draft, and AR / draft_model / SSD on one GPU.

    python scripts/gpu_bench.py --out DIR                # on a machine with a GPU
    python scripts/gpu_bench.py --out DIR --dry-run      # anywhere: tiny shapes, all but the device itself

Each measurement runs in a process of its own, which gives all memory back. Weights are random, of true
shape; models lie in a temporary folder (TMPDIR), which takes 20 GB. Out come DIR/gpu_bench.json and
DIR/gpu_bench.md. What fails is a row there, and the rest continues. A dry run's times mean nothing and are
marked so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arguments import parse_number
from gpu_parts import DRY, REAL, SINGLE, Sizes, check_pair, dtype_name
from harness import exit_on_signals
from provenance import describe_run, provenance, write_json
from rich.console import Console

SCRIPTS = Path(__file__).parent
MARK = "ROW "  # before each row that a part prints
TIME_LIMIT_S = 540
MPS_CONTROL, MPS_LIMIT_S = "nvidia-cuda-mps-control", 20
console = Console()


@dataclass(frozen=True)
class Run:
    """One call of this script."""

    sizes: Sizes
    is_dry: bool
    scratch: Path  # gone afterwards
    deadline: float = math.inf  # of time.monotonic()


def verify(run: Run) -> list[dict[str, Any]]:
    """Steps of a target over batch x (K + 1) tokens, logits included, without attention over a context.

    vLLM spreads the tokens of such a step over as many requests as it can, so logits are of
    min(tokens, largest batch) rows.
    """
    rows = []
    for name, shape in run.sizes.targets.items():
        rows += in_process(run, "verify_one", name, shape)
    return rows


def draft(run: Run) -> list[dict[str, Any]]:
    """Steps of the draft by rows, eager and as CUDA graphs, beside what reading its weights takes."""
    rows = []
    for name, shape in run.sizes.drafts.items():
        for mode in ("eager",) if run.is_dry else ("eager", "captured"):
            rows += in_process(run, "draft_one", name, shape, mode)
    return rows


def end_to_end(run: Run) -> list[dict[str, Any]]:
    """AR, vLLM's draft_model and SSD on one GPU, which target and draft share: in turns, and by MPS."""
    check_pair(REAL)  # in a dry run too, which writes another pair
    rows = write_pair(run)
    if rows:
        return rows
    for method in ("ar", "draft_model", "ssd"):
        rows += in_process(run, "end_to_end_one", method)
    if not shutil.which(MPS_CONTROL):
        console.print(f"no {MPS_CONTROL} here: target and draft only take turns", highlight=False)
        return rows
    try:
        with multi_process_service() as has_served:
            shared = in_process(run, "end_to_end_one", "ssd")
            is_shared = has_served()
    except (OSError, subprocess.SubprocessError) as error:
        return [*rows, {"failed": MPS_CONTROL, "error": str(error)}]
    return rows + [row | {"mps": is_shared} for row in shared]


def write_pair(run: Run) -> list[dict[str, Any]]:
    """Write the pair's models; a row with an error if that fails."""
    target, draft = run.sizes.pair
    command = [sys.executable, str(SCRIPTS / "make_demo_models.py"), "--random"]
    command += ["--out", str(run.scratch / "pair"), "--target-shape", target, "--draft-shape", draft]
    return call(run, "models", [*command, "--epsilon", "0.05", "--dtype", dtype_name()])[1]


@contextmanager
def multi_process_service() -> Iterator[Callable[[], bool]]:
    """CUDA's MPS for processes that are started meanwhile: they use one GPU at the same time.

    Yields:
        Whether any of them has; those that do not find the service go without, and say nothing.
    """
    folder = Path(tempfile.mkdtemp(prefix="mps-"))  # a short path: there will be sockets in it
    where = {"CUDA_MPS_PIPE_DIRECTORY": folder / "pipe", "CUDA_MPS_LOG_DIRECTORY": folder / "log"}
    before = {name: os.environ.get(name) for name in where}
    for name, path in where.items():
        path.mkdir()
        os.environ[name] = str(path)
    try:
        subprocess.run([MPS_CONTROL, "-d"], check=True, timeout=MPS_LIMIT_S)
        yield lambda: bool(_ask_service("get_server_list"))
    finally:
        _ask_service("quit")
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def _ask_service(question: str) -> str:
    """The answer of the MPS daemon, empty if there is none."""
    try:
        done = subprocess.run(
            [MPS_CONTROL],
            input=question + "\n",
            text=True,
            capture_output=True,
            timeout=MPS_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


PARTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "kernels": lambda run: in_process(run, "kernels_one"),
    "verify": verify,
    "draft": draft,
    "end_to_end": end_to_end,
}


def in_process(run: Run, name: str, *args: str) -> list[dict[str, Any]]:
    """The rows that a function of SINGLE returns in a process of its own; a row with an error if it fails."""
    command = [sys.executable, __file__, "--out", str(run.scratch), "--single", json.dumps([name, *args])]
    label = " ".join([name.removesuffix("_one"), *args])
    printed, failed = call(run, label, command + ["--dry-run"] * run.is_dry)
    lines = printed.splitlines()
    return [json.loads(line[len(MARK) :]) for line in lines if line.startswith(MARK)] + failed


def call(run: Run, label: str, command: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """What a command prints, and a row with its error if it fails or takes too long."""
    began = time.monotonic()
    limit = max(min(TIME_LIMIT_S, run.deadline - began), 0)
    try:
        done = subprocess.run(command, capture_output=True, timeout=limit, check=False)
        printed, errors = done.stdout, done.stderr
        failure = f"exit code {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        printed, errors = error.stdout or b"", error.stderr or b""
        failure = f"stopped after {limit:.0f} s"
    seconds = time.monotonic() - began
    console.print(f"{label}: {failure or 'done'} ({seconds:.0f} s)", highlight=False, markup=False)
    text = f"{failure}\n{errors.decode(errors='replace')[-2000:]}"
    return printed.decode(errors="replace"), [{"failed": label, "error": text}] if failure else []


def write_table(path: Path, run: dict[str, Any], parts: dict[str, list[dict[str, Any]]], dry: bool) -> None:
    """The rows as Markdown, with where they come from."""
    lines = provenance(run)
    if dry:
        lines.append("\n**A dry run: no time here means anything.**")
    for part, rows in parts.items():
        good = [row for row in rows if "failed" not in row]
        lines += [f"\n## {part}\n", *(f"* failed: {row['failed']}" for row in rows if "failed" in row)]
        if not good:
            continue
        names = [
            name for name in dict.fromkeys(key for row in good for key in row) if "tokens_of" not in name
        ]
        lines += [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
        lines += ["| " + " | ".join(shown(row.get(name)) for name in names) + " |" for row in good]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def shown(value: Any) -> str:
    """A table's cell."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def parse_parts(text: str) -> list[str]:
    """ "kernels,draft" -> ["kernels", "draft"]; for argparse."""
    names = text.split(",")
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PARTS)}")
    return names


def parse_arguments() -> argparse.Namespace:
    """The command line, complete and checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the figures")
    add("--parts", type=parse_parts, default=",".join(PARTS), help="default: all")
    add("--limit", type=parse_number, default=math.inf, help="seconds for all of it; default: none")
    add("--dry-run", action="store_true", help="tiny shapes, on the CPU if there is no GPU")
    add("--single", help=argparse.SUPPRESS)  # this script calls itself
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = parse_arguments()
    sizes = DRY if args.dry_run else REAL
    args.out.mkdir(parents=True, exist_ok=True)
    if args.single is not None:
        name, *rest = json.loads(args.single)
        if name != "draft_one":  # the draft has no runner, and on the CPU no Triton
            import device

            device.use_v2_runner()
        for row in SINGLE[name](sizes, args.out, args.dry_run, *rest):
            print(MARK + json.dumps(row), flush=True)
        return
    exit_on_signals()
    described = describe_run()
    parts: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as scratch:
        run = Run(sizes, args.dry_run, Path(scratch), time.monotonic() + args.limit)
        for name in args.parts:
            try:
                parts[name] = PARTS[name](run)
            except Exception as error:
                parts[name] = [{"failed": name, "error": repr(error)}]
            # After each part: the machine may be taken away before the last.
            write_json(args.out / "gpu_bench.json", described | {"dry_run": args.dry_run, "parts": parts})
            write_table(args.out / "gpu_bench.md", described, parts, args.dry_run)
    failed = [row for rows in parts.values() for row in rows if "failed" in row]
    for row in failed:
        console.print(f"failed: {row['failed']}\n{row['error']}", highlight=False, markup=False)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
