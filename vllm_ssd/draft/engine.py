"""The draft model on vLLM's own loader, paged KV cache and attention backend.

The engine knows rows and blocks, not requests: `forward` runs one step over a ragged batch of rows, `advance`
one more over the same rows, each fed with the draft of the step before. A branch of a request is simply a row
whose block table shares the request's full blocks (see `vllm_ssd.draft.branches`), so any attention backend
serves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model
from vllm.v1.worker.gpu.attn_utils import (
    build_slot_mappings_by_layer,
    init_attn_backend,
    init_kv_cache,
)

from vllm_ssd.compat import leave_process_groups
from vllm_ssd.draft.graphs import (
    Capture,
    Perturb,
    Publish,
    StepGraph,
    StepGraphs,
    capture_cuda_graphs,
    sizes_up_to,
)
from vllm_ssd.draft.inputs import StepInputs, inputs_of
from vllm_ssd.draft.loading import UnsupportedDraft, engine_config, init_device, plan_kv_cache
from vllm_ssd.draft.rows import Candidates, Place, Rows, RowSampling
from vllm_ssd.draft.sampling import DraftSampler, SampledRows
from vllm_ssd.link.messages import Configure
from vllm_ssd.link.outcome_cache import NO_ENTRY

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]

PLACES_AT_ONCE = 64  # whose logits are copied, of perhaps 150,000 tokens each

logger = init_logger("vllm.ssd")


@dataclass(frozen=True)
class StepPredictions:
    """See `vllm_ssd.draft.rows.Predictions`; L positions."""

    logits: (
        torch.Tensor
    )  # [L, V], what candidates are ranked by: tempered, restricted, in coupled rows with the noise
    drafts: Int64Array
    distributions: Float32Array | None = None


@dataclass
class Step:
    """One step's inputs, and what is asked of it."""

    inputs: StepInputs
    wanted: torch.Tensor | None  # [L], which tokens' predictions; None: all
    sampling: SampledRows | None
    publish: Callable[[torch.Tensor], None]  # drafts [L]

    @property
    def wanted_positions(self) -> torch.Tensor:
        """[L]"""
        positions = self.inputs.positions
        return positions if self.wanted is None else positions[self.wanted]


class DraftEngine:
    """Owns the draft's weights and KV blocks and runs single steps.

    Args:
        configure: what the target's worker asks for (model, dtype, memory, see `vllm_ssd.link.messages`).

    Raises:
        UnsupportedDraft: if the model's layers are not all full attention: the state of a sliding-window
            or recurrent layer cannot be shared block by block between branches.
    """

    def __init__(self, configure: Configure) -> None:
        self.config = engine_config(configure)
        self.device = torch.device(configure.device)
        init_device(self.config, self.device)
        with set_current_vllm_config(self.config):
            self.model = get_model(vllm_config=self.config)
            self.kv_cache_config = plan_kv_cache(self.config, configure.memory_bytes)
            self.attn_groups, _, block_sizes = init_attn_backend(
                self.kv_cache_config, self.config, self.device
            )
            layers = self.config.compilation_config.static_forward_context
            kv_caches = init_kv_cache(layers, self.kv_cache_config, self.device, block_sizes, self.config)
        self.block_size = self.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self.num_blocks = self.kv_cache_config.num_blocks - 1  # the last is for what fills up a graph's batch
        self.vocab_size = configure.vocab_size  # what the target has not is never drafted
        self.max_model_len = self.config.model_config.max_model_len
        self._is_coupled = configure.is_coupled
        self._sampler = DraftSampler(
            self.vocab_size,
            self.device,
            configure.is_coupled,
            configure.saguaro_c,
            saguaro_tokens=max(1, configure.branch_budget // (configure.num_speculative_tokens + 1)),
        )
        self.kv_caches: list[torch.Tensor] = list(kv_caches.values())  # each [num_blocks, ...]
        for cache in self.kv_caches:
            if cache.shape[0] != self.kv_cache_config.num_blocks:
                raise UnsupportedDraft(f"KV cache of shape {tuple(cache.shape)} is not ordered by block")
        self._fork_copy = _fork_copy(self.kv_caches)
        self._graphs: StepGraphs | None = None
        self._graph: StepGraph | None = None  # of the last step, if it was one
        self._publish: Publish | None = None

    def publish_by(self, publish: Publish) -> None:
        """From now on let each step publish its drafts by itself; before `warm_up`, which captures steps.

        Args:
            publish: see `graphs.StepGraph`.
        """
        self._publish = publish
        nobody, nothing = torch.tensor([[NO_ENTRY], [0]], device=self.device)
        publish(nobody, nothing, nothing)  # it is compiled now

    def warm_up(self, max_rows: int) -> None:
        """Do once, on scratch blocks and before any is in use, all that serving does.

        What is compiled at its first use is compiled now: later the target would take the draft for stalled.
        With torch.compile vLLM drops the compiled code's guards, so the first batch decides which sizes are
        dynamic: it has to have several rows of different lengths.

        Args:
            max_rows: most branches of a step; trunk rows come on top.
        """
        num_rows = min(16, max_rows)
        self._run_on_scratch_blocks(num_rows, 2)
        for top_k, top_p in ((0, 1.0), (2, 0.9)):
            sampling = RowSampling(
                temperatures=np.ones(num_rows, dtype=np.float32),
                seeds=np.arange(num_rows),
                top_k=np.full(num_rows, top_k, dtype=np.int32),
                top_p=np.full(num_rows, top_p, dtype=np.float32),
            )
            predictions = self._run_on_scratch_blocks(num_rows, 1, sampling)
            self.advance()
            self.likeliest([Place(predictions, 0)], num_candidates=2)
        self.copy_blocks(np.array([0]), np.array([1 % self.num_blocks]))
        if self._can_capture():
            self._capture_cuda_graphs(max_rows)

    def leave_process_groups(self) -> None:
        """End what only costs time in a world of one, once nothing is compiled any more."""
        if self.device.type == "cpu":  # where the draft has few cores
            leave_process_groups()

    def run_on_scratch_blocks(self, num_rows: int) -> None:
        """One step over so many short rows, before any block is in use."""
        self._run_on_scratch_blocks(num_rows, 1)

    def check(self) -> None:
        """Run a step that is about no request.

        Raises:
            Exception: whatever keeps the device from running any.
        """
        filler = np.array([[self.num_blocks]], dtype=np.int32)
        zero, one = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int32)
        self.forward(Rows(zero, zero, one, filler, zero))

    def _run_on_scratch_blocks(
        self, num_rows: int, length: int, sampling: RowSampling | None = None
    ) -> StepPredictions:
        rows = Rows(
            tokens=np.zeros(length * num_rows, dtype=np.int64),
            positions=np.tile(np.arange(length), num_rows),
            query_lens=np.full(num_rows, length, dtype=np.int32),
            block_tables=np.arange(num_rows, dtype=np.int32)[:, None] % self.num_blocks,
            wanted=np.arange(length - 1, length * num_rows, length),
            sampling=sampling,
        )
        return self.forward(rows)

    @torch.inference_mode()
    def forward(self, rows: Rows) -> StepPredictions:
        """Run one step; the KV of every token of the batch is written to its row's blocks."""
        self._graph = None
        if self._graphs is not None and (self._is_coupled or rows.sampling is None):
            self._graph = self._graphs.load(rows)
        if self._graph is not None:
            return StepPredictions(*self._graph.step())
        self._last = Step(
            inputs_of(rows, self.block_size, self._slots_by_layer, self.device),
            self._to_device(rows.wanted) if len(rows.wanted) < len(rows.tokens) else None,
            self._sampler.prepare(rows.sampling) if rows.sampling else None,
            self._publisher(rows),
        )
        return self._run(self._last)

    @torch.inference_mode()
    def advance(self) -> StepPredictions:
        """Run one more step over the rows of the last, which had one token each; its drafts are fed in."""
        if self._graph is not None:
            return StepPredictions(*self._graph.step())
        self._last.inputs.advance(self._drafts)
        self._last.inputs.note_advance()
        return self._run(self._last)

    @torch.inference_mode()
    def likeliest(self, places: list[Place], num_candidates: int) -> Candidates:
        """The `num_candidates` likeliest tokens at each place, which may be of different steps."""
        tokens, log_probs = [], []
        for begin in range(0, len(places), PLACES_AT_ONCE):
            some = places[begin : begin + PLACES_AT_ONCE]
            logits = torch.stack([cast(StepPredictions, step).logits[row] for step, row in some])
            top = torch.topk(logits, num_candidates, dim=-1)
            tokens.append(top.indices.cpu().numpy())
            log_probs.append((top.values - logits.logsumexp(dim=-1, keepdim=True)).cpu().numpy())
        return Candidates(np.concatenate(tokens), np.concatenate(log_probs))

    @torch.inference_mode()
    def copy_blocks(self, sources: Int64Array, targets: Int64Array) -> None:
        """Copy whole KV blocks in every layer: sources[i] -> targets[i], both [n]."""
        self._fork_copy(self._to_device(sources), self._to_device(targets))

    @torch.inference_mode()
    def capture_graphs(self, sizes: Sequence[int], perturb: Perturb, capture: Capture) -> None:
        """From now on run steps over branches alone as graphs, filled up to these numbers of rows.

        Args:
            perturb, capture: see `graphs.StepGraph`.
        """

        def build(size: int) -> StepGraph:
            width = -(-self.max_model_len // self.block_size)
            inputs = inputs_of(
                Rows(
                    tokens=np.zeros(size, dtype=np.int64),
                    positions=np.zeros(size, dtype=np.int64),
                    query_lens=np.ones(size, dtype=np.int32),
                    block_tables=np.full((size, width), self.num_blocks, dtype=np.int32),
                    wanted=np.arange(size),
                ),
                self.block_size,
                self._slots_by_layer,
                self.device,
            )
            # Nothing that the host decides may depend on how long the rows are.
            inputs.attention.max_seq_len = self.max_model_len
            return StepGraph(inputs, self._captured_logits(inputs), perturb, capture, self._publish)

        self._graphs = StepGraphs(sizes, build)

    def _capture_cuda_graphs(self, max_rows: int) -> None:
        from vllm_ssd.kernels.noise import perturb

        try:
            self.capture_graphs(sizes_up_to(max_rows), perturb, capture_cuda_graphs())
        except RuntimeError as error:  # such as a layer that waits for the device
            logger.warning("the draft's steps cannot be CUDA graphs, which makes them slower: %s", error)
            torch.accelerator.synchronize()

    @property
    def has_graphs(self) -> bool:
        """Whether steps over branches are replayed."""
        return self._graphs is not None

    def _can_capture(self) -> bool:
        if self.device.type != "cuda" or self.config.model_config.enforce_eager:
            return False
        for group in self.attn_groups[0]:
            # A block table that is translated for the kernel would stay that of the capture.
            if not group.supports_draft_decode_metadata_update or group.kernel_block_size is not None:
                logger.warning("%s has no CUDA graphs of the draft's steps", group.backend.get_name())
                return False
        return True

    def _captured_logits(self, inputs: StepInputs) -> Callable[[], torch.Tensor]:
        """What computes the logits of these inputs as they are each time, with nothing left to the host."""
        groups = self.attn_groups[0]
        metadata = self._metadata(inputs)

        def logits() -> torch.Tensor:
            for group in groups:
                group.update_draft_decode_metadata(metadata)
            return self._logits(inputs, metadata)

        return logits

    def _slots_by_layer(self, slots: torch.Tensor) -> dict[str, torch.Tensor]:
        return build_slot_mappings_by_layer(slots[None, :], self.kv_cache_config)

    def _metadata(self, inputs: StepInputs) -> dict[str, Any]:
        metadata = {}
        for group in self.attn_groups[0]:
            built = group.build_metadata(inputs.attention)
            metadata.update(dict.fromkeys(group.layer_names, built))
        return metadata

    def _logits(
        self, inputs: StepInputs, metadata: dict[str, Any], wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[L, V], without what lies beyond the common vocabulary."""
        with set_forward_context(
            metadata, self.config, num_tokens=len(inputs.tokens), slot_mapping=inputs.slots_by_layer
        ):
            hidden = self.model(input_ids=inputs.tokens, positions=inputs.positions)
        logits = self.model.compute_logits(hidden if wanted is None else hidden[wanted])
        return logits[:, : self.vocab_size].float()

    def _run(self, step: Step) -> StepPredictions:
        logits = self._logits(step.inputs, self._metadata(step.inputs), step.wanted)
        chosen = self._sampler.choose(logits, step.sampling, step.wanted_positions)
        self._drafts = chosen.drafts
        step.publish(chosen.drafts)
        return StepPredictions(chosen.logits, chosen.drafts.cpu().numpy(), chosen.distributions)

    def _publisher(self, rows: Rows) -> Callable[[torch.Tensor], None]:
        """What publishes the drafts of these rows, in each step a token more."""
        if self._publish is None or rows.entries is None:
            return lambda drafts: None
        places, depths = self._to_device(rows.entries.places), self._to_device(rows.entries.depths)
        return partial(self._publish, places, depths)

    def _to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def _fork_copy(caches: list[torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Copies blocks [n] to blocks [n] in every layer."""
    if caches[0].is_cuda:
        from vllm_ssd.kernels.fork import ForkCopy

        return ForkCopy(caches)

    def copy(sources: torch.Tensor, targets: torch.Tensor) -> None:
        for cache in caches:
            cache.index_copy_(0, targets, cache.index_select(0, sources))

    return copy
