"""What scripts/gpu_bench.py measures, each function in a process of its own; started by it only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    targets: dict[str, str]  # name -> shape, as scripts/make_demo_models.py --target-shape takes it
    drafts: dict[str, str]
    pair: tuple[str, str]  # target and draft that run together on one GPU
    vocab: int
    verify_batches: tuple[int, ...]
    verify_drafts: tuple[int, ...]
    draft_rows: tuple[int, ...]
    lookup: tuple[int, int]  # rows, branches
    fork: tuple[int, int, int]  # layers, blocks, words of 2 bytes in a block of one layer
    out_tokens: int
    batches: tuple[int, ...]


LLAMA_1B = "layers=16,hidden=2048,heads=32,kv_heads=8,head_dim=64,intermediate=8192,vocab=128256"
LLAMA_8B = "layers=32,hidden=4096,heads=32,kv_heads=8,head_dim=128,intermediate=14336,vocab=128256"
# As LLAMA_1B, with heads of the 8B's dimension: only such a draft can be nested in it.
PAIR_1B = "layers=16,hidden=2048,heads=16,kv_heads=8,head_dim=128,intermediate=8192,vocab=128256"
DRAFT_STEPS = 5  # K of the draft round that is timed
REAL = Sizes(
    targets={
        "Llama-3.1-8B": LLAMA_8B,
        "Qwen3-32B": "layers=64,hidden=5120,heads=64,kv_heads=8,head_dim=128,intermediate=25600,vocab=151936",
        # What one of four GPUs holds of a 70B model: a quarter of the heads and of the MLP.
        "Llama-3.1-70B, one of four shards": (
            "layers=80,hidden=8192,heads=16,kv_heads=2,head_dim=128,intermediate=7168,vocab=32064"
        ),
    },
    drafts={
        "Llama-3.2-1B": LLAMA_1B,
        "Qwen3-0.6B": "layers=28,hidden=1024,heads=16,kv_heads=8,head_dim=128,intermediate=3072,vocab=151936",
    },
    pair=(LLAMA_8B, PAIR_1B),
    vocab=128_256,
    verify_batches=(1, 2, 4, 8, 16, 32, 64),
    verify_drafts=tuple(range(9)),
    draft_rows=(8, 16, 32, 64, 128, 256, 512),
    lookup=(256, 64),
    fork=(16, 16, 16 * 8 * 64 * 2),
    out_tokens=256,
    batches=(1, 4, 8),
)
TINY = "layers=2,hidden=64,heads=2,kv_heads=1,head_dim=32,intermediate=128,vocab=512"
DRY = Sizes(
    targets={"tiny": TINY},
    drafts={"tiny": TINY},
    pair=(TINY, TINY),
    vocab=512,
    verify_batches=(1, 2),
    verify_drafts=(0, 3),
    draft_rows=(8,),
    lookup=(8, 8),
    fork=(2, 2, 64),
    out_tokens=8,
    batches=(1, 2),
)


def device_seconds(step: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a step, device work included."""
    import torch

    def finish() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    seconds = []
    step()
    for _ in range(repeats):
        finish()
        began = time.perf_counter()
        step()
        finish()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def kernel_microseconds(launch: Callable[[], Any]) -> float | None:
    """Of the device alone: launches replayed from a CUDA graph. What fits stays in the device's cache."""
    import torch

    if not torch.cuda.is_available():
        launch()
        return None
    from triton.testing import do_bench_cudagraph

    return 1000 * float(do_bench_cudagraph(launch, rep=50, return_mode="median"))


def bandwidth() -> float:
    """Bytes per second that a copy within the device's memory reaches, read and written."""
    import torch
    from device import DEVICE

    source = torch.empty(1 << (30 if DEVICE == "cuda" else 20), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / device_seconds(lambda: target.copy_(source), 9)


def kernels(sizes: Sizes) -> list[dict[str, Any]]:
    """Each kernel beside its PyTorch reference and the bytes that it has to move."""
    import torch
    from device import DEVICE

    from vllm_ssd.kernels.fork import ForkCopy, fork_copy_reference
    from vllm_ssd.kernels.lookup import look_up, look_up_reference
    from vllm_ssd.kernels.noise import perturb, perturb_reference
    from vllm_ssd.kernels.publish import publish, publish_reference
    from vllm_ssd.link.outcome_cache import FIRST_DRAFT

    speed = bandwidth()
    rows, branches, k = *sizes.lookup, 5
    entries = torch.randint(1, k + 1, (rows, branches, FIRST_DRAFT + k), device=DEVICE)
    entries[:, branches // 2, :FIRST_DRAFT] = torch.tensor([1, 1, 0, 1, k], device=DEVICE)  # this one is hit
    states = [torch.ones(rows, dtype=torch.int64, device=DEVICE) for _ in range(3)]  # epochs, rounds, last
    outcome = (
        entries,
        torch.arange(rows, device=DEVICE),
        states[0],
        states[1],
        torch.ones(rows, dtype=torch.int32, device=DEVICE),
        states[2],
        torch.empty(rows, k, dtype=torch.int64, device=DEVICE),
        torch.empty(rows, dtype=torch.int32, device=DEVICE),
    )
    published = (  # the first draft of one branch of each row
        torch.zeros_like(entries),
        torch.arange(rows, device=DEVICE) * branches,
        torch.zeros(rows, dtype=torch.int64, device=DEVICE),
        states[2],
    )
    logits = torch.randn(64, sizes.vocab, device=DEVICE, dtype=torch.bfloat16)
    sampled = (
        logits,
        torch.ones(64, device=DEVICE),
        torch.arange(64, device=DEVICE),
        torch.arange(64, device=DEVICE),
    )
    layers, blocks, words = sizes.fork
    caches = [torch.empty(2 * blocks, words, dtype=torch.bfloat16, device=DEVICE) for _ in range(layers)]
    fork, pairs = ForkCopy(caches), torch.arange(2 * blocks, device=DEVICE).view(2, blocks)
    measured: list[tuple[str, str, Callable[[], Any], Callable[[], Any], int]] = [
        (
            "lookup",
            f"{rows} rows, {branches} branches",
            # The rounds are set back each time, or all but the first launches would miss.
            lambda: (states[1].fill_(1), look_up(*outcome, sizes.vocab)),
            lambda: (states[1].fill_(1), look_up_reference(*outcome, sizes.vocab)),
            rows * (branches * 4 + k) * 8,
        ),
        (
            "publish",
            f"{rows} rows",
            lambda: (published[2].zero_(), publish(*published)),
            lambda: (published[2].zero_(), publish_reference(*published)),
            rows * 6 * 8,
        ),
        (
            "perturb",
            f"64 rows of {sizes.vocab}",
            lambda: perturb(*sampled),
            lambda: perturb_reference(*sampled),
            logits.numel() * 6,
        ),
        (
            "fork copy",
            f"{blocks} blocks of {layers} layers",
            lambda: fork(pairs[0], pairs[1]),
            lambda: fork_copy_reference(caches, pairs[0], pairs[1]),
            2 * layers * blocks * words * 2,
        ),
    ]
    return [
        {
            "name": name,
            "size": size,
            "microseconds": kernel_microseconds(kernel),
            "reference_microseconds": kernel_microseconds(reference),
            "floor_microseconds": 1e6 * num_bytes / speed,
        }
        for name, size, kernel, reference, num_bytes in measured
    ]


def check_pair(sizes: Sizes) -> None:
    """Raise a ValueError if the pair's target cannot contain its draft."""
    from demo.nested import check_nested, parse_shape

    target, draft = (parse_shape(shape) for shape in sizes.pair)
    check_nested(draft, target)


def write_config(folder: Path, shape: str) -> str:
    """A model folder without weights, for load_format "dummy"."""
    from demo.nested import parse_shape
    from demo.shipped import load_tokenizer

    config = parse_shape(shape)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype_name()
    config.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return str(folder)


def dtype_name() -> str:
    """Of weights: what the GPU is made for, and what the CPU's attention knows."""
    from device import DEVICE

    return "bfloat16" if DEVICE == "cuda" else "float32"


def make_llm(model: str, **options: Any) -> Any:
    """A vLLM engine in this process."""
    from vllm import LLM

    defaults = {"dtype": dtype_name(), "max_model_len": 1024, "seed": 0, "skip_tokenizer_init": True}
    return LLM(model, **(defaults | options))


def verify_one(sizes: Sizes, scratch: Path, dry: bool, name: str, shape: str) -> list[dict[str, Any]]:
    """Of one target."""
    llm = make_llm(
        write_config(scratch / "target", shape),
        load_format="dummy",
        enforce_eager=dry,
        max_num_seqs=max(sizes.verify_batches),
    )

    def time_steps(worker: Any) -> list[dict[str, Any]]:
        runner = worker.model_runner

        def step(num_tokens: int) -> None:
            _, hidden_states = runner._dummy_run(num_tokens)
            runner.model.compute_logits(hidden_states)

        found = []
        for batch in sizes.verify_batches:
            for k in sizes.verify_drafts:
                seconds = device_seconds(lambda n=batch * (k + 1): step(n), 7)
                found.append({"target": name, "batch": batch, "k": k, "milliseconds": 1000 * seconds})
        return found

    return llm.collective_rpc(time_steps)[0]


def draft_one(
    sizes: Sizes, scratch: Path, dry: bool, name: str, shape: str, mode: str
) -> list[dict[str, Any]]:
    """Of one draft."""
    import torch
    from demo.nested import parse_shape
    from device import DEVICE

    import vllm_ssd
    from vllm_ssd.draft.engine import DraftEngine
    from vllm_ssd.kernels.publish import publish
    from vllm_ssd.link.messages import Configure
    from vllm_ssd.link.outcome_cache import FIRST_DRAFT

    vllm_ssd.register()
    most = max(sizes.draft_rows)
    engine = DraftEngine(
        Configure(
            model=write_config(scratch / "draft", shape),
            engine_args={
                "dtype": dtype_name(),
                "max_model_len": 1024,
                "block_size": 16 if DEVICE == "cuda" else 32,
                "load_format": "dummy",
            },
            device="cuda:0" if DEVICE == "cuda" else "cpu",
            cores=[0],
            vocab_size=parse_shape(shape).vocab_size,
            num_speculative_tokens=DRAFT_STEPS,
            fanout="global",
            branch_budget=most,
            max_slots=1,
            max_rows=most,
            prefill_chunk=256,
            memory_bytes=1 << 30,
            enforce_eager=mode == "eager",
            is_coupled=True,
            saguaro_c=1.0,
        )
    )
    if DEVICE == "cuda":  # as for a target there
        entries = torch.zeros(1, most, FIRST_DRAFT + DRAFT_STEPS, dtype=torch.int64, device=DEVICE)
        engine.publish_by(partial(publish, entries))
    engine.warm_up(most)
    if engine.has_graphs != (mode == "captured"):
        raise RuntimeError(f"{mode}: the engine's steps are not so")
    # Of the embedding a step reads single rows.
    weights = sum(
        value.numel() * value.element_size()
        for name, value in engine.model.named_parameters()
        if "embed_tokens" not in name
    )
    floor = 1000 * weights / bandwidth()

    def round_of(num_rows: int) -> None:
        """The steps of a round, without forks."""
        engine.run_on_scratch_blocks(num_rows)
        for _ in range(DRAFT_STEPS - 1):
            engine.advance()

    return [
        {
            "draft": name,
            "mode": mode,
            "rows": rows,
            "milliseconds": 1000 * device_seconds(lambda n=rows: engine.run_on_scratch_blocks(n), 9),
            "floor_milliseconds": floor,
            "round_milliseconds": 1000 * device_seconds(lambda n=rows: round_of(n), 9),
            "round_floor_milliseconds": DRAFT_STEPS * floor,
        }
        for rows in sizes.draft_rows
    ]


def end_to_end_one(sizes: Sizes, scratch: Path, dry: bool, method: str) -> list[dict[str, Any]]:
    """Of one method."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    models = scratch / "pair"
    options: dict[str, Any] = {
        "enforce_eager": dry,
        "max_num_seqs": max(sizes.batches),
        "gpu_memory_utilization": 0.1 if dry else 0.7,  # the last method's may not be free yet
    }
    if method != "ar":
        options["speculative_config"] = {
            "method": method,
            "model": str(models / "draft"),
            "num_speculative_tokens": 4,
        }
    llm = make_llm(str(models / "target"), **options)
    params = SamplingParams(temperature=0.0, max_tokens=sizes.out_tokens, ignore_eos=True, detokenize=False)
    rows = []
    for batch in sizes.batches:
        prompts = [
            TokensPrompt(prompt_token_ids=[(7 * i * j + 3) % (sizes.vocab - 1) + 1 for j in range(64)])
            for i in range(1, batch + 1)
        ]
        llm.generate(prompts, params, use_tqdm=False)
        before = llm.collective_rpc("ssd_stats")[0] if method == "ssd" else {}
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        row = {"method": method, "batch": batch, "tok_s": batch * sizes.out_tokens / seconds}
        if before:
            after = llm.collective_rpc("ssd_stats")[0]
            new = {
                name: after[name] - before[name] for name in ("rounds", "lookups", "hits", "critical_path_ns")
            }
            row["hit_rate"] = new["hits"] / max(new["lookups"], 1)
            row["critical_path_microseconds"] = new["critical_path_ns"] / 1000 / max(new["rounds"], 1)
        row["tokens_of_first"] = list(outputs[0].outputs[0].token_ids)[:16]
        rows.append(row)
    return rows


SINGLE: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "kernels_one": lambda sizes, scratch, dry: kernels(sizes),
    "verify_one": verify_one,
    "draft_one": draft_one,
    "end_to_end_one": end_to_end_one,
}
