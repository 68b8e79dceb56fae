"""Cases of `run.py`: the evaluation of 50 records, and of 50 single edits, against the published loop; texts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from naive_evaluation import SORTS, evaluate_record
from shared import peak_memory, timed

import knowedit_ext as ke
from knowedit_ext.datasets import load_counterfact
from knowedit_ext.editing.edit import LowRank
from knowedit_ext.evaluation.generation import continuations
from knowedit_ext.model.facts import encode
from knowedit_ext.world import load_world

RECORDS, LAYER = 50, 8
DATA = Path(os.environ.get("KNOWEDIT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def records_and_model(model: ke.EditableModel) -> tuple[list[dict], ke.EditableModel]:
    """Real records under GPT-2's tokenizer where the data is; else the world's, under its own."""
    file = DATA / "counterfact_350.json"
    if not file.exists():
        return load_world().records()[:RECORDS], model
    from transformers import GPT2TokenizerFast

    tokenizer = GPT2TokenizerFast.from_pretrained(DATA / "gpt2_tokenizer")
    return load_counterfact(file, limit=RECORDS), ke.load_model((model.hf, tokenizer))


def evaluate_case(model: ke.EditableModel, repeat: int) -> dict[str, Any]:
    """The unedited model on 50 records, no generation."""
    records, model = records_and_model(model)
    (ours, seconds), memory = peak_memory(lambda: timed(lambda: ke.evaluate(model, records, generation=False), repeat))
    loop = lambda: [_published(model, record) for record in records]  # noqa: E731
    (plain, plain_seconds), plain_memory = peak_memory(lambda: timed(loop, 1 if repeat == 1 else 2))
    error = compare([case["pre"] for case in ours.cases], plain)
    return result(error, seconds, plain_seconds, memory, plain_memory)


def single_edits_case(model: ke.EditableModel, repeat: int) -> dict[str, Any]:
    """50 records, each under a rank-one edit of its own: one batch, against apply, evaluate, revert; and against our
    own evaluation of one edit after the other (`serial_seconds`)."""
    records, model = records_and_model(model)
    edits = [rank_one(model, seed) for seed in range(len(records))]
    together = lambda: ke.evaluate(model, records, edits, generation=False, baseline=False)  # noqa: E731
    (ours, seconds), memory = peak_memory(lambda: timed(together, repeat))

    def one_by_one() -> list[Any]:
        pairs = zip(records, edits, strict=True)
        return [ke.evaluate(model, [r], e, generation=False, baseline=False).cases[0]["post"] for r, e in pairs]

    def loop() -> list[Any]:
        scores = []
        for record, edit in zip(records, edits, strict=True):
            with edit.applied(model):
                scores.append(_published(model, record))
        return scores

    serial, serial_seconds = timed(one_by_one, 1 if repeat == 1 else 2)
    (plain, plain_seconds), plain_memory = peak_memory(lambda: timed(loop, 1 if repeat == 1 else 2))
    scores = [case["post"] for case in ours.cases]
    error = max(compare(scores, plain), compare(scores, serial))
    return {**result(error, seconds, plain_seconds, memory, plain_memory), "serial_seconds": serial_seconds}


def generate_case(model: ke.EditableModel, repeat: int) -> dict[str, Any]:
    """90 tokens behind each of 64 prompts, always the likeliest, against transformers' own `generate` of the batch."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 12, (64,), generator=draw).tolist()
    prompts = [torch.randint(model.modules.config.vocab_size, (n,), generator=draw).tolist() for n in lengths]
    longest = max(lengths)
    tokens = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    given = dict(attention_mask=mask, do_sample=False, max_new_tokens=90, min_new_tokens=90, pad_token_id=0)
    (ours, seconds), memory = peak_memory(lambda: timed(lambda: continuations(model, prompts, 90), repeat))
    (plain, plain_seconds), plain_memory = peak_memory(
        lambda: timed(lambda: model.hf.generate(tokens, **given), repeat)
    )
    other = sum(mine != other for mine, other in zip(ours, plain[:, longest:].tolist(), strict=True))
    return result(other / len(prompts), seconds, plain_seconds, memory, plain_memory)


def rank_one(model: ke.EditableModel, seed: int) -> ke.Edit:
    draw = torch.Generator().manual_seed(seed)
    module = model.modules.down_projection(LAYER)
    inputs, outputs = (torch.randn(d, 1, generator=draw) * 0.05 for d in (module.nx, module.nf))
    return ke.Edit({f"{model.modules.parameter_name(LAYER)}.weight": LowRank(inputs, outputs, True)}, "rome", [{}])


def _published(model: ke.EditableModel, record: dict) -> dict[str, list[Any]]:
    return evaluate_record(model.hf, lambda text: encode(model, text)[0], record)


def compare(ours: list[dict], plain: list[dict]) -> float:
    """Largest difference of NLLs, in nats."""
    both = [
        (mine[name], theirs[name])
        for one, other in zip(ours, plain, strict=True)
        for sort in SORTS
        for mine, theirs in zip(one[f"{sort}_probs"], other[f"{sort}_probs"], strict=True)
        for name in mine
    ]
    return max(abs(a - b) for a, b in both)


def result(error: float, seconds: float, plain_seconds: float, memory: float, plain_memory: float) -> dict[str, Any]:
    if not error <= 1e-4:
        raise SystemExit(f"evaluation: differs from the plain loop by {error:.1e}: no times are reported")
    return {
        "error": error,
        "plain_seconds": plain_seconds,
        "seconds": seconds,
        "ratio": plain_seconds / seconds,
        "peak_mb": memory,
        "plain_peak_mb": plain_memory,
    }
