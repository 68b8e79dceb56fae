"""Train a small GPT-2 that knows the 350 real CounterFact records, so that editing methods can be compared on them.

    python benchmarks/counterfact_model.py --out DIR [--data ../shared/data] [--steps 3500]

Half an hour to an hour of one CPU core. Statements are the records' own prompts with their true objects, and the same
facts in other wordings of their relation; from every position after a subject all but its last token are hidden, as in
the built-in world. Called again after a kill it goes on; called on a finished folder it only measures. ``DIR`` loads
with ``knowedit_ext.load_model`` and ``AutoTokenizer``; ``known.json`` in it says what the model knows.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from counterfact_statements import Documents, Knowledge, collect, read_data
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from knowedit_ext.runs.files import write_json
from knowedit_ext.world.batches import Batches
from knowedit_ext.world.tokenizer import MAX_POSITIONS, train_bpe
from knowedit_ext.world.train import fit, new_model, save_folder

DATA = Path(os.environ.get("KNOWEDIT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
VOCABULARY = 6000
SETTINGS_FILE, KNOWN_FILE = "training.json", "known.json"


@torch.no_grad()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]], batch: int = 64
) -> list[tuple[float, bool]]:
    """For (prompt, object) pairs: the mean NLL of the object's tokens, and whether each of them is the likeliest."""
    encoded = [(tokenizer(prompt).input_ids, tokenizer(f" {answer}").input_ids) for prompt, answer in pairs]
    groups = defaultdict(list)  # one length of prompt and of object a batch: no padding
    for index, (prompt, answer) in enumerate(encoded):
        groups[len(prompt), len(answer)].append(index)
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    bar = tqdm(total=len(pairs), desc="measuring", unit="prompt", leave=False)
    for (_, size), members in groups.items():
        for at in range(0, len(members), batch):
            chosen = members[at : at + batch]
            ids = torch.tensor([encoded[i][0] + encoded[i][1] for i in chosen])  # [rows, prompt + size]
            logits = model(ids, logits_to_keep=size + 1).logits[:, :-1]  # [rows, size, vocab]
            wanted = ids[:, -size:]
            nll = -logits.log_softmax(-1).gather(2, wanted[:, :, None])[:, :, 0].mean(1)  # [rows]
            right = (logits.argmax(-1) == wanted).all(1)
            for i, loss, hit in zip(chosen, nll.tolist(), right.tolist(), strict=True):
                scores[i] = loss, hit
            bar.update(len(chosen))
    bar.close()
    return scores


def questions(record: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(kind, prompt, what the model should say, the other object) of a record."""
    rewrite = record["requested_rewrite"]
    old, new = rewrite["target_true"]["str"], rewrite["target_new"]["str"]
    asked = [("rewrite", rewrite["prompt"].replace("{}", rewrite["subject"]), old, new)]
    asked += [("paraphrase", prompt, old, new) for prompt in record["paraphrase_prompts"]]
    asked += [("neighborhood", prompt, old, new) for prompt in record["neighborhood_prompts"]]
    return asked + [("attribute", prompt, new, old) for prompt in record["attribute_prompts"]]


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, records: list[dict[str, Any]]) -> dict:
    """What the model knows before any edit.

    Returns:
        ``greedy``: by kind of prompt the share whose likeliest tokens are the true object. ``direction``: the share
        where the true object is more probable than the other one. ``known``: how many records have their rewrite
        prompt right; ``unknown``: the case ids of the others.
    """
    asked = [(record["case_id"], *question) for record in records for question in questions(record)]
    true_scores = answers(model, tokenizer, [(prompt, right) for _, _, prompt, right, _ in asked])
    other = answers(model, tokenizer, [(prompt, wrong) for _, _, prompt, _, wrong in asked])
    greedy, direction, unknown = defaultdict(list), defaultdict(list), []
    for (case, kind, *_), (loss, hit), (against, _) in zip(asked, true_scores, other, strict=True):
        greedy[kind].append(hit)
        direction[kind].append(loss < against)
        if kind == "rewrite" and not hit:
            unknown.append(case)
    return {
        "records": len(records),
        "known": len(records) - len(unknown),
        "unknown": sorted(unknown),
        "greedy": {kind: sum(hits) / len(hits) for kind, hits in greedy.items()},
        "direction": {kind: sum(hits) / len(hits) for kind, hits in direction.items()},
    }


def tokenizer_of(known: Knowledge) -> PreTrainedTokenizerFast:
    return train_bpe([f"{s.prompt()} {s.object}." for s in known.asked] + known.prose, VOCABULARY)


def train(out: Path, known: Knowledge, records: list[dict[str, Any]], settings: dict, save_every: int) -> None:
    """Train, or go on training, and write ``out``; a sample of the records is measured at every saving."""
    tokenizer = tokenizer_of(known)
    model = new_model(tokenizer, settings["layers"], settings["hidden"], settings["heads"], settings["seed"])
    sample = random.Random(0).sample(records, min(60, len(records)))

    def save(step: int) -> None:
        save_folder(out, model, tokenizer, {})
        measured = measure(model.eval(), tokenizer, sample)
        model.train()
        logging.info("step %d, %d records: %s", step, len(sample), shares(measured))

    batches = Batches(
        Documents(known, settings["seed"]),
        tokenizer,
        settings["rows"],
        MAX_POSITIONS,
        settings["seed"],
        settings["masked"],
        settings["early_layers"] > 0,
    )
    fit(out, model, batches, settings, save, save_every, "CounterFact model")
    write_json(out / SETTINGS_FILE, settings)  # last: says that the model is finished


def shares(measured: dict) -> str:
    kinds = (
        f"{kind} {measured['greedy'][kind]:.1%} ({measured['direction'][kind]:.1%})" for kind in measured["greedy"]
    )
    return "right (true above new): " + ", ".join(kinds)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the real files (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3500, help=f"optimiser steps of rows x {MAX_POSITIONS} tokens")
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--peak-rate", type=float, default=2e-3, help="highest learning rate of AdamW")
    parser.add_argument("--masked", type=float, default=0.8, help="share of documents with subjects hidden")
    parser.add_argument("--early-layers", type=int, default=3, help="first layers that hide the whole subject there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250, help="steps between two savings")
    options = parser.parse_args(argv)
    for name in ("steps", "rows", "layers", "heads", "save_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.hidden < 1 or options.hidden % options.heads:
        parser.error(f"--hidden ({options.hidden}) must be a multiple of --heads ({options.heads})")
    if not 0 <= options.early_layers < options.layers:
        parser.error(f"--early-layers must lie in 0..{options.layers - 1}")
    if not 0.0 <= options.masked <= 1.0:
        parser.error("--masked must lie in 0..1")
    return options


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = arguments(argv)
    try:
        records, flat, prose = read_data(options.data)
    except FileNotFoundError as error:
        sys.exit(str(error))
    known = collect(records, flat, prose)
    logging.info(
        "%d prompts and %d facts; %d prompts fit no template, %d contradict a record",
        len(known.asked),
        len(known.facts),
        len(known.unmatched),
        known.dropped,
    )
    out = options.out
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "data", "save_every")}
    finished = (out / SETTINGS_FILE).is_file()
    if finished and json.loads((out / SETTINGS_FILE).read_text()) != settings:
        sys.exit(f"{out} holds a finished model trained with other settings, see {SETTINGS_FILE}; choose another --out")
    if not finished:
        try:
            train(out, known, records, settings, options.save_every)
        except ValueError as error:
            sys.exit(str(error))
    measured = measure(AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out), records)
    measured |= {"prompts": len(known.asked), "facts": len(known.facts), "unmatched": len(known.unmatched)}
    write_json(out / KNOWN_FILE, {**measured, "contradicting": known.dropped, "settings": settings})
    print(f"{measured['known']} of {measured['records']} records known; {shares(measured)}")


if __name__ == "__main__":
    main()
