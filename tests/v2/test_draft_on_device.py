"""The draft engine where it will run: its branches are off by no more than a plain run is.

On a GPU in bfloat16, with the steps that CUDA graphs replay and without; elsewhere in float32.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device import DEVICE
from engines import Engines
from transformers import LlamaForCausalLM
from wire import configure

from vllm_ssd.draft.rows import Rows, RowSampling
from vllm_ssd.kernels.noise import perturb_reference

Pair = tuple[Path, Path]

pytestmark = pytest.mark.timeout(150)

VOCAB, K, NUM_BRANCHES = 512, 4, 3
BLOCK = 16 if DEVICE == "cuda" else 32
MAX_LEN = 256
PRIVATE_BLOCKS = 100  # and on: the branches'


@pytest.fixture(scope="module")
def engine(engines: Engines, pair: Pair) -> Iterator[Any]:
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm_ssd.draft.engine import DraftEngine

    engines.close()  # one of them has this process's distributed state
    engine = DraftEngine(
        configure(
            model=str(pair[1]),
            device="cuda:0" if DEVICE == "cuda" else "cpu",
            engine_args={
                "dtype": "bfloat16" if DEVICE == "cuda" else "float32",
                "max_model_len": MAX_LEN,
                "block_size": BLOCK,
            },
            vocab_size=VOCAB,
            max_rows=24,
            prefill_chunk=MAX_LEN,  # compiled code takes no step longer than that
            enforce_eager=DEVICE == "cpu",
        )
    )
    if DEVICE == "cuda":  # which captures the graphs; vLLM's kernel for top-k does not run interpreted
        engine.warm_up(24)
    yield engine
    del engine
    cleanup_dist_env_and_memory()


@pytest.fixture(params=["launched", "replayed"] if DEVICE == "cuda" else ["launched"])
def stepping(request: pytest.FixtureRequest, engine: Any) -> Iterator[Any]:
    """The engine, with CUDA graphs and without."""
    graphs = engine._graphs
    assert engine.has_graphs == (DEVICE == "cuda")
    if request.param == "launched":
        engine._graphs = None
    yield engine
    engine._graphs = graphs


@pytest.fixture(scope="module")
def exact(pair: Pair) -> LlamaForCausalLM:
    """The draft model in float32, on the host."""
    return LlamaForCausalLM.from_pretrained(pair[1], dtype=torch.float32).eval()


def rows_of(*rows: tuple[list[int], int, list[int]], sampling: RowSampling | None = None) -> Rows:
    """Rows of (tokens, first position, blocks); the prediction after each row's last token is wanted."""
    tables = np.zeros((len(rows), -(-MAX_LEN // BLOCK)), dtype=np.int32)
    for table, (_, _, blocks) in zip(tables, rows, strict=True):
        table[: len(blocks)] = blocks
    lengths = [len(tokens) for tokens, _, _ in rows]
    return Rows(
        np.concatenate([np.array(tokens) for tokens, _, _ in rows]),
        np.concatenate([np.arange(first, first + len(tokens)) for tokens, first, _ in rows]),
        np.array(lengths, dtype=np.int32),
        tables,
        np.cumsum(lengths) - 1,
        sampling,
    )


def tokens_of(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(2, VOCAB) for _ in range(length)]


def open_branches(engine: Any, trunk: list[int]) -> list[tuple[list[int], int, list[int]]]:
    """The first rows of branches after the trunk, whose blocks held something else before."""
    shared = len(trunk) // BLOCK
    blocks = list(range(1, shared + 2))
    first = engine.forward(rows_of((trunk, 0, blocks)))
    private = [[PRIVATE_BLOCKS + 2 * i, PRIVATE_BLOCKS + 2 * i + 1] for i in range(NUM_BRANCHES)]
    for own in private:
        engine.forward(rows_of((tokens_of(2 * BLOCK), 0, own)))
    engine.copy_blocks(np.full(NUM_BRANCHES, blocks[shared]), np.array([own[0] for own in private]))
    candidates = first.logits[0].topk(NUM_BRANCHES).indices.tolist()
    return [
        ([token], len(trunk), blocks[:shared] + own) for token, own in zip(candidates, private, strict=True)
    ]


@pytest.mark.parametrize("length", [5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 2])
def test_branches_are_off_by_no_more_than_a_plain_run(
    stepping: Any, exact: LlamaForCausalLM, length: int
) -> None:
    trunk = tokens_of(length)
    branches = open_branches(stepping, trunk)
    chains = [list(tokens) for tokens, _, _ in branches]
    found: list[tuple[list[int], torch.Tensor]] = []
    for step in range(K):
        predictions = stepping.forward(rows_of(*branches)) if step == 0 else stepping.advance()
        found += [([*trunk, *chain], row) for chain, row in zip(chains, predictions.logits, strict=True)]
        for chain, draft in zip(chains, predictions.drafts.tolist(), strict=True):
            chain.append(draft)
    error, plain_error = 0.0, 0.0
    for tokens, logits in found:
        with torch.inference_mode():
            true = exact(input_ids=torch.tensor([tokens])).logits[0, -1]
        plain = stepping.forward(rows_of((tokens, 0, [40, 41, 42, 43, 44]))).logits[0]
        error = max(error, float((logits.cpu() - true).abs().max()))
        plain_error = max(plain_error, float((plain.cpu() - true).abs().max()))
    assert error <= 2 * plain_error + 1e-4


def test_sampled_branches_add_the_shared_noise(stepping: Any) -> None:
    """As PyTorch computes it, and greedy rows without."""
    trunk = tokens_of(20)
    branches = open_branches(stepping, trunk)
    plain = stepping.forward(rows_of(*branches))
    stepping.advance()
    sampling = RowSampling(
        np.array([0.7, 0.0, 1.3], dtype=np.float32),
        np.array([5, 6, 2**62]),
        np.zeros(3, dtype=np.int32),
        np.ones(3, dtype=np.float32),
    )
    sampled = stepping.forward(rows_of(*branches, sampling=sampling))
    expected = perturb_reference(
        plain.logits.cpu(),
        torch.from_numpy(sampling.temperatures),
        torch.from_numpy(sampling.seeds),
        torch.full((NUM_BRANCHES,), len(trunk)),
    )
    torch.testing.assert_close(sampled.logits.cpu(), expected, atol=2e-3, rtol=0)
    assert sampled.drafts.tolist() == sampled.logits.argmax(dim=-1).tolist()
