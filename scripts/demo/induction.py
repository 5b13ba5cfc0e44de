"""Start a model with the circuit that copies from its context, which gradient descent is slow to find.

Layer 0 gets heads that look one and two tokens back and note what they see; layer 1 gets heads that look for
an earlier place whose note equals the present token, and copy the token found there (induction heads). The
other heads copy a little from anywhere. All of it is only an initial value: training goes on from it freely.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

# Channel 0 of every embedding is this many standard deviations: what a head can see in any token.
CONSTANT = 4.0
# Large embeddings, so that the circuit outlives the optimiser's first steps.
EMBEDDING_STD, LOGIT_STD = 0.3, 1.0
# Rotary pairs: fast ones tell positions apart, slow ones hardly turn within a row and compare contents.
FAST_PAIRS, SLOW_PAIR = 14, 20
POSITION_SCORE, CONTENT_SCORE = 4.0, 14.0
# What layer 1 sees is diluted by the notes; and how much the other heads copy from anywhere.
SHARE_OF_STREAM, BROAD_COPY = 0.7, 0.5


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return a random matrix with orthonormal rows; rows <= columns."""
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator))[0].T.contiguous()


@torch.no_grad()
def plant_induction(model: LlamaForCausalLM, seed: int) -> None:
    """Write the circuit into the first two layers, in place."""
    config = model.config
    width, dim, groups = config.hidden_size, config.head_dim, config.num_key_value_heads
    share = config.num_attention_heads // groups
    generator = torch.Generator().manual_seed(seed)
    embedding = model.model.embed_tokens.weight
    embedding *= EMBEDDING_STD / embedding.std()
    size = EMBEDDING_STD
    embedding[:, 0] = CONSTANT * size
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    pairs = dim // 2
    turn = config.rope_parameters["rope_theta"] ** (-torch.arange(pairs) / pairs)
    # The score falls by POSITION_SCORE from the wanted distance to the one beside it.
    gain = (POSITION_SCORE * dim**0.5 / (1 - turn[:FAST_PAIRS].cos()).sum()).sqrt() / CONSTANT
    slow = torch.cat([torch.arange(SLOW_PAIR, pairs), torch.arange(SLOW_PAIR, pairs) + pairs])
    content = (CONTENT_SCORE * dim**0.5 / len(slow)) ** 0.5 / SHARE_OF_STREAM
    rest = torch.zeros(pairs - FAST_PAIRS)

    basis = _orthonormal(2 * groups * dim, width, generator).view(2, groups, dim, width)
    basis[..., 0] = 0
    reads, notes = basis
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    for group in range(groups):
        rows = slice(group * dim, (group + 1) * dim)
        head = slice(group * share * dim, group * share * dim + dim)
        angle = (group + 1) * turn[:FAST_PAIRS]
        first.q_proj.weight[head, 0] = 0
        first.q_proj.weight[head, 0][:FAST_PAIRS] = gain
        first.k_proj.weight[rows, 0] = gain * torch.cat([angle.cos(), rest, angle.sin(), rest])
        first.v_proj.weight[rows] = reads[0]
        first.o_proj.weight[:, head] = 2 * size * notes[group].T

        for layer in model.model.layers[1:]:
            layer.self_attn.v_proj.weight[rows] = reads[group]
            for start in range(group * share * dim, (group + 1) * share * dim, dim):
                layer.self_attn.o_proj.weight[:, start : start + dim] = BROAD_COPY * size * reads[group].T
        second.o_proj.weight[:, head] = 2 * size * reads[group].T
        second.q_proj.weight[head] = 0
        second.q_proj.weight[head][slow] = content * reads[0][: len(slow)]
        second.k_proj.weight[rows] = 0
        second.k_proj.weight[rows][slow] = content * notes[group][: len(slow)]
    model.model.norm.weight.fill_(LOGIT_STD / (size * width**0.5))
