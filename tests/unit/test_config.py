"""What method "ssd" accepts, what it chooses by itself, and that each refusal is one line that says why."""

from __future__ import annotations

import json
import os
import pickle
import platform
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hub
import pytest
from configs import NO_CORE, Pair, assert_one_line, create, refusal

pytestmark = pytest.mark.usefixtures("bound_target")


def test_only_model_and_number_are_needed(pair: Pair) -> None:
    from vllm_ssd.config import SSDSpeculativeConfig

    config = create(pair)
    ssd = config.speculative_config
    assert isinstance(ssd, SSDSpeculativeConfig)
    assert ssd.method == "ssd"
    assert ssd.num_speculative_tokens == 4
    assert config.parallel_config.worker_cls == "vllm_ssd.target.worker_cpu.SSDWorker"
    assert not config.scheduler_config.async_scheduling
    assert ssd.draft_model_config.model == str(pair[1])
    assert ssd.draft_model_config.get_vocab_size() == 512
    place = ssd.placement
    assert place.device == "cpu"
    assert set(place.cores) <= os.sched_getaffinity(0)
    if len(os.sched_getaffinity(0)) > 1:
        assert min(os.sched_getaffinity(0)) not in place.cores
    assert place.memory_bytes == 1 << 29
    assert create(pair).speculative_config.placement.engine_id != place.engine_id


def test_options_that_the_user_left_open_stay_open(pair: Pair) -> None:
    """What is chosen is `placement`, and not made to look like what the user said."""
    from vllm_ssd.config import _default

    ssd = create(pair).speculative_config
    defaults = {field.name: _default(field) for field in fields(ssd) if field.name.startswith("ssd_")}
    assert {name: getattr(ssd, name) for name in defaults} == defaults


def test_options_are_kept(pair: Pair) -> None:
    first = min(os.sched_getaffinity(0))
    config = create(
        pair,
        ssd_branch_budget=10,
        ssd_fanout=[4, 3, 1, 1, 1],
        ssd_backup="ngram",
        ssd_draft_cores=str(first),
        ssd_wait_ms=1.5,
        max_model_len=128,
    ).speculative_config
    assert config.placement.cores == (first,)
    assert config.ssd_fanout == [4, 3, 1, 1, 1]
    assert config.ssd_draft_cores == str(first)
    assert config.ssd_backup == "ngram"
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
        assert config.parallel_config.worker_cls != "vllm_ssd.target.worker_cpu.SSDWorker"


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
        {"ssd_backup": "guess"},
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
    from tiny_models import llama, write

    model = llama(1, 300, seed=0, sharpness=1.0)
    other = write(model, tmp_path / "other")
    assert_one_line(refusal(pair, model=str(other)), "512", "300", "same vocabulary", "212 of 512 tokens")
    for skips in (False, True):
        (other / "tokenizer.json").unlink(missing_ok=True)
        lines = refusal(pair, {"skip_tokenizer_init": skips}, model=str(other))
        assert_one_line(lines, "512", "300", "same vocabulary", "tokenizer.json cannot be compared")


@pytest.mark.parametrize("num_tokens", [(512, 480), (480, 512)])
def test_one_tokenizer_with_other_padding(tmp_path: Path, num_tokens: tuple[int, int]) -> None:
    from tiny_models import write_padded_pair

    from vllm_ssd.target.worker import _configure

    config = create(write_padded_pair(tmp_path, *num_tokens))
    assert config.speculative_config.common_vocab_size == 480
    assert _configure(config.speculative_config, config).vocab_size == 480


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
    from vllm_ssd.target.worker import _configure

    config = create(pair, {"enforce_eager": target}, enforce_eager=draft)
    assert _configure(config.speculative_config, config).enforce_eager == is_eager


@pytest.mark.parametrize(("asked", "given"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_the_draft_may_have_a_type_of_its_own(pair: Pair, asked: str, given: str) -> None:
    from vllm_ssd.target.worker import _configure

    config = create(pair, {"dtype": "float32"}, ssd_draft_dtype=asked)
    assert _configure(config.speculative_config, config).engine_args["dtype"] == given


NAMED_LIKE_A_METHOD = ("my-eagle-draft", "eagle3-draft", "DFlash-exp/draft", "dspark/draft", "medusa/mtp")


@pytest.mark.parametrize("name", NAMED_LIKE_A_METHOD)
def test_the_drafts_path_does_not_matter(pair: Pair, tmp_path: Path, name: str) -> None:
    shutil.copytree(pair[1], tmp_path / name)
    ids = f"eagle-team/{name.replace('/', '-')}"
    hub.publish(pair[1], ids)
    for draft in (str(tmp_path / name), ids):
        ssd = create(pair, model=draft).speculative_config
        assert (ssd.method, ssd.model, ssd.draft_model_config.model) == ("ssd", draft, draft)
        assert ssd.draft_model_config.hf_config.model_type == "llama"


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLMEagle3", "EagleLlamaForCausalLM", "Qwen3DSparkModel"]
)
def test_drafts_that_cannot_run_by_themselves(pair: Pair, tmp_path: Path, architecture: str) -> None:
    from vllm.config import ModelConfig, speculative

    shutil.copytree(pair[1], tmp_path / "draft")
    change_config(tmp_path / "draft", architectures=[architecture])
    assert_one_line(refusal(pair, model=str(tmp_path / "draft")), "stand-alone draft model")
    assert speculative.ModelConfig is ModelConfig  # nothing stays patched


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(config), encoding="utf-8")


def test_recurrent_targets(pair: Pair, tmp_path: Path) -> None:
    """Mamba-2, and a hybrid of convolutions and attention, by their configs alone."""
    from transformers import Lfm2Config, Mamba2Config

    size = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    mamba = Mamba2Config(**size, num_heads=4, head_dim=32, state_size=16, n_groups=1)
    hybrid = Lfm2Config(
        **size, num_attention_heads=2, num_key_value_heads=1, layer_types=["conv", "full_attention"]
    )
    for config, architecture in ((mamba, "Mamba2ForCausalLM"), (hybrid, "Lfm2ForCausalLM")):
        target = tmp_path / architecture
        config.architectures = [architecture]
        config.save_pretrained(target)
        lines = refusal((target, pair[1]), {"skip_tokenizer_init": True})
        assert_one_line(lines, "the target", str(target), "recurrent", "without speculation")


def test_a_draft_with_sliding_windows(pair: Pair, tmp_path: Path) -> None:
    sliding = tmp_path / "sliding"
    shutil.copytree(pair[1], sliding)
    change_config(sliding, sliding_window=64)
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
    target = SimpleNamespace(
        get_vocab_size=lambda: 9, has_inner_state=False, is_hybrid=False, is_attention_free=False
    )
    with pytest.raises(ValueError, match=said) as error:
        _check_models(SimpleNamespace(target_model_config=target, draft_model_config=draft))  # type: ignore[arg-type]
    assert len(str(error.value).splitlines()) == 1


def test_every_option_that_is_not_honoured_is_refused(pair: Pair) -> None:
    """Also those of a later vLLM."""
    from vllm.config.speculative import SpeculativeConfig

    from vllm_ssd.config import _HONOURED, _INTERNAL, _default, _refuse_foreign_options

    defaults = {field.name: _default(field) for field in fields(SpeculativeConfig)}
    assert set(_HONOURED) | set(_INTERNAL) <= defaults.keys()
    given = defaults | {"model": "draft", "num_speculative_tokens": 4}
    _refuse_foreign_options(SimpleNamespace(**given))  # type: ignore[arg-type]
    for name in defaults.keys() - _HONOURED - set(_INTERNAL):
        with pytest.raises(ValueError, match=f"does not support {name}=.*remove it"):
            _refuse_foreign_options(SimpleNamespace(**given | {name: "other"}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_max": 8},
        {"suffix_decoding_max_tree_depth": 12},
        {"disable_eagle_block_drop": True},
        {"use_local_argmax_reduction": True},
        {"tensor_parallel_size": 1},
        {"num_speculative_tokens_per_batch_size": [[1, 4, 3]]},
        {"draft_model_config": {}},
        {"target_model_config": {}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_other_methods(pair: Pair, options: dict[str, Any]) -> None:
    (name,) = options
    assert_one_line(refusal(pair, **options), "does not support", name, "remove it")


def test_a_config_that_is_made_again(pair: Pair) -> None:
    options = {"ssd_draft_cores": 0, "draft_load_config": {"load_format": "pt"}, "ssd_draft_memory": "1GiB"}
    ssd = create(pair, **options).speculative_config
    again = pickle.loads(pickle.dumps(ssd))
    again.__post_init__()
    for name in (field.name for field in fields(ssd)):
        if name.startswith("ssd_") or name in ("method", "model", "draft_load_config", "prompt_lookup_max"):
            assert getattr(again, name) == getattr(ssd, name), name


def test_a_verification_that_fits_no_step(pair: Pair) -> None:
    engine = {"max_num_batched_tokens": 4, "max_num_seqs": 4, "enable_chunked_prefill": True}
    assert_one_line(
        refusal(pair, engine), "max_num_batched_tokens=4", "num_speculative_tokens + 1 = 5", "raise"
    )
    assert_one_line(refusal(pair, {"max_num_scheduled_tokens": 4}), "max_num_scheduled_tokens=4")
    create(pair, engine, num_speculative_tokens=3)


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_another_system(pair: Pair, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert_one_line(refusal(pair), "Linux only", system)
