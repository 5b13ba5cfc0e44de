"""Changes to vLLM: made once, absent on versions that are not supported, loud when they miss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
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
    from vllm.utils import cpu_triton_utils
    from vllm.v1.metrics import loggers

    return [
        EngineArgs.create_speculative_config,
        cpu_triton_utils._expand_kernel_impl,
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
from vllm.utils import cpu_triton_utils
from vllm.v1.metrics import loggers
before = [cpu_triton_utils._expand_kernel_impl, loggers.LoggingStatLogger.__init__]
vllm_ssd.register()
once = EngineArgs.create_speculative_config
vllm_ssd.register()
assert EngineArgs.create_speculative_config is once
assert before == [cpu_triton_utils._expand_kernel_impl, loggers.LoggingStatLogger.__init__]
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
from vllm.utils import cpu_triton_utils
del cpu_triton_utils._expand_kernel_impl
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
    assert "_expand_kernel_impl" in line


class TestExpansion:
    """vLLM's expansion of sampling parameters to draft rows, stock and mended."""

    counts = torch.tensor([2, 2, 5], dtype=torch.int32)  # cumulative: 2, 0 and 3 rows

    @staticmethod
    def mended(*args: Any) -> None:
        from vllm.utils import cpu_triton_utils

        cpu_triton_utils._expand_kernel_impl(*args)

    @staticmethod
    def stock(*args: Any) -> None:
        from vllm.utils import cpu_triton_utils

        import_kernels()
        cpu_triton_utils._expand_kernel_impl._vllm_ssd(*args)

    def test_stock_loses_what_it_computed(self) -> None:
        """If this fails, vLLM has repaired it: `compat.mend_cpu_sampling` can go."""
        temperatures = torch.full((5,), -7.0)
        self.stock(temperatures, torch.tensor([0.7, 9.0, 1.3]), self.counts, 0, 1)
        assert (temperatures == -7.0).all()

    def test_mended_temperatures(self) -> None:
        temperatures = torch.full((5,), -7.0)
        self.mended(temperatures, torch.tensor([0.7, 9.0, 1.3]), self.counts, 0, 1)
        torch.testing.assert_close(temperatures, torch.tensor([0.7, 0.7, 1.3, 1.3, 1.3]))

    def test_mended_replacement(self) -> None:
        """Greedy rows have temperature 0, which must not be divided by."""
        temperatures = torch.empty(5)
        self.mended(temperatures, torch.tensor([0.0, 9.0, 1.3]), self.counts, 0, 1)
        torch.testing.assert_close(temperatures, torch.tensor([1.0, 1.0, 1.3, 1.3, 1.3]))

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_mended_integers(self, dtype: torch.dtype) -> None:
        top_k = torch.full((5,), -7, dtype=dtype)
        self.mended(top_k, torch.tensor([3, 4, 5], dtype=dtype), self.counts, 0, 0)
        assert top_k.tolist() == [3, 3, 5, 5, 5]

    def test_through_vllms_own_function(self) -> None:
        from vllm.platforms import current_platform
        from vllm.v1.sample import rejection_sampler

        current_platform.register_triton_kernel_overrides()
        expanded = rejection_sampler.expand_batch_to_tokens(
            torch.tensor([0.7, 9.0, 0.0]), self.counts, 5, replace_from=0, replace_to=1
        )
        torch.testing.assert_close(expanded, torch.tensor([0.7, 0.7, 1.0, 1.0, 1.0]))


def import_kernels() -> None:
    from vllm.platforms import current_platform

    current_platform.import_kernels()


@pytest.mark.parametrize(
    ("module", "name", "patch"),
    [
        ("vllm.engine.arg_utils", "EngineArgs.create_speculative_config", compat.add_method_ssd),
        ("vllm.utils.cpu_triton_utils", "_expand_kernel_impl", compat.mend_cpu_sampling),
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
    from types import SimpleNamespace

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
