"""Random Llama pairs of any shape, nested so that draft and target agree by a chosen amount.

The target contains the draft: in its first layers, the draft's heads and units act on the first channels of
the residual stream exactly as they do in the draft. All that is added to them (heads, units, layers) reads
the stream like any layer but writes to it scaled by epsilon. At epsilon = 0 the two compute the same
function; the greedy agreement falls as epsilon grows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .models import llama_config
from .shipped import load_tokenizer

SHAPE_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
}
# Sharp attention and layers that write as much as they read keep the output from hanging on one token.
QUERY_GAIN = 2.0
WRITE_GAIN = 1.0


def parse_shape(text: str) -> LlamaConfig:
    """Return the configuration of "layers=32,hidden=4096,..."; the rest is as in the demo models."""
    changes = {key: int(value) for key, value in (item.split("=") for item in text.split(","))}
    unknown = set(changes) - set(SHAPE_KEYS)
    if unknown:
        raise ValueError(f"unknown shape keys {sorted(unknown)}; known are {sorted(SHAPE_KEYS)}")
    fields = {SHAPE_KEYS[key]: value for key, value in changes.items()}
    if "head_dim" not in changes and {"hidden", "heads"} & set(changes):
        demo = llama_config(1)
        heads = fields.get("num_attention_heads", demo.num_attention_heads)
        fields["head_dim"] = fields.get("hidden_size", demo.hidden_size) // heads
    layers = fields.pop("num_hidden_layers", 2)
    return llama_config(layers, tie_word_embeddings=False, **fields)


def _random(seed: int, name: str, rows: int, columns: int, std: float) -> Tensor:
    """Return a normal matrix that depends on the seed and its name only."""
    generator = torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))
    return torch.randn(rows, columns, generator=generator) * std


def random_layer(config: LlamaConfig, seed: int, layer: int) -> dict[str, Tensor]:
    """Return a layer's matrices by short name."""
    width, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, groups = config.num_attention_heads * dim, config.num_key_value_heads * dim
    reads, inner_reads = 1 / math.sqrt(width), 1 / math.sqrt(inner)
    shapes = {
        "self_attn.q_proj": (heads, width, QUERY_GAIN * reads),
        "self_attn.k_proj": (groups, width, reads),
        "self_attn.v_proj": (groups, width, reads),
        "self_attn.o_proj": (width, heads, WRITE_GAIN / math.sqrt(heads)),
        "mlp.gate_proj": (inner, width, reads),
        "mlp.up_proj": (inner, width, reads),
        "mlp.down_proj": (width, inner, WRITE_GAIN * inner_reads),
    }
    return {
        name: _random(seed, f"{layer} {name}", rows, columns, std)
        for name, (rows, columns, std) in shapes.items()
    }


def _head_slots(draft: LlamaConfig, target: LlamaConfig) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the target head of each draft head, and (target, draft) pairs of key-value heads.

    A draft group wider than the target's is spread over several of the target's key-value heads.
    """
    ours = draft.num_attention_heads // draft.num_key_value_heads
    theirs = target.num_attention_heads // target.num_key_value_heads
    copies = -(-ours // theirs)
    if draft.head_dim != target.head_dim or copies * draft.num_key_value_heads > target.num_key_value_heads:
        raise ValueError("the draft's heads do not fit into the target's: equal head_dim, fewer heads")
    slots = [
        ((head // ours) * copies + head % ours // theirs) * theirs + head % ours % theirs
        for head in range(draft.num_attention_heads)
    ]
    return slots, [(group, group // copies) for group in range(copies * draft.num_key_value_heads)]


def check_nested(draft: LlamaConfig, target: LlamaConfig) -> None:
    """Raise a ValueError unless such a target can contain such a draft."""
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size")
    if draft.vocab_size != target.vocab_size or any(
        getattr(draft, key) > getattr(target, key) for key in sizes
    ):
        raise ValueError("the draft must be no larger than the target, with the same vocabulary")
    _head_slots(draft, target)


def nest_layer(
    big: dict[str, Tensor], small: dict[str, Tensor], draft: LlamaConfig, target: LlamaConfig, epsilon: float
) -> None:
    """Put the draft's layer into the target's, in place, and scale by epsilon what the target adds."""
    dim, width = draft.head_dim, draft.hidden_size
    slots, groups = _head_slots(draft, target)
    pairs = {
        "self_attn.q_proj": [(slot, head) for head, slot in enumerate(slots)],
        "self_attn.k_proj": groups,
        "self_attn.v_proj": groups,
    }
    big["self_attn.o_proj"] *= epsilon
    big["mlp.down_proj"] *= epsilon
    for name, places in pairs.items():
        for theirs, ours in places:
            rows = big[name][theirs * dim : (theirs + 1) * dim]
            rows.zero_()
            rows[:, :width] = small[name][ours * dim : (ours + 1) * dim]
    for head, slot in enumerate(slots):
        columns = big["self_attn.o_proj"][:, slot * dim : (slot + 1) * dim]
        columns.zero_()
        columns[:width] = small["self_attn.o_proj"][:, head * dim : (head + 1) * dim]
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        big[name][: draft.intermediate_size] = 0
        big[name][: draft.intermediate_size, :width] = small[name]
    big["mlp.down_proj"][:, : draft.intermediate_size] = 0
    big["mlp.down_proj"][:width, : draft.intermediate_size] = small["mlp.down_proj"]


def widen(matrix: Tensor, width: int) -> Tensor:
    """Return the matrix with columns of zeros added up to this width."""
    return torch.nn.functional.pad(matrix, (0, width - matrix.shape[1]))


def random_weights(
    config: LlamaConfig, seed: int, draft: LlamaConfig | None = None, epsilon: float = 1.0
) -> Iterator[dict[str, Tensor]]:
    """Yield a random model's float32 state in parts, one for each layer and one for the rest.

    With a draft configuration the result is the target that contains the draft of the same seed.
    """
    inner = draft or config
    check_nested(inner, config)
    width = config.hidden_size
    # The root mean square over the wider stream is smaller by this factor while the added channels are 0.
    norm = torch.full((width,), math.sqrt(inner.hidden_size / width))
    embedding = _random(seed, "embedding", inner.vocab_size, inner.hidden_size, 1.0)
    head = _random(seed, "head", inner.vocab_size, inner.hidden_size, 1 / math.sqrt(inner.hidden_size))
    yield {
        "model.embed_tokens.weight": widen(embedding, width),
        "lm_head.weight": widen(head, width),
        "model.norm.weight": norm.clone(),
    }
    for layer in range(config.num_hidden_layers):
        matrices = random_layer(config, seed if draft is None else seed + 1, layer)
        if draft is not None and layer < draft.num_hidden_layers:
            nest_layer(matrices, random_layer(draft, seed, layer), draft, config, epsilon)
        elif draft is not None:
            matrices["self_attn.o_proj"] *= epsilon
            matrices["mlp.down_proj"] *= epsilon
        state = {f"model.layers.{layer}.{name}.weight": matrix for name, matrix in matrices.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{layer}.{name}.weight"] = norm.clone()
        yield state


def random_model(
    config: LlamaConfig, seed: int, draft: LlamaConfig | None = None, epsilon: float = 1.0
) -> LlamaForCausalLM:
    """Return the model of random_weights in memory."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    for part in random_weights(config, seed, draft, epsilon):
        model.load_state_dict(part, strict=False)
    return model.eval()


@torch.inference_mode()
def agreement(draft: LlamaForCausalLM, target: LlamaForCausalLM, seed: int, rows: int = 8) -> float:
    """Share of positions of random-token rows [rows, 64] at which both have the same greedy token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, draft.config.vocab_size, (rows, 64), generator=generator)
    same = draft(input_ids=tokens).logits.argmax(-1) == target(input_ids=tokens).logits.argmax(-1)
    return same.float().mean().item()


def find_epsilon(
    draft: LlamaConfig, target: LlamaConfig, wanted: float, seed: int, rounds: int = 9
) -> tuple[float, float]:
    """Bisect the logarithm of epsilon for this greedy agreement; return epsilon and the agreement reached."""
    small = random_model(draft, seed)
    low, high = math.log(1e-4), math.log(3.0)
    best = (0.0, 1.0)
    for _ in range(rounds):
        middle = (low + high) / 2
        reached = agreement(small, random_model(target, seed, draft, math.exp(middle)), seed)
        if abs(reached - wanted) < abs(best[1] - wanted):
            best = (math.exp(middle), reached)
        low, high = (middle, high) if reached > wanted else (low, middle)
    return best


def write_random(
    out: Path,
    config: LlamaConfig,
    seed: int,
    dtype: torch.dtype,
    draft: LlamaConfig | None = None,
    epsilon: float = 1.0,
) -> None:
    """Write a random model in Hugging Face format, with the demo tokenizer, one layer in memory at a time."""
    write_parts(out, config, dtype, random_weights(config, seed, draft, epsilon))


def write_parts(
    out: Path, config: LlamaConfig, dtype: torch.dtype, parts: Iterator[dict[str, Tensor]]
) -> None:
    """Write a model that comes in parts, one for each layer and one for the rest, with the demo tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    config.dtype = dtype
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(out)
    load_tokenizer().save_pretrained(out)
    count = config.num_hidden_layers + 1
    index: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        tensors = {key: value.to(dtype) for key, value in part.items()}
        save_file(tensors, out / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    index_text = json.dumps({"metadata": {}, "weight_map": index}, indent=1)
    (out / "model.safetensors.index.json").write_text(index_text)
