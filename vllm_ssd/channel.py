"""The few messages between the target's worker and the draft process: typed, versioned, no pickle.

`Configure` travels once, as a JSON line on the draft's standard input; everything else is MessagePack over
a ZeroMQ PAIR socket (ipc on one host). Messages of one direction arrive in order or not at all: a sender
that finds the queue full is told so and starts its requests anew under fresh epochs.
"""

from __future__ import annotations

from typing import Any

import msgspec
import zmq

PROTOCOL_VERSION = 4
HIGH_WATER_MARK = 4096  # messages; a draft that far behind is as good as gone


class Configure(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the draft process has to know before it loads its model."""

    protocol: int = PROTOCOL_VERSION
    address: str  # where the target's worker listens, a ZeroMQ endpoint
    shared_dir: str  # folder of the counters, which outlive a draft process
    table_dir: str  # folder of this draft process's outcome cache
    model: str
    engine_args: dict[str, Any]  # further vllm.EngineArgs fields: dtype, max_model_len, ...
    device: str  # "cpu" or a GPU, such as "cuda:1"
    cores: list[int]  # CPU cores of the draft process
    vocab_size: int
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
    seed: int = 0  # of the noise that both share, see `vllm_ssd.noise`
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0


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


class Shutdown(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The draft process shall end."""


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The draft has loaded its model; `vocab_size` and `num_blocks` are for the log."""

    protocol: int
    vocab_size: int
    num_blocks: int
    block_size: int
    step_base: float  # seconds of a step over no row, as measured
    step_per_row: float  # and of each further row


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The draft cannot serve, and why."""

    reason: str


ToDraft = Start | Missed | Outcomes | Stop | Reset | Shutdown
ToTarget = Ready | Failed


class Channel:
    """One end of the connection; `ToDraft` flows one way and `ToTarget` the other.

    Args:
        address: ZeroMQ endpoint.
        bind: True at the target's end, which outlives its drafts.
        receives: the union of message types that this end accepts.
    """

    def __init__(self, address: str, *, bind: bool, receives: Any) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        self._socket.bind(address) if bind else self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(receives)

    def send(self, message: ToDraft | ToTarget) -> bool:
        """Queue a message without waiting. False: the peer is gone or too far behind, nothing was sent."""
        try:
            self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_ms: int = 0) -> Any | None:
        """The next message, or None when none came within `timeout_ms`.

        Raises:
            msgspec.ValidationError: on a message this end does not know.
        """
        if timeout_ms and not self._socket.poll(timeout_ms):
            return None
        try:
            return self._decoder.decode(self._socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def close(self, linger_ms: int = 0) -> None:
        """Free the endpoint; what is still queued gets `linger_ms` to leave."""
        self._context.destroy(linger=linger_ms)
