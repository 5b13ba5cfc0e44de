"""Where tests/v2 and gpu_bench.py run: on a GPU if there is one, else on the CPU in Triton's interpreter."""

from __future__ import annotations

import inspect
import os
from types import SimpleNamespace

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def use_v2_runner() -> None:
    """Let vLLM run its V2 model runner in this process; neither it nor Triton may have been imported yet."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if DEVICE == "cpu":
        _interpret_kernels()


def _interpret_kernels() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from triton import language as tl
    from triton.backends import backends
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    # vLLM takes Triton for usable if there is an active backend, and on the CPU if there is one of this name.
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    # Device libraries come with a backend. vLLM's rejection sampler needs this function of theirs alone.
    libdevice.log1p = lambda value: tl.log(1.0 + value)

    # At every call of a device function, the interpreter looks through all of triton.language for builtins,
    # which takes much of the time. Which names are builtins does not change, so they are looked for once.
    names: dict[object, list[str]] = {}

    def patch_builtin(package: object, builder: object, scope: object) -> None:
        if package not in names:
            members = inspect.getmembers(package)
            names[package] = [name for name, member in members if tl.core.is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # not patched yet
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
