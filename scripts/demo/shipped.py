"""The weights that lie in the repository, and writing them out as Hugging Face models."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .models import DRAFT_LAYERS, TARGET_LAYERS, llama_config, new_llama
from .packing import pack, unpack
from .tokenizer import wrap_tokenizer

WEIGHTS = Path(__file__).parent / "weights"
LAYERS = {"target": TARGET_LAYERS, "draft": DRAFT_LAYERS}


def load_tokenizer(weights: Path = WEIGHTS) -> PreTrainedTokenizerFast:
    """Return the shipped tokenizer."""
    return wrap_tokenizer(Tokenizer.from_file(str(weights / "tokenizer.json")))


def load_model(name: str, weights: Path = WEIGHTS) -> LlamaForCausalLM:
    """Return the shipped "target" or "draft", float32, from its packed weights."""
    model = new_llama(llama_config(LAYERS[name]), seed=0)
    missing, unexpected = model.load_state_dict(unpack(weights / f"{name}.safetensors"), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"packed {name} does not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


def save_weights(name: str, model: LlamaForCausalLM, weights: Path = WEIGHTS) -> None:
    """Pack a trained "target" or "draft" into the weights folder."""
    pack(model.state_dict(), weights / f"{name}.safetensors")


def write_models(out: Path, weights: Path = WEIGHTS) -> None:
    """Write out/target and out/draft in Hugging Face format, each with the tokenizer."""
    tokenizer = load_tokenizer(weights)
    for name in LAYERS:
        load_model(name, weights).save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
