"""Where the draft runs: a local process with its own cores."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec

from vllm_ssd.channel import Configure

# The target's worker binds its OpenMP threads through these; a child would inherit the target's cores.
_OPENMP_BINDING = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")
_EXIT_GRACE_S = 3.0


class DraftProcess:
    """A running `python -m vllm_ssd.draft`.

    `subprocess` and not `multiprocessing`, because vLLM's workers are daemons, which may not have
    `multiprocessing` children. The process ends by itself when this one dies: its standard input closes.
    """

    def __init__(self, configure: Configure) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in _OPENMP_BINDING}
        environment.pop("VLLM_USE_V2_MODEL_RUNNER", None)  # concerns the target; the draft has no runner
        environment["OMP_NUM_THREADS"] = str(len(configure.cores) if configure.device == "cpu" else 1)
        environment["PYTHONSAFEPATH"] = "1"  # the installed package, also where there is a checkout around
        environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        environment["VLLM_LOGGING_PREFIX"] = "[ssd draft] "
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_ssd.draft"], stdin=subprocess.PIPE, env=environment, bufsize=0
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(configure) + b"\n")

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while the process runs."""
        return self._process.poll()

    def stop(self, grace_s: float = _EXIT_GRACE_S) -> None:
        """Close its standard input, which ends it, and kill it if it has not gone after `grace_s`."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
