"""Packed weights: int8 with one float16 scale for each output row; vectors stay float32."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SCALE_SUFFIX = ".scale"
# The smallest normal float16: rows of zeros need some scale.
MIN_SCALE = 2.0**-14


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return (int8 values, float16 scale of each row); the error is at most half a scale."""
    scales = (matrix.abs().amax(1) / 127).clamp_min(MIN_SCALE).half()
    return (matrix / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def dequantise(values: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 matrix of int8 values and the float16 scales of their rows."""
    return values.float() * scales.float()[:, None]


def pack(state: dict[str, Tensor], path: Path) -> None:
    """Write a model's state, without the tied output matrix, to a packed file."""
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue
        if tensor.ndim == 2:
            packed[name], packed[name + SCALE_SUFFIX] = quantise(tensor.float())
        else:
            packed[name] = tensor.float().clone()
    save_file(packed, path)


def unpack(path: Path) -> dict[str, Tensor]:
    """Return the float32 state of a packed file."""
    packed = load_file(path)
    return {
        name: dequantise(tensor, packed[name + SCALE_SUFFIX]) if tensor.dtype == torch.int8 else tensor
        for name, tensor in packed.items()
        if not name.endswith(SCALE_SUFFIX)
    }
