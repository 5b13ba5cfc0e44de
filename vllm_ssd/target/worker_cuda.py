"""The target's worker on CUDA: vLLM's, with a draft at its side and our V2 model runner inside."""

from __future__ import annotations

from functools import partial

from vllm.distributed import get_world_group
from vllm.v1.worker.gpu_worker import Worker

from vllm_ssd.link.outcome_cache_gpu import allocate_table
from vllm_ssd.target.runner_v2 import SSDModelRunnerV2, runs_ahead
from vllm_ssd.target.worker import DraftHost


class SSDWorker(DraftHost, Worker):
    """Named in the config as the class of the target's workers."""

    def init_device(self) -> None:
        """Build the model runner, which starts the draft."""
        super().init_device()
        self.connect()

    def _make_model_runner(self) -> SSDModelRunnerV2:
        if not self.use_v2_model_runner:
            raise ValueError(
                "method 'ssd' needs vLLM's V2 model runner on CUDA; unset VLLM_USE_V2_MODEL_RUNNER, or see "
                "vLLM's warning about which option rules it out"
            )
        # Only after vLLM has looked at how much memory is free: what the draft takes on the same device
        # between this and the sizing of the KV cache is counted as the target's.
        get_world_group().barrier()  # all ranks have, since the draft may share another's device
        is_read_there = runs_ahead(self.vllm_config)
        self.start_draft(partial(allocate_table, device=self.device) if is_read_there else None)
        return SSDModelRunnerV2(self.vllm_config, self.device)
