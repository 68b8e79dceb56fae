"""The published evaluation loop, written plainly: one record at a time, all its prompts with both targets in one padded
batch through the whole model (eval_utils_counterfact.py: test_batch_prediction)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

SORTS = ("rewrite_prompts", "paraphrase_prompts", "neighborhood_prompts")


def prompts_of(record: Mapping[str, Any]) -> dict[str, list[str]]:
    rewrite = record["requested_rewrite"]
    asked = [rewrite["prompt"].replace("{}", rewrite["subject"])]
    return dict(zip(SORTS, (asked, record["paraphrase_prompts"], record["neighborhood_prompts"]), strict=True))


@torch.no_grad()
def evaluate_record(
    hf: nn.Module, encode: Callable[[str], Sequence[int]], record: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """{sort}_probs and {sort}_correct of a record, as in the published case files."""
    rewrite = record["requested_rewrite"]
    targets = [" " + rewrite[name]["str"] for name in ("target_new", "target_true")]
    sorts = prompts_of(record)
    prompts = [prompt for texts in sorts.values() for prompt in texts]
    rows = [list(encode(prompt + target)) for prompt in prompts for target in targets]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    logits = hf(input_ids=ids, attention_mask=mask).logits
    nll, right = [], []
    for n, row in enumerate(rows):
        first = len(encode(prompts[n // 2]))
        logp = logits[n].log_softmax(-1)
        nll.append(-sum(logp[t - 1, row[t]].item() for t in range(first, len(row))) / (len(row) - first))
        right.append(all(logits[n, t - 1].argmax().item() == row[t] for t in range(first, len(row))))
    scores: dict[str, list[Any]] = {}
    at = 0
    for sort, texts in sorts.items():
        here = range(at, at + len(texts))
        wanted = 1 if sort == "neighborhood_prompts" else 0
        scores[f"{sort}_probs"] = [{"target_new": nll[2 * n], "target_true": nll[2 * n + 1]} for n in here]
        scores[f"{sort}_correct"] = [right[2 * n + wanted] for n in here]
        at += len(texts)
    return scores
