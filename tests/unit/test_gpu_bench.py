"""What gpu_bench.py does around a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import gpu_bench


def test_mps_is_ended_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    control = tmp_path / gpu_bench.MPS_CONTROL
    control.write_text(f'#!/bin/sh\n[ "$1" = -d ] && set -- "$1" || set -- $(cat)\necho "$@" >>{calls}\n')
    control.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def measure() -> None:
        with gpu_bench.multi_process_service(tmp_path / "mps"):
            assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == str(tmp_path / "mps" / "pipe")
            assert calls.read_text().split() == ["-d"]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        measure()
    assert calls.read_text().split() == ["-d", "quit"]
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
