"""What a target's worker does for its draft, on any platform: starts, awaits, watches and stops it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
from vllm.config import VllmConfig
from vllm.distributed import get_world_group
from vllm.logger import init_logger

from vllm_ssd import compat
from vllm_ssd.config import SSDSpeculativeConfig
from vllm_ssd.link.announcement import Announcement
from vllm_ssd.link.counters import Counters, target_fields
from vllm_ssd.link.messages import Configure
from vllm_ssd.plan.costs import Costs
from vllm_ssd.plan.planner import FixedPlan, Plan, Planner, RoundPlanner
from vllm_ssd.plan.speed_model import StepTimes, measure_line
from vllm_ssd.target.backup import (
    AutoBackup,
    Backup,
    JustInTimeBackup,
    NgramBackup,
    NoBackup,
)
from vllm_ssd.target.draft_args import draft_engine_args, plain
from vllm_ssd.target.guard import Guard
from vllm_ssd.target.observer import RoundObserver
from vllm_ssd.target.proposer import Proposer
from vllm_ssd.target.ranks import leading_rank, leads
from vllm_ssd.target.served_probs import ServedProbs
from vllm_ssd.target.supervisor import AllocateTable, DraftSupervisor

logger = init_logger("vllm.ssd")


class DraftHost:
    """Mixed into vLLM's worker, whose model runner is then one of ours (`runner_v1`, `runner_v2`).

    The worker calls `start_draft` before the target loads, so that both load at once, and `connect` when
    there is a model runner. From then on all is done here.
    """

    vllm_config: VllmConfig
    rank: int
    model_runner: Any
    _draft: TargetsDraft | None = None  # None on the ranks that follow (`ranks`)

    def start_draft(self, allocate: AllocateTable | None = None) -> None:
        """Start the draft process on the rank that leads; nothing waits for it yet.

        Args:
            allocate: see `DraftSupervisor`.
        """
        if leads(self.vllm_config.parallel_config, self.rank):
            self._draft = TargetsDraft(self.vllm_config, allocate)
            # Also where nobody calls shutdown: an engine that fails to start, or is dropped in-process.
            self._stop_draft = weakref.finalize(self, self._draft.close)

    def connect(self) -> None:
        """Give the model runner its proposer."""
        if self._draft is not None:
            self._draft.connect(self.model_runner)

    def determine_available_memory(self) -> int:
        """Size the target's KV cache once the draft has taken its memory, be it on another rank's device."""
        if self._draft is not None:
            self._draft.supervisor.await_ready()
        get_world_group().barrier()
        return super().determine_available_memory()  # type: ignore[misc]

    def draft_memory_bytes(self) -> int:
        """What the draft process holds and will hold, on all ranks alike; waits until it has loaded."""
        num_bytes = 0 if self._draft is None else self._draft.memory_bytes()
        leader = leading_rank(self.vllm_config.parallel_config)
        return int(get_world_group().broadcast_object(num_bytes, src=leader))

    def compile_or_warm_up_model(self) -> Any:
        """Warm the target up; where rounds are to be planned, measure what they cost."""
        warmed_up = super().compile_or_warm_up_model()  # type: ignore[misc]
        ssd = self.vllm_config.speculative_config
        if ssd.ssd_planner:
            scheduler = self.vllm_config.scheduler_config
            batch = min(8, scheduler.max_num_seqs)
            most_tokens = min((ssd.num_speculative_tokens + 1) * batch, scheduler.max_num_batched_tokens)
            times = measure_line(self.model_runner.time_step, 1, most_tokens)  # on all ranks at once
            self.model_runner.maybe_remove_all_loras(self.model_runner.lora_config)
            if self._draft is not None:
                # Each stage of a pipeline steps by itself here; a round passes through all of them.
                stages = self.vllm_config.parallel_config.pipeline_parallel_size
                self._draft.plan_rounds((stages * times[0], stages * times[1]))
        return warmed_up

    def shutdown(self) -> None:
        """Stop the draft, then the worker."""
        if self._draft is not None:
            self._stop_draft()
        super().shutdown()  # type: ignore[misc]

    def ssd_plan(self, num_drafts: int | None = None, branch_budget: int = sys.maxsize) -> None:
        """Fix K and the branch budget from now on, at most what is configured; without arguments undo it.

        For `LLM.collective_rpc("ssd_plan", args=(3, 8))`.
        """
        if self._draft is None:
            return
        ssd = self.vllm_config.speculative_config
        if num_drafts is None:
            self._draft.set_plan(None)
        else:
            budget = min(branch_budget, ssd.ssd_branch_budget) if num_drafts else 0
            plan = Plan(min(num_drafts, ssd.num_speculative_tokens), budget)
            self._draft.set_plan(FixedPlan(plan))

    def ssd_restart(self) -> None:
        """Start another draft process in place of this one, or of one that was given up.

        For `LLM.collective_rpc("ssd_restart")`.
        """
        if self._draft is not None:
            self._draft.supervisor.restart()

    def ssd_stats(self) -> dict[str, Any]:
        """All counters of both halves; empty on ranks that follow. For `LLM.collective_rpc("ssd_stats")`."""
        return {} if self._draft is None else self._draft.stats()


class TargetsDraft:
    """The draft of a target, on the one rank that talks to it: its process, and the proposer that asks it.

    Args:
        vllm_config: the target's. The draft process starts at once; nothing waits for it yet.
        allocate: see `DraftSupervisor`.
    """

    def __init__(self, vllm_config: VllmConfig, allocate: AllocateTable | None) -> None:
        ssd = vllm_config.speculative_config
        assert isinstance(ssd, SSDSpeculativeConfig)
        self._vllm_config, self._ssd = vllm_config, ssd
        self._counters = Counters(target_fields(ssd.num_speculative_tokens))
        self.supervisor = DraftSupervisor(
            _configure(ssd, vllm_config),
            self._counters,
            ssd.ssd_ready_timeout,
            ssd.ssd_stall_timeout,
            allocate,
        )
        counters = (self._counters, self.supervisor.draft_counters)
        self._announcement: Announcement | None = None
        try:
            self._announcement = Announcement(
                ssd.placement.engine_id,
                ssd.placement.engine_cores,
                [each.descriptor for each in counters],
            )
        except OSError as error:  # such as in a sandbox without such sockets
            logger.warning("SSD's counters will be missing on /metrics and in the log: %s", error)
        self._costs = Costs()
        self._planner: RoundPlanner = FixedPlan(Plan(ssd.num_speculative_tokens, ssd.ssd_branch_budget))
        self._proposer: Proposer | None = None
        self._close_runner: Callable[[], None] | None = None

    def connect(self, model_runner: Any) -> None:
        """Give the model runner its proposer."""
        ssd, history = self._ssd, model_runner.token_history
        observer = RoundObserver(self._counters, self._costs)
        self._proposer = Proposer(
            self.supervisor,
            self._vllm_config.scheduler_config.max_num_seqs,
            _backup(ssd, self._costs, observer, history, self._vllm_config.model_config.max_model_len),
            history,
            observer,
            self._planner,
            ssd.common_vocab_size,
            ssd.num_speculative_tokens,
            ssd.ssd_wait_ms / 1000,
        )
        guard = Guard(self._proposer, ServedProbs(self.supervisor, observer), self._counters)
        model_runner.connect(guard, self.supervisor, self._counters)
        self._close_runner = model_runner.close

    def plan_rounds(self, target_times: tuple[float, float]) -> None:
        """Choose K and the branch budget by what a step of the target takes, and one of the draft.

        Args:
            target_times: seconds of a step over nothing, and of each further token.
        """
        ssd = self._ssd
        times = StepTimes(*target_times, *self.supervisor.step_times)
        logger.info("SSD planner: %s", times)
        self._planner = Planner(
            ssd.num_speculative_tokens,
            ssd.ssd_branch_budget,
            ssd.ssd_max_rows,
            times,
            self._costs,
            lambda: self.supervisor.step_seconds,
        )
        self.set_plan(None)

    def set_plan(self, plan: FixedPlan | None) -> None:
        """Fix K and the branch budget from now on, or undo it."""
        assert self._proposer is not None
        self._proposer.planner = plan or self._planner

    def stats(self) -> dict[str, Any]:
        """All counters of both halves."""
        draft = {"pid": self.supervisor.pid, "state": self.supervisor.state.value}
        return {**self._counters.as_dict(), "draft": draft | self.supervisor.draft_counters.as_dict()}

    def memory_bytes(self) -> int:
        """What the draft process holds once it has loaded, and the logits that its rounds will add.

        Its KV cache is filled with zeros when it is made, and so among what it holds.
        """
        self.supervisor.await_ready()
        ssd = self._ssd
        steps = ssd.num_speculative_tokens + 2  # of a round; the logits of all are kept until it ends
        distributions = (
            1 if ssd.ssd_verify == "coupled" else 2
        )  # with ratio, what they are drawn from as well
        logits = ssd.ssd_max_rows * steps * ssd.draft_model_config.get_vocab_size() * 4 * distributions
        return int(psutil.Process(self.supervisor.pid).memory_info().rss) + logits

    def close(self) -> None:
        """Stop the draft, and let nobody find the engine any more; once."""
        if self._announcement is not None:
            self._announcement.close()
        if self._close_runner is not None:
            self._close_runner()  # first, since it may be talking to the draft
        self.supervisor.close()


def _configure(ssd: SSDSpeculativeConfig, vllm_config: VllmConfig) -> Configure:
    draft = ssd.draft_model_config
    options = {
        "model": draft.model_weights
        or draft.model,  # where vLLM fetched the config alone, it keeps the rest's
        "vocab_size": ssd.common_vocab_size,
        "engine_args": draft_engine_args(ssd, vllm_config),
        "device": ssd.placement.device,
        "cores": ssd.placement.cores,
        "num_speculative_tokens": ssd.num_speculative_tokens,
        "fanout": ssd.ssd_fanout,
        "branch_budget": ssd.ssd_branch_budget,
        "max_slots": vllm_config.scheduler_config.max_num_seqs,
        "max_rows": ssd.ssd_max_rows,
        "prefill_chunk": ssd.ssd_prefill_chunk,
        "memory_bytes": ssd.placement.memory_bytes,
        "enforce_eager": draft.enforce_eager if ssd.enforce_eager is None else ssd.enforce_eager,
        "is_coupled": ssd.ssd_verify == "coupled",
        "saguaro_c": ssd.ssd_saguaro_c,
    }
    return Configure(**plain(options))


def _backup(
    ssd: SSDSpeculativeConfig,
    costs: Costs,
    observer: RoundObserver,
    history: Callable[[str], list[int]],
    max_model_len: int,
) -> Backup:
    ngram = NgramBackup(compat.match_ngram, history, max_model_len)
    just_in_time = JustInTimeBackup(costs, observer.add_wait)
    if ssd.ssd_backup in ("ngram", "auto"):
        compat.match_ngram(np.zeros(2, dtype=np.int32), 1, 1, 2, 1)  # Numba compiles it at the first call
    kinds: dict[str, Backup] = {
        "none": NoBackup(),
        "ngram": ngram,
        "draft": just_in_time,
        "auto": AutoBackup(costs, ngram, just_in_time),
    }
    return kinds[ssd.ssd_backup]
