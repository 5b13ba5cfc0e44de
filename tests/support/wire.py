"""What the target would tell its draft, with small defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_ssd.link.messages import Configure

DEFAULTS: dict[str, Any] = {
    "address": "",
    "shared_dir": "",
    "table_dir": "",
    "model": "",
    "engine_args": {},
    "device": "cpu",
    "cores": [0],
    "vocab_size": 12,
    "num_speculative_tokens": 3,
    "fanout": "uniform",
    "branch_budget": 8,
    "max_slots": 4,
    "max_rows": 64,
    "prefill_chunk": 16,
    "memory_bytes": 1 << 24,
    "enforce_eager": True,
    "is_coupled": True,
    "saguaro_c": 1.0,
}


def configure(folder: Path | str, **changes: Any) -> Configure:
    """A `Configure` whose shared files lie in `folder`."""
    folders = {"shared_dir": str(folder), "table_dir": str(folder)}
    return Configure(**(DEFAULTS | folders | changes))
