"""The world's byte-level BPE tokenizer."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .generate import Documents
from .people import Person

END = "<|endoftext|>"
MAX_POSITIONS = 128


def train_tokenizer(people: list[Person], vocab_size: int = 1100, documents: int = 6000) -> PreTrainedTokenizerFast:
    """Train a GPT-2-like tokenizer: objects and common words become one token, a full name two to four.

    Names are thinned out of the corpus, since a merge goes to what is frequent.
    """
    stream = iter(Documents(people, seed=0))
    corpus = []
    for number, doc in zip(range(documents), stream, strict=False):
        text = doc.text
        if number % 6:  # names in one document of six
            for start, end in reversed(doc.names):
                text = text[:start] + "X" + text[end:]
        corpus.append(text)
    return train_bpe(corpus, vocab_size)


def train_bpe(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A GPT-2-like tokenizer of these texts: byte-level, so that nothing is unknown, with the end-of-text token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=MAX_POSITIONS,
    )
