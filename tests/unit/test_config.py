"""What method "ssd" accepts, what it chooses by itself, and that each refusal is one line that says why."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from configs import Pair, assert_one_line, create, refusal

import vllm_ssd

NO_CORE = 4096


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    vllm_ssd.register()


@pytest.fixture(autouse=True)
def bound_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target bound to the first core, whatever earlier tests left."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(min(os.sched_getaffinity(0))))
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)


def test_only_model_and_number_are_needed(pair: Pair) -> None:
    from vllm_ssd.config import SSDSpeculativeConfig

    config = create(pair)
    ssd = config.speculative_config
    assert isinstance(ssd, SSDSpeculativeConfig)
    assert ssd.method == "ssd"
    assert ssd.num_speculative_tokens == 4
    assert config.parallel_config.worker_cls == "vllm_ssd.worker_cpu.SSDWorker"
    assert not config.scheduler_config.async_scheduling
    assert ssd.draft_model_config.model == str(pair[1])
    assert ssd.draft_model_config.get_vocab_size() == 512
    cores = [int(core) for core in ssd.ssd_draft_cores.split(",")]
    assert set(cores) <= os.sched_getaffinity(0)
    if len(os.sched_getaffinity(0)) > 1:
        assert min(os.sched_getaffinity(0)) not in cores
    assert "vllm-ssd-" in ssd.ssd_shared_dir
    assert not Path(ssd.ssd_shared_dir).exists()  # configuring makes nothing
    assert create(pair).speculative_config.ssd_shared_dir != ssd.ssd_shared_dir
    assert ssd.ssd_draft_memory == 0.5


def test_options_are_kept(pair: Pair) -> None:
    first = min(os.sched_getaffinity(0))
    config = create(
        pair,
        ssd_branch_budget=10,
        ssd_fanout=[4, 3, 1, 1, 1],
        ssd_fallback="ngram",
        ssd_draft_cores=str(first),
        ssd_wait_ms=1.5,
        ssd_shared_dir="/var/tmp",
        max_model_len=128,
    ).speculative_config
    assert Path(config.ssd_shared_dir).parent == Path("/var/tmp")
    assert config.ssd_fanout == [4, 3, 1, 1, 1]
    assert config.ssd_draft_cores == str(first)
    assert config.ssd_fallback == "ngram"
    assert config.ssd_wait_ms == 1.5
    assert config.draft_model_config.max_model_len == 128


def test_the_config_has_a_representation(pair: Pair) -> None:
    assert "ssd" in repr(create(pair).speculative_config)


def test_options_with_dashes_as_on_the_command_line(pair: Pair) -> None:
    from vllm.engine.arg_utils import EngineArgs

    options = {"method": "ssd", "model": str(pair[1]), "num-speculative-tokens": 2, "ssd-branch-budget": 6}
    args = EngineArgs(model=str(pair[0]), speculative_config=options, max_model_len=256)
    assert args.create_engine_config().speculative_config.ssd_branch_budget == 6


def test_other_methods_are_vllms_own(pair: Pair) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_ssd.config import SSDSpeculativeConfig

    for options in (None, {"method": "draft_model", "model": str(pair[1]), "num_speculative_tokens": 2}):
        args = EngineArgs(model=str(pair[0]), speculative_config=options, max_model_len=256)
        config = args.create_engine_config()
        assert not isinstance(config.speculative_config, SSDSpeculativeConfig)
        assert config.parallel_config.worker_cls != "vllm_ssd.worker_cpu.SSDWorker"


REFUSED: list[Any] = [
    ({"ssd_nonsense": 1}, ("ssd_nonsense",)),
    ({"model": None}, ("'model'",)),
    ({"num_speculative_tokens": None}, ("num_speculative_tokens",)),
    ({"num_speculative_tokens": 17, "ssd_branch_budget": 40}, ("num_speculative_tokens=17", "16")),
    ({"max_model_len": 4}, ("num_speculative_tokens=4",)),
    ({"ssd_branch_budget": 4, "ssd_fanout": "uniform"}, ("ssd_branch_budget=4", "raise it")),
    ({"ssd_fanout": [5, 5, 5]}, ("ssd_fanout", "5 numbers", "not 3")),
    ({"ssd_fanout": [5, 5, 5, 5, 5]}, ("ssd_branch_budget=25",)),
    ({"ssd_fanout": [-1, 4, 4, 4, 4]}, ("ssd_fanout", "outside")),
    ({"ssd_fanout": [1, 1, 1, 1, 600], "ssd_branch_budget": 604}, ("ssd_fanout", "outside")),
    ({"ssd_draft_cores": str(NO_CORE)}, (f"no core {NO_CORE}",)),
    ({"ssd_draft_cores": "one"}, ("ssd_draft_cores='one'", "form")),
    ({"ssd_draft_cores": "2-1"}, ("ssd_draft_cores='2-1'",)),
    ({"ssd_draft_cores": ""}, ("ssd_draft_cores=''",)),
    ({"draft_sample_method": "probabilistic"}, ("draft_sample_method", "remove it")),
    ({"rejection_sample_method": "block"}, ("rejection_sample_method", "remove it")),
    ({"parallel_drafting": True}, ("parallel_drafting", "remove it")),
    ({"draft_tensor_parallel_size": 2}, ("draft_tensor_parallel_size",)),
    ({"ssd_saguaro_c": 0.5}, ("ssd_saguaro_c=0.5", "ssd_verify='ratio'")),
    ({"ssd_shared_dir": "/dev/shm/" + 80 * "x"}, ("ssd_shared_dir", "at most 63 bytes")),
]


@pytest.mark.parametrize(
    ("options", "parts"), REFUSED, ids=lambda value: next(iter(value), "") if value else ""
)
def test_refused_options(pair: Pair, options: dict[str, Any], parts: tuple[str, ...]) -> None:
    assert_one_line(refusal(pair, **options), *parts)


@pytest.mark.parametrize(
    "options",
    [
        {"ssd_branch_budget": 0},
        {"ssd_fallback": "guess"},
        {"ssd_draft_dtype": "int4"},
        {"ssd_wait_ms": -1.0},
        {"ssd_draft_memory": 0.0},
        {"ssd_max_rows": 0},
        {"ssd_prefill_chunk": 0},
        {"ssd_verify": "hope"},
        {"ssd_saguaro_c": 1.5},
        {"ssd_branch_budget": 5000},
        {"ssd_ready_timeout": 0.0},
        {"ssd_stall_timeout": 0.0},
        {"num_speculative_tokens": 0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_values_out_of_range_are_named(pair: Pair, options: dict[str, Any]) -> None:
    (name,) = options
    assert any(name in line for line in refusal(pair, **options))


def test_another_vocabulary(pair: Pair, tmp_path: Path) -> None:
    from models import llama, write

    other = write(llama(1, 300, seed=0, sharpness=1.0), tmp_path / "other")
    assert_one_line(refusal(pair, model=str(other)), "512", "300", "same vocabulary")


def test_a_worker_of_ones_own(pair: Pair) -> None:
    assert_one_line(refusal(pair, {"worker_cls": "my.Worker"}), "worker_cls", "my.Worker", "remove")


def test_the_short_flags(pair: Pair) -> None:
    flags = {"spec_method": "ssd", "spec_model": str(pair[1]), "spec_tokens": 3}
    nothing = {"method": None, "model": None, "num_speculative_tokens": None}
    config = create(pair, flags, **nothing).speculative_config
    assert (config.method, config.num_speculative_tokens) == ("ssd", 3)
    assert_one_line(refusal(pair, {"spec_tokens": 3}), "--spec-tokens", "one of them")


def test_ratio_where_stores_may_change_their_order(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert_one_line(refusal(pair, ssd_verify="ratio"), "ssd_verify='ratio'", "aarch64", "'coupled'")
    create(pair)


def test_kinds_of_parallel_targets_that_are_not_known(pair: Pair) -> None:
    engine = {"data_parallel_size": 2, "distributed_executor_backend": "mp"}
    assert_one_line(refusal(pair, engine), "data_parallel_size=1", "2")


def test_a_pipeline_needs_the_v2_runner(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ssd.config import _check_platform

    engine = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    assert_one_line(refusal(pair, engine), "pipeline_parallel_size", "V2 model runner")
    config = create(pair)
    config.parallel_config.pipeline_parallel_size = 2
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    _check_platform(config.speculative_config)


def test_sleep_mode_and_wide_noise(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ssd.config import _check_platform

    parallel = create(pair).parallel_config
    model = SimpleNamespace(enable_sleep_mode=True, use_fp64_gumbel=False)
    ssd: Any = SimpleNamespace(
        target_model_config=model, target_parallel_config=parallel, ssd_verify="coupled"
    )
    with pytest.raises(ValueError, match="remove enable_sleep_mode"):
        _check_platform(ssd)
    model.enable_sleep_mode, model.use_fp64_gumbel = False, True
    with pytest.raises(ValueError, match=r"use_fp64_gumbel.*'ratio'"):
        _check_platform(ssd)
    ssd.ssd_verify = "ratio"
    _check_platform(ssd)


def test_ranks_that_schedule_by_themselves(pair: Pair) -> None:
    engine = {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}
    assert_one_line(refusal(pair, engine), "distributed_executor_backend", "'mp' or 'ray'")


@pytest.mark.parametrize(
    ("target", "draft", "is_eager"), [(True, None, True), (True, False, False), (False, True, True)]
)
def test_the_draft_may_be_eager_by_itself(
    pair: Pair, target: bool, draft: bool | None, is_eager: bool
) -> None:
    from vllm_ssd.worker import _configure

    config = create(pair, {"enforce_eager": target}, enforce_eager=draft)
    assert _configure(config.speculative_config, config).enforce_eager == is_eager


@pytest.mark.parametrize(("asked", "given"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_the_draft_may_have_a_type_of_its_own(pair: Pair, asked: str, given: str) -> None:
    from vllm_ssd.worker import _configure

    config = create(pair, {"dtype": "float32"}, ssd_draft_dtype=asked)
    assert _configure(config.speculative_config, config).engine_args["dtype"] == given


def test_a_draft_that_vllm_takes_for_eagle(pair: Pair, tmp_path: Path) -> None:
    eagle = tmp_path / "my-eagle-draft"
    shutil.copytree(pair[1], eagle)
    assert_one_line(refusal(pair, model=str(eagle)), "stand-alone draft model", "eagle")


def test_a_draft_with_sliding_windows(pair: Pair, tmp_path: Path) -> None:
    sliding = tmp_path / "sliding"
    shutil.copytree(pair[1], sliding)
    config = json.loads((sliding / "config.json").read_text(encoding="utf-8"))
    config["sliding_window"] = 64
    (sliding / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert_one_line(refusal(pair, model=str(sliding)), "sliding-window", "full attention")


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("is_multimodal_model", "multimodal"),
        ("is_encoder_decoder", "encoder-decoder"),
        ("has_inner_state", "recurrent"),
        ("use_mla", "MLA"),
    ],
)
def test_drafts_of_unsupported_kinds(attribute: str, said: str) -> None:
    from vllm_ssd.config import _check_models

    kinds = ("is_multimodal_model", "is_encoder_decoder", "has_inner_state", "use_mla")
    draft = SimpleNamespace(
        model="draft",
        get_vocab_size=lambda: 9,
        get_sliding_window=lambda: None,
        **{kind: kind == attribute for kind in kinds},
    )
    target = SimpleNamespace(get_vocab_size=lambda: 9)
    with pytest.raises(ValueError, match=said) as error:
        _check_models(SimpleNamespace(target_model_config=target, draft_model_config=draft))  # type: ignore[arg-type]
    assert len(str(error.value).splitlines()) == 1


def on_cuda(monkeypatch: pytest.MonkeyPatch, num_devices: int) -> None:
    from vllm_ssd import config

    platform = SimpleNamespace(
        is_cpu=lambda: False, is_cuda=lambda: True, device_count=lambda: num_devices, device_type="cuda"
    )
    monkeypatch.setattr(config, "current_platform", platform)


def test_another_platform(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ssd import config

    monkeypatch.setattr(
        config, "current_platform", SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False)
    )
    assert_one_line(refusal(pair), "CUDA and on the CPU only")


@pytest.mark.parametrize(
    ("num_devices", "asked", "device"),
    [(1, None, "cuda:0"), (2, None, "cuda:1"), (4, "cuda:2", "cuda:2")],
)
def test_the_drafts_gpu(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, num_devices: int, asked: str | None, device: str
) -> None:
    on_cuda(monkeypatch, num_devices)
    config = create(pair, ssd_draft_device=asked)
    assert config.speculative_config.draft_device == device
    assert config.parallel_config.worker_cls == "vllm_ssd.worker_cuda.SSDWorker"
    assert len(config.speculative_config.draft_cores) == len(os.sched_getaffinity(0))


def test_a_gpu_that_does_not_exist(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda(monkeypatch, 2)
    assert_one_line(refusal(pair, ssd_draft_device="cuda:2"), "ssd_draft_device='cuda:2'", "cuda:1")


def test_on_cuda_the_planner_needs_a_scheduler_that_waits(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cuda(monkeypatch, 2)
    lines = refusal(pair, {"async_scheduling": True}, ssd_planner=True)
    assert_one_line(lines, "ssd_planner", "async_scheduling")


def test_with_ray_the_drafts_gpu_is_named(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ssd.config import _choose_draft_device

    on_cuda(monkeypatch, 4)
    parallel = SimpleNamespace(distributed_executor_backend="ray", assigned_physical_gpu_ids=None)
    ssd = SimpleNamespace(ssd_draft_device=None, target_parallel_config=parallel)
    with pytest.raises(ValueError, match="ssd_draft_device"):
        _choose_draft_device(ssd)
    ssd.ssd_draft_device = "cuda:3"
    assert _choose_draft_device(ssd) == "cuda:3"


def test_beside_chosen_gpus_the_drafts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ssd.config import _choose_draft_device

    on_cuda(monkeypatch, 4)
    parallel = SimpleNamespace(distributed_executor_backend="mp", assigned_physical_gpu_ids=[2, 3])
    ssd: Any = SimpleNamespace(ssd_draft_device=None, target_parallel_config=parallel)
    with pytest.raises(ValueError, match=r"\[2, 3\].*ssd_draft_device"):
        _choose_draft_device(ssd)
    ssd.ssd_draft_device = "cuda:0"
    assert _choose_draft_device(ssd) == "cuda:0"


def test_a_gpu_where_there_is_none(pair: Pair) -> None:
    assert_one_line(refusal(pair, ssd_draft_device="cuda:0"), "no GPU here")


def test_the_readme_has_every_option_with_its_default() -> None:
    from dataclasses import fields

    from vllm_ssd.config import SSDSpeculativeConfig

    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in readme.splitlines() if line.startswith("| `ssd_")]
    told = {row[0].strip("| `"): row[1].strip("` ") for row in rows}
    defaults = {
        field.name: getattr(field.default, "default", field.default)
        for field in fields(SSDSpeculativeConfig)
        if field.name.startswith("ssd_")
    }
    assert told.keys() == defaults.keys()
    for name, default in defaults.items():
        if default not in (None, "auto"):  # those are told in words
            assert told[name] == default or json.loads(told[name]) == default, name
