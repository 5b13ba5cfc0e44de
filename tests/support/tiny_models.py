"""Tiny random Llama pairs with a tokenizer, written in Hugging Face format.

The draft is the target's first layers under the same embedding and head; what the later layers add is scaled
down, so that the two agree in part. Weights are large, so that the next token depends on the context and text
does not loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, NUM_SPECIAL = 0, 1, 2
SYMBOLS = sorted(ByteLevel.alphabet())
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def llama(num_layers: int, vocab_size: int, seed: int, sharpness: float, **changes: Any) -> LlamaForCausalLM:
    """A random model in float32 whose logits have a standard deviation of about `sharpness`."""
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }
    config = LlamaConfig(vocab_size=vocab_size, num_hidden_layers=num_layers, **(shape | changes))
    model = LlamaForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.fill_(1.0)
                continue
            std = 1.0 if "embed" in name else weight.shape[1] ** -0.5
            gain = sharpness if "lm_head" in name else 2.0 if "q_proj" in name else 1.0
            weight.copy_(torch.randn(weight.shape, generator=generator) * std * gain)
    return model


def nested_pair(
    vocab_size: int, seed: int = 0, agreement: float = 0.5, sharpness: float = 2.0
) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """(target of three layers, draft of its first two); they agree more as `agreement` goes to 1."""
    target = llama(3, vocab_size, seed, sharpness)
    with torch.no_grad():
        for projection in (target.model.layers[2].self_attn.o_proj, target.model.layers[2].mlp.down_proj):
            projection.weight *= 1 - agreement
    draft = llama(2, vocab_size, seed, sharpness)
    kept = {name: value for name, value in target.state_dict().items() if "layers.2." not in name}
    draft.load_state_dict(kept)
    return target, draft


def write(model: LlamaForCausalLM, path: Path, num_tokens: int | None = None) -> Path:
    """Save the model with a byte-level tokenizer of so many tokens, by default as large as its vocabulary."""
    num_tokens = num_tokens or model.config.vocab_size
    model.save_pretrained(path)
    vocab = {"<s>": BOS, "</s>": EOS}
    for symbol in SYMBOLS[: num_tokens - NUM_SPECIAL]:
        vocab[symbol] = len(vocab)
    while len(vocab) < num_tokens:
        vocab[f"<{len(vocab)}>"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    return path


def write_pair(folder: Path, vocab_size: int, **options: Any) -> tuple[Path, Path]:
    """Paths of a nested pair's target and draft."""
    target, draft = nested_pair(vocab_size, **options)
    return write(target, folder / "target"), write(draft, folder / "draft")


def write_padded_pair(folder: Path, target_vocab: int, draft_vocab: int, **options: Any) -> tuple[Path, Path]:
    """The same with one tokenizer: the model with the larger vocabulary has tokens of its own beyond it."""
    paths = []
    pair = nested_pair(max(target_vocab, draft_vocab), **options)
    for name, model, size in zip(("target", "draft"), pair, (target_vocab, draft_vocab), strict=True):
        model.resize_token_embeddings(size)
        paths.append(write(model, folder / name, num_tokens=min(target_vocab, draft_vocab)))
    return paths[0], paths[1]


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, tokens: list[int], count: int) -> list[int]:
    """The model's own greedy continuation, by full recomputation."""
    chain = list(tokens)
    for _ in range(count):
        chain.append(int(model(input_ids=torch.tensor([chain])).logits[0, -1].argmax()))
    return chain[len(tokens) :]
