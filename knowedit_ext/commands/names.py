"""Names that help and checks need at once, while the tables that hold them take torch, and seconds, to import."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ..checks import quoted

_PRESET = re.compile(r'"([a-z][\w.-]*(?:/[\w-]+)?)"')
_METHOD = re.compile(r'^METHOD = Method\(\s*"([^"]+)"', re.MULTILINE)
_FILES = sorted((Path(__file__).parent.parent / "editing" / "methods").glob("*.py"))
_TEXTS = tuple(file.read_text(encoding="utf-8") for file in _FILES)
METHOD_NAMES = tuple(name for text in _TEXTS for name in _METHOD.findall(text))
KIND_NAMES = ("state", "mlp", "attn", "knockout")
PROBLEM_NAMES = ("error_injection", "tracing_reversal", "fact_erasure", "fact_amplification", "fact_forcing")
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla", "meta", "privateuseone")
COMPATS = ("reference", "hase")
TOKEN_NAMES = ("subject_first", "subject_last", "subject_first_after_last", "last")
FILE_NAMES = ("known_1000", "zsre", "counterfact", "attribute_snippets", "idf", "tfidf_vocab")


def check_method(name: str, *others: str) -> None:
    """ValueError for what is no method's name, nor one of the others. A program may have added methods to the table."""
    table = sys.modules.get("knowedit_ext.editing.methods")
    known = (*others, *(METHOD_NAMES if table is None else table.METHODS))
    if name not in known:
        raise ValueError(f"unknown method {quoted(name)}: expected one of {', '.join(known)}")


def check_line(label: str) -> None:
    """ValueError for a study's METHOD[+...][:parameter=value,...] of an unknown method."""
    check_method(re.split(r"[+:]", label, maxsplit=1)[0].strip())


def check_edited_by(name: str) -> None:
    """ValueError for what is no method of the study of localization."""
    if not re.fullmatch(r"rome|memit|ft-0*[1-9]\d*", name):
        raise ValueError(f"unknown method {quoted(name)} of the study: expected rome, memit, or ft-1, ft-5 (ft-LAYERS)")


def check_device(name: str) -> None:
    """ValueError for what torch calls no device; whether this machine has it takes torch."""
    if not re.fullmatch(rf"({'|'.join(DEVICES)})(:\d+)?", name):
        raise ValueError(f"unknown device {quoted(name)}: expected e.g. 'cpu', 'cuda' or 'cuda:1'")


def may_be_preset(name: str) -> bool:
    """False for what no method calls a preset of its own; else the table has to be asked, which takes torch."""
    if "knowedit_ext.editing.methods" in sys.modules:
        return True
    return any(name in (preset, preset.partition("/")[0]) for text in _TEXTS for preset in _PRESET.findall(text))
