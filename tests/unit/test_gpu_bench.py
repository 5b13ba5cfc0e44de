"""What gpu_bench.py does around a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import gpu_bench

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
    target = tmp_path / "models" / "pair" / "target"
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    monkeypatch.setattr(
        gpu_bench,
        "in_process",
        lambda name, out, dry, method: [
            {"method": method, "found": "CUDA_MPS_PIPE_DIRECTORY" in os.environ},
        ],
    )
    return gpu_bench.end_to_end(gpu_bench.DRY, tmp_path, dry=True)


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
