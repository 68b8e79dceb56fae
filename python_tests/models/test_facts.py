"""Where subject and target stand among the tokens, for every kind of tokenizer."""

from __future__ import annotations

import json
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

import knowedit_ext as ke
from knowedit_ext.model.facts import encode, tokenize_fact
from knowedit_ext.model.spelling import find_occurrence

from ..support.families import tiny_hf
from ..support.tokenizers import TOKENIZERS, tokenizer, word_level

SUBJECTS = ["Miles Davis", "Côte d'Ivoire", "東京", "北京", "Zoë", "The Space Needle", "I"]
PROMPTS = ["{} plays the", "The capital of {} is", "In Japan, the mayor of {}", "{}", "北{}京 is", "the\u00a0{}'s"]


@cache
def model_with(name: str, bos: bool | None = None) -> ke.EditableModel:
    return ke.load_model((tiny_hf("gpt2", vocab_size=500), tokenizer(name)), bos=bos)


def span_text(model: ke.EditableModel, tokenized) -> str:
    first, after = tokenized.subject_range
    return model.tokenizer.decode(tokenized.ids[first:after])


def published_span(tokens: list[str], subject: str) -> tuple[int, int] | None:
    """The published rule: each token decoded by itself, characters matched; None where it does not apply."""
    whole = "".join(tokens)
    if whole.count(subject) != 1:
        return None
    at = whole.index(subject)
    ends = [sum(map(len, tokens[: n + 1])) for n in range(len(tokens))]
    first = next(n for n, end in enumerate(ends) if end > at)
    return first, next(n for n, end in enumerate(ends) if end >= at + len(subject)) + 1


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_span_is_the_subject(name: str, subject: str, prompt: str) -> None:
    model = model_with(name)
    text = prompt.format(subject)
    if len(encode(model, text)[0]) < 2:
        with pytest.raises(ValueError, match="single token"):
            tokenize_fact(model, ke.Fact(prompt, subject))
        return
    last_one = text.count(subject) - 1 if text.count(subject) > 1 else None  # "I" stands in "In Japan", too
    tokenized = tokenize_fact(model, ke.Fact(prompt, subject, occurrence=last_one))
    ids = model.tokenizer(text)["input_ids"]
    assert list(tokenized.ids) == (ids[:-1] if name == "byte_bpe_eos" else ids)
    first, after = tokenized.subject_range
    assert subject in span_text(model, tokenized)
    for shorter in (
        tokenized.ids[first + 1 : after],
        tokenized.ids[first : after - 1],
    ):  # and no token more than needed
        assert subject not in model.tokenizer.decode(shorter)
    assert (first == 0) == (prompt[0] == "{" and name == "byte_bpe")
    published = published_span(list(tokenized.tokens), subject)
    assert published in (None, (first, after))


TEXT = st.text(alphabet=st.sampled_from("MilesDavé' 東京北ñ.,-"), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from(TOKENIZERS), st.sampled_from(["", "x ", "The mayor of "]), TEXT, st.sampled_from(["", " is", "'s"])
)
def test_random_subjects(name: str, before: str, subject: str, after: str) -> None:
    assume(subject.strip() == subject and "  " not in subject and (before + subject + after).count(subject) == 1)
    model = model_with(name)
    assume(len(encode(model, before + subject + after)[0]) > 1)
    tokenized = tokenize_fact(model, ke.Fact(before + "{}" + after, subject))
    assert subject in span_text(model, tokenized)
    published = published_span(list(tokenized.tokens), subject)
    assert published in (None, tokenized.subject_range)
    with_target = tokenize_fact(model, ke.Fact(before + "{}" + after, subject, target=" trumpet"))
    assert with_target.ids == tokenized.ids and with_target.subject_range == tokenized.subject_range


def test_known_facts_with_the_gpt2_tokenizer(data_dir) -> None:
    model = ke.load_model(
        (tiny_hf("gpt2", vocab_size=50257), GPT2TokenizerFast.from_pretrained(data_dir / "gpt2_tokenizer"))
    )
    seen = 0
    for record in json.loads((data_dir / "known_1000.json").read_text())[:400]:
        tokenized = tokenize_fact(model, ke.Fact(record["template"], record["subject"]))
        want = published_span(list(tokenized.tokens), record["subject"])
        seen += want is not None
        assert want in (None, tokenized.subject_range)
    assert seen > 300


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("target", [" trumpet", " 東京", " 北京 opera", " a", "'s"])
def test_prompt_and_target_are_tokenised_jointly(name: str, target: str) -> None:
    model = model_with(name)
    fact = ke.Fact("{} plays the", "Miles Davis", target=target, space=False)
    tokenized = tokenize_fact(model, fact)
    joint, _ = encode(model, fact.text + target)
    assert list(tokenized.ids + tokenized.target_ids) == joint
    assert tokenized.ids == tokenize_fact(model, ke.Fact(fact.prompt, fact.subject)).ids
    assert model.tokenizer.decode(tokenized.target_ids).strip() == target.strip()


@pytest.mark.parametrize(
    "name, prompt, target",
    [(n, p, t) for n in TOKENIZERS for p, t in [("{} plays", "the"), ("{} plays the t", "rumpet")]],
)
def test_a_target_that_merges_into_the_prompt(name: str, prompt: str, target: str) -> None:
    model, fact = model_with(name), ke.Fact(prompt, "Miles Davis", target=target, space=False)
    ids, joint = encode(model, fact.text)[0], encode(model, fact.text + target)[0]
    if joint[: len(ids)] == ids:
        assert list(tokenize_fact(model, fact).target_ids) == joint[len(ids) :]
        return
    with pytest.raises(ValueError, match=f"target '{target}' merges with the last token of prompt .*plays"):
        tokenize_fact(model, fact)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_trailing_space_merges_with_the_target(name: str) -> None:
    with pytest.raises(ValueError, match="target 'trumpet' merges"):
        tokenize_fact(model_with(name), ke.Fact("{} plays the ", "Miles Davis", target="trumpet"))


def test_in_a_writing_without_spaces_what_merges_is_named() -> None:
    """A space is no way out there: the error says where to cut."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["中国的首都是北京"] * 3, trainer)
    model = ke.load_model((tiny_hf("gpt2", vocab_size=400), PreTrainedTokenizerFast(tokenizer_object=made)))
    with pytest.raises(
        ValueError, match="the tokenizer reads '.*是北.*' as one; end the prompt in front of that"
    ) as seen:
        tokenize_fact(model, ke.Fact("{}的首都是", "中国", target="北京"))
    assert "space" not in str(seen.value)


@pytest.mark.parametrize("attribute", ["", "  "])
def test_an_empty_attribute_is_refused(attribute: str) -> None:
    with pytest.raises(ValueError, match="the attribute of prompt '{} plays the' is empty"):
        ke.Fact("{} plays the", "Miles Davis", attribute=attribute)


# -- special tokens and prefixes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bos_on_request(name: str) -> None:
    fact = ke.Fact("{} plays the", "Miles Davis", target=" trumpet")
    by_bos = {bos: tokenize_fact(model_with(name, bos), fact) for bos in (True, False, None)}
    start = model_with(name).tokenizer.bos_token_id
    assert by_bos[True].ids == (start, *by_bos[False].ids) and start not in by_bos[False].ids
    assert by_bos[None] == by_bos[name != "byte_bpe"]
    first, after = by_bos[False].subject_range
    assert by_bos[True].subject_range == (first + 1, after + 1) and first == 0
    assert by_bos[True].target_ids == by_bos[False].target_ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prefix(name: str) -> None:
    """A chat prefix is context: the subject is not looked for in it."""
    model = model_with(name)
    fact = ke.Fact("{} plays the", "Miles Davis", prefix="Miles Davis was born in Alton. ")
    tokenized = tokenize_fact(model, fact)
    assert fact.text == "Miles Davis was born in Alton. Miles Davis plays the"
    assert list(tokenized.ids) == encode(model, fact.text)[0]
    assert span_text(model, tokenized).strip() == "Miles Davis" and tokenized.subject_range[0] > 5


# -- the subject several times -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_subject_twice_needs_an_occurrence(name: str) -> None:
    model, prompt = model_with(name), "{} and Miles play; the"
    with pytest.raises(ValueError, match="subject 'Miles' occurs 2 times .*occurrence=0..1"):
        ke.Fact(prompt, "Miles")
    spans = [tokenize_fact(model, ke.Fact(prompt, "Miles", occurrence=n)).subject_range for n in (0, 1)]
    assert spans[0][1] < spans[1][0]
    with pytest.raises(ValueError, match="no occurrence=2"):
        ke.Fact(prompt, "Miles", occurrence=2)


def test_overlapping_occurrences_are_counted() -> None:
    with pytest.raises(ValueError, match="2 times"):
        find_occurrence("an ana-ana-ana b", "ana-ana")


def test_from_prompt() -> None:
    whole = ke.Fact.from_prompt("In Annaburg, Anna plays the", "Anna")
    assert (whole.prompt, whole.subject_chars()) == ("In Annaburg, {} plays the", (13, 17))
    fact = ke.Fact.from_prompt("The mayor of 東京 lives", "東京", target=" in")
    assert (fact.prompt, fact.subject, fact.target) == ("The mayor of {} lives", "東京", " in")
    second = ke.Fact.from_prompt("a needle, a needle", "needle", occurrence=1)
    assert second.prompt == "a needle, a {}" and second.subject_chars() == (12, 18)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(prompt="", subject="x"), "the prompt is empty"),
        (dict(prompt="  \n", subject="x"), "the prompt is empty"),
        (dict(prompt="{} is", subject=" "), r"subject of prompt '\{\} is' is empty"),
        (dict(prompt="Miles plays", subject="Miles"), r"prompt 'Miles plays' has no '\{\}'.*from_prompt"),
        (dict(prompt="{} and {}", subject="Miles"), r"prompt '\{\} and \{\}' has 2 '\{\}'"),
        (dict(prompt="{} is", subject="Miles", target=""), "target of prompt .* is empty"),
        (dict(prompt="{} is", subject="Miles", target=" "), "target of prompt .* is empty"),
    ],
)
def test_bad_facts(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ke.Fact(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(prompt=None, subject="x"),
        dict(prompt="{}", subject=3),
        dict(prompt="{}", subject="x", target=3),
        dict(prompt="{}", subject="x", attribute=3),
        dict(prompt="{}", subject="x", prefix=None),
    ],
)
def test_not_a_string(arguments) -> None:
    with pytest.raises(TypeError, match="must be a string, not (NoneType|int)"):
        ke.Fact(**arguments)


@pytest.mark.parametrize(
    "prompt, subject, message",
    [
        ("Miles plays", "Davis", "subject 'Davis' does not occur in prompt 'Miles plays'"),
        ("", "Davis", "the prompt is empty"),
        ("Miles plays", "", "subject of prompt 'Miles plays' is empty"),
        ("{} plays", "plays", "already has"),
        ("Miles or Miles", "Miles", "2 times"),
    ],
)
def test_bad_prompts(prompt, subject, message) -> None:
    with pytest.raises(ValueError, match=message):
        ke.Fact.from_prompt(prompt, subject)


def test_a_prompt_of_one_token() -> None:
    model = ke.load_model((tiny_hf("gpt2"), word_level()))
    with pytest.raises(ValueError, match="prompt 'w3' is a single token"):
        tokenize_fact(model, ke.Fact("{}", "w3"))


def test_a_prompt_longer_than_the_positions() -> None:
    model = ke.load_model((tiny_hf("gpt2"), word_level()))
    fits = ke.Fact("{}" + " w4" * 63, "w3", target=" w5")
    assert len(tokenize_fact(model, fits).ids) == 64
    for prompt, target in (("{}" + " w4" * 64, None), (fits.prompt, " w5 w6")):
        with pytest.raises(ValueError, match=r"prompt 'w3 w4 .*more than the model's 64 positions"):
            tokenize_fact(model, ke.Fact(prompt, "w3", target=target))
