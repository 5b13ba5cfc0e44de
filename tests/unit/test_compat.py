"""Changes to vLLM: made once, absent on versions that are not supported, loud when they miss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import vllm_ssd
from vllm_ssd import compat


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    vllm_ssd.register()


def patched() -> list[Any]:
    """Everything that `register` replaces."""
    from vllm.config import vllm as config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.metrics import loggers

    return [
        EngineArgs.create_speculative_config,
        loggers.LoggingStatLogger.__init__,
        loggers.PrometheusStatLogger._spec_decoding_cls,
        config.NgramGPUTypes,
    ]


def test_methods_that_may_be_scheduled_asynchronously() -> None:
    """vLLM's own list, and ours."""
    from typing import get_args

    from vllm.config import vllm as config

    assert {"ngram_gpu", "ssd"} <= set(get_args(config.NgramGPUTypes))


def test_registering_twice_changes_nothing_more() -> None:
    before = patched()
    vllm_ssd.register()
    vllm_ssd.register()
    assert [a is b for a, b in zip(patched(), before, strict=True)] == [True] * len(before)


def test_the_installed_version_is_supported() -> None:
    assert compat.is_supported_version()


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.32.0", True),
        ("0.32.1+cpu", True),
        ("0.33.0rc1", True),
        ("0.31.9", False),
        ("0.34.0", False),
        ("0.3.2", False),
        ("1.32.0", False),
    ],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, version: str, supported: bool) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    assert compat.is_supported_version() == supported


UNSUPPORTED = """
import sys, vllm
vllm.__version__ = "0.99.0"
import vllm_ssd
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.metrics import loggers
before = loggers.LoggingStatLogger.__init__
vllm_ssd.register()
once = EngineArgs.create_speculative_config
vllm_ssd.register()
assert EngineArgs.create_speculative_config is once
assert before == loggers.LoggingStatLogger.__init__
target, draft = sys.argv[1:]
args = EngineArgs(model=target, max_model_len=128)
assert args.create_engine_config().speculative_config is None
args = EngineArgs(model=target, max_model_len=128,
                  speculative_config={"method": "draft_model", "model": draft, "num_speculative_tokens": 2})
assert args.create_engine_config().speculative_config.method == "draft_model"
"""


ASK_FOR_SSD = """
args = EngineArgs(model=target, max_model_len=128,
                  speculative_config={"method": "ssd", "model": draft, "num_speculative_tokens": 2})
try:
    args.create_engine_config()
except ValueError as error:
    print("REFUSED:", error)
"""


def run_without_plugins(code: str, pair: tuple[Path, Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process where nothing is patched yet; VLLM_PLUGINS keeps vLLM from loading us itself.

    The code leaves `EngineArgs`, `target` and `draft` to what asks for method "ssd" after it.
    """
    done = subprocess.run(
        [sys.executable, "-c", code + ASK_FOR_SSD, *map(str, pair)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"VLLM_PLUGINS": "none"},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_on_an_unsupported_version_only_ssd_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    done = run_without_plugins(UNSUPPORTED, pair, tmp_path)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("REFUSED:")]
    assert "0.32." in line
    assert "0.99.0" in line


LACKING = """
import sys
from vllm.v1.metrics import loggers
del loggers.PrometheusStatLogger._spec_decoding_cls
import vllm_ssd
from vllm.engine.arg_utils import EngineArgs
vllm_ssd.register()
vllm_ssd.register()
target, draft = sys.argv[1:]
assert EngineArgs(model=target, max_model_len=128).create_engine_config().speculative_config is None
"""


def test_where_vllm_lacks_what_is_patched_only_ssd_is_refused(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """An error in `register` would end every engine of this vLLM."""
    done = run_without_plugins(LACKING, pair, tmp_path)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("REFUSED:")]
    assert "_spec_decoding_cls" in line


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
    """Unless the user wants them mended as well."""
    monkeypatch.delenv("VLLM_SSD_PATCH", raising=False)
    if asked is not None:
        monkeypatch.setenv("VLLM_SSD_PATCH", asked)
    done = run_without_plugins(SOMEBODY_ELSES, pair, tmp_path)
    assert f"PATCHED: {patched}" in done.stdout


class TestExpansion:
    """vLLM's expansion of sampling parameters to draft rows, stock and mended."""

    counts = torch.tensor([2, 2, 5], dtype=torch.int32)  # cumulative: 2, 0 and 3 rows

    def expand(self, values: torch.Tensor, replace_from: int, replace_to: int) -> torch.Tensor:
        """As vLLM's rejection sampler does."""
        from vllm.v1.sample import rejection_sampler

        return rejection_sampler.expand_batch_to_tokens(values, self.counts, 5, replace_from, replace_to)

    def mended(self, *args: Any) -> torch.Tensor:
        """The same amid a mended step."""
        forward = compat.mend_cpu_sampling(lambda *args: self.expand(*args))
        return forward(*args)

    def test_stock_loses_what_it_computed(self) -> None:
        """If this fails, vLLM has repaired it: `compat.mend_cpu_sampling` can go."""
        from vllm.utils import cpu_triton_utils

        import_kernels()
        temperatures = torch.full((5,), -7.0)
        stock = cpu_triton_utils._expand_kernel_impl
        stock(temperatures, torch.tensor([0.7, 9.0, 1.3]), self.counts, 0, 1)
        assert (temperatures == -7.0).all()

    def test_mended_temperatures(self) -> None:
        temperatures = self.mended(torch.tensor([0.7, 9.0, 1.3]), 0, 1)
        torch.testing.assert_close(temperatures, torch.tensor([0.7, 0.7, 1.3, 1.3, 1.3]))

    def test_mended_replacement(self) -> None:
        """Greedy rows have temperature 0, which must not be divided by."""
        temperatures = self.mended(torch.tensor([0.0, 9.0, 1.3]), 0, 1)
        torch.testing.assert_close(temperatures, torch.tensor([1.0, 1.0, 1.3, 1.3, 1.3]))

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_mended_integers(self, dtype: torch.dtype) -> None:
        top_k = self.mended(torch.tensor([3, 4, 5], dtype=dtype), 0, 0)
        assert top_k.dtype == dtype
        assert top_k.tolist() == [3, 3, 5, 5, 5]

    def test_only_amid_the_step(self) -> None:
        from vllm.v1.sample import rejection_sampler

        stock = rejection_sampler.expand_batch_to_tokens

        def fail() -> None:
            assert rejection_sampler.expand_batch_to_tokens is not stock
            raise KeyError

        with pytest.raises(KeyError):
            compat.mend_cpu_sampling(fail)()
        assert rejection_sampler.expand_batch_to_tokens is stock


def test_only_the_runners_own_sampler_is_mended() -> None:
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler

    ours, other = RejectionSampler(Sampler()), RejectionSampler(Sampler())
    stock = RejectionSampler.forward
    compat.mend_rejection_sampler(ours)
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
    compat.mend_kernel_scan()
    module.kernel = kernel
    dispatcher._rebind_kernels([(kernel, "override")])
    assert (module.kernel, module.owner.kernel) == ("override", "override")


def import_kernels() -> None:
    from vllm.platforms import current_platform

    current_platform.import_kernels()


@pytest.mark.parametrize(
    ("module", "name", "patch"),
    [
        ("vllm.engine.arg_utils", "EngineArgs.create_speculative_config", compat.add_method_ssd),
        ("vllm.triton_utils.dispatcher", "_rebind_kernels", compat.mend_kernel_scan),
        ("vllm.v1.metrics.loggers", "PrometheusStatLogger._spec_decoding_cls", compat.add_metrics),
    ],
)
def test_a_missing_patch_target_fails_loudly(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, patch: Any
) -> None:
    monkeypatch.delattr(f"{module}.{name}")
    with pytest.raises(AttributeError, match=name.rpartition(".")[2]):
        patch()


def test_missing_seams_of_the_runner_fail_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("vllm.v1.worker.cpu_worker.CPUModelRunner")
    with pytest.raises(AttributeError, match="CPUModelRunner"), compat.cpu_runner_class(object, is_v2=False):
        pass
    monkeypatch.delattr("vllm.v1.worker.gpu_model_runner.create_custom_proposer")
    with (
        pytest.raises(AttributeError, match="create_custom_proposer"),
        compat.no_stock_drafter(None, object()),
    ):
        pass


def test_seams_of_the_runner_are_put_back() -> None:
    from vllm.v1.worker import cpu_worker, gpu_model_runner

    stock = cpu_worker.CPUModelRunner, gpu_model_runner.create_custom_proposer
    config = SimpleNamespace(method="ssd")

    def fail_inside() -> None:
        with compat.cpu_runner_class(object, is_v2=False), compat.no_stock_drafter(config, "drafter"):
            assert cpu_worker.CPUModelRunner is object
            assert config.method == "custom_class"
            assert gpu_model_runner.create_custom_proposer(None) == "drafter"
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert (cpu_worker.CPUModelRunner, gpu_model_runner.create_custom_proposer) == stock
    assert config.method == "ssd"
