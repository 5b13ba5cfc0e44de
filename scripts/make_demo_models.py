"""Write the demo pair DIR/target and DIR/draft: the shipped weights (as they are or grown), newly trained
or random ones.

    make_demo_models.py --out DIR                      expand the shipped weights (seconds, offline)
    make_demo_models.py --out DIR --train              train them anew first, into scripts/demo/weights
    make_demo_models.py --out DIR --report             also measure the pair; figures to DIR/report.json
    make_demo_models.py --out DIR --grow --dtype bfloat16 \
--target-shape layers=28,hidden=768,intermediate=2048,heads=12,kv_heads=6 \
--draft-shape layers=3,hidden=1024,intermediate=2816,heads=16,kv_heads=8
                                                   the shipped pair at the cost of larger models
    make_demo_models.py --out DIR --random --target-shape layers=16,hidden=1024,intermediate=2816,heads=16,\
kv_heads=4 --draft-shape layers=2,hidden=512,intermediate=1408,heads=8,kv_heads=4 --agreement 0.8
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from demo.evaluate import evaluate
from demo.grown import write_grown
from demo.nested import find_epsilon, parse_shape, write_random
from demo.prompts import demo_prompts
from demo.recipe import train_pair
from demo.shipped import WEIGHTS, load_model, load_tokenizer, write_models

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for target/ and draft/")
    parser.add_argument("--seed", type=int, default=1, help="of training and of random weights")
    parser.add_argument("--report", action="store_true", help="measure the pair that was written")
    parser.add_argument("--train", action="store_true", help="train the weights anew and pack them")
    parser.add_argument("--work", type=Path, default=Path("demo_training"), help="folder for checkpoints")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the packed weights")
    random = parser.add_argument_group("pairs of any Llama shape, for speed runs")
    kind = random.add_mutually_exclusive_group()
    kind.add_argument("--random", action="store_true", help="write random nested weights")
    kind.add_argument("--grow", action="store_true", help="write the shipped weights inside larger shapes")
    random.add_argument("--target-shape", default="layers=12", help="for example layers=32,hidden=4096,...")
    random.add_argument("--draft-shape", default="layers=2")
    random.add_argument("--agreement", type=float, default=0.8, help="share of equal greedy tokens")
    random.add_argument("--epsilon", type=float, help="skip the search for the agreement: for large shapes")
    random.add_argument("--dtype", choices=DTYPES, default="float32", help="of the random weights")
    return parser.parse_args()


def write_random_pair(options: argparse.Namespace) -> None:
    """Write the nested random pair that the options describe."""
    target, draft = parse_shape(options.target_shape), parse_shape(options.draft_shape)
    epsilon = options.epsilon
    if epsilon is None:
        epsilon, reached = find_epsilon(draft, target, options.agreement, options.seed)
        print(f"epsilon {epsilon:.5f}: greedy agreement {reached:.3f} on random contexts")
    dtype = DTYPES[options.dtype]
    write_random(options.out / "draft", draft, options.seed, dtype)
    write_random(options.out / "target", target, options.seed, dtype, draft, epsilon)


def main() -> None:
    """Run the command line."""
    options = parse_arguments()
    if options.random:
        write_random_pair(options)
        return
    if options.grow:
        for name, shape in (("target", options.target_shape), ("draft", options.draft_shape)):
            write_grown(options.out / name, name, parse_shape(shape), options.seed, DTYPES[options.dtype])
        return
    if options.train:
        train_pair(options.seed, options.work, options.weights)
    write_models(options.out, options.weights)
    tokenizer = load_tokenizer(options.weights)
    prompts = demo_prompts(tokenizer, 12, options.seed, 64, 64, shared_prefix_fraction=0.0)
    lines = [json.dumps({"prompt": tokenizer.decode(prompt, skip_special_tokens=True)}) for prompt in prompts]
    (options.out / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    if options.report:
        models = (load_model(name, options.weights) for name in ("target", "draft"))
        figures = evaluate(*models, load_tokenizer(options.weights))
        print(json.dumps(figures, indent=1))
        (options.out / "report.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
