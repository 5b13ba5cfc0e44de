"""What the target would tell its draft, with small defaults."""

from __future__ import annotations

from typing import Any

from vllm_ssd.link.messages import Configure

DEFAULTS: dict[str, Any] = {
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


def configure(**changes: Any) -> Configure:
    """The defaults, but for these changes."""
    return Configure(**(DEFAULTS | changes))
