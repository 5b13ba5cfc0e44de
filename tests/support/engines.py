"""Real vLLM in this process: one engine alive at a time, kept while tests ask for the same one."""

from __future__ import annotations

import atexit
import gc
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

atexit.register(gc.unfreeze)  # what is frozen (`Engines.close`) would count as leaked

CORES = os.sched_getaffinity(0)
MAX_MODEL_LEN = 1024

TIME_FOR_DRAFT_S = 0.02


class Engines:
    """Builds vLLM engines and keeps the last one.

    Args:
        always: options of all of them.
    """

    def __init__(self, always: dict[str, Any] | None = None) -> None:
        self._always = always or {}
        self._key: str | None = None
        self._llm: Any = None

    def get(self, target: Path, speculative_config: dict[str, Any] | None = None, **options: Any) -> Any:
        """An `LLM` of these options; the last one, if they are the same."""
        key = json.dumps([str(target), speculative_config, options], default=str, sort_keys=True)
        if key != self._key:
            self.close()
            self._llm = build(target, speculative_config, **self._always, **options)
            self._key = key
        return self._llm

    def close(self) -> None:
        """Shut the engine down, if there is one."""
        llm, self._llm, self._key = self._llm, None, None
        if llm is None:
            return
        llm.llm_engine.engine_core.shutdown()
        del llm
        # What is left are modules, which stay: the next engine's start collects several times.
        gc.freeze()
        os.sched_setaffinity(0, CORES)


def build(target: Path, speculative_config: dict[str, Any] | None = None, **options: Any) -> Any:
    """An `LLM` in this process, in float32."""
    from vllm import LLM

    # vLLM binds this very thread to the target's core; the next engine must see all cores again.
    os.sched_setaffinity(0, CORES)
    chosen: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 8,
        "max_num_batched_tokens": MAX_MODEL_LEN,
        "disable_log_stats": False,
        "seed": 0,
    }
    chosen |= options
    if speculative_config is not None:
        # A new dict for each engine: vLLM adds to it.
        chosen["speculative_config"] = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in speculative_config.items()
        }
    return LLM(str(target), **chosen)


def ssd(draft: Path, num_speculative_tokens: int, **options: Any) -> dict[str, Any]:
    """A speculative config of method "ssd"."""
    return {
        "method": "ssd",
        "model": draft,
        "num_speculative_tokens": num_speculative_tokens,
        "ssd_draft_memory": 0.25,
        **options,
    }


def generate(llm: Any, prompts: Sequence[list[int]], params: Any) -> list[list[int]]:
    """[B] token ids of each prompt's completion; all of them are asked for at once."""
    from vllm.inputs import TokensPrompt

    outputs = llm.generate([TokensPrompt(prompt_token_ids=list(p)) for p in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def greedy_params(max_tokens: int, **options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **options)


def stats(llm: Any) -> dict[str, Any]:
    """SSD's counters."""
    return llm.collective_rpc("ssd_stats")[0]


def metric(llm: Any, name: str) -> Any:
    """A counter (or vector) of vLLM's own metrics, summed over engines."""
    found = [m for m in llm.get_metrics() if m.name == name]
    assert found, name
    values = [m.values if hasattr(m, "values") else m.value for m in found]
    return values[0] if len(values) == 1 else sum(values)


def in_worker(llm: Any, function: Any) -> Any:
    """What `function(worker)` returns in the engine's worker, which is in this process."""
    return llm.collective_rpc(function)[0]


def is_running(pid: int) -> bool:
    """Whether there is such a process, not merely its exit code."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def give_up_draft(worker: Any) -> None:
    """End the draft, and start no other; for `collective_rpc`."""
    if worker._draft is not None:
        worker._draft.supervisor.give_up("is ended by a test")


def give_draft_time(worker: Any) -> None:
    """Slow the target down: a tiny one outruns its draft on some machines, and then nothing is foreseen."""
    runner = worker.model_runner
    if hasattr(runner, "unslowed_propose"):
        return
    runner.unslowed_propose = stock = runner.propose_draft_token_ids

    def propose(*args: Any, **kwargs: Any) -> Any:
        time.sleep(TIME_FOR_DRAFT_S)
        return stock(*args, **kwargs)

    runner.propose_draft_token_ids = propose
