"""The space in front of a target, and the subject that a prompt spells out."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from knowedit_ext.model.spelling import find_occurrence, mark_subject, marked_occurrence, spaced

ENDS = [
    ("Anna plays the", True),
    ("Анна играет на", True),
    ("한국의 수도는", True),
    ("عاصمة فرنسا هي", True),
    ("Q: Who? A:", True),
    ("It was built in 1250,", True),
    ("1250", True),
    ("?", True),
    ("中国的首都是", False),
    ("中国的首都是：", False),
    ("中国（1949）:", False),
    ("日本の首都は、", False),
    ("谁写了 Linux？", False),  # a full-width mark
    ("他说「Linux」", True),  # no mark of Chinese alone
    ("コンピュータ", False),  # ends in a prolonged sound mark
    ("人々", False),
    ("ประเทศไทยอยู่ที่", False),  # ends in a vowel sign
    ("ភាសា", False),
    ("နိုင်ငံ", False),
    ("user: who?\nassistant:\n", False),
    ("Anna plays the ", False),
    ("是\u3000", False),
]


@pytest.mark.parametrize("prompt, space", ENDS)
@pytest.mark.parametrize("target", ["harp", "北京", "'s", "1250"])
def test_the_prompt_tells(prompt: str, space: bool, target: str) -> None:
    assert spaced(target, prompt) == (f" {target}" if space else target)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(min_size=1), st.text(), st.sampled_from([None, True, False]))
def test_at_most_one_space(target: str, prompt: str, space: bool | None) -> None:
    spelling = spaced(target, prompt, space)
    assert spelling in (target, f" {target}")
    assert spelling == target or (space is not False and not target[0].isspace())
    assert space is not True or spelling[0].isspace()
    assert spaced(spelling, prompt, space) == spelling  # what was spaced once stays


@pytest.mark.parametrize(
    "prompt, subject, template",
    [
        ("Annaburg, Anna", "Anna", "Annaburg, {}"),
        ("Anna's sister is Annabel", "Anna", "{}'s sister is Annabel"),
        ("In Japan, I", "I", "In Japan, {}"),
        ("The Mainz on Main", "Main", "The Mainz on {}"),
        ("route 666 is 66 miles", "66", "route 666 is {} miles"),
        ("snake_case, case", "case", "snake_case, {}"),
        ("Jose\u0301 and Jose", "Jose", "Jose\u0301 and {}"),
        ("Straßenbahn, Straße", "Straße", "Straßenbahn, {}"),
        ("Иванов и Иван", "Иван", "Иванов и {}"),
        ("서울은 한국의", "서울", "{}은 한국의"),  # no whole word, but one place
        ("Annaburg lies", "Anna", "{}burg lies"),
        ("中国的首都是", "中国", "{}的首都是"),
        ("これは東京です", "東京", "これは{}です"),
        ("C++ is", "C++", "{} is"),
        ("(Anna) Annabel", "Anna", "({}) Annabel"),
    ],
)
def test_whole_words_first(prompt: str, subject: str, template: str) -> None:
    assert mark_subject(prompt, subject) == template
    assert template.replace("{}", subject) == prompt
    start = template.find("{}")
    assert find_occurrence(prompt, subject, marked_occurrence(template, subject)) == (start, start + len(subject))


@pytest.mark.parametrize(
    "prompt, subject, times",
    [
        ("Anna and Anna", "Anna", 2),
        ("Anna-Maria, Anna", "Anna", 2),
        ("Annaburg, Annabel", "Anna", 2),
        ("ana-ana-ana", "ana-ana", 2),
        ("北京和北京", "北京", 2),
    ],
)
def test_several_are_ambiguous(prompt: str, subject: str, times: int) -> None:
    with pytest.raises(ValueError, match=rf"'{subject}' occurs {times} times in prompt '{prompt}': put '\{{\}}'"):
        mark_subject(prompt, subject)
    assert mark_subject(prompt, subject, first=True) == prompt.replace(subject, "{}", 1)


def test_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="subject 'Bo' does not occur in prompt 'Anna plays the'"):
        mark_subject("Anna plays the", "Bo")


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.text("ab é", min_size=1, max_size=12), st.text("ab é", min_size=1, max_size=2))
def test_as_a_regular_expression_finds_them(prompt: str, subject: str) -> None:
    assume(subject == subject.strip() and subject in prompt)
    whole = [m.start() for m in re.finditer(rf"(?=(?<!\w){re.escape(subject)}(?!\w))", prompt)]
    starts = whole or [m.start() for m in re.finditer(rf"(?={re.escape(subject)})", prompt)]
    want = prompt[: starts[0]] + "{}" + prompt[starts[0] + len(subject) :]
    assert mark_subject(prompt, subject, first=True) == want
    if len(starts) == 1:
        assert mark_subject(prompt, subject) == want
    else:
        with pytest.raises(ValueError, match=f"occurs {len(starts)} times"):
            mark_subject(prompt, subject)
