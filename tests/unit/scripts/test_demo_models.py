"""The demo models: packing, the files written, and that the shipped pair is fit for benchmarks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

SCRIPTS = Path(__file__).parents[3] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import make_demo_models  # noqa: E402
from demo.evaluate import context_share, draft_ranks, has_loop  # noqa: E402
from demo.greedy import greedy  # noqa: E402
from demo.grown import grown_config  # noqa: E402
from demo.nested import agreement, find_epsilon, parse_shape, random_model  # noqa: E402
from demo.packing import dequantise, pack, quantise, unpack  # noqa: E402
from demo.prompts import demo_prompts  # noqa: E402
from demo.shipped import WEIGHTS, load_model, load_tokenizer  # noqa: E402
from demo.text import document_chain  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer()


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return load_model("target")


@pytest.fixture(scope="module")
def draft() -> LlamaForCausalLM:
    return load_model("draft")


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return demo_prompts(tokenizer, 6, seed=5, min_tokens=30, max_tokens=120, shared_prefix_fraction=0.0)


@pytest.fixture(scope="module")
def outputs(target: LlamaForCausalLM, prompts: list[list[int]]) -> list[list[int]]:
    return greedy(target, prompts, 256)


def test_quantisation_error_is_at_most_half_a_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 48, generator=generator) * torch.logspace(-3, 1, 64)[:, None]
    matrix[7] = 0
    values, scales = quantise(matrix)
    error = (dequantise(values, scales) - matrix).abs()
    assert (error <= scales.float()[:, None] * 0.5001).all()


def test_packing_twice_changes_nothing(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(8, 16), "norm.weight": torch.randn(16)}
    pack(state, tmp_path / "once")
    once = unpack(tmp_path / "once")
    pack(once, tmp_path / "twice")
    twice = unpack(tmp_path / "twice")
    assert torch.equal(once["norm.weight"], state["norm.weight"])
    for name, tensor in once.items():
        torch.testing.assert_close(twice[name], tensor, rtol=2e-3, atol=2e-3)


def test_shipped_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 12_000_000


def test_command_writes_hugging_face_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_demo_models.py", "--out", str(tmp_path)])
    make_demo_models.main()
    for name, layers in (("target", 28), ("draft", 3)):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert (config["num_hidden_layers"], config["dtype"]) == (layers, "float32")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        expected = load_model(name).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        message = [{"role": "user", "content": "Hello"}]
        assert tokenizer.apply_chat_template(message, tokenize=False) == "<s>Hello\n"
        odd = "né \x00\t日本 🙂"
        assert tokenizer.decode(tokenizer(odd)["input_ids"], skip_special_tokens=True) == odd


def test_greedy_acceptance(
    draft: LlamaForCausalLM, prompts: list[list[int]], outputs: list[list[int]]
) -> None:
    ranks = torch.tensor(draft_ranks(draft, prompts, outputs))
    assert 0.6 <= (ranks == 1).float().mean() <= 0.9
    assert (ranks <= 3).float().mean() >= 0.9


def test_greedy_output_does_not_loop(outputs: list[list[int]]) -> None:
    assert not any(map(has_loop, outputs))


def test_models_follow_their_context(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert context_share(target, tokenizer, n=6, seed=3) >= 0.6
    assert context_share(draft, tokenizer, n=6, seed=3) >= 0.5


def test_text_and_prompts_are_deterministic(tokenizer: PreTrainedTokenizerFast) -> None:
    assert next(document_chain(3)) == next(document_chain(3)) != next(document_chain(4))
    first, again = (demo_prompts(tokenizer, 20, 1, 1, 300, shared_prefix_fraction=0.5) for _ in range(2))
    assert first == again
    assert all(1 <= len(prompt) <= 300 and prompt[0] == tokenizer.bos_token_id for prompt in first)
    heads = {tuple(prompt[:40]) for prompt in first if len(prompt) >= 40}
    assert len(heads) < sum(len(prompt) >= 40 for prompt in first)


@pytest.mark.parametrize("draft_heads", ["heads=2,kv_heads=1", "heads=2,kv_heads=2"])
def test_random_pair_agrees_as_asked(draft_heads: str) -> None:
    draft = parse_shape(f"layers=2,hidden=64,intermediate=96,head_dim=32,{draft_heads}")
    target = parse_shape("layers=4,hidden=128,intermediate=192,head_dim=32,heads=4,kv_heads=2")
    small = random_model(draft, seed=0)
    assert agreement(small, random_model(target, 0, draft, epsilon=0.0), seed=9) > 0.99
    epsilon, reached = find_epsilon(draft, target, wanted=0.8, seed=0)
    assert reached == pytest.approx(0.8, abs=0.05)
    assert agreement(small, random_model(target, 0, draft, epsilon), seed=9) == pytest.approx(0.8, abs=0.1)


def test_random_pair_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ["--target-shape", "layers=3,hidden=128,heads=2,kv_heads=1,intermediate=96"]
    shapes += ["--draft-shape", "layers=1,hidden=128,heads=2,kv_heads=1,intermediate=96"]
    options = ["--out", str(tmp_path), "--random", *shapes, "--epsilon", "0.1", "--dtype", "bfloat16"]
    monkeypatch.setattr(sys, "argv", ["make_demo_models.py", *options])
    make_demo_models.main()
    draft, target = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("draft", "target"))
    assert target.dtype == torch.bfloat16
    assert agreement(draft, target, seed=0) > 0.5
    outputs = greedy(target, [[5, 6, 7], [8, 6, 7]], 64)
    assert outputs[0] != outputs[1]
    assert min(len(set(output)) for output in outputs) > 20


def test_grown_pair_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]]
) -> None:
    shapes = ["--target-shape", "layers=29,hidden=192,intermediate=384,heads=4,kv_heads=2,head_dim=64"]
    shapes += ["--draft-shape", "layers=3,hidden=256,intermediate=400,heads=4,kv_heads=2"]
    monkeypatch.setattr(sys, "argv", ["make_demo_models.py", "--out", str(tmp_path), "--grow", *shapes])
    make_demo_models.main()
    tokens = torch.tensor([prompts[0][:20]])
    for name in ("target", "draft"):
        grown = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        shipped = load_model(name)
        assert grown.num_parameters() > shipped.num_parameters()
        with torch.inference_mode():
            torch.testing.assert_close(grown(tokens).logits, shipped(tokens).logits, rtol=1e-3, atol=1e-3)


def test_a_pair_does_not_grow_smaller() -> None:
    with pytest.raises(ValueError, match="no smaller"):
        grown_config(load_model("draft").config, parse_shape("layers=1"))
