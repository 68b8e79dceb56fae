"""What an editor is trained on: records, split by subject, and texts that edits should leave alone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import quoted
from ..editing.request import EditRequest
from ..model.load import EditableModel
from ..model.spelling import spaced
from ..model.tokens import encode, encode_all
from .texts import Text, text_of_request

VALIDATION_SHARE = 0.1  # of the locality texts, as upstream


@dataclass(frozen=True)
class Example:
    """An edit, and other texts in which its target follows; cut: there are none, it is asked less a random prefix."""

    edit: Text
    others: tuple[Text, ...] = ()
    cut: bool = False


@dataclass(frozen=True)
class Data:
    """Subjects of `train` and `held` have nothing in common."""

    train: list[Example]
    held: list[Example]
    loc_train: list[Text]
    loc_held: list[Text]


Source = Mapping[str, Any] | str  # a record of CounterFact's form, or a text whose end is what an edit should say


def split_records(records: Iterable[Source], held: int) -> tuple[list[Source], list[Source]]:
    """(for training, the last `held` for validation); what shares a subject with the latter is left out.

    Raises ValueError where nothing is left for training.
    """
    if isinstance(records, (str, bytes, Mapping)):
        raise ValueError(f"records are {quoted(str(records))}: expected a list of records, or of texts")
    usable = list(records)
    kept = usable[len(usable) - held :]
    subjects = set(map(_subject, kept))
    train = [record for record in usable[: len(usable) - held] if _subject(record) not in subjects]
    if not train or len(kept) < held:
        raise ValueError(
            f"{len(usable)} records with {held} of them left out for validation leave {len(train)} for training whose "
            "subjects are not among these: give more records, or lower val_edits"
        )
    return train, kept


def _subject(record: Source) -> str:
    """Of a text, which says nothing of a subject, the text."""
    return record if isinstance(record, str) else EditRequest.of(record).subject


def read_data(
    model: EditableModel, records: Iterable[Source], texts: Sequence[str], params: Any, compat: str | None
) -> Data:
    """Tokenised. ValueError for bad records and for texts of which there are none to train or validate on."""
    train, held = split_records(records, params.val_edits)
    ids = [each for each in encode_all(model, list(texts), _longest(model, params)) if len(each) > 1]
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} locality texts have two tokens: give at least two such texts")
    first = max(1, int(len(ids) * VALIDATION_SHARE))
    loc = [Text.of_last(each, len(each)) for each in ids]
    examples = [[_example(model, each, params, compat) for each in part] for part in (train, held)]
    return Data(*examples, loc[:-first], loc[-first:])


def _longest(model: EditableModel, params: Any) -> int:
    return min(params.loc_tokens, model.modules.max_positions or params.loc_tokens)


def _example(model: EditableModel, source: Source, params: Any, compat: str | None) -> Example:
    if isinstance(source, str):
        (ids,) = encode_all(model, [source], _longest(model, params))
        if len(ids) < 2:
            raise ValueError(f"{quoted(source)} has {len(ids)} tokens: an edit needs two, one of them to say")
        return Example(Text.of_last(ids, min(params.edit_tokens, len(ids) - 1)), cut=True)
    request = EditRequest.of(source)
    text = text_of_request(model, request.fact())
    if compat == "reference":
        return Example(Text.of_last(text.ids, 1), cut=True)
    return Example(text, tuple(_continued(model, prompt, request) for prompt in source.get("paraphrase_prompts", ())))


def _continued(model: EditableModel, prompt: str, request: EditRequest) -> Text:
    target = spaced(request.target_new.lstrip(), prompt, request.space)
    ids, joint = encode(model, prompt)[0], encode(model, prompt + target)[0]
    if joint[: len(ids)] != ids or len(joint) == len(ids):
        raise ValueError(f"target '{target}' merges with the last token of prompt '{prompt}'")
    if len(joint) > (model.modules.max_positions or len(joint)):
        most = model.modules.max_positions
        raise ValueError(f"prompt '{prompt[:60]}...' takes {len(joint)} tokens, more than the model's {most} positions")
    return Text.of_last(joint, len(joint) - len(ids))


def outer_of(example: Example, rng: random.Random) -> Text:
    """What the edited model is asked: a paraphrase, or the edit's own text, less a random prefix where that is cut."""
    if not example.cut:
        return rng.choice(example.others) if example.others else example.edit
    ids, scored = example.edit.ids, len(example.edit.scored)
    cut = rng.randint(0, max(0, (len(ids) - scored) // 2))
    cut = min(cut, len(ids) - scored - 1)  # what is scored needs a token before it
    return Text(ids[cut:], example.edit.labels[cut:])
