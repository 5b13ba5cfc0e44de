"""What SSD takes on a GPU: our kernels, steps of target and draft, and AR / draft_model / SSD on one GPU.

    python scripts/gpu_bench.py --out DIR                # on a machine with a GPU
    python scripts/gpu_bench.py --out DIR --dry-run      # anywhere: tiny shapes, all but the device itself

Each measurement runs in a process of its own, which gives all memory back. Weights are random, of true
shape. Out come DIR/gpu_bench.json and DIR/gpu_bench.md. A dry run's times mean nothing and are marked so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu_parts import DRY, REAL, SINGLE, Sizes, dtype_name
from harness import describe_run, exit_on_signals, provenance, write_json
from rich.console import Console

SCRIPTS = Path(__file__).parent
MARK = "ROW "  # before each row that a part prints
TIME_LIMIT_S = 540
MPS_CONTROL, MPS_LIMIT_S = "nvidia-cuda-mps-control", 20
console = Console()


def verify(sizes: Sizes, out: Path, dry: bool) -> list[dict[str, Any]]:
    """Steps of a target over batch x (K + 1) tokens, logits included, without attention over a context.

    vLLM spreads the tokens of such a step over as many requests as it can, so logits are of
    min(tokens, largest batch) rows.
    """
    rows = []
    for name, shape in sizes.targets.items():
        rows += in_process("verify_one", out, dry, name, shape)
    return rows


def draft(sizes: Sizes, out: Path, dry: bool) -> list[dict[str, Any]]:
    """Steps of the draft by rows, eager and as CUDA graphs, beside what reading its weights takes."""
    rows = []
    for name, shape in sizes.drafts.items():
        for mode in ("eager",) if dry else ("eager", "captured"):
            rows += in_process("draft_one", out, dry, name, shape, mode)
    return rows


def end_to_end(sizes: Sizes, out: Path, dry: bool) -> list[dict[str, Any]]:
    """AR, vLLM's draft_model and SSD on one GPU, which target and draft share: in turns, and by MPS."""
    models = out / "models" / "pair"
    if not (models / "target" / "config.json").exists():
        command = [sys.executable, str(SCRIPTS / "make_demo_models.py"), "--random", "--out", str(models)]
        command += ["--target-shape", sizes.pair[0], "--draft-shape", sizes.pair[1], "--epsilon", "0.05"]
        subprocess.run([*command, "--dtype", dtype_name()], check=True)
    rows = []
    for method in ("ar", "draft_model", "ssd"):
        rows += in_process("end_to_end_one", out, dry, method)
    if not shutil.which(MPS_CONTROL):
        console.print(f"no {MPS_CONTROL} here: target and draft only take turns", highlight=False)
        return rows
    try:
        with multi_process_service() as has_served:
            shared = in_process("end_to_end_one", out, dry, "ssd")
            is_shared = has_served()
    except (OSError, subprocess.SubprocessError) as error:
        return [*rows, {"failed": MPS_CONTROL, "error": str(error)}]
    return rows + [row | {"mps": is_shared} for row in shared]


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
    "kernels": lambda sizes, out, dry: in_process("kernels_one", out, dry),
    "verify": verify,
    "draft": draft,
    "end_to_end": end_to_end,
}


def in_process(name: str, out: Path, dry: bool, *args: str) -> list[dict[str, Any]]:
    """The rows that a function of SINGLE returns in a process of its own; a row with an error if it fails."""
    command = [sys.executable, __file__, "--out", str(out), "--single", json.dumps([name, *args])]
    label = " ".join([name.removesuffix("_one"), *args])
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command + ["--dry-run"] * dry, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False
        )
        printed, errors, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        printed, errors, code = "", f"{error}", 1
    rows = [json.loads(line[len(MARK) :]) for line in printed.splitlines() if line.startswith(MARK)]
    console.print(f"{label}: {len(rows)} rows in {time.perf_counter() - began:.0f} s", highlight=False)
    if code:
        rows.append({"failed": label, "error": errors[-2000:]})
    return rows


def write_table(path: Path, run: dict[str, Any], parts: dict[str, list[dict[str, Any]]], dry: bool) -> None:
    """The rows as Markdown, with where they come from."""
    lines = provenance(run)
    if dry:
        lines.append("\n**A dry run: no time here means anything.**")
    for part, rows in parts.items():
        good = [row for row in rows if "failed" not in row]
        lines += [f"\n## {part}\n", *(f"* failed: {row['failed']}" for row in rows if "failed" in row)]
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
    add("--out", type=Path, required=True, help="folder for the figures, and for models meanwhile")
    add("--parts", type=parse_parts, default=",".join(PARTS), help="default: all")
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
    run = describe_run()
    parts: dict[str, list[dict[str, Any]]] = {}
    for name in args.parts:
        parts[name] = PARTS[name](sizes, args.out, args.dry_run)
        # After each part: the machine may be taken away before the last.
        write_json(args.out / "gpu_bench.json", run | {"dry_run": args.dry_run, "parts": parts})
        write_table(args.out / "gpu_bench.md", run, parts, args.dry_run)
    failed = [row for rows in parts.values() for row in rows if "failed" in row]
    for row in failed:
        console.print(f"failed: {row['failed']}\n{row['error']}", highlight=False, markup=False)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
