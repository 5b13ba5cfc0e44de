"""Rounds whose outcome the host does not wait for: looked up on the device, told to the draft afterwards.

Where the model runner works ahead of its device (V2 on CUDA), waiting for an outcome would stop it in every
round. So a kernel looks the outcomes up, in a table that the device reads by itself, and the next
verification may begin at once. What came of it is copied to the host meanwhile, and a thread of its own, once
the copy is there, does the bookkeeping and tells the draft: all that is in `proposer`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_ssd.kernels.lookup import MISSED, look_up
from vllm_ssd.link.counters import Counters
from vllm_ssd.link.outcome_cache import NOT_INTRODUCED, OutcomeCache
from vllm_ssd.plan.planner import Plan
from vllm_ssd.target.draft_link import DraftLink
from vllm_ssd.target.guard import Guard
from vllm_ssd.target.histories import Histories
from vllm_ssd.target.live import LiveRequest
from vllm_ssd.target.proposer import LookedUp

CLOSE_S = 2.0
KEEP_UP_S = 60.0  # for rounds in flight; as long as no device takes, unless it hangs
MOST_FAILURES = 3  # of look-ups in a row: the device cannot do them

logger = logging.getLogger("vllm.ssd")


@dataclass(frozen=True)
class _Round:
    """One step's outcome on its way to the host: per row the number of new tokens, the last, MISSED or the
    number of drafts, and the drafts."""

    request_ids: Sequence[str]
    requests: list[LiveRequest | None]  # [B]: a name may soon stand for another
    plan: Plan
    had_draft: bool
    found: Tensor  # [B, 3 + K] int64
    is_there: Any  # the event of the copy; None where there is nothing to wait for


class DeferredRounds:
    """The device's half of look-ups, and the thread that follows it.

    The thread and its caller take turns at the proposer, under a lock.

    Args:
        guard: of a proposer with `NoBackup`: nothing can be made up for a miss that the host hears of late.
        link: the draft process.
        counters: the target's.
        histories: the requests' tokens; used by the thread, in the order of rounds, under the lock.
        max_num_reqs: the model runner's slots, which are also the outcome cache's.
        num_speculative_tokens: K.
        vocab_size: of the tokens that target and draft both have.
        device: where outcomes and drafts are.
    """

    def __init__(
        self,
        guard: Guard,
        link: DraftLink,
        counters: Counters,
        histories: Histories,
        max_num_reqs: int,
        num_speculative_tokens: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._guard = guard
        self._link = link
        self._counters = counters
        self._histories = histories
        self._most_drafts = num_speculative_tokens
        self._vocab_size = vocab_size
        self._device = device
        self._cache: OutcomeCache | None = None
        self._generation = -1
        self._entries: Tensor | None = None
        # By slot, as the look-up takes them; the device advances the rounds.
        self._epochs = torch.full((max_num_reqs,), NOT_INTRODUCED, dtype=torch.int64, device=device)
        self._rounds = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        self._todo: queue.Queue[_Round | None] = queue.Queue()
        self._failed = self._closed = False
        self._num_failures = 0  # of look-ups, in a row
        self._proposed: tuple[Sequence[str], list[list[int]]] = ([], [])
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self._follow_rounds, name="ssd-rounds", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Receive what is under way and end the thread, which else keeps the model runner in memory."""
        if not self._closed:
            self._closed = True
            self._todo.put(None)
            if threading.current_thread() is not self._thread:
                self._thread.join(CLOSE_S)
            if self._device.type == "cuda":
                torch.accelerator.synchronize(self._device)  # a look-up may still be reading the table
            self._unmap()

    def begin(self, slot: int, epoch: int = NOT_INTRODUCED) -> None:
        """A request of this epoch takes the slot."""
        self._epochs[slot] = epoch
        self._rounds[slot] = 0

    def propose(
        self, request_ids: Sequence[str], slots: Tensor, num_sampled: Tensor, last_sampled: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Drafts for the next verification of each row, without waiting for the outcome.

        Args:
            request_ids: [B].
            slots: [B] int64.
            num_sampled: [B], 0 for a row without an outcome.
            last_sampled: [max_num_reqs] int64, by slot.

        Returns:
            [B, K] int64 drafts, filled up with a valid token, and how many of each row are drafts: [B] int32.
        """
        began = time.perf_counter_ns()
        try:
            self._keep_up_with_draft()
            drafts, num_drafts = self._look_up(request_ids, slots, num_sampled, last_sampled)
            self._num_failures = 0
        except Exception:
            self._guard.note_failure()
            self._recover(request_ids)
            drafts = last_sampled[slots][:, None].repeat(1, self._most_drafts)
            num_drafts = torch.zeros(len(request_ids), dtype=torch.int32, device=self._device)
        self._counters.add("critical_path_ns", time.perf_counter_ns() - began)
        return drafts, num_drafts

    def _look_up(
        self, request_ids: Sequence[str], slots: Tensor, num_sampled: Tensor, last_sampled: Tensor
    ) -> tuple[Tensor, Tensor]:
        plan = self._guard.plan(len(request_ids))
        drafts = torch.empty(len(request_ids), self._most_drafts, dtype=torch.int64, device=self._device)
        found = torch.empty(len(request_ids), dtype=torch.int32, device=self._device)
        last = last_sampled[slots]
        if self._entries is None:
            drafts.copy_(last[:, None].expand_as(drafts))
            found.fill_(MISSED)
        else:
            look_up(
                self._entries,
                slots,
                self._epochs,
                self._rounds,
                num_sampled,
                last_sampled,
                drafts,
                found,
                self._vocab_size,
            )
            found.clamp_(max=plan.num_drafts)
        columns = torch.cat([torch.stack([num_sampled.long(), last, found.long()], dim=1), drafts], dim=1)
        requests = [self._guard.live(request_id) for request_id in request_ids]
        had_draft = self._entries is not None
        if not self._failed:
            self._todo.put(_Round(request_ids, requests, plan, had_draft, *self._to_host(columns)))
        return drafts, found.clamp(min=0)

    def _recover(self, request_ids: Sequence[str]) -> None:
        """A look-up failed: the host will not hear of these outcomes, and the requests' tokens have a gap."""
        with self.lock:
            self._guard.exclude(request_ids)
        self._generation = -1  # epochs and rounds are read anew
        self._num_failures += 1
        if self._num_failures >= MOST_FAILURES:
            self._give_up()

    def proposed(self) -> tuple[Sequence[str], list[list[int]]]:
        """The last step's requests and their drafts, without the filling. Waits for that step to end."""
        with suppress(RuntimeError):
            self._join()
        return self._proposed

    def _join(self) -> None:
        """Wait until the thread has dealt with the rounds in flight.

        Raises:
            RuntimeError: if it never will.
        """
        deadline = time.monotonic() + KEEP_UP_S
        with self._todo.all_tasks_done:
            while self._todo.unfinished_tasks:
                if not self._thread.is_alive() or time.monotonic() > deadline:
                    raise RuntimeError("the thread that follows the rounds has ended, or hangs")
                self._todo.all_tasks_done.wait(0.1)

    def _keep_up_with_draft(self) -> None:
        """Look up in the table of the draft that is ready now, with the epochs that it knows."""
        if self._failed:
            self._entries = None
            return
        cache, generation = self._link.cache, self._guard.generation
        if cache is self._cache and generation == self._generation:
            return
        self._join()  # the rounds in flight are counted; this happens seldom in a draft's life
        with self.lock:
            self._cache = None if self._failed else self._link.cache  # it may have changed again
            self._generation = self._guard.generation
            keys = self._guard.keys()
        self._unmap()
        self._entries = None if self._cache is None else self._mapped(self._cache)
        self._epochs.fill_(NOT_INTRODUCED)
        for slot, (epoch, round_) in keys.items():
            self._epochs[slot], self._rounds[slot] = epoch, round_

    def _mapped(self, cache: OutcomeCache) -> Tensor | None:
        """The table, as the device reads it: in its own memory or the host's. None if it cannot."""
        if cache.gpu_entries is not None:
            return cache.gpu_entries
        entries = torch.from_numpy(cache.entries)
        if self._device.type == "cuda":
            from vllm.v1.kv_offload.cpu.host_register import host_register  # clears CUDA's error if it fails

            if not host_register(entries.data_ptr(), entries.numel() * entries.element_size()):
                logger.error("SSD: the GPU cannot read the outcome cache; decoding continues without drafts")
                return None
        return entries

    def _unmap(self) -> None:
        """Before its memory is unmapped: what is mapped there next would be taken for registered."""
        if self._entries is not None and self._device.type == "cuda" and not self._entries.is_cuda:
            from vllm.v1.kv_offload.cpu.host_register import host_unregister

            host_unregister(self._entries.data_ptr())
        self._entries = None

    def _to_host(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """A copy that is on its way, and the event of its arrival."""
        if self._device.type != "cuda":
            return tensor, None
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copy.copy_(tensor, non_blocking=True)
        is_there = torch.cuda.Event(blocking=True)
        is_there.record()
        return copy, is_there

    def _follow_rounds(self) -> None:
        while (round_ := self._todo.get()) is not None:
            try:
                if round_.is_there is not None:
                    round_.is_there.synchronize()
                if not self._failed:
                    self._receive(round_)
            except Exception:
                self._guard.note_failure()
                self._give_up()
            finally:
                self._todo.task_done()

    def _give_up(self) -> None:
        """Without bookkeeping nothing can be predicted any more, but every request is still answered."""
        self._failed, self._proposed = True, ([], [])
        with self.lock:
            self._link.give_up("works for nobody any more")

    def _receive(self, round_: _Round) -> None:
        rows = round_.found.tolist()
        served = [row[3 : 3 + row[2]] if row[2] != MISSED else None for row in rows]
        with self.lock:
            # A request that left the batch since then, and perhaps came again, has no use for the outcome.
            counts = [
                row[0] if self._guard.live(request_id) is request else 0
                for request_id, request, row in zip(round_.request_ids, round_.requests, rows, strict=True)
            ]
            try:
                verified = [self._guard.verified(request_id) for request_id in round_.request_ids]
                last = [row[1] for row in rows]
                sampled = self._histories.add_outcomes(round_.request_ids, verified, counts, last)
            except Exception:
                self._guard.note_failure()
                self._guard.exclude(round_.request_ids)
            else:
                was_asked = round_.had_draft and round_.plan.num_drafts > 0
                found = LookedUp(round_.plan, served if was_asked else None)
                self._guard.receive(round_.request_ids, sampled, found)
        self._proposed = round_.request_ids, [row or [] for row in served]
