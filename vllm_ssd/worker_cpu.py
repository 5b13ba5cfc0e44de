"""The target's worker on the CPU: vLLM's, with a draft at its side and our model runner inside."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_ssd import compat
from vllm_ssd.worker import DraftHost


class SSDWorker(DraftHost, CPUWorker):
    """Named in the config as the class of the target's workers."""

    def init_device(self) -> None:
        """Start the draft, and build the model runner of the version that vLLM has chosen."""
        self.start_draft()
        is_v2 = self.use_v2_model_runner
        with compat.cpu_runner_class(_runner_class(is_v2), is_v2=is_v2):
            super().init_device()
        if not is_v2:
            compat.mend_rejection_sampler(self.model_runner.rejection_sampler)
        self.connect()


def _runner_class(is_v2: bool) -> type:
    if not is_v2:
        from vllm_ssd.runner_v1 import SSDModelRunner

        return SSDModelRunner
    from vllm.v1.worker.cpu.model_runner import CPUModelRunner

    from vllm_ssd.runner_v2 import SSDModelRunnerV2

    class SSDCPUModelRunnerV2(SSDModelRunnerV2, CPUModelRunner):
        """With what vLLM adds on the CPU."""

    return SSDCPUModelRunnerV2
