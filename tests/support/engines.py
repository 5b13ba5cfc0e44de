"""Real vLLM in this process: one engine alive at a time, kept while tests ask for the same one."""

from __future__ import annotations

import atexit
import gc
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_ssd.link.messages import Outcomes
from vllm_ssd.link.outcome_cache import DECLINED, DEPTH, EPOCH, NOT_INTRODUCED, ROUND, Outcome

atexit.register(gc.unfreeze)  # what is frozen (`Engines.close`) would count as leaked

CORES = os.sched_getaffinity(0)
MAX_MODEL_LEN = 1024

POLL_S = 0.0005
QUIET_S = 3.0  # in which a draft does nothing that has something left to do


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
        "ssd_stall_timeout": 120.0,  # a busy machine stops nobody's draft
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


def let_finished_go(llm: Any) -> None:
    """The scheduler tells the worker that requests have finished with its next step, here one without any."""
    while llm.llm_engine.engine_core.engine_core.scheduler.has_requests():
        llm.llm_engine.step()


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


def await_draft(worker: Any) -> None:
    """Let each round begin when the draft has made all drafts of it, for `collective_rpc`.

    Which outcomes are hits then depends on the models alone, not on the machine: an outcome that has a branch
    finds its drafts, to the depth that was asked for.
    """
    _before_each_round(worker, _AwaitDraft)


def vary_depth(worker: Any) -> None:
    """Let each round begin when its drafts have reached a depth drawn from 0 to K; the draft continues.

    As with `await_draft` this much is certain; what the draft adds before the look-up, or while the target
    verifies, is up to the machine. Half of the look-ups get the drawn depth and no more.
    """
    _before_each_round(worker, _VaryDepth)


def _before_each_round(worker: Any, make: Callable[[Any], Any]) -> None:
    runner = worker.model_runner
    if worker._draft is None or hasattr(runner, "draft_awaited_by"):  # another rank leads; or it is done
        return
    runner.draft_awaited_by = awaits = make(worker)
    is_v2 = hasattr(runner, "speculator")
    owner, name = (runner.speculator, "propose") if is_v2 else (runner, "propose_draft_token_ids")
    stock = getattr(owner, name)

    def propose(*args: Any, **kwargs: Any) -> Any:
        if is_v2:
            runner.speculator.proposed()  # the draft has been told of the last round
        awaits()
        return stock(*args, **kwargs)

    setattr(owner, name, propose)


class _AwaitDraft:
    """Waits until all branches of the rounds that the target is in have the depth that was asked for."""

    def __init__(self, worker: Any) -> None:
        runner = worker.model_runner
        self._proposer = getattr(runner, "speculator", runner).proposer
        self._supervisor = worker._draft.supervisor
        self._depth = worker.vllm_config.speculative_config.num_speculative_tokens
        stock = self._supervisor.send

        def send(message: Any) -> bool:
            if isinstance(message, Outcomes):
                self._depth = message.num_drafts
            return stock(message)

        self._supervisor.send = send

    def __call__(self) -> None:
        self._wait(self._depth)

    def _wait(self, depth: int) -> None:
        seen, last_seen = None, time.monotonic()
        while depth and not self._is_there(depth):
            found = self._supervisor.draft_counters.as_dict()
            if found != seen:
                seen, last_seen = found, time.monotonic()
            # Of some requests there will be no drafts: it has no room for them, or has ended.
            if time.monotonic() > last_seen + QUIET_S or not is_running(self._supervisor.pid):
                return
            time.sleep(POLL_S)

    def _is_there(self, depth: int) -> bool:
        cache = self._supervisor.cache
        if cache is None:
            return True
        for slot, key in self._proposer.keys().items():
            entries = cache.entries[slot]
            depths = entries[(entries[:, [EPOCH, ROUND]] == key).all(axis=1), DEPTH]
            is_declined = (depths == DECLINED).any()
            if key[0] != NOT_INTRODUCED and not is_declined and not (len(depths) and depths.min() >= depth):
                return False
        return True


class _VaryDepth(_AwaitDraft):
    """Waits for a depth drawn for each round, and lets half of the look-ups find no more."""

    def __init__(self, worker: Any) -> None:
        super().__init__(worker)
        self._rng = random.Random(0)
        self._most = self._depth
        cache = self._supervisor.cache
        stock = cache.look_up

        def look_up(outcomes: list[Outcome]) -> list[list[int] | None]:
            return [drafts and drafts[: self._most] for drafts in stock(outcomes)]

        cache.look_up = look_up

    def __call__(self) -> None:
        depth = self._rng.randint(0, self._depth)
        self._most = depth if self._rng.random() < 0.5 else self._depth
        self._wait(depth)
