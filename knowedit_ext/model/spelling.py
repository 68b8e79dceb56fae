"""Where words end: the space in front of a target, and the subject that a prompt spells out."""

from __future__ import annotations

import unicodedata

from ..checks import quoted

# Scripts that put no space between words, as their letters' Unicode names begin.
_UNSPACED = (
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI ", "FULLWIDTH", "HALFWIDTH KATAKANA"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE", "BALINESE", "TAI ", "NEW TAI"),
)


def spaced(target: str, prompt: str, space: bool | None = None) -> str:
    """`target` as it goes on from `prompt`: published targets come without the space that stands before them.

    space: True puts one in front, False keeps the target as it is. None: one, unless the prompt ends in whitespace (a
    chat's turn) or its last letter, or full-width mark, is of a writing without spaces (Chinese, Japanese, Thai).
    A target that begins with whitespace never gets another one.
    """
    if space is False or target[:1].isspace():
        return target
    return " " + target if space or _separates_words(prompt) else target


def mark_subject(prompt: str, subject: str, first: bool = False) -> str:
    """A prompt that spells its subject out, with "{}" in the subject's place.

    Whole words go before parts of longer ones: in "Annaburg, Anna" it is the second one. first: of several that are
    alike take the first; else they are a ValueError, as is a subject that does not occur.
    """
    starts = _starts(prompt, subject)
    if not starts:
        raise ValueError(f"subject {quoted(subject)} does not occur in prompt {quoted(prompt)}")
    starts = [n for n in starts if _is_edge(prompt, n) and _is_edge(prompt, n + len(subject))] or starts
    if len(starts) > 1 and not first:
        raise ValueError(
            f"subject {quoted(subject)} occurs {len(starts)} times in prompt {quoted(prompt)}: put '{{}}' in the "
            "place of the one that is meant"
        )
    return prompt[: starts[0]] + "{}" + prompt[starts[0] + len(subject) :]


def marked_occurrence(template: str, subject: str) -> int:
    """Which occurrence of the subject, in the filled template, is the one in the `{}`."""
    return sum(start < template.find("{}") for start in _starts(template.replace("{}", subject), subject))


def find_occurrence(text: str, subject: str, occurrence: int | None = None) -> tuple[int, int]:
    """Character range of `subject` in `text`; ambiguous without `occurrence` where it stands there several times."""
    starts = _starts(text, subject)
    if not starts:
        raise ValueError(f"subject {quoted(subject)} does not occur in prompt {quoted(text)}")
    if occurrence is None and len(starts) > 1:
        raise ValueError(
            f"subject {quoted(subject)} occurs {len(starts)} times in prompt {quoted(text)}: say which with "
            f"occurrence=0..{len(starts) - 1}"
        )
    if occurrence is not None and not 0 <= occurrence < len(starts):
        raise ValueError(
            f"subject {quoted(subject)} occurs {len(starts)} times in prompt {quoted(text)}: no occurrence={occurrence}"
        )
    start = starts[occurrence or 0]
    return start, start + len(subject)


def _starts(text: str, part: str) -> list[int]:
    """Where `part` begins in `text`, overlapping ones included."""
    return [n for n in range(len(text)) if text.startswith(part, n)]


def _separates_words(prompt: str) -> bool:
    if prompt[-1:].isspace():
        return False
    last = next((sign for sign in reversed(prompt) if sign.isalpha() or _is_unspaced(sign)), "a")
    return not _is_unspaced(last)


def _is_unspaced(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith(_UNSPACED)


def _is_edge(text: str, place: int) -> bool:
    """Does a word begin or end in front of this character?"""
    if place in (0, len(text)):
        return True
    if unicodedata.category(text[place]).startswith("M"):  # an accent of the letter before
        return False
    return not (_is_word(text[place - 1]) and _is_word(text[place]))


def _is_word(letter: str) -> bool:
    marks = letter == "_" or unicodedata.category(letter).startswith("M")
    return (marks or letter.isalnum()) and not _is_unspaced(letter)
