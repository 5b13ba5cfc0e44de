"""Changes to vLLM: made once, absent on versions that are not supported, loud when they miss."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from unpatched import run_without_plugins

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


@pytest.mark.parametrize(
    ("module", "name", "patch"),
    [
        ("vllm.engine.arg_utils", "EngineArgs.create_speculative_config", compat.add_method_ssd),
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
