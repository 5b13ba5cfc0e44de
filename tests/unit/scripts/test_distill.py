"""Making a draft of a target's layers: what is kept, what is measured, what learns."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

from distill import (
    CrossEntropy,
    Text,
    add_hidden,
    batches,
    both_states,
    cut,
    evaluate,
    rate_at,
    states_of,
    template_around,
)

VOCAB = 64


@pytest.fixture
def target() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def texts(target: LlamaForCausalLM, tmp_path: Path) -> list[Text]:
    rng = random.Random(0)
    ids = [[rng.randrange(VOCAB) for _ in range(length)] for length in (5, 40, 12)]
    (tmp_path / "text0.json").write_text(str(ids))
    return add_hidden(target, tmp_path)


def test_the_draft_is_the_named_layers_and_the_targets_frame(target: LlamaForCausalLM) -> None:
    state = {name: value.clone() for name, value in target.state_dict().items()}
    draft = cut(target, [0, 3])
    assert draft.config.num_hidden_layers == len(draft.model.layers) == 2
    for ours, theirs in ((0, 0), (1, 3)):
        name = "self_attn.q_proj.weight"
        expected = state[f"model.layers.{theirs}.{name}"]
        assert torch.equal(draft.state_dict()[f"model.layers.{ours}.{name}"], expected)
    learning = {name for name, value in draft.named_parameters() if value.requires_grad}
    assert learning == {name for name, _ in draft.named_parameters() if ".layers." in name}


def test_the_whole_target_agrees_with_itself(target: LlamaForCausalLM, texts: list[Text]) -> None:
    # bfloat16 states, so 1 - TV is not quite one; ties are unlikely.
    agreement, overlap = evaluate(cut(target, [0, 1, 2, 3]), texts)
    assert agreement > 0.9
    assert overlap > 0.99


def test_half_the_target_does_not(target: LlamaForCausalLM, texts: list[Text]) -> None:
    assert evaluate(cut(target, [0]), texts)[1] < 0.99


def test_the_loss_and_its_gradient_are_those_of_cross_entropy() -> None:
    torch.manual_seed(0)
    states, wanted, head = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8), torch.randn(16, 8)
    loss = CrossEntropy.apply(states, wanted.bfloat16(), head.bfloat16())
    (gradient,) = torch.autograd.grad(loss, states)
    expected = cross_entropy(states @ head.T, (wanted @ head.T).softmax(-1))
    torch.testing.assert_close(loss, expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, states)[0], atol=0.01, rtol=0.05)


def test_agreement_and_overlap_by_hand(target: LlamaForCausalLM) -> None:
    draft = cut(target, [0, 1, 2, 3])
    text = Text(torch.tensor([1, 2, 3]), torch.randn(3, 32).bfloat16())
    own = (states_of(draft, [text.tokens]) @ draft.lm_head.weight.T).softmax(-1)
    theirs = (text.hidden.float() @ draft.lm_head.weight.T).softmax(-1)
    agreement, overlap = evaluate(draft, [text])
    assert agreement == pytest.approx((own.argmax(-1) == theirs.argmax(-1)).float().mean().item())
    assert overlap == pytest.approx(1 - (own - theirs).abs().sum().item() / 6, abs=2e-2)


def test_padding_is_left_out(target: LlamaForCausalLM, texts: list[Text]) -> None:
    draft = cut(target, [0, 1, 2, 3])
    states, wanted = both_states(draft, texts)
    assert len(states) == len(wanted) == sum(len(text.tokens) for text in texts)
    alone = torch.cat([both_states(draft, [text])[0] for text in texts])
    torch.testing.assert_close(states, alone, atol=0.05, rtol=0.05)


def test_every_text_is_in_every_round_of_batches() -> None:
    texts = [Text(torch.zeros(length, dtype=torch.long), torch.zeros(length, 1)) for length in range(1, 11)]
    stream = batches(texts, 4, random.Random(0))
    lengths = [len(text.tokens) for group in (next(stream), next(stream), next(stream)) for text in group]
    assert sorted(lengths) == list(range(1, 11))


def test_the_rate_rises_and_falls() -> None:
    assert rate_at(0, 1000) == 0
    assert rate_at(100, 1000) > 0.9
    assert rate_at(1000, 1000) == pytest.approx(0.02)


def test_hidden_states_are_computed_once(target: LlamaForCausalLM, texts: list[Text], tmp_path: Path) -> None:
    again = add_hidden(None, tmp_path)
    assert all(torch.equal(ours.hidden, theirs.hidden) for ours, theirs in zip(again, texts, strict=True))


class Templated:
    """A tokenizer's chat template alone."""

    chat_template = "..."

    def apply_chat_template(self, messages: list[dict[str, str]], **_: bool) -> str:
        return f"<system>Be brief.<user>{messages[0]['content']}<end><assistant>"


def test_a_user_turn_is_put_where_the_template_has_it() -> None:
    assert template_around(Templated()) == ("<system>Be brief.<user>", "<end><assistant>")
