"""The few messages between the target's worker and the draft process: typed, versioned, no pickle.

`Configure` travels once, as a JSON line on the draft's standard input; everything else is MessagePack
(`vllm_ssd.link.transport`).
"""

from __future__ import annotations

from typing import Any

import msgspec

PROTOCOL_VERSION = 9
GREEDY_BELOW = 1e-5  # temperature, as vLLM has it (`vllm.sampling_params._SAMPLING_EPS`)


class Descriptors(msgspec.Struct, frozen=True, kw_only=True):
    """Files without names that the draft process inherits from the target's worker, by their numbers."""

    socket: int
    counters: int  # the draft's, which outlive its process
    outcome_cache: int
    draft_probs: int | None  # None where verification needs none

    def all(self) -> list[int]:
        """The numbers alone."""
        given = (self.socket, self.counters, self.outcome_cache, self.draft_probs)
        return [descriptor for descriptor in given if descriptor is not None]


class Configure(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the draft process has to know before it loads its model."""

    protocol: int = PROTOCOL_VERSION
    inherited: Descriptors | None = None  # those of this draft process
    gpu_table: bytes | None = None  # the handle of an outcome cache in the memory of the target's GPU
    model: str
    engine_args: dict[str, Any]  # further vllm.EngineArgs fields: dtype, max_model_len, ...
    device: str  # "cpu" or a GPU, such as "cuda:1"
    cores: list[int]  # CPU cores of the draft process
    vocab_size: int  # of the tokens that target and draft both have: no other is drafted
    num_speculative_tokens: int
    fanout: list[int] | str  # branches per accepted length, or "global", "geometric" or "uniform"
    branch_budget: int  # branches per request
    max_slots: int  # requests at once
    max_rows: int  # rows of one draft step, over all requests
    prefill_chunk: int  # prompt tokens of one draft step, over all requests
    memory_bytes: int  # KV cache
    enforce_eager: bool  # as the target: no torch.compile
    is_coupled: bool  # sampled requests: drafts are what the target will draw, else drawn by themselves
    saguaro_c: float  # weight of the likeliest tokens among drafts that are drawn by themselves


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How the target samples a request, as far as its draft can do the same."""

    temperature: float = 0.0  # 0: greedy, the rest is then of no account
    seed: int = 0  # of the noise that both share, see `vllm_ssd.verify.noise`
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0

    @classmethod
    def of(cls, params: Any, seed: int, vocab_size: int) -> Sampling:
        """What vLLM itself makes of a request's `SamplingParams`, as plain numbers within their bounds.

        Clients choose these values: vLLM takes any `top_k` and seed, and in-process also numbers of NumPy's.

        Args:
            params: vLLM's, or None for a request that is not sampled.
            seed: of any size; the low 64 bits count.
            vocab_size: of what the draft draws from; a `top_k` of as much is none.
        """
        if params is None or params.temperature < GREEDY_BELOW:
            return cls()
        from vllm_ssd.verify.noise import wrapped_to_int64  # imports torch, which the draft may do only later

        top_k = int(params.top_k)
        return cls(
            temperature=float(params.temperature),
            seed=wrapped_to_int64(int(seed)),
            top_k=top_k if 0 < top_k < vocab_size else 0,
            top_p=float(params.top_p),
        )


class Start(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A request takes a slot; `tokens` are its int32 token ids so far, little-endian."""

    slot: int
    epoch: int
    tokens: bytes
    sampling: Sampling = Sampling()


class RoundOutcome(msgspec.Struct, frozen=True, array_like=True):
    """What the target decided in `round`, and the drafts that it verifies next."""

    slot: int
    epoch: int
    round: int
    tokens: list[int]  # the k accepted drafts, then the recovery or bonus token
    drafts: list[int]  # what the target verifies next
    num_verified: int  # drafts that this outcome is of: the scheduler may have cut what was proposed


class Outcomes(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The outcomes of one target step, for the whole batch, and what the draft shall prepare from now on."""

    rows: list[RoundOutcome]
    num_drafts: int  # of each branch, at most K
    branch_budget: int  # per request, at most the configured one


class MissedRow(msgspec.Struct, frozen=True, array_like=True):
    """An outcome without a branch, for which the target now waits."""

    slot: int
    epoch: int
    round: int
    tokens: list[int]  # as in `RoundOutcome`, which follows
    num_drafts: int  # what it waits for


class Missed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Make just-in-time drafts for these rows, before anything else."""

    rows: list[MissedRow]


class Stop(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The request in this slot has finished, was aborted, or was preempted."""

    slot: int
    epoch: int


class Reset(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Forget all requests: the target lost track of which messages arrived."""


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The draft has loaded its model."""

    num_blocks: int  # of its KV cache, for the log
    block_size: int  # tokens
    step_base: float  # seconds of a step over no row, as measured
    step_per_row: float  # and of each further row
    max_model_len: int  # tokens of a request and its drafts; longer ones it cannot serve
    uses_gpu_table: bool = False  # and not the one in the host's memory


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The draft cannot serve, and why."""

    reason: str
    is_final: bool = False  # another draft process would fail as well


ToDraft = Start | Missed | Outcomes | Stop | Reset
ToTarget = Ready | Failed
