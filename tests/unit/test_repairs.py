"""Faults of vLLM that SSD patches in its own engines: they are there, and the patches repair them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from unpatched import run_without_plugins

from vllm_ssd import repairs

SOMEBODY_ELSES = """
import sys, types
import vllm_ssd
from vllm.triton_utils import dispatcher
from vllm.v1.sample.rejection_sampler import RejectionSampler
before = RejectionSampler.forward, dispatcher._rebind_kernels, vars(dispatcher).get("hasattr")
vllm_ssd.register()
vllm_ssd.register()
is_same = before == (RejectionSampler.forward, dispatcher._rebind_kernels, vars(dispatcher).get("hasattr"))
print("PATCHED:", not is_same)
from vllm.engine.arg_utils import EngineArgs
target, draft = sys.argv[1:]
"""


@pytest.mark.parametrize(("asked", "patched"), [(None, False), ("1", True)])
def test_engines_without_ssd_are_as_vllm_made_them(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None, patched: bool
) -> None:
    """Unless the user wants them patched as well."""
    monkeypatch.delenv("VLLM_SSD_PATCH", raising=False)
    if asked is not None:
        monkeypatch.setenv("VLLM_SSD_PATCH", asked)
    done = run_without_plugins(SOMEBODY_ELSES, pair, tmp_path)
    assert f"PATCHED: {patched}" in done.stdout


class TestExpansion:
    """vLLM's expansion of sampling parameters to draft rows, stock and patched."""

    counts = torch.tensor([2, 2, 5], dtype=torch.int32)  # cumulative: 2, 0 and 3 rows

    def expand(self, values: torch.Tensor, replace_from: int, replace_to: int) -> torch.Tensor:
        """As vLLM's rejection sampler does."""
        from vllm.v1.sample import rejection_sampler

        return rejection_sampler.expand_batch_to_tokens(values, self.counts, 5, replace_from, replace_to)

    def patched(self, *args: Any) -> torch.Tensor:
        """The same amid a patched step."""
        forward = repairs.patch_cpu_sampling(lambda *args: self.expand(*args))
        return forward(*args)

    def test_stock_loses_what_it_computed(self) -> None:
        """If this fails, vLLM has repaired it: `repairs.patch_cpu_sampling` can go."""
        from vllm.utils import cpu_triton_utils

        import_kernels()
        temperatures = torch.full((5,), -7.0)
        stock = cpu_triton_utils._expand_kernel_impl
        stock(temperatures, torch.tensor([0.7, 9.0, 1.3]), self.counts, 0, 1)
        assert (temperatures == -7.0).all()

    def test_patched_temperatures(self) -> None:
        temperatures = self.patched(torch.tensor([0.7, 9.0, 1.3]), 0, 1)
        torch.testing.assert_close(temperatures, torch.tensor([0.7, 0.7, 1.3, 1.3, 1.3]))

    def test_patched_replacement(self) -> None:
        """Greedy rows have temperature 0, which must not be divided by."""
        temperatures = self.patched(torch.tensor([0.0, 9.0, 1.3]), 0, 1)
        torch.testing.assert_close(temperatures, torch.tensor([1.0, 1.0, 1.3, 1.3, 1.3]))

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_patched_integers(self, dtype: torch.dtype) -> None:
        top_k = self.patched(torch.tensor([3, 4, 5], dtype=dtype), 0, 0)
        assert top_k.dtype == dtype
        assert top_k.tolist() == [3, 3, 5, 5, 5]

    def test_only_amid_the_step(self) -> None:
        from vllm.v1.sample import rejection_sampler

        stock = rejection_sampler.expand_batch_to_tokens

        def fail() -> None:
            assert rejection_sampler.expand_batch_to_tokens is not stock
            raise KeyError

        with pytest.raises(KeyError):
            repairs.patch_cpu_sampling(fail)()
        assert rejection_sampler.expand_batch_to_tokens is stock


def test_only_the_runners_own_sampler_is_patched() -> None:
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler

    ours, other = RejectionSampler(Sampler()), RejectionSampler(Sampler())
    stock = RejectionSampler.forward
    repairs.patch_rejection_sampler(ours)
    assert ours.forward.__func__ is not stock
    assert other.forward.__func__ is RejectionSampler.forward is stock


class Misbehaving:
    """Answers any name by what it is told to."""

    __slots__ = ("answer",)

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __getattr__(self, name: str) -> Any:
        return self.answer()


def test_the_search_for_kernels_passes_by_what_misbehaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects of llvmlite do: after a first engine of ours no other started in the process."""
    from vllm.triton_utils import dispatcher

    def fail() -> None:
        raise RuntimeError("no such thing")

    module: Any = ModuleType("odd")
    module.like_llvmlite = Misbehaving(lambda: lambda: None)
    module.fails = Misbehaving(fail)
    module.kernel = kernel = object()
    module.owner = SimpleNamespace(kernel=kernel)
    monkeypatch.setitem(sys.modules, "odd", module)
    monkeypatch.setattr(dispatcher, "hasattr", hasattr, raising=False)  # whatever others have done
    with pytest.raises(AttributeError, match="'function' object has no attribute 'get'"):
        dispatcher._rebind_kernels([(kernel, "override")])  # if it does not, vLLM has repaired it
    repairs.patch_kernel_scan()
    module.kernel = kernel
    dispatcher._rebind_kernels([(kernel, "override")])
    assert (module.kernel, module.owner.kernel) == ("override", "override")


def import_kernels() -> None:
    from vllm.platforms import current_platform

    current_platform.import_kernels()


def test_a_kernel_scan_that_has_moved_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("vllm.triton_utils.dispatcher._rebind_kernels")
    with pytest.raises(AttributeError, match="_rebind_kernels"):
        repairs.patch_kernel_scan()
