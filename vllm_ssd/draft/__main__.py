"""python -m vllm_ssd.draft: the draft process.

It reads one JSON line (`vllm_ssd.link.messages.Configure`) from standard input, loads its model, answers
`Ready` or `Failed`, and serves until the target hangs up or standard input closes: then its parent has died,
in whatever way. What the two share has no names, so nothing is left to remove.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
import traceback
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from vllm_ssd.link.messages import (
    PROTOCOL_VERSION,
    Configure,
    Descriptors,
    Failed,
    Ready,
    ToDraft,
)
from vllm_ssd.link.transport import Channel, SocketChannel

if TYPE_CHECKING:
    from vllm_ssd.draft.engine import DraftEngine
    from vllm_ssd.link.outcome_cache_gpu import GpuOutcomeCache

UNSUPPORTED = "UnsupportedDraft"  # of `vllm_ssd.draft.loading`, which may be what cannot be imported


def main() -> None:
    """Run the draft process."""
    # What is sent to a whole group of processes is for the target, which then stops us.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    configure = msgspec.json.decode(sys.stdin.buffer.readline(), type=Configure)
    os.sched_setaffinity(0, configure.cores)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    exit_code = 0
    try:
        _serve(configure)
    except Exception:
        traceback.print_exc()
        exit_code = 1
    # Without Python's own shutting down, which would wait for standard input: a thread is reading it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _serve(configure: Configure) -> None:
    inherited = configure.inherited
    if inherited is None:
        raise ValueError("the draft process is for the target's worker to start")
    for descriptor in inherited.all():
        os.set_inheritable(descriptor, False)  # no child of ours is to hold the line
    channel = SocketChannel(socket.socket(fileno=inherited.socket), receives=ToDraft)
    try:
        server = _build_server(configure, inherited, channel)
    except Exception as error:
        channel.send(Failed(f"{type(error).__name__}: {error}", is_final=type(error).__name__ == UNSUPPORTED))
        raise
    server.run()


def _build_server(configure: Configure, inherited: Descriptors, channel: Channel):  # type: ignore[no-untyped-def]
    if configure.protocol != PROTOCOL_VERSION:
        raise ValueError(f"target speaks protocol {configure.protocol}, this draft {PROTOCOL_VERSION}")
    # Imports and the model leave some 700,000 objects that stay. Garbage collections amid the imports take a
    # quarter of their time; one that looked at them all while serving would take more than half a second.
    gc.disable()
    # Only now: these import torch and vLLM, which read the cores and OpenMP variables set for this process.
    from vllm_ssd import register
    from vllm_ssd.draft.engine import DraftEngine
    from vllm_ssd.draft.server import DraftServer
    from vllm_ssd.link.counters import DRAFT_FIELDS, Counters
    from vllm_ssd.link.draft_probs import DraftProbs
    from vllm_ssd.link.outcome_cache import OutcomeCache
    from vllm_ssd.plan.speed_model import measure_line

    gc.freeze()
    gc.enable()
    register()
    engine = DraftEngine(configure)
    gpu_cache = _open_gpu_cache(configure, engine)
    engine.warm_up(configure.max_rows)
    engine.leave_process_groups()
    step_times = measure_line(engine.run_on_scratch_blocks, 1, configure.max_rows)
    cache = OutcomeCache(
        configure.max_slots,
        configure.branch_budget,
        configure.num_speculative_tokens,
        configure.vocab_size,
        inherited.outcome_cache,
    )
    distributions = None
    if inherited.draft_probs is not None:
        distributions = DraftProbs(
            configure.max_slots,
            configure.num_speculative_tokens,
            engine.vocab_size,
            inherited.draft_probs,
        )
    counters = Counters(DRAFT_FIELDS, inherited.counters)
    counters.set("messages", 0)
    gc.collect()
    gc.freeze()
    ready = Ready(
        engine.num_blocks, engine.block_size, *step_times, engine.max_model_len, gpu_cache is not None
    )
    channel.send(ready)
    return DraftServer(configure, engine, channel, gpu_cache or cache, counters, distributions)


def _open_gpu_cache(configure: Configure, engine: DraftEngine) -> GpuOutcomeCache | None:
    """The outcome cache in the target's GPU, which the engine's steps then publish in; None without one."""
    if configure.gpu_table is None:
        return None
    from vllm_ssd.kernels.publish import publish
    from vllm_ssd.link.outcome_cache import FIRST_DRAFT
    from vllm_ssd.link.outcome_cache_gpu import GpuOutcomeCache, open_table

    shape = (configure.max_slots, configure.branch_budget, FIRST_DRAFT + configure.num_speculative_tokens)
    entries = open_table(configure.gpu_table, shape, engine.device)
    if entries is None:
        return None
    engine.publish_by(partial(publish, entries))
    return GpuOutcomeCache(entries, engine.device)


def _exit_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
