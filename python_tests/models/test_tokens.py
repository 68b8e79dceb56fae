"""One door for text: special tokens as `bos` asks, never twice, spans right, wherever text is tokenised."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import knowedit_ext as ke
from knowedit_ext.datasets.zsre import _by_texts
from knowedit_ext.editing.contexts import memit_contexts, rome_contexts
from knowedit_ext.editing.examples import published_examples
from knowedit_ext.editing.tokenized import tokenize_requests
from knowedit_ext.evaluation.generation import generate
from knowedit_ext.evaluation.metrics.essence import perplexity
from knowedit_ext.evaluation.nll import Question, score, tokenize_question
from knowedit_ext.model.facts import tokenize_fact
from knowedit_ext.model.tokens import encode, encode_all, encode_part

from ..support.families import POSITIONS, tiny_hf
from ..support.tokenizers import TOKENIZERS, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:corrupting", "ignore:.*already continued")
BOS, EOS, VOCAB = 1, 2, 500
ADDS = [name for name in TOKENIZERS if name != "byte_bpe"]  # who put BOS in front by themselves
TEXTS = ["Miles Davis plays the", "Côte d'Ivoire", "x", " Miles", "東京"]
CHATS = ["<s>", "<s> ", "<s>[INST] "]


def model_of(name: str, bos: bool | None = None) -> ke.EditableModel:
    return ke.load_model((tiny_hf("gpt2", vocab_size=VOCAB), tokenizer(name)), bos=bos)


def wants_bos(name: str, bos: bool | None) -> bool:
    return name in ADDS if bos is None else bos


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_as_asked(name: str, bos: bool | None) -> None:
    model, plain = model_of(name, bos), tokenizer(name)
    for text in TEXTS:
        own = plain(text, add_special_tokens=False)["input_ids"]
        ids, offsets = encode(model, text)
        assert ids == [BOS] * wants_bos(name, bos) + own and len(offsets) == len(ids)
        assert encode_part(model, text) == own
    assert encode_all(model, [*TEXTS, ""]) == [encode(model, text)[0] for text in TEXTS] + [[]]
    assert encode_all(model, TEXTS, 3) == [encode(model, text)[0][:3] for text in TEXTS]
    assert encode_all(model, []) == [] and encode(model, "")[0] == [BOS] * (bos is True)


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("front", CHATS)
def test_one_bos_where_the_text_spells_it(name: str, bos: bool | None, front: str) -> None:
    """A chat template's output goes in as it is, whatever `bos` says: the same tokens, and offsets of that text."""
    model, plain = model_of(name, bos), tokenizer(name)
    for text in TEXTS:
        text = front + text
        spelled = plain(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encode(model, text)
        assert ids == spelled["input_ids"] and ids.count(BOS) == 1
        assert offsets == [tuple(o) for o in spelled["offset_mapping"]]
        assert encode_all(model, [text]) == [ids]
    assert encode(model, "<s>")[0] == encode_all(model, ["<s>"])[0] == [BOS]


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_a_text_spells_elsewhere_stays(name: str, bos: bool | None) -> None:
    model = model_of(name, bos)
    ids, _ = encode(model, "Miles</s><s>Davis</s>")
    assert ids.count(EOS) == 2 and ids[-1] == EOS and ids.count(BOS) == 1 + wants_bos(name, bos)
    assert encode(model, "<s><s>Miles")[0].count(BOS) == 2


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("front", ["", *CHATS])
@pytest.mark.parametrize("template", ["{} plays the", "The mayor of {} lives in"])
@pytest.mark.parametrize("subject", ["Miles Davis", "Côte d'Ivoire", "東京"])
def test_the_subjects_tokens(name: str, bos: bool | None, front: str, template: str, subject: str) -> None:
    model = model_of(name, bos)
    for fact in (ke.Fact(front + template, subject), ke.Fact(template, subject, prefix=front)):
        tokenized = tokenize_fact(model, fact)
        first, after = tokenized.subject_range
        assert model.tokenizer.decode(tokenized.ids[first:after]).strip() == subject
        assert BOS not in tokenized.ids[first:after] and tokenized.ids.count(BOS) == (
            wants_bos(name, bos) or bool(front)
        )


def seen_by(model: ke.EditableModel) -> list[list[int]]:
    """The token ids of every forward pass that begins a text, as they come."""
    sequences: list[list[int]] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        sequences.extend(ids.tolist())

    model.hf.register_forward_pre_hook(keep, with_kwargs=True)
    return sequences


@pytest.mark.parametrize("bos", [None, True])
@pytest.mark.parametrize("name", ADDS)
def test_contexts_are_sampled_behind_bos(name: str, bos: bool | None) -> None:
    model = model_of(name, bos)
    seen = seen_by(model)
    assert len(memit_contexts(model)[1]) == 5 and len(rome_contexts(model, [(5, 2)])) == 3
    assert seen and all(ids[0] == BOS and ids[1:2] != [BOS] for ids in seen)


def test_contexts_follow_bos() -> None:
    for name, bos in (("byte_bpe", None), ("byte_bpe", True), ("byte_bpe_bos", False)):
        model = model_of(name, bos)
        seen = seen_by(model)
        memit_contexts(model)
        assert {ids[0] == BOS for ids in seen} == {wants_bos(name, bos)}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("bos", [None, True, False])
def test_noise_follows_bos(name: str, bos: bool | None) -> None:
    model, subjects = model_of(name, bos), ["Miles Davis", "Ghana"]
    ids = [i for s in subjects for i in [BOS] * wants_bos(name, bos) + encode_part(model, s)]
    want = model.hf.get_input_embeddings().weight[torch.tensor(ids)].std().item()
    assert ke.noise_level(model, "s3", subjects=subjects) == pytest.approx(3 * want, rel=1e-6)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_published_targets_have_no_bos(name: str) -> None:
    model = model_of(name)
    request = ke.EditRequest("{} plays the", "Miles Davis", " violin")
    own = encode_part(model, " violin")
    [example] = published_examples(model, [request], "reference")
    assert example.scored == ((len(example.ids) - 1, tuple(own)),) and BOS not in own
    assert example.ids.count(BOS) == (name in ADDS)
    questions = _by_texts(model, "Miles Davis plays the", " violin", 0)
    assert len(questions) == len(own)
    for question in questions:
        assert question.ids.count(BOS) == (name in ADDS) and question.joint[0][-1] != BOS


@pytest.mark.parametrize("name", TOKENIZERS)
def test_contexts_go_behind_a_prompts_own_bos(name: str) -> None:
    model = model_of(name)
    request = ke.EditRequest("<s>[INST] {} plays the", "Miles Davis", " violin")
    contexts = ["{}", "The violin. {}", "<s>The violin. {}"]
    [tokenized] = tokenize_requests(model, [request], contexts, "subject_last")
    texts = ["<s>[INST] {} plays the", *["<s>The violin. [INST] {} plays the"] * 2]
    for fact, text, token in zip(tokenized.facts, texts, tokenized.lookups, strict=True):
        assert fact.fact.prompt == text and fact.ids[0] == BOS and fact.ids.count(BOS) == 1
        assert model.tokenizer.decode(fact.ids[: token + 1]).strip().endswith("Miles Davis")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_chat_template_says_the_same_everywhere(name: str) -> None:
    """A prompt that spells BOS gives what the bare one gives under bos=True."""
    spelled, added = model_of(name), model_of(name, bos=True)
    bare, chat = "Miles Davis", "<s>Miles Davis"
    if encode(added, bare)[0] != encode(spelled, chat)[0]:
        pytest.skip("this tokenizer treats the first word of a text in its own way")
    [[a]], _ = score(spelled, [Question(chat, (" plays",))])
    [[b]], _ = score(added, [Question(bare, (" plays",))])
    assert a == b and tokenize_question(spelled, Question(chat, (" plays",))).ids.count(BOS) == 1
    assert perplexity(spelled, [chat], max_length=POSITIONS) == perplexity(added, [bare], max_length=POSITIONS)
    assert generate(spelled, [chat], [3], max_length=9) == generate(added, [bare], [3], max_length=9)
    trace = [
        ke.trace(model, ke.Fact(front + "{} plays the", "Miles Davis"), samples=2, noise=0.5).scores
        for model, front in ((spelled, "<s>"), (added, ""))
    ]
    assert (trace[0] == trace[1]).all()


def test_nobody_else_calls_the_tokenizer() -> None:
    """The built-in world trains one of its own."""
    package = Path(ke.__file__).parent
    for path in package.rglob("*.py"):
        if "world" in path.parts or path.name == "tokens.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called == "searched.tokenizer.encode":  # compat/neurons.py compares with what EasyEdit itself reads
                    continue
                assert not called.endswith(("tokenizer", "tokenizer.encode", "tokenizer.tokenize")), (path, called)


def test_a_token_that_was_added_to_the_tokenizer_alone_is_named() -> None:
    """The model loads: most texts do not have it."""
    grown = tokenizer("byte_bpe")
    rows = len(grown)
    grown.add_tokens(["zebra"])
    model = ke.load_model((tiny_hf("gpt2", vocab_size=rows), grown))
    assert encode(model, "Miles")[0]
    for read in (encode, lambda model, text: encode_all(model, ["Miles", text]), encode_part):
        with pytest.raises(ValueError, match=rf"token {rows} \('zebra'\) is beyond the {rows} rows"):
            read(model, "Miles zebra")
