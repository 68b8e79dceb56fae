"""What to change: edit requests, and the prompts that an edit is computed from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..model.facts import Fact, TokenizedFact
from ..model.head import final_states, likeliest
from ..model.load import EditableModel
from ..sweep.capture import clean_runs
from ..sweep.engine import default_max_rows
from ..sweep.packed import PackedPrompts, parts_of


@dataclass(frozen=True)
class EditRequest:
    """Make the model go on from `prompt` (with one `{}` for the subject) with `target_new`.

    A target without a leading space gets one, as published. target_true: what the model says before; kept for reports.
    case_id: the record it comes from; names files of results and values, and has no part in what is edited.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    case_id: int | str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.target_new, str) or not self.target_new.strip():
            raise ValueError(f"target_new of '{self.prompt}' ('{self.subject}') is empty")
        Fact(self.prompt, self.subject, occurrence=_slot(self.prompt, self.subject))
        for name in ("target_new", "target_true"):
            value = getattr(self, name)
            if value is not None and not value.startswith(" "):
                object.__setattr__(self, name, " " + value)

    @classmethod
    def of(cls, raw: EditRequest | Mapping[str, Any]) -> EditRequest:
        """From a request, its published dict form, or a CounterFact record."""
        if isinstance(raw, EditRequest):
            return raw
        case_id = raw.get("case_id")
        raw = raw.get("requested_rewrite", raw)
        missing = [key for key in ("prompt", "subject", "target_new") if key not in raw]
        if missing:
            raise ValueError(f"an edit request lacks {', '.join(missing)}: {dict(raw)!r}")
        text = lambda value: value["str"] if isinstance(value, Mapping) else value  # noqa: E731
        prompt = raw["prompt"]
        if "{}" not in prompt and raw["subject"] in prompt:
            prompt = prompt.replace(raw["subject"], "{}", 1)
        return cls(prompt, raw["subject"], text(raw["target_new"]), text(raw.get("target_true")), case_id)

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "subject": self.subject,
            "target_new": self.target_new,
            "target_true": self.target_true,
            "case_id": self.case_id,
        }

    def fact(self, context: str = "{}", target: bool = True) -> Fact:
        """The prompt inside a context template."""
        if context.count("{}") != 1:
            raise ValueError(f"context '{context}': exactly one '{{}}' must say where the prompt goes")
        template = context.replace("{}", self.prompt)
        occurrence = _slot(template, self.subject)
        return Fact(template, self.subject, self.target_new if target else None, occurrence=occurrence)


def check_requests(requests: Iterable[EditRequest | Mapping[str, Any]]) -> list[EditRequest]:
    """Requests as `EditRequest`s. Raises ValueError when there are none, or two that contradict each other."""
    found = [EditRequest.of(raw) for raw in ([requests] if isinstance(requests, (EditRequest, Mapping)) else requests)]
    if not found:
        raise ValueError("no edit requests")
    targets: dict[tuple[str, str], str] = {}
    for request in found:
        key = (request.prompt, request.subject)
        if targets.setdefault(key, request.target_new) != request.target_new:
            raise ValueError(
                f"contradictory requests: '{request.prompt}' with subject '{request.subject}' is to become both "
                f"'{targets[key].strip()}' and '{request.target_new.strip()}'"
            )
    return found


def check_compat(compat: str | None) -> None:
    if compat not in (None, "reference"):
        raise ValueError(f"unknown compat '{compat}': expected None or 'reference'")


@torch.no_grad()
def warn_of_known(model: EditableModel, facts: Sequence[TokenizedFact]) -> None:
    """Warn of targets that the model's own continuation of the bare prompt begins with: nothing needs editing there."""
    texts = [fact.ids + fact.target_ids[:-1] for fact in facts]
    for part in parts_of([len(text) for text in texts], default_max_rows(model)):
        for known, right in zip(facts[part], _said(model, facts[part], texts[part]), strict=True):
            if right:
                fact = known.fact
                warnings.warn(f"'{fact.text}' is already continued with '{fact.target.strip()}'", stacklevel=3)


def _said(model: EditableModel, facts: Sequence[TokenizedFact], texts: Sequence[tuple[int, ...]]) -> list[bool]:
    """For each fact: is every token of its target the likeliest?"""
    packed = PackedPrompts(model, clean_runs(model, texts))
    rows = [packed.row(n, len(f.ids) - 1 + k) for n, f in enumerate(facts) for k in range(len(f.target_ids))]
    states = packed.run(packed.start, 0, model.num_layers)
    said = likeliest(model, final_states(model, states[torch.tensor(rows, device=states.device)]))
    right = said == torch.tensor([token for fact in facts for token in fact.target_ids])
    return [bool(each.all()) for each in right.split([len(fact.target_ids) for fact in facts])]


def lookup(tokenized: TokenizedFact, fact_token: str) -> int:
    """The token whose key is edited (rome/repr_tools.py:43-99, compute_v.py:230-260)."""
    first, after = tokenized.subject_range
    last = len(tokenized.ids) - 1
    if fact_token == "subject_first_after_last" and after > last:
        text = tokenized.fact.text
        raise ValueError(f"fact_token 'subject_first_after_last': nothing follows the subject in '{text}'")
    places = {"subject_last": after - 1, "subject_first": first, "subject_first_after_last": after, "last": last}
    return places[fact_token]


def _slot(template: str, subject: str) -> int:
    """Which occurrence of the subject, in the filled template, is the one in the `{}`."""
    filled, at = template.replace("{}", subject), template.find("{}")
    return sum(1 for i in range(at) if filled.startswith(subject, i))
