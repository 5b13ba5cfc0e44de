"""Make a draft for a target that has none: a few of its layers, trained on text that the target writes
itself.

    python -m scripts.distill --target TARGET --layers 0,1,2,3,26,27,28,29 --out DRAFT

The draft starts from the named layers of the target and shares its embedding, last norm and output layer,
which stay as they are. No data set is needed: the target writes user turns, some after the beginning of a
request of a known kind, then answers them at temperatures 0 to 1. The loss is the cross-entropy against the
target's own distribution over the most frequent tokens (knowledge distillation as in DistillSpec, arXiv
2310.08461).

DRAFT/work holds the text, the target's hidden states and the last checkpoint: started again, the script
continues. Every --report steps it prints, on text it never trains on, the share of greedy agreement (how
often a draft would be accepted at temperature 0) and 1 - TV (how often at temperature 1). Delete DRAFT/work
when it is done.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

# Beginnings of requests; after the empty one the target chooses what is asked. A passage is a long input.
OPENINGS = json.loads(Path(__file__).with_name("distill_openings.json").read_text())
TEMPERATURES = (0.0, 0.0, 0.6, 1.0)
MAX_TOKENS = 768  # of a text
SHARD = 256  # texts of a file
CORES = os.sched_getaffinity(0)


@dataclass
class Text:
    """One conversation: `[tokens]` ids, and the target's last hidden states `[tokens, hidden]`, bfloat16."""

    tokens: torch.Tensor
    hidden: torch.Tensor


def write_shards(target: Path, work: Path, num_texts: int) -> None:
    """Let the target write `num_texts` conversations; a shard that is there is not written again."""
    count = math.ceil(num_texts / SHARD)
    missing = [index for index in range(count) if not (work / f"text{index}.json").exists()]
    if not missing:
        return
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine ends with what it is for
    from vllm import LLM

    llm = LLM(str(target), max_model_len=MAX_TOKENS + 256, max_num_seqs=SHARD // 2)
    for index in missing:
        start = time.monotonic()
        texts = converse(llm, random.Random(index))
        write_whole(work / f"text{index}.json", partial(Path.write_text, data=json.dumps(texts)))
        tokens = sum(map(len, texts))
        say(f"shard {index}: {tokens} tokens, {tokens / (time.monotonic() - start):.0f} tokens/s")
    llm.llm_engine.engine_core.shutdown()


def converse(llm: Any, rng: random.Random) -> list[list[int]]:
    """Return the token ids of one shard of conversations."""
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    before, after = template_around(tokenizer)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    def write(prompts: list[list[int]], params: list[Any]) -> list[Any]:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    is_passage = [rng.random() < 0.2 for _ in range(SHARD)]
    starts = [rng.choice(OPENINGS["passage" if long else "short"]) for long in is_passage]
    for_turns = [
        SamplingParams(
            temperature=rng.choice((0.6, 0.8)),
            max_tokens=320 if long else 96,
            min_tokens=200 if long else 4,
            stop_token_ids=ids(after)[:1],
        )
        for long in is_passage
    ]
    turns = write([ids(before + start) for start in starts], for_turns)
    prompts = [ids(before + start + turn.text + after) for start, turn in zip(starts, turns, strict=True)]
    for_answers = [
        SamplingParams(temperature=rng.choice(TEMPERATURES), max_tokens=rng.choice((128, 256, 320)))
        for _ in prompts
    ]
    answers = write(prompts, for_answers)
    return [(prompt + [*one.token_ids])[:MAX_TOKENS] for prompt, one in zip(prompts, answers, strict=True)]


def template_around(tokenizer: Any) -> tuple[str, str]:
    """Return what the chat template puts before and after a user's turn; a line each without a template."""
    if tokenizer.chat_template is None:
        return "Question: ", "\nAnswer:"
    mark = "USER-TURN"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
    )
    before, _, after = text.partition(mark)
    return before, after


def states_of(model: Any, sequences: list[torch.Tensor]) -> torch.Tensor:
    """Return the model's last hidden states of these token ids, `[tokens of all, hidden]`, from one batch."""
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(model.device)
    lengths = torch.tensor([len(ids) for ids in sequences], device=model.device)
    is_token = torch.arange(tokens.shape[1], device=model.device) < lengths[:, None]
    # No mask is needed: padding comes last, and no token sees what comes after it.
    with torch.autocast(model.device.type, torch.bfloat16):
        return model.model(tokens, use_cache=False).last_hidden_state[is_token]


@torch.no_grad()
def add_hidden(target: Any, work: Path) -> list[Text]:
    """Return all texts with the target's last hidden states, which are computed once and kept in `work`."""
    texts = []
    for path in sorted(work.glob("text*.json"), key=lambda path: int(path.stem[4:])):
        shard = [Text(torch.tensor(ids), torch.empty(0)) for ids in json.loads(path.read_text())]
        shard.sort(key=lambda text: len(text.tokens))
        kept = path.with_suffix(".safetensors")
        if not kept.exists():
            say(f"hidden states of {path.name}")
            groups = [[text.tokens for text in shard[row : row + 8]] for row in range(0, len(shard), 8)]
            states = torch.cat([states_of(target, group).cpu().to(torch.bfloat16) for group in groups])
            write_whole(kept, partial(save_file, {"states": states}))
        states = load_file(kept)["states"].split([len(text.tokens) for text in shard])
        texts += [Text(text.tokens, hidden) for text, hidden in zip(shard, states, strict=True)]
    return texts


def cut(target: Any, layers: list[int]) -> Any:
    """Turn the target into the draft of these layers; only they can learn."""
    kept = [target.model.layers[index] for index in layers]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    target.model.layers = torch.nn.ModuleList(kept)
    target.config.num_hidden_layers = len(layers)
    target.requires_grad_(False)
    target.model.layers.requires_grad_(True)
    return target.float()


def batches(texts: list[Text], size: int, rng: random.Random) -> Iterator[list[Text]]:
    """Yield the texts in batches of like length, in random order, for ever."""
    while True:
        order = sorted(texts, key=lambda text: (len(text.tokens) // 32, rng.random()))
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        rng.shuffle(groups)
        yield from groups


def both_states(draft: Any, group: list[Text]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the draft's and the target's last hidden states of a batch, `[tokens, hidden]` each."""
    wanted = torch.cat([text.hidden for text in group])
    return states_of(draft, [text.tokens for text in group]), wanted.to(draft.device)


class CrossEntropy(torch.autograd.Function):
    """The mean cross-entropy to the target's distribution, in bfloat16, with its gradient in one pass."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, wanted: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Take both models' hidden states `[tokens, hidden]` and the output rows `[vocabulary, hidden]`."""
        target = F.linear(wanted, head).softmax(-1)
        own = F.linear(states.to(head.dtype), head).log_softmax(-1)
        loss = -torch.linalg.vecdot(target, own).float().mean()
        ctx.save_for_backward(own.exp_().sub_(target), head)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Softmax less target, as for every cross-entropy."""
        difference, head = ctx.saved_tensors
        return (difference @ head).float() * (grad / len(difference)), None, None


@torch.no_grad()
def evaluate(draft: Any, held_out: list[Text]) -> tuple[float, float]:
    """Return greedy agreement and 1 - TV over all tokens of the vocabulary, means over the held-out texts."""
    head, sums, count = draft.lm_head.weight.to(torch.bfloat16), torch.zeros(2), 0
    for text in held_out:
        states, wanted = both_states(draft, [text])
        own = F.linear(states.to(head.dtype), head).float().softmax(-1)
        target = F.linear(wanted, head).float().softmax(-1)
        overlap = torch.minimum(own, target).sum()
        sums += torch.stack([(own.argmax(-1) == target.argmax(-1)).sum(), overlap]).cpu()
        count += len(text.tokens)
    return (sums[0] / count).item(), (sums[1] / count).item()


def train(draft: Any, texts: list[Text], args: Namespace, work: Path) -> None:
    """Train to the last step, from the checkpoint if there is one."""
    held_out, texts = texts[: SHARD : SHARD // 64], texts[SHARD:]
    counts = Counter(token for text in texts for token in text.tokens.tolist())
    frequent = torch.tensor(sorted(token for token, _ in counts.most_common(args.loss_tokens)))
    head = draft.lm_head.weight[frequent.to(draft.device)].to(torch.bfloat16)
    learning = [value for value in draft.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, args.steps))
    checkpoint, step, spent = work / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        draft.model.layers.load_state_dict(state["layers"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step, spent = state["step"], state["seconds"]
        say(f"continuing at step {step}")
    started, losses = time.monotonic() - spent, []
    stream = batches(texts, args.batch, random.Random(step))
    while True:
        if step % args.report == 0 or step == args.steps:
            seconds = time.monotonic() - started
            agreement, overlap = evaluate(draft, held_out)
            loss, minutes = sum(losses) / max(1, len(losses)), seconds / 60
            say(f"step {step}, {minutes:.1f} min, loss {loss:.3f}: agree {agreement:.3f}, 1-TV {overlap:.3f}")
            point = {"step": step, "seconds": seconds, "agreement": agreement, "overlap": overlap}
            with (work / "curve.jsonl").open("a") as file:
                print(json.dumps(point), file=file)
            state = {"layers": draft.model.layers.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"schedule": schedule.state_dict(), "step": step, "seconds": seconds}
            write_whole(checkpoint, partial(torch.save, state))
            losses = []
        if step >= args.steps:
            return
        loss = CrossEntropy.apply(*both_states(draft, next(stream)), head)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step += 1


def rate_at(step: int, steps: int) -> float:
    """Return the learning rate's factor: 100 steps up, then down a cosine to 2 %."""
    return min(1.0, step / 100) * (0.51 + 0.49 * math.cos(math.pi * min(1.0, step / steps)))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file that is never seen half written."""
    part = path.with_suffix(".part")
    write(part)
    part.rename(path)


def say(text: str) -> None:
    """Print with the time of day."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def main() -> None:
    """Write text, compute hidden states, train, save the draft."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--layers", required=True, help="the target's layers to start from: 0,1,28,29")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=8192, help="conversations to write")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=8, help="texts of a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate at its height")
    parser.add_argument("--loss-tokens", type=int, default=16384, help="tokens in the loss")
    parser.add_argument("--report", type=int, default=250, help="steps between reports and checkpoints")
    args = parser.parse_args()
    if args.texts <= SHARD:
        parser.error(f"--texts: {SHARD} are held out, so more are needed")
    work = args.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    write_shards(args.target, work, args.texts)
    os.sched_setaffinity(0, CORES)  # vLLM has bound this thread to one
    torch.set_num_threads(len(CORES))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16).to(device)
    texts = add_hidden(target, work)
    draft = cut(target, [int(layer) for layer in args.layers.split(",")])
    train(draft, texts, args, work)
    draft.to(torch.bfloat16).save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.target).save_pretrained(args.out)
    say(f"the draft is in {args.out}")


if __name__ == "__main__":
    main()
