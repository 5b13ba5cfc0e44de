"""Configs of method "ssd", and what is said where one is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

Pair = tuple[Path, Path]
NO_CORE = 4096


def create(pair: Pair, engine: dict[str, Any] | None = None, **speculative: Any) -> Any:
    """The engine's config; an option of None is left out."""
    from vllm.engine.arg_utils import EngineArgs

    options = {"method": "ssd", "model": str(pair[1]), "num_speculative_tokens": 4} | speculative
    options = {name: value for name, value in options.items() if value is not None}
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    return EngineArgs(
        model=str(pair[0]), speculative_config=options, **(defaults | (engine or {}))
    ).create_engine_config()


def refusal(pair: Pair, engine: dict[str, Any] | None = None, **speculative: Any) -> list[str]:
    """The lines of the error."""
    with pytest.raises(ValueError) as error:  # noqa: PT011  the callers look at its text
        create(pair, engine, **speculative)
    return str(error.value).splitlines()


def assert_one_line(lines: list[str], *parts: str) -> None:
    matching = [line for line in lines if all(part in line for part in parts)]
    assert len(matching) == 1, lines


def on_cuda(monkeypatch: pytest.MonkeyPatch, num_devices: int) -> None:
    from vllm_ssd import config, placement

    stand_in = SimpleNamespace(
        is_cpu=lambda: False,
        is_cuda=lambda: True,
        device_count=lambda: num_devices,
        device_type="cuda",
        get_device_total_memory=lambda index: (40 + index) << 30,
    )
    for module in (config, placement):
        monkeypatch.setattr(module, "current_platform", stand_in)
