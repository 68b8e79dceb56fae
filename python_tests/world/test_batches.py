"""The packed rows and the masks of training."""

from __future__ import annotations

import torch

from knowedit_ext.world import load_world
from knowedit_ext.world.batches import ANSWER_WEIGHT, VISIBLE, Batches, attention_masks, encode
from knowedit_ext.world.generate import Document, Documents
from knowedit_ext.world.tokenizer import train_tokenizer

PEOPLE = load_world().people
TOKENIZER = train_tokenizer(PEOPLE, documents=3000)


def test_encode_finds_names_and_objects() -> None:
    person = PEOPLE[0]
    doc = Document()
    doc.add("The birthplace of {} is", person.name, "New Delhi")
    for leading in (False, True):
        coded = encode(TOKENIZER, doc, leading)
        name = [i for i, end in enumerate(coded.name_end) if end != VISIBLE]
        assert TOKENIZER.decode([coded.ids[i] for i in name]) == " " + person.name
        assert {coded.name_end[i] for i in name} == {name[-1]}
        answer = [coded.ids[i] for i, w in enumerate(coded.weights) if w == ANSWER_WEIGHT]
        assert TOKENIZER.decode(answer) == " New Delhi"
        assert coded.ids[-1] == TOKENIZER.eos_token_id and coded.weights[0] == 0.0


def test_masks_hide_names_from_what_follows() -> None:
    # document 0: a [b c d] e f, the name at 1..3; then document 9: g h
    documents = torch.tensor([[0, 0, 0, 0, 0, 0, 9, 9]])
    name_end = torch.tensor([[VISIBLE, 3, 3, 3, VISIBLE, VISIBLE, VISIBLE, VISIBLE]])
    early, late = (m[0, 0] for m in attention_masks(documents, name_end, hide_whole_names=True))
    assert late[5].tolist() == [True, False, False, True, True, True, False, False]
    assert early[5].tolist() == [True, False, False, False, True, True, False, False]
    for mask in (early, late):
        assert mask[3].tolist() == [True] * 4 + [False] * 4  # the name sees itself
        assert mask[7].tolist() == [False] * 6 + [True] * 2  # documents do not see each other
        assert not mask.triu(1).any()  # causal
    same_early, same_late = attention_masks(documents, name_end, hide_whole_names=False)
    assert torch.equal(same_early, same_late) and torch.equal(same_late[0, 0], late)


def test_batches_are_deterministic_and_packed() -> None:
    def make() -> Batches:
        return Batches(Documents(PEOPLE, 1), TOKENIZER, rows=6, width=128, seed=1)

    first, second = make(), make()
    for _ in range(2):
        a, b = first.next(), second.next()
        for name in ("ids", "positions", "weights", "early_mask", "late_mask"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        assert a.ids.shape == (6, 128) and a.positions.max() < 128
        assert (a.weights > 0).float().mean() > 0.7
        assert a.late_mask.diagonal(dim1=-2, dim2=-1).all()  # no query is left without a key
        assert (a.early_mask <= a.late_mask).all()


def test_without_masking_both_masks_are_plain() -> None:
    batch = Batches(Documents(PEOPLE, 1), TOKENIZER, rows=3, width=128, seed=1, masked=0.0).next()
    assert torch.equal(batch.early_mask, batch.late_mask)
