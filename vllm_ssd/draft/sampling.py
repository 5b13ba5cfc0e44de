"""How drafts are chosen from logits: the likeliest, with the noise that is shared, or a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from vllm_ssd.draft.rows import Float32Array, RowSampling
from vllm_ssd.verify.noise import RecentNoise

FORBIDDEN = 100.0  # nats, more than noise can make up for


@dataclass(frozen=True)
class SampledRows:
    """How each of L positions is sampled, on the device: made once for all steps over the same rows."""

    temperatures: Tensor  # [L, 1], 1 where greedy
    is_greedy: Tensor | None  # [L, 1]; None: none is
    top_k: Tensor | None  # [L]; None: all tokens, everywhere
    top_p: Tensor | None  # [L]
    seeds: npt.NDArray[np.int64]  # [L]
    device_seeds: Tensor  # [L]


@dataclass(frozen=True)
class Chosen:
    """The drafts of L positions."""

    logits: Tensor  # [L, V], what further candidates are ranked by
    drafts: Tensor  # [L]
    distributions: Float32Array | None = None  # [L, V], what the drafts were drawn from


class DraftSampler:
    """Chooses drafts.

    Args:
        vocab_size: V.
        device: of the logits.
        is_coupled: whether drafts are the target's own draws, predicted with its noise; else they are drawn.
        saguaro_c, saguaro_tokens: see `saguaro`, of drafts that are drawn.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device,
        is_coupled: bool,
        saguaro_c: float = 1.0,
        saguaro_tokens: int = 1,
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._is_coupled = is_coupled
        self._saguaro_c = saguaro_c
        self._saguaro_tokens = saguaro_tokens
        self._noise = RecentNoise(vocab_size)

    def prepare(self, sampling: RowSampling) -> SampledRows:
        """Bring to the device what does not change from step to step."""
        greedy = sampling.temperatures == 0
        top_k = np.where(sampling.top_k > 0, sampling.top_k, self._vocab_size).clip(max=self._vocab_size)
        return SampledRows(
            temperatures=self._to_device(np.where(greedy, np.float32(1), sampling.temperatures))[:, None],
            is_greedy=self._to_device(greedy)[:, None] if greedy.any() else None,
            top_k=self._to_device(top_k) if sampling.top_k.any() else None,
            top_p=self._to_device(sampling.top_p) if (sampling.top_p < 1).any() else None,
            seeds=sampling.seeds,
            device_seeds=self._to_device(sampling.seeds),
        )

    def choose(self, logits: Tensor, rows: SampledRows | None, positions: Tensor) -> Chosen:
        """The drafts.

        Args:
            logits: [L, V] float32, the model's.
            rows: how positions are sampled; None: all are greedy.
            positions: [L], of the token whose logits these are.
        """
        if rows is None:
            return Chosen(logits, logits.argmax(dim=-1))
        logits = logits / rows.temperatures
        restricted = logits
        if rows.top_k is not None or rows.top_p is not None:
            restricted = apply_top_k_top_p(logits.clone(), rows.top_k, rows.top_p)
            # The target may allow what the draft does not: those are candidates too, after all others.
            logits = torch.where(restricted.isneginf(), logits - FORBIDDEN, restricted)
        if self._is_coupled:
            logits = self._perturbed(logits, rows, positions)
            return Chosen(logits, logits.argmax(dim=-1))
        distributions = restricted.softmax(dim=-1)
        if self._saguaro_c < 1:
            reshaped = saguaro(distributions, self._saguaro_tokens, self._saguaro_c)
            distributions = (
                reshaped if rows.is_greedy is None else torch.where(rows.is_greedy, distributions, reshaped)
            )
        drafts = self._perturbed(distributions.log(), rows, positions).argmax(dim=-1)
        return Chosen(logits, drafts, distributions.cpu().numpy())

    def _perturbed(self, logits: Tensor, rows: SampledRows, positions: Tensor) -> Tensor:
        """[L, V] with the keyed noise added where rows are sampled."""
        if self._device.type == "cuda":
            from vllm_ssd.kernels.noise import perturb

            is_sampled = torch.ones_like(rows.temperatures[:, 0])
            if rows.is_greedy is not None:
                is_sampled = (~rows.is_greedy[:, 0]).float()
            return perturb(logits, is_sampled, rows.device_seeds, positions)
        noise = self._noise(rows.seeds.tolist(), positions.tolist())
        if rows.is_greedy is not None:
            noise.masked_fill_(rows.is_greedy, 0.0)
        return noise.add_(logits)

    def _to_device(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def saguaro(distributions: Tensor, num_tokens: int, weight: float) -> Tensor:
    """Saguaro sampling (arXiv 2603.03251, definition 14): less of the likeliest tokens in each distribution.

    What the draft draws less often than the target is what the recovery token is drawn from; so recovery
    tokens fall on the likeliest tokens, which have branches. Acceptance falls in turn.

    Args:
        distributions: [L, V].
        num_tokens: F, how many tokens of each distribution count as likeliest.
        weight: C in (0, 1], what their probability is multiplied by.

    Returns:
        [L, V], renormalised.
    """
    top = distributions.topk(min(num_tokens, distributions.shape[-1]), dim=-1)
    distributions = distributions.scatter(-1, top.indices, top.values * weight)
    return distributions / distributions.sum(dim=-1, keepdim=True)
