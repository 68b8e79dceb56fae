"""Essence: the perplexity of what is known of a subject, read by the edited model. It rises where an edit forgets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ...checks import StudyCompat, as_type
from ...model.head import final_states, log_probabilities
from ...model.hooks import at_rest
from ...model.load import EditableModel
from ...model.tokens import encode, encode_all
from ...sweep import default_max_rows
from ...sweep.capture import clean_runs
from ...sweep.packed import PackedPrompts
from ..metric import Metric, Written, scaled

if TYPE_CHECKING:
    from ..edited import Edited

MAX_LENGTH = 100  # test_generation, as published


def essence_texts(samples: Sequence[Mapping[str, str]], subject: str) -> list[str]:
    """The snippets that are named as the subject is: essence is the perplexity of them joined.

    samples: attribute snippets {"name", "text"}; published: those of the new target, as for the consistency.
    """
    return [sample["text"] for sample in samples if sample["name"] == subject]


@at_rest
def perplexity(
    model: EditableModel,
    texts: Sequence[str],
    *,
    max_length: int = MAX_LENGTH,
    compat: str | None = None,
    edits: Edited | None = None,
    index: Sequence[int] | None = None,
    max_rows: int | None = None,
) -> list[float]:
    """exp(-1/N sum_t log p(token t | tokens before it)) of each text's first `max_length` tokens (util/perplexity.py).

    N is the number of tokens that are predicted, all but the first; compat="reference" divides by the number of all, as
    the published code does, which makes it less.
    edits, index: many edited models at once, and for each text the number of its edit, -1 for none.
    max_rows: tokens run at once; None: from free memory.

    Raises ValueError for a text of one token, in which nothing is predicted.
    """
    as_type("compat", compat, StudyCompat)
    if (edits is None) != (index is None):
        raise ValueError("edits and index belong together: the edits, and the number of one for each text")
    if index is not None and len(index) != len(texts):
        raise ValueError(f"{len(texts)} texts, but {len(index)} edit numbers: expected one a text")
    ids = _token_ids(model, texts, max_length)
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))  # few lengths at once
    together = max(1, (max_rows or default_max_rows(model)) // max_length)
    perplexities = [math.nan] * len(ids)
    for first in range(0, len(order), together):
        part = order[first : first + together]
        numbers = None if index is None else torch.tensor([int(index[n]) for n in part])
        for n, total in zip(part, _log_likelihood(model, [ids[n] for n in part], edits, numbers), strict=True):
            perplexities[n] = math.exp(-total / (len(ids[n]) if compat else len(ids[n]) - 1))
    return perplexities


def _token_ids(model: EditableModel, texts: Sequence[str], max_length: int) -> list[list[int]]:
    if isinstance(texts, str):
        raise TypeError("texts is one string: expected a list of them")
    most = model.modules.max_positions
    if max_length < 2 or (most is not None and max_length - 1 > most):
        raise ValueError(f"max_length is {max_length}: expected 2..{'' if most is None else most + 1}")
    ids = encode_all(model, texts, max_length)
    for number, (text, tokens) in enumerate(zip(texts, ids, strict=True)):
        if len(tokens) < 2:
            raise ValueError(f"text {number} ({text!r}) has {len(tokens)} tokens: perplexity takes at least 2")
    return ids


def _log_likelihood(
    model: EditableModel, ids: list[list[int]], edits: Edited | None, index: torch.Tensor | None
) -> list[float]:
    """Sum of each text's token log-probabilities but the first; no row is run for the last token."""
    starts = [tokens[:-1] for tokens in ids]
    packed = PackedPrompts(model, clean_runs(model, starts))
    with nullcontext() if edits is None else edits.rows(index[packed.prompt_of_row]):
        if getattr(edits, "changes_embedding", False):
            packed = PackedPrompts(model, clean_runs(model, starts))
        hidden = packed.run(packed.start, 0, model.num_layers)  # [rows, hidden]
        targets = torch.tensor([token for tokens in ids for token in tokens[1:]])
        logp = log_probabilities(model, final_states(model, hidden), targets)
    return [float(part.double().sum()) for part in logp.split([len(tokens) for tokens in starts])]


def _measure(written: Written) -> list[dict[str, Any]]:
    """Of the records whose references have something about the subject."""
    measured: list[dict[str, Any]] = [{} for _ in written.texts]
    about: dict[int, list[str]] = {}
    for n, (references, record) in enumerate(zip(written.references or (), written.records, strict=False)):
        of_subject = essence_texts(references, record["requested_rewrite"]["subject"])
        if len(encode(written.model, " ".join(of_subject))[0]) > 1:  # nothing is predicted in a single token
            about[n] = of_subject
    if about:
        under = {} if written.edited is None else {"edits": written.edited, "index": list(about)}
        joined = [" ".join(texts) for texts in about.values()]
        limits = {"max_length": written.max_length, "compat": written.compat}
        scores = perplexity(written.model, joined, **limits, **under)
        for (n, of_subject), value in zip(about.items(), scores, strict=True):
            measured[n] = {"essence_score": value, "essence_text": of_subject}
    return measured


METRIC = Metric(("ess.",), 110, scaled("essence_score", "ess.", 1.0), measure=_measure)
