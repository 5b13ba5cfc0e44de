"""Where the draft runs: a local process with its own cores."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import msgspec

from vllm_ssd.link.messages import Configure

# The target's worker binds its OpenMP threads through these; a child would inherit the target's cores.
_OPENMP_BINDING = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")
_EXIT_GRACE_S = 3.0
_KILL_GRACE_S = 1.0  # a process that the kernel cannot end may be waiting for a driver


class DraftProcess:
    """A running `python -m vllm_ssd.draft`.

    `subprocess` and not `multiprocessing`, because vLLM's workers are daemons, which may not have
    `multiprocessing` children. The process ends by itself when this one dies: its standard input closes.

    Args:
        configure: what it is told; of this process's descriptors it gets those that are named there alone.

    Raises:
        OSError: if the system cannot start it.
    """

    def __init__(self, configure: Configure) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in _OPENMP_BINDING}
        environment.pop("VLLM_USE_V2_MODEL_RUNNER", None)  # concerns the target; the draft has no runner
        environment["OMP_NUM_THREADS"] = str(len(configure.cores) if configure.device == "cpu" else 1)
        environment["PYTHONPATH"] = _module_path()
        environment["PYTHONSAFEPATH"] = (
            "1"  # the target's package, also where there is another checkout around
        )
        environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        environment["VLLM_LOGGING_PREFIX"] = "[ssd draft] "
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_ssd.draft"],
            stdin=subprocess.PIPE,
            env=environment,
            bufsize=0,
            pass_fds=() if configure.inherited is None else configure.inherited.all(),
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(configure) + b"\n")

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while the process runs."""
        return self._process.poll()

    def kill(self) -> None:
        """End it without waiting: `exit_code` tells when it has gone."""
        self._close_stdin()
        self._process.kill()

    def stop(self) -> None:
        """Ask it to end, and kill it if it has not gone after some seconds."""
        self._close_stdin()
        try:
            self._process.wait(_EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_KILL_GRACE_S)

    def _close_stdin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()


def _module_path() -> str:
    """PYTHONPATH of a child that finds modules where this process does, in the same order.

    vLLM's own children get their parent's `sys.path` as well. The working directory ("") is left out, unless
    this very package was found there: then it is given by its name.
    """
    own = str(Path(__file__).parents[2])
    return os.pathsep.join(dict.fromkeys([*filter(None, sys.path), own]))
