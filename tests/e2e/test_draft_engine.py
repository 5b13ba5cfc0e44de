"""The draft engine on real vLLM: branches over shared blocks equal a full recomputation."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from engines import Engines
from target import Setup, Target
from transformers import LlamaForCausalLM

from vllm_ssd.draft.rows import Place, Rows, RowSampling
from vllm_ssd.kernels.noise import perturb_reference
from vllm_ssd.kernels.publish import publish_reference
from vllm_ssd.link.outcome_cache import OutcomeCache

pytestmark = pytest.mark.timeout(240)

K, BLOCK, NUM_CANDIDATES, VOCAB = 4, 32, 16, 512
TOLERANCE = 2e-4  # of logits of order one; what the copy leaves out changes them by more than a tenth
SETUP = Setup(
    num_drafts=K, budget=12, max_slots=4, max_rows=48, prefill_chunk=64, block_size=BLOCK, vocab=VOCAB
)


class Model:
    """`DraftEngine`, and the logits behind its candidates."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.logits = torch.empty(0)
        stock = engine.model.compute_logits

        def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
            self.logits = stock(hidden)
            return self.logits

        engine.model.compute_logits = compute_logits
        self.width = -(-engine.max_model_len // BLOCK)

    def run(self, *rows: tuple[list[int], int, list[int]]) -> tuple[npt.NDArray[np.int64], torch.Tensor]:
        """Rows of (tokens, first position, blocks): candidates and logits after each row's last token."""
        tables = np.zeros((len(rows), self.width), dtype=np.int32)
        for table, (_, _, blocks) in zip(tables, rows, strict=True):
            table[: len(blocks)] = blocks
        lengths = [len(tokens) for tokens, _, _ in rows]
        batch = Rows(
            np.concatenate([np.array(tokens, dtype=np.int64) for tokens, _, _ in rows]),
            np.concatenate([np.arange(first, first + len(tokens)) for tokens, first, _ in rows]),
            np.array(lengths, dtype=np.int32),
            tables,
            np.cumsum(lengths) - 1,
        )
        predictions = self.engine.forward(batch)
        found = self.engine.likeliest([Place(predictions, row) for row in range(len(rows))], NUM_CANDIDATES)
        return found.tokens, self.logits.clone()


@pytest.fixture(scope="module")
def model(engines: Engines, pair: tuple[Path, Path]) -> Iterator[Model]:
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm_ssd.draft.engine import DraftEngine

    engines.close()  # one of them has this process's distributed state
    asked = SETUP.configure(
        model=str(pair[1]),
        engine_args={"dtype": "float32", "max_model_len": 512, "block_size": BLOCK},
    )
    yield Model(DraftEngine(asked))
    cleanup_dist_env_and_memory()


@contextmanager
def replaying(engine: Any) -> Iterator[None]:
    """Steps as from CUDA graphs; here they merely compute again, with the same memory for all rounds."""

    memory: dict[torch.Size, torch.Tensor] = {}

    def perturb(logits: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        found = perturb_reference(logits, *args)
        return memory.setdefault(found.shape, found).copy_(found)

    def captured_logits(inputs: Any) -> Any:
        # The CPU's metadata has to be built for each step, which a graph could not do.
        return lambda: engine._logits(inputs, engine._metadata(inputs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_captured_logits", captured_logits)
        engine.capture_graphs([4, 24, 48], perturb, lambda step: step)
    try:
        yield
    finally:
        engine._graphs = engine._graph = None


@pytest.fixture(params=["launched", "replayed"])
def stepping(request: pytest.FixtureRequest, model: Model) -> Iterator[Model]:
    """The model, as the host launches its steps and as they are replayed."""
    with replaying(model.engine) if request.param == "replayed" else nullcontext():
        yield model


def tokens_of(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2, VOCAB) for _ in range(length)]


def branch_logits(model: Model, trunk: list[int], copy: bool) -> list[tuple[list[int], torch.Tensor]]:
    """Three branches after the trunk, run K steps: (tokens, logits after the last) of each."""
    engine = model.engine
    shared, partial = divmod(len(trunk), BLOCK)
    blocks = list(range(1, 1 + shared + 1))
    candidates, _ = model.run((trunk, 0, blocks))
    chains = [[int(token)] for token in candidates[0, :3]]
    private = [[20 + 3 * i, 21 + 3 * i] for i in range(3)]
    # What other requests left behind in these blocks.
    for own in private:
        model.run((tokens_of(99, 2 * BLOCK), 0, own))
    if partial and copy:
        engine.copy_blocks(np.full(3, blocks[shared]), np.array([own[0] for own in private]))
    for _ in range(K):
        rows = [
            (chain[-1:], len(trunk) + len(chain) - 1, blocks[:shared] + own)
            for chain, own in zip(chains, private, strict=True)
        ]
        candidates, logits = model.run(*rows)
        for chain, row in zip(chains, candidates, strict=True):
            chain.append(int(row[0]))
    return [([*trunk, *chain[:-1]], row) for chain, row in zip(chains, logits, strict=True)]


@pytest.mark.parametrize("length", [5, 31, 32, 33, 45, 63, 64, 90])
def test_branches_equal_a_full_recomputation(model: Model, length: int) -> None:
    trunk = tokens_of(length, length)
    for tokens, logits in branch_logits(model, trunk, copy=True):
        candidates, fresh = model.run((tokens, 0, [40, 41, 42, 43]))
        torch.testing.assert_close(logits, fresh[0], atol=TOLERANCE, rtol=0)
        assert candidates[0, 0] == logits.argmax()
    # The trunk's own blocks are as they were.
    blocks = list(range(1, 2 + length // BLOCK))
    _, again = model.run((trunk[-1:], length - 1, blocks))
    _, fresh = model.run((trunk, 0, [40, 41, 42, 43]))
    torch.testing.assert_close(again, fresh, atol=TOLERANCE, rtol=0)


def test_without_the_copy_they_would_not(model: Model) -> None:
    """The test above notices a missing copy of the partial block."""
    worst = 0.0
    for tokens, logits in branch_logits(model, tokens_of(45, 45), copy=False):
        _, fresh = model.run((tokens, 0, [40, 41, 42, 43]))
        worst = max(worst, float((logits - fresh[0]).abs().max()))
    assert worst > 100 * TOLERANCE


def test_prefill_in_chunks_equals_prefill_at_once(model: Model) -> None:
    tokens = tokens_of(7, 100)
    _, whole = model.run((tokens, 0, [1, 2, 3, 4]))
    for first in range(0, 100, 24):
        other = (tokens_of(first, 3), 0, [9])  # another row in the same steps
        _, logits = model.run((tokens[first : first + 24], first, [5, 6, 7, 8]), other)
    torch.testing.assert_close(logits[0], whole[0], atol=TOLERANCE, rtol=0)


class TransformersOracle:
    """The draft model by full recomputation in transformers."""

    def __init__(self, path: Path) -> None:
        self._model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._known: dict[tuple[int, ...], npt.NDArray[np.int64]] = {}

    @torch.inference_mode()
    def rank(self, tokens: list[int]) -> npt.NDArray[np.int64]:
        key = tuple(tokens)
        if key not in self._known:
            logits = self._model(input_ids=torch.tensor([tokens])).logits[0, -1]
            self._known[key] = logits.argsort(descending=True).numpy()
        return self._known[key]


def test_rounds_on_the_real_engine(stepping: Model, pair: tuple[Path, Path]) -> None:
    play_rounds(Target(SETUP, stepping.engine, TransformersOracle(pair[1])))


@pytest.mark.parametrize("is_replayed", [False, True], ids=["launched", "replayed"])
def test_rounds_whose_steps_publish_by_themselves(
    model: Model, pair: tuple[Path, Path], is_replayed: bool
) -> None:
    engine = model.engine
    tables: list[torch.Tensor] = []

    def table(cache: OutcomeCache) -> AnnouncedAlone:
        tables.append(torch.from_numpy(cache.entries))
        return AnnouncedAlone(cache)

    engine.publish_by(lambda *rows: [publish_reference(entries, *rows) for entries in tables])
    try:
        with replaying(engine) if is_replayed else nullcontext():
            play_rounds(Target(SETUP, engine, TransformersOracle(pair[1]), table=table))
    finally:
        engine._publish = None


class AnnouncedAlone:
    """As `GpuOutcomeCache`, in the host's memory."""

    def __init__(self, cache: OutcomeCache) -> None:
        self.open_branches, self.close_branches = cache.open_branches, cache.close_branches

    def publish(self, slot: int, first: int, depth: int, tokens: npt.NDArray[np.int64]) -> None:
        """The step has done so."""


def play_rounds(target: Target) -> None:
    """Hits, misses, n-gram drafts, early outcomes: published chains are the draft's greedy decoding."""
    rng = random.Random(3)
    shared = tokens_of(50, 70)
    for slot, prompt in enumerate((tokens_of(51, 1), tokens_of(52, 30), shared, [*shared, 7, 8])):
        target.start(slot, prompt)
        target.run_until_idle()
    for turn in range(12):
        if turn == 6:  # preempted and resumed
            tokens = target.live[1].tokens
            target.stop(1)
            target.start(1, tokens)
        for _ in range(rng.choice([1, 2, 4])):
            target.step()
        for slot in list(target.live):
            target.decide_like(slot, rng)
    target.run_until_idle()
    assert target.hits > 10
    assert target.counters["adopted"] > 10
    target.finish()


def test_advancing_equals_feeding_the_drafts(stepping: Model) -> None:
    """Over the end of a block, too, and with the rows at different lengths."""
    engine = stepping.engine
    rows = [(tokens_of(60, 30), [1, 2]), (tokens_of(61, 9), [3, 4]), (tokens_of(62, 31), [5, 6])]
    for tokens, blocks in rows:
        stepping.run((tokens, 0, blocks))
    chains = [[7], [8], [9]]
    for step in range(K):
        if step == 0:
            first = [([7 + row], len(tokens), blocks) for row, (tokens, blocks) in enumerate(rows)]
            drafts = stepping.run(*first)[0][:, 0]
        else:
            drafts = engine.advance().drafts
        for chain, draft in zip(chains, drafts.tolist(), strict=True):
            chain.append(draft)
    for row, ((tokens, _), chain) in enumerate(zip(rows, chains, strict=True)):
        _, fresh = stepping.run((tokens + chain[:-1], 0, [40, 41, 42, 43]))
        assert chain[-1] == fresh[0].argmax(), row


def test_sampled_branches_are_the_same_from_a_graph(model: Model) -> None:
    """Greedy rows between them, too; and a graph forgets how the rows of the last round were sampled."""
    engine = model.engine
    trunks = [(tokens_of(60, 30), [1, 2]), (tokens_of(61, 9), [3, 4]), (tokens_of(62, 31), [5, 6])]
    for tokens, blocks in trunks:
        model.run((tokens, 0, blocks))

    def rounds() -> list[tuple[list[int], torch.Tensor]]:
        steps = []
        for temperatures in ([0.7, 0.0, 1.3], [0.0, 0.0, 0.9], None):
            steps += [engine.forward(branches(temperatures)), engine.advance(), engine.advance()]
            assert (engine._graph is not None) == engine.has_graphs
        return [(step.drafts.tolist(), step.logits) for step in steps]

    def branches(temperatures: list[float] | None) -> Rows:
        sampling = temperatures and RowSampling(
            np.array(temperatures, dtype=np.float32),
            np.array([5, 6, 2**62]),
            np.zeros(3, dtype=np.int32),
            np.ones(3, dtype=np.float32),
        )
        tables = np.array([blocks for _, blocks in trunks], dtype=np.int32)
        lengths = np.array([len(tokens) for tokens, _ in trunks])
        return Rows(
            np.array([7, 8, 9]), lengths, np.ones(3, dtype=np.int32), tables, np.arange(3), sampling or None
        )

    launched = rounds()
    with replaying(engine):
        replayed = rounds()
    for (drafts, logits), (same_drafts, same_logits) in zip(launched, replayed, strict=True):
        assert drafts == same_drafts
        torch.testing.assert_close(logits, same_logits, atol=TOLERANCE, rtol=0)


def test_what_a_graph_cannot_do_is_launched(model: Model) -> None:
    engine = model.engine
    table = np.ones((1, 1), dtype=np.int32)

    def is_replayed(
        num_tokens: int, wanted: list[int], top_k: int = 0, top_p: float = 1.0, rows: int = 1
    ) -> bool:
        per_row = np.ones(rows, dtype=np.int32)
        sampling = RowSampling(
            np.ones(len(wanted), dtype=np.float32),
            np.ones(len(wanted), dtype=np.int64),
            np.full(len(wanted), top_k, dtype=np.int32),
            np.full(len(wanted), top_p, dtype=np.float32),
        )
        tokens = np.arange(num_tokens * rows)
        positions = np.tile(np.arange(num_tokens), rows)
        batch = Rows(
            tokens, positions, num_tokens * per_row, table.repeat(rows, axis=0), np.array(wanted), sampling
        )
        engine.forward(batch)
        return engine._graph is not None

    with replaying(engine):
        assert is_replayed(1, [0])
        assert not is_replayed(2, [1])
        assert not is_replayed(2, [0, 1])
        assert not is_replayed(1, [0], top_k=3)
        assert not is_replayed(1, [0], top_p=0.9)
        assert is_replayed(1, list(range(48)), rows=48)
        assert not is_replayed(1, list(range(49)), rows=49)


def test_it_computes_on_without_process_groups(model: Model) -> None:
    """The last test here: the groups do not come back."""
    request = (tokens_of(70, 20), 0, [1])
    _, before = model.run(request)
    threads = num_gloo_threads()
    model.engine.leave_process_groups()
    _, after = model.run(request)
    assert torch.equal(before, after)
    assert num_gloo_threads() <= threads - 10


def num_gloo_threads() -> int:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("gloo_tcp_loop")


@pytest.mark.parametrize("is_replayed", [False, True])
def test_what_the_target_has_not_is_never_drafted(
    model: Model, monkeypatch: pytest.MonkeyPatch, is_replayed: bool
) -> None:
    """A draft may have more tokens, which it neither chooses, nor ranks, nor draws from."""
    engine, few = model.engine, 20
    tokens = tokens_of(5, 24)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "vocab_size", few)
        with replaying(engine) if is_replayed else nullcontext():
            found, logits = model.run(*(([token], 0, [row]) for row, token in enumerate(tokens)))
            drafts = engine.advance().drafts
    assert (logits[:, :few].argmax(dim=-1).numpy() == found[:, 0]).all()
    assert (logits.argmax(dim=-1) >= few).any()
    assert found.max() < few
    assert drafts.max() < few
