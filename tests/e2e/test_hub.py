"""Target and draft by their Hub ids, as nearly everybody names them; test_serve.py serves them so."""

from __future__ import annotations

from typing import Any

import pytest
import readme
from engines import Engines, await_draft, generate, greedy_params, in_worker, stats

pytestmark = pytest.mark.timeout(280)


def test_the_readmes_python_file(
    engines: Engines,
    hub_pair: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import vllm

    made: list[Any] = []

    def build(target: str, speculative_config: dict[str, Any]) -> Any:
        monkeypatch.undo()
        made.append(engines.get(target, speculative_config))
        return made[-1]

    monkeypatch.setattr(vllm, "LLM", build)
    exec(compile(readme.snippet(*hub_pair), "README.md", "exec"), {"__name__": "__main__"})
    (llm,) = made
    assert "RequestOutput" in capsys.readouterr().out
    in_worker(llm, await_draft)
    generate(llm, [[5, 6, 7]], greedy_params(64))
    assert stats(llm)["hits"] > 0
