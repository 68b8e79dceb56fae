"""What to change: edit requests, and the prompts that an edit is computed from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import repr as brief
from typing import Any

import torch

from .. import checks
from ..checks import quoted
from ..model.facts import Fact, TokenizedFact
from ..model.head import final_states, likeliest
from ..model.hooks import at_rest
from ..model.load import EditableModel
from ..model.spelling import mark_subject, marked_occurrence, spaced
from ..runs.files import file_name
from ..sweep.capture import clean_runs
from ..sweep.engine import default_max_rows
from ..sweep.packed import PackedPrompts, parts_of
from ..tracing.subject_noise import SubjectNoise

REQUIRED = ("prompt", "subject", "target_new")
_KEYS = "prompt, subject and target_new"


@dataclass(frozen=True)
class EditRequest:
    """Make the model go on from `prompt` (with one `{}` for the subject) with `target_new`.

    minimise: the other way: make `target_new` less likely. noise: a `SubjectNoise`; the target is to follow the prompt
        with a noised subject (see `as_problem`). Not every method takes these two.

    target_true: what the model says before; kept for reports.
    case_id: the record it comes from; names files of results and values, and has no part in what is edited.
    space: whether a space stands before the targets. None: published targets come without theirs and get it, except
        where the prompt ends in whitespace (a chat's turn) or is in a writing without spaces; see `spelling.spaced`.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    case_id: int | str | None = field(default=None, compare=False)
    space: bool | None = field(default=None, kw_only=True)
    minimise: bool = field(default=False, kw_only=True)
    noise: SubjectNoise | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new"):
            checks.text(name, getattr(self, name))
        for name in ("target_new", "target_true"):
            value = getattr(self, name)
            if value is not None and not checks.text(name, value).strip():
                raise ValueError(f"{name} of {quoted(self.prompt)} ({quoted(self.subject)}) is empty")
        if self.case_id is not None:
            if not isinstance(self.case_id, (int, str)) or isinstance(self.case_id, bool):
                raise ValueError(f"case_id is {brief(self.case_id)}: expected a number or text")
            file_name(self.case_id, "case_id")
        object.__setattr__(self, "minimise", checks.as_type("minimise", self.minimise, bool))
        object.__setattr__(self, "noise", SubjectNoise.of(self.noise))
        occurrence = marked_occurrence(self.prompt, self.subject)
        fact = Fact(self.prompt, self.subject, self.target_new, occurrence=occurrence, space=self.space)
        object.__setattr__(self, "space", fact.space)
        for name in ("target_new", "target_true"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, spaced(getattr(self, name), fact.text, fact.space))

    @classmethod
    def of(cls, raw: EditRequest | Mapping[str, Any]) -> EditRequest:
        """From a request, its published dict form, or a CounterFact record.

        A prompt without `{}` spells its subject out; see `spelling.mark_subject`. Raises ValueError that names the key
        for what is missing, empty, ambiguous or of another type.
        """
        if isinstance(raw, EditRequest):
            return raw
        if not isinstance(raw, Mapping):
            raise ValueError(f"an edit request is {brief(raw)}: expected an EditRequest, or an object with {_KEYS}")
        rewrite = raw.get("requested_rewrite", raw)
        if not isinstance(rewrite, Mapping):
            several = "; several rewrites are one request each" if isinstance(rewrite, (list, tuple)) else ""
            raise ValueError(f"requested_rewrite is {brief(rewrite)}: expected an object with {_KEYS}{several}")
        if missing := [key for key in REQUIRED if key not in rewrite]:
            raise ValueError(f"an edit request lacks {', '.join(missing)}: {brief(dict(rewrite))}")
        prompt, subject, new = (_text(rewrite, key) for key in REQUIRED)
        true = None if rewrite.get("target_true") is None else _text(rewrite, "target_true")
        if "{}" not in prompt and prompt.strip() and subject.strip():
            prompt = mark_subject(prompt, subject)
        asked = {"minimise": rewrite.get("minimise", False), "noise": rewrite.get("noise")}
        return cls(prompt, subject, new, true, raw.get("case_id"), space=rewrite.get("space"), **asked)

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "subject": self.subject,
            "target_new": self.target_new,
            "target_true": self.target_true,
            "case_id": self.case_id,
            "space": self.space,
            "minimise": self.minimise,
            "noise": None if self.noise is None else self.noise.to_dict(),
        }

    @property
    def is_problem(self) -> bool:
        """Is something else asked for than a likelier target behind the clean prompt?"""
        return self.minimise or self.noise is not None

    def fact(self, context: str = "{}", target: bool = True) -> Fact:
        """The prompt inside a context template."""
        if not isinstance(context, str) or context.count("{}") != 1:
            raise ValueError(f"context {brief(context)}: exactly one '{{}}' must say where the prompt goes")
        template = context.replace("{}", self.prompt)
        occurrence = marked_occurrence(template, self.subject)
        return Fact(template, self.subject, self.target_new if target else None, occurrence=occurrence, space=False)


def _text(rewrite: Mapping[str, Any], key: str) -> str:
    value = rewrite[key]
    if isinstance(value, Mapping):
        key, value = f"{key}.str", value.get("str")
    if not isinstance(value, str):
        raise ValueError(f"'{key}' of an edit request is {brief(value)}, expected text: {brief(dict(rewrite))}")
    return value


def requests_of(raw: Any) -> list[Any]:
    """One for each rewrite of a record that has several, else what was given."""
    rewrites = raw.get("requested_rewrite") if isinstance(raw, Mapping) else None
    return [{**raw, "requested_rewrite": rewrite} for rewrite in rewrites] if isinstance(rewrites, list) else [raw]


def check_each(requests: Iterable[EditRequest | Mapping[str, Any]]) -> list[EditRequest]:
    """As `check_requests`, problems too, of requests that are not edited together: they may contradict each other."""
    checked = [one for request in requests for one in check_requests(request, problems=True)]
    if not checked:
        raise ValueError("no edit requests")
    return checked


def check_requests(
    requests: EditRequest | Mapping[str, Any] | Iterable[EditRequest | Mapping[str, Any]],
    problems: bool = False,
) -> list[EditRequest]:
    """Requests as `EditRequest`s. Raises ValueError when there are none, or two that contradict each other.

    problems: whether the method takes `minimise` and `noise`; else a request with one of them is a ValueError, too.
    """
    if isinstance(requests, (EditRequest, Mapping)):
        requests = [requests]
    if isinstance(requests, (str, bytes)) or not isinstance(requests, Iterable):
        raise ValueError(f"edit requests are {brief(requests)}: expected EditRequests, or objects with {_KEYS}")
    requests = [EditRequest.of(one) for raw in requests for one in requests_of(raw)]
    if not requests:
        raise ValueError("no edit requests")
    asked: dict[Any, EditRequest] = {}
    for request in requests:
        if request.is_problem and not problems:
            raise ValueError(
                f"{quoted(request.prompt)} with subject {quoted(request.subject)} asks for "
                f"{'a target that is less likely' if request.minimise else 'a noised subject'}, which this method does "
                "not take: rome, r_rome, memit and finetune do"
            )
        before = asked.setdefault((request.prompt, request.subject, request.noise), request)  # one key, one value
        if (before.target_new, before.minimise) != (request.target_new, request.minimise):
            raise ValueError(
                f"contradictory requests: {quoted(request.prompt)} with subject {quoted(request.subject)} is to become "
                f"both {_wanted(before)} and {_wanted(request)}"
            )
    return requests


def _wanted(request: EditRequest) -> str:
    return f"{'less of ' if request.minimise else ''}{quoted(request.target_new.strip())}"


@at_rest
def warn_of_known(model: EditableModel, requests: Sequence[EditRequest], facts: Sequence[TokenizedFact]) -> None:
    """Warn of targets that the model's own continuation of the bare prompt begins with: nothing needs editing there.

    facts: the requests' bare prompts. Nothing is said where the truth is asked for, or another input or direction.
    """
    facts = [
        fact
        for request, fact in zip(requests, facts, strict=True)
        if not request.is_problem and request.target_new != request.target_true
    ]
    texts = [fact.ids + fact.target_ids[:-1] for fact in facts]
    for part in parts_of([len(text) for text in texts], default_max_rows(model)):
        for known, right in zip(facts[part], _predicts_target(model, facts[part], texts[part]), strict=True):
            if right:
                fact = known.fact
                warnings.warn(
                    f"{quoted(fact.text)} is already continued with {quoted(fact.target.strip())}", stacklevel=3
                )


def _predicts_target(
    model: EditableModel, facts: Sequence[TokenizedFact], texts: Sequence[tuple[int, ...]]
) -> list[bool]:
    """For each fact: is every token of its target the likeliest?"""
    packed = PackedPrompts(model, clean_runs(model, texts))
    rows = [packed.row(n, len(f.ids) - 1 + k) for n, f in enumerate(facts) for k in range(len(f.target_ids))]
    states = packed.run(packed.start, 0, model.num_layers)
    predictions = likeliest(model, final_states(model, states[torch.tensor(rows, device=states.device)]))
    right = predictions == torch.tensor([token for fact in facts for token in fact.target_ids])
    return [bool(each.all()) for each in right.split([len(fact.target_ids) for fact in facts])]


def lookup(tokenized: TokenizedFact, fact_token: str) -> int:
    """The token whose key is edited (rome/repr_tools.py:43-99, compute_v.py:230-260)."""
    first, after = tokenized.subject_range
    last = len(tokenized.ids) - 1
    if fact_token == "subject_first_after_last" and after > last:
        text = tokenized.fact.text
        raise ValueError(f"fact_token 'subject_first_after_last': nothing follows the subject in {quoted(text)}")
    places = {"subject_last": after - 1, "subject_first": first, "subject_first_after_last": after, "last": last}
    return places[fact_token]
