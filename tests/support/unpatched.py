"""Code in a process where nothing of vLLM is patched yet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ASK_FOR_SSD = """
args = EngineArgs(model=target, max_model_len=128,
                  speculative_config={"method": "ssd", "model": draft, "num_speculative_tokens": 2})
try:
    args.create_engine_config()
except ValueError as error:
    print("REFUSED:", error)
"""


def run_without_plugins(code: str, pair: tuple[Path, Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process where nothing is patched yet; VLLM_PLUGINS keeps vLLM from loading us itself.

    The code leaves `EngineArgs`, `target` and `draft` to what asks for method "ssd" after it.
    """
    done = subprocess.run(
        [sys.executable, "-c", code + ASK_FOR_SSD, *map(str, pair)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"VLLM_PLUGINS": "none"},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done
