"""Facts, and where their subject and target stand among the tokens.

Spans are found by the tokenizer's character offsets on the whole text, so byte-level BPE, metaspace and BOS-adding
tokenizers are all right, and so are characters that take several tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import checks
from ..checks import quoted
from .load import EditableModel
from .spelling import find_occurrence, mark_subject, marked_occurrence, spaced
from .tokens import Offsets, encode, token_span


@dataclass(frozen=True)
class Fact:
    """A statement about a subject, cut before its object.

    prompt: template with exactly one `{}` where the subject goes, e.g. "{} plays the".
    target: continuation to score, e.g. "trumpet"; None: what the model itself says.
    attribute: what the model must say to count as knowing the fact (compared without surrounding space).
    occurrence: which occurrence of the subject in the prompt is meant, counted from 0, where there are several.
    prefix: text in front of the prompt (a chat prefix, context); never searched for the subject.
    space: whether a space stands before the target; None: as the prompt's writing has it, see `spelling.spaced`.
    """

    prompt: str
    subject: str
    target: str | None = None
    attribute: str | None = None
    occurrence: int | None = None
    prefix: str = ""
    space: bool | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "prefix"):
            checks.text(name, getattr(self, name))
        for name in ("target", "attribute"):
            if getattr(self, name) is not None:
                checks.text(name, getattr(self, name))
        if not self.prompt.strip():
            raise ValueError("the prompt is empty")
        if not self.subject.strip():
            raise ValueError(f"the subject of prompt {quoted(self.prompt)} is empty")
        slots = self.prompt.count("{}")
        if slots != 1:
            raise ValueError(
                f"prompt {quoted(self.prompt)} has {slots or 'no'} '{{}}': exactly one must mark where the subject goes"
                + ("; Fact.from_prompt takes a prompt that spells the subject out" if not slots else "")
            )
        if self.target is not None and not self.target.strip():
            raise ValueError(f"the target of prompt {quoted(self.prompt)} is empty; None: the model's own answer")
        if self.attribute is not None and not self.attribute.strip():
            raise ValueError(f"the attribute of prompt {quoted(self.prompt)} is empty; None: whatever the model says")
        for name, kind in (("occurrence", int | None), ("space", bool | None)):
            object.__setattr__(self, name, checks.as_type(name, getattr(self, name), kind))
        self.subject_chars()
        if self.target is not None:
            object.__setattr__(self, "target", spaced(self.target, self.text, self.space))

    @classmethod
    def from_prompt(cls, prompt: str, subject: str, occurrence: int | None = None, **kwargs: Any) -> Fact:
        """From a prompt that spells the subject out: `Fact.from_prompt("Miles Davis plays the", "Miles Davis")`.

        Whole words go before parts of longer ones, see `spelling.mark_subject`; `occurrence` counts both.
        """
        if not checks.text("prompt", prompt).strip():
            raise ValueError("the prompt is empty")
        if not checks.text("subject", subject).strip():
            raise ValueError(f"the subject of prompt {quoted(prompt)} is empty")
        if "{}" in prompt:
            raise ValueError(f"prompt {quoted(prompt)} already has a '{{}}'")
        if occurrence is None:
            template = mark_subject(prompt, subject)
            if prompt.count(subject) > 1:
                occurrence = marked_occurrence(template, subject)
        else:
            start, stop = find_occurrence(prompt, subject, occurrence)
            template = prompt[:start] + "{}" + prompt[stop:]
        return cls(template, subject, occurrence=occurrence, **kwargs)

    @property
    def text(self) -> str:
        """Prefix and prompt, with the subject filled in."""
        return self.prefix + self.prompt.replace("{}", self.subject)

    def subject_chars(self) -> tuple[int, int]:
        """Character range [first, after) of the subject in `text`."""
        start, stop = find_occurrence(self.prompt.replace("{}", self.subject), self.subject, self.occurrence)
        return len(self.prefix) + start, len(self.prefix) + stop


@dataclass(frozen=True)
class TokenizedFact:
    """A fact as the model reads it.

    ids: token ids of the prompt, special tokens included; tokens: each decoded alone;
    subject_range: (first, after): the subject's tokens, and the one behind them; target_ids: empty without a target.
    """

    fact: Fact
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    subject_range: tuple[int, int]
    target_ids: tuple[int, ...] = ()


def tokenize_fact(model: EditableModel, fact: Fact) -> TokenizedFact:
    """Tokenise prompt and target jointly and find the subject's and the target's tokens.

    Raises ValueError when the prompt is a single token, longer than the model's positions, or when the target does
    not begin at a token boundary.
    """
    text, target = fact.text, fact.target or ""
    ids, offsets = encode(model, text)
    target_ids: list[int] = []
    if target:
        joint, places = encode(model, text + target)
        if joint[: len(ids)] != ids:  # offsets would not tell: some tokenizers leave spaces out of them
            raise ValueError(_merging(text, target, places))
        target_ids = joint[len(ids) :]
        if not target_ids:
            raise ValueError(f"target {quoted(target)} after prompt {quoted(text)} gives no token of its own")
    tokens = [model.tokenizer.decode([i]) for i in ids]
    first, after = token_span(offsets, *fact.subject_chars())
    while after - first > 1 and not tokens[first].strip() and offsets[first][0] == offsets[first + 1][0]:
        first += 1  # a lone "▁" put in front of the text, which claims the place of the first character
    if first == after:
        raise ValueError(f"subject {quoted(fact.subject)} has no token of its own in prompt {quoted(text)}")
    if len(ids) < 2:
        raise ValueError(f"prompt {quoted(text)} is a single token: there is nothing between subject and answer")
    most = model.modules.max_positions
    needed = len(ids) + max(0, len(target_ids) - 1)
    if most is not None and needed > most:
        what = f"'{text[:60]}...'" + (" with its target" if target_ids else "")
        raise ValueError(f"prompt {what} takes {needed} tokens, more than the model's {most} positions")
    return TokenizedFact(fact, tuple(ids), tuple(tokens), (first, after), tuple(target_ids))


def _merging(text: str, target: str, places: Offsets) -> str:
    """Why a target cannot be told from its prompt, and what would help in its writing."""
    what = f"target {quoted(target)} merges with the last token of prompt {quoted(text)}"
    if not text[-1:].isspace() and spaced(target, text) != target:
        return f"{what}: begin it with a space (' {target.lstrip()}')"
    if text[-1:].isspace():
        return f"{what}: begin it with a space (' {target.lstrip()}') and leave none at the prompt's end"
    both = text + target
    start = next((first for first, after in places if first < len(text) < after), None)
    if start is None:
        return f"{what}: the tokenizer reads {quoted(both)} another way; cut it elsewhere"
    token = both[start : next(after for first, after in places if first == start and after > len(text))]
    return f"{what}: the tokenizer reads {quoted(token)} as one; end the prompt in front of that, or behind it"
