"""A draft's layers as they are shipped, and what becomes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from scripts import models


def tiny(path: Path, layers: int, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=layers, tie_word_embeddings=True, **shape)
    model = LlamaForCausalLM(config).bfloat16()
    for layer in model.model.layers:
        layer.input_layernorm.weight.data.uniform_(0.5, 2)
    model.save_pretrained(path)
    return model.state_dict()


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict, dict, dict]:
    """The state of a target, of its trained draft, and of the draft that is written of its packed layers."""
    target, trained = tiny(tmp_path / "target", 5, 0), tiny(tmp_path / "trained", 2, 1)
    (tmp_path / "target" / "tokenizer_config.json").write_text("{}")
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", lambda path: Tokenizer())
    models.pack_layers(tmp_path / "trained", tmp_path / "layers.safetensors")
    monkeypatch.setattr(models, "DRAFT", tmp_path / "layers.safetensors")
    models.write_smollm2(tmp_path)  # the target is there: no network
    return target, trained, AutoModelForCausalLM.from_pretrained(tmp_path / "draft").state_dict()


class Tokenizer:
    def save_pretrained(self, path: Path) -> None:
        (path / "tokenizer_config.json").write_text("{}")


def test_the_written_draft_has_the_trained_layers_and_the_targets_frame(
    written: tuple[dict, dict, dict],
) -> None:
    target, trained, draft = written
    assert set(draft) == set(trained)
    for name, tensor in draft.items():
        if not name.startswith(models.LAYERS):
            assert torch.equal(tensor, target[name])
        elif tensor.ndim == 1:
            assert torch.equal(tensor, trained[name])
        else:
            error = (tensor.float() - trained[name].float()).abs()
            half_a_step = trained[name].float().abs().amax(1, keepdim=True) / 127 * 0.51
            rounding = trained[name].float().abs() / 128  # bfloat16
            assert (error <= half_a_step + rounding).all()


def test_only_layers_are_packed_and_matrices_take_a_byte_a_weight(tmp_path: Path) -> None:
    state = tiny(tmp_path / "draft", 2, 1)
    models.pack_layers(tmp_path / "draft", tmp_path / "file")
    packed = load_file(tmp_path / "file")
    for name, tensor in packed.items():
        assert name.startswith(models.LAYERS)
        if name in state and state[name].ndim == 2:
            assert tensor.dtype == torch.int8


def test_a_second_run_finds_the_work_done(written: tuple[dict, dict, dict], tmp_path: Path) -> None:
    before = (tmp_path / "draft" / "model.safetensors").stat().st_mtime_ns
    models.write_smollm2(tmp_path)
    assert (tmp_path / "draft" / "model.safetensors").stat().st_mtime_ns == before


def test_layers_of_another_model_are_refused(tmp_path: Path) -> None:
    tiny(tmp_path / "target", 3, 0)
    save_file({"model.layers.0.other.weight": torch.zeros(2)}, tmp_path / "layers")
    with pytest.raises(ValueError, match="other"):
        models.write_draft(tmp_path / "target", tmp_path / "layers", tmp_path / "draft")
