"""The target's worker on the CPU: vLLM's, with a draft at its side and our model runner inside."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_ssd import compat, repairs
from vllm_ssd.placement import GIB
from vllm_ssd.target.worker import DraftHost


class SSDWorker(DraftHost, CPUWorker):
    """Named in the config as the class of the target's workers."""

    def init_device(self) -> None:
        """Start the draft, and build the model runner of the version that vLLM has chosen."""
        self.start_draft()
        is_v2 = self.use_v2_model_runner
        with compat.cpu_runner_class(_runner_class(is_v2), is_v2=is_v2):
            super().init_device()
        if not is_v2:
            repairs.patch_rejection_sampler(self.model_runner.rejection_sampler)
        self.connect()

    def determine_available_memory(self) -> int:
        """Size the target's KV cache by what the draft leaves: vLLM counts this process's memory alone."""
        draft_bytes = self.draft_memory_bytes()
        if self.cache_config.kv_cache_memory_bytes is None:  # neither by option nor by VLLM_CPU_KVCACHE_SPACE
            self.requested_cpu_memory -= draft_bytes
        try:
            return super().determine_available_memory()
        except ValueError as error:
            raise ValueError(
                f"{error} One of them is SSD's draft process with {draft_bytes / GIB:.2f} GiB: lower "
                "ssd_draft_memory, or set VLLM_CPU_KVCACHE_SPACE or gpu_memory_utilization to what fits"
            ) from error


def _runner_class(is_v2: bool) -> type:
    if not is_v2:
        from vllm_ssd.target.runner_v1 import SSDModelRunner

        return SSDModelRunner
    from vllm.v1.worker.cpu.model_runner import CPUModelRunner

    from vllm_ssd.target.runner_v2 import SSDModelRunnerV2

    class SSDCPUModelRunnerV2(SSDModelRunnerV2, CPUModelRunner):
        """With what vLLM adds on the CPU."""

    return SSDCPUModelRunnerV2
