"""One engine process of scripts/harness.py: `python scripts/engine_process.py FD`, started by it only."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections import deque
from multiprocessing.connection import Connection
from typing import Any

from harness import EngineSpec, GenerationResult, GenerationTask, TopTwo, receive_until_closed
from vllm import EngineArgs, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats


class StepStats(StatLoggerBase):
    """Sums up vLLM's own statistics, of which Prometheus shows the same sums and some fewer."""

    def __init__(self, num_speculative_tokens: int) -> None:
        self._num_positions = num_speculative_tokens
        self.reset()

    def reset(self) -> None:
        """Begin at zero."""
        self.preemptions = 0
        self.drafted_rows = 0
        self.drafted_per_position = [0] * self._num_positions
        self.accepted_per_position = [0] * self._num_positions

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Receive one engine step."""
        if iteration_stats is not None:
            self.preemptions += iteration_stats.num_preempted_reqs
        if scheduler_stats is not None and scheduler_stats.spec_decoding_stats is not None:
            spec = scheduler_stats.spec_decoding_stats
            self.drafted_rows += spec.num_drafts
            self.drafted_per_position = _sum(self.drafted_per_position, spec.num_draft_tokens_per_pos)
            self.accepted_per_position = _sum(self.accepted_per_position, spec.num_accepted_tokens_per_pos)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def _sum(totals: list[int], counts: list[int]) -> list[int]:
    return [a + b for a, b in zip(totals, counts, strict=True)]


class Engine:
    """A vLLM engine in this process."""

    def __init__(self, spec: EngineSpec) -> None:
        speculation = spec.engine_args.get("speculative_config", {})
        self._is_ssd = speculation.get("method") == "ssd"
        self._arrived: dict[str, float] = {}  # request id -> time
        self._stats = StepStats(speculation.get("num_speculative_tokens", 0))
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(**spec.engine_args), stat_loggers=[lambda *args, **kwargs: self._stats]
        )
        if not spec.all_cores:
            _bind_threads(spec.cores.target)
        self._num_requests = 0

    def generate(self, task: GenerationTask) -> GenerationResult:
        """Run all requests of the task; nothing else is in the engine."""
        self._stats.reset()
        if self._is_ssd:
            self._engine.collective_rpc("ssd_plan", args=task.plan or ())
        ssd_before = self._ssd_counters()
        count = len(task.prompts)
        outputs, top_two, seconds = ([[] for _ in range(count)] for _ in range(3))
        result = GenerationResult(outputs=outputs, top_two=top_two, output_seconds=seconds)
        self._run(task, result)
        result.preemptions = self._stats.preemptions
        result.drafted_per_position = self._stats.drafted_per_position
        result.accepted_per_position = self._stats.accepted_per_position
        result.ssd = {name: value - ssd_before[name] for name, value in self._ssd_counters().items()}
        return result

    def shutdown(self) -> None:
        """End the engine and, with method ssd, its draft process."""
        self._engine.engine_core.shutdown()

    def _run(self, task: GenerationTask, result: GenerationResult) -> None:
        waiting = deque(range(len(task.prompts)))
        in_flight: dict[str, int] = {}  # request id -> index of the prompt
        full_batch = max(task.max_in_flight)
        began, cpu_began = time.perf_counter(), time.process_time()
        while waiting or in_flight:
            while waiting and len(in_flight) < task.max_in_flight[waiting[0]]:
                index = waiting.popleft()
                in_flight[self._add(task, index)] = index
            num_in_flight = len(in_flight)
            is_decode = all(result.outputs[index] for index in in_flight.values())
            drafted_before = self._stats.drafted_rows
            step_began = time.perf_counter()
            outputs = self._engine.step()
            seconds = time.perf_counter() - step_began
            num_tokens = self._receive_step(outputs, in_flight, result)
            result.in_flight.append(num_in_flight)
            if is_decode:
                result.decode_rows += num_in_flight
                result.decode_tokens += num_tokens
                if num_in_flight == full_batch:
                    result.decode_seconds.append(seconds)
                    result.drafted_rows.append(self._stats.drafted_rows - drafted_before)
        result.seconds, result.cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began

    def _add(self, task: GenerationTask, index: int) -> str:
        self._num_requests += 1
        request_id = str(self._num_requests)
        params = SamplingParams(
            temperature=task.temperature,
            seed=index if task.temperature else None,
            max_tokens=task.out_tokens[index],
            ignore_eos=not task.may_end,
            logprobs=2 if task.want_top_two else None,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = TokensPrompt(prompt_token_ids=task.prompts[index])
        self._arrived[request_id] = time.perf_counter()
        self._engine.add_request(request_id, prompt, params)
        return request_id

    def _receive_step(self, outputs: list[Any], in_flight: dict[str, int], result: GenerationResult) -> int:
        """Collect the step's new tokens; returns how many they are."""
        num_tokens, now = 0, time.perf_counter()
        for output in outputs:
            assert isinstance(output, RequestOutput)
            completion = output.outputs[0]
            index = in_flight[output.request_id]
            result.outputs[index] += completion.token_ids
            result.top_two[index] += [_top_two(candidates) for candidates in completion.logprobs or ()]
            result.output_seconds[index].append(now - self._arrived[output.request_id])
            num_tokens += len(completion.token_ids)
            if output.finished:
                del in_flight[output.request_id], self._arrived[output.request_id]
        return num_tokens

    def _ssd_counters(self) -> dict[str, int]:
        if not self._is_ssd:
            return {}
        stats = self._engine.collective_rpc("ssd_stats")[0]
        draft = {
            f"draft.{name}": value for name, value in stats.pop("draft").items() if isinstance(value, int)
        }
        return {**stats, **draft}


def _top_two(candidates: dict[int, Any]) -> TopTwo:
    (first, best), (second, next_best) = sorted(candidates.items(), key=lambda item: item[1].rank)[:2]
    return TopTwo(first, second, best.logprob - next_best.logprob)


def _bind_threads(core: int) -> None:
    """Bind every thread of this process, also those that began before vLLM bound the main one."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), {core})


def main() -> None:
    """Serve the process that started this one."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    connection = Connection(int(sys.argv[1]))
    received = receive_until_closed(connection)
    engine = Engine(next(received))
    try:
        with contextlib.suppress(SystemExit):  # by SIGTERM: what the task yields is no longer wanted
            connection.send("ready")
            for task in received:
                connection.send(engine.generate(task))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        engine.shutdown()
    os._exit(0)  # nothing is left to do, and tearing down the interpreter takes torch many seconds


if __name__ == "__main__":
    main()
