"""What gpu_bench.py does around a GPU."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

import gpu_bench
from gpu_parts import DRY, LLAMA_1B, LLAMA_8B, REAL, Sizes, check_pair

CONTROL = """#!/bin/sh
if [ "$1" = -d ]; then said=-d; else said=$(cat); fi
echo $said >>{calls}
if [ $said = get_server_list ]; then echo "{servers}"; fi
[ $said != -d ] || exit {code}
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What CUDA's MPS daemon is told."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "calls"


def write_control(calls: Path, servers: str = "", code: int = 0) -> None:
    control = calls.parent / gpu_bench.MPS_CONTROL
    control.write_text(CONTROL.format(calls=calls, servers=servers, code=code))
    control.chmod(0o755)


def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, object]]:
    """The rows of `end_to_end`, each with whether MPS was there to be found."""
    monkeypatch.setattr(gpu_bench, "write_pair", lambda run: [])
    monkeypatch.setattr(
        gpu_bench,
        "in_process",
        lambda run, name, method: [
            {"method": method, "found": "CUDA_MPS_PIPE_DIRECTORY" in os.environ},
        ],
    )
    return gpu_bench.end_to_end(dry_run(tmp_path))


def dry_run(scratch: Path, seconds: float = 60.0) -> gpu_bench.Run:
    return gpu_bench.Run(DRY, True, scratch, time.monotonic() + seconds)


@pytest.mark.parametrize(("servers", "is_shared"), [("4711", True), ("", False)])
def test_ssd_runs_once_more_under_mps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: Path, servers: str, is_shared: bool
) -> None:
    write_control(calls, servers)
    rows = measured(monkeypatch, tmp_path)
    assert [row["found"] for row in rows] == [False, False, False, True]
    assert rows[-1] == {"method": "ssd", "found": True, "mps": is_shared}
    assert calls.read_text().split() == ["-d", "get_server_list", "quit"]
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ


def test_mps_that_cannot_be_started_costs_no_other_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: Path
) -> None:
    write_control(calls, code=3)
    rows = measured(monkeypatch, tmp_path)
    assert [row.get("method") for row in rows] == ["ar", "draft_model", "ssd", None]
    assert rows[-1]["failed"] == gpu_bench.MPS_CONTROL


@pytest.mark.parametrize("sizes", [REAL, DRY], ids=["real", "dry"])
def test_the_pair_fits_together(sizes: Sizes) -> None:
    check_pair(sizes)


def test_a_pair_that_does_not_fit_is_seen_in_a_dry_run_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_bench, "REAL", replace(REAL, pair=(LLAMA_8B, LLAMA_1B)))
    with pytest.raises(ValueError, match="heads do not fit"):
        measured(monkeypatch, tmp_path)


def test_a_failing_process_becomes_a_row(tmp_path: Path) -> None:
    printed, rows = gpu_bench.call(
        dry_run(tmp_path), "it", ["sh", "-c", "echo one; echo no room >&2; exit 3"]
    )
    assert printed == "one\n"
    assert rows == [{"failed": "it", "error": "exit code 3\nno room\n"}]
    assert gpu_bench.call(dry_run(tmp_path), "it", ["true"]) == ("", [])


def test_a_process_that_takes_too_long_becomes_a_row(tmp_path: Path) -> None:
    run = dry_run(tmp_path, seconds=1.0)
    printed, rows = gpu_bench.call(run, "it", ["sh", "-c", "echo one; exec sleep 60"])
    assert printed == "one\n"
    assert [row["failed"] for row in rows] == ["it"]
    assert "stopped after" in rows[0]["error"]


def test_without_models_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failure = {"failed": "models", "error": "no room"}
    monkeypatch.setattr(gpu_bench, "write_pair", lambda run: [failure])
    assert gpu_bench.end_to_end(dry_run(tmp_path)) == [failure]


def test_a_failing_part_leaves_the_others_and_only_results_come_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(run: gpu_bench.Run) -> list[dict[str, Any]]:
        raise ValueError("planted")

    def write_and_measure(run: gpu_bench.Run) -> list[dict[str, Any]]:
        (run.scratch / "model").write_text("large")
        return [{"rows": 8}]

    monkeypatch.setattr(gpu_bench, "exit_on_signals", lambda: None)
    monkeypatch.setitem(gpu_bench.PARTS, "verify", fail)
    monkeypatch.setitem(gpu_bench.PARTS, "draft", write_and_measure)
    monkeypatch.setattr(
        sys, "argv", ["gpu_bench.py", "--out", str(tmp_path), "--parts", "verify,draft", "--dry-run"]
    )
    with pytest.raises(SystemExit, match="1"):
        gpu_bench.main()
    report = json.loads((tmp_path / "gpu_bench.json").read_text())
    assert report["parts"] == {
        "verify": [{"failed": "verify", "error": "ValueError('planted')"}],
        "draft": [{"rows": 8}],
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_bench.json", "gpu_bench.md"]
