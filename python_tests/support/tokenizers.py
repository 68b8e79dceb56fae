"""Tiny tokenizers of the kinds in use, trained or spelled out offline."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Miles Davis plays the trumpet",
    "The capital of Côte d'Ivoire is Yamoussoukro",
    "The mayor of 東京 lives in Japan",
    "Niccolo Paganini plays the violin",
    "The Space Needle is in downtown Seattle, where the needle is",
    "Côte d'Ivoire borders Ghana; Miles was born in Alton",
]
# Names that no merge was trained on must come apart into many pieces; the corpus leaves 北京 and Zoë out.
_SPECIAL = ["<unk>", "<s>", "</s>"]


def word_level(words: int = 60, bos: bool = False) -> PreTrainedTokenizerFast:
    """Words w0, w2 .. w{words - 1} (1 is the BOS token), one token each; w0 stands for unknown ones."""
    vocabulary = {f"w{i}": i for i in range(words) if i != 1} | {"<s>": 1}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        core.post_processor = _bos()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", bos_token="<s>")


def _fast(core: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _bos() -> processors.PostProcessor:
    return processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])


def byte_bpe(bos: bool = False, trim_offsets: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's; `trim_offsets` leaves spaces out of offsets, as Llama 3's does."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=340, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    steps: list[processors.PostProcessor] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if eos:
        steps.append(processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]))
    elif bos:
        steps.append(_bos())
    core.post_processor = processors.Sequence(steps)
    return _fast(core)


def metaspace(normalized: bool = False) -> PreTrainedTokenizerFast:
    """BPE with "▁" for spaces, byte fallback and a BOS token, as Llama's.

    normalized: "▁" comes from a normalizer (Llama 2's files) instead of the pre-tokenizer.
    """
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.train_from_iterator(
        SENTENCES[:1] + SENTENCES[3:], trainers.BpeTrainer(vocab_size=150, special_tokens=_SPECIAL, show_progress=False)
    )
    spelled = json.loads(core.to_str())
    vocabulary = spelled["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    spelled["model"]["byte_fallback"] = True
    core = Tokenizer.from_str(json.dumps(spelled))
    if normalized:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.pre_tokenizer = pre_tokenizers.Split("\0", "isolated")  # nothing is split
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = _bos()
    return _fast(core)


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    return {
        "byte_bpe": byte_bpe,
        "byte_bpe_bos": lambda: byte_bpe(bos=True),
        "byte_bpe_eos": lambda: byte_bpe(eos=True),
        "byte_bpe_trimmed": lambda: byte_bpe(bos=True, trim_offsets=True),
        "metaspace": metaspace,
        "metaspace_normalized": lambda: metaspace(normalized=True),
    }[name]()


TOKENIZERS = (
    "byte_bpe",
    "byte_bpe_bos",
    "byte_bpe_eos",
    "byte_bpe_trimmed",
    "metaspace",
    "metaspace_normalized",
)
