"""``python -m knowedit_ext.world train --out DIR`` and ``python -m knowedit_ext.world measure [FOLDER]``."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from .measure import answer_probabilities, indirect_effects, subject_noise
from .store import load_world
from .train import train


def measure(folder: Path | None, facts: int) -> str:
    """Held-out accuracy and average indirect effects of a world, as a Markdown report."""
    world = load_world(folder)
    model = AutoModelForCausalLM.from_pretrained(world.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(world.folder)
    lines = ["| statements | right | mean probability |", "|---|---|---|"]
    for name, statements in (
        ("templates met in training", world.facts()),
        ("held-out templates", world.held_out()),
        ("held-out templates behind a sentence", world.held_out(prefix=True)),
    ):
        right, probability = answer_probabilities(model, tokenizer, statements)
        lines.append(f"| {name} ({len(statements)}) | {right.mean():.2%} | {probability.mean():.3f} |")
    noise = subject_noise(model, tokenizer, [p.name for p in world.people])
    effects, clean, corrupted = indirect_effects(model, tokenizer, world.facts()[:facts], noise)
    lines += ["", f"Noise {noise:.3f}, {facts} facts: clean {clean:.3f}, corrupted {corrupted:.3f}.", ""]
    lines.append("| AIE of the state at | " + " | ".join(f"layer {i}" for i in range(model.config.n_layer)) + " |")
    lines.append("|---" * (model.config.n_layer + 1) + "|")
    lines += [f"| {role} | " + " | ".join(f"{v:.2f}" for v in values) + " |" for role, values in effects.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m knowedit_ext.world", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train a world on the CPU")
    training.add_argument("--out", required=True, type=Path)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--steps", type=int, default=None)
    measuring = commands.add_parser("measure", help="held-out accuracy and indirect effects")
    measuring.add_argument("folder", nargs="?", type=Path, help="the shipped world when not given")
    measuring.add_argument("--facts", type=int, default=100, help="how many facts to trace")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.command == "train":
        train(args.out, seed=args.seed, **({} if args.steps is None else {"steps": args.steps}))
    else:
        print(measure(args.folder, args.facts))


if __name__ == "__main__":
    main()
