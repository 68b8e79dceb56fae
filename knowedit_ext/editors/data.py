"""What an editor is trained on: records, split by subject, and texts that edits should leave alone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..editing.request import EditRequest
from ..model.load import EditableModel
from ..model.spelling import spaced
from ..model.tokens import encode, encode_all
from .texts import Text, text_of_request

VALIDATION_SHARE = 0.1  # of the locality texts, as upstream


@dataclass(frozen=True)
class Example:
    """An edit, and other prompts [any] that its target should follow; last: only its last token is scored."""

    edit: Text
    others: tuple[Text, ...]


@dataclass(frozen=True)
class Data:
    """Subjects of `train` and `held` have nothing in common."""

    train: list[Example]
    held: list[Example]
    loc_train: list[Text]
    loc_held: list[Text]


def split_records(records: Iterable[Mapping[str, Any]], held: int) -> tuple[list[Any], list[Any]]:
    """(for training, the last `held` for validation); what shares a subject with the latter is left out.

    Raises ValueError where nothing is left for training.
    """
    usable = list(records)
    kept = usable[len(usable) - held :]
    subjects = {EditRequest.of(record).subject for record in kept}
    train = [record for record in usable[: len(usable) - held] if EditRequest.of(record).subject not in subjects]
    if not train or len(kept) < held:
        raise ValueError(
            f"{len(usable)} records with {held} of them left out for validation leave {len(train)} for training whose "
            "subjects are not among these: give more records, or lower val_edits"
        )
    return train, kept


def read_data(
    model: EditableModel, records: Iterable[Mapping[str, Any]], texts: Sequence[str], params: Any, compat: str | None
) -> Data:
    """Tokenised. ValueError for bad records and for texts of which there are none to train or validate on."""
    train, held = split_records(records, params.val_edits)
    ids = [each for each in encode_all(model, list(texts), params.loc_tokens) if len(each) > 1]
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} locality texts have two tokens: give at least two such texts")
    first = max(1, int(len(ids) * VALIDATION_SHARE))
    loc = [Text.of_last(each, len(each)) for each in ids]
    examples = [[_example(model, record, compat) for record in part] for part in (train, held)]
    return Data(*examples, loc[:-first], loc[-first:])


def _example(model: EditableModel, record: Mapping[str, Any], compat: str | None) -> Example:
    request = EditRequest.of(record)
    text = text_of_request(model, request.fact())
    if compat == "reference":
        return Example(Text.of_last(text.ids, 1), ())
    others = [_continued(model, prompt, request) for prompt in record.get("paraphrase_prompts", ())]
    return Example(text, tuple(others))


def _continued(model: EditableModel, prompt: str, request: EditRequest) -> Text:
    target = spaced(request.target_new.lstrip(), prompt, request.space)
    ids, joint = encode(model, prompt)[0], encode(model, prompt + target)[0]
    if joint[: len(ids)] != ids or len(joint) == len(ids):
        raise ValueError(f"target '{target}' merges with the last token of prompt '{prompt}'")
    return Text.of_last(joint, len(joint) - len(ids))


def outer_of(example: Example, rng: random.Random, compat: str | None) -> Text:
    """What the edited model is asked: a paraphrase; compat="reference": the edit's own text less a random prefix."""
    if compat is None:
        return rng.choice(example.others) if example.others else example.edit
    ids, scored = example.edit.ids, len(example.edit.scored)
    cut = rng.randint(0, max(0, (len(ids) - scored) // 2))
    cut = min(cut, len(ids) - scored - 1)  # what is scored needs a token before it
    return Text(ids[cut:], example.edit.labels[cut:])
