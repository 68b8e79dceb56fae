"""Packages that only some of the work needs, asked for before any of it is done."""

from __future__ import annotations

from .runs.interrupts import imported

# package: what pip calls it, and what for
EXTRAS = {
    "nltk": ("nltk", "fluency of generated text (GE)"),
    "sklearn": ("scikit-learn", "consistency with reference texts (RS)"),
    "datasets": ("datasets", "a data set by its name"),
    "plotly": ("plotly", "a page to click"),
    "jinja2": ("jinja2", "a page to click"),
    "gradio": ("gradio", "exploring a model in the browser"),
    "pandas": ("pandas", "a table as a DataFrame"),
    "peft": ("peft", "loading an adapter"),
    "gguf": ("gguf", "loading a GGUF file"),
    "lm_eval": ("lm-eval", "a task of general ability"),
}


class MissingExtraError(ImportError, ValueError):
    """A package that is not installed because only some of the work needs it."""


def require(module: str) -> None:
    """Raises `MissingExtraError`, with the line to type, where a module of an extra's package cannot be imported."""
    package = module.partition(".")[0]
    try:
        for name in (package, module):
            there = imported(name)
            if hasattr(there, "__path__") and getattr(there, "__file__", None) is None:  # any folder makes a package
                raise ImportError(f"there is only a folder '{name}'")
    except ImportError as error:
        name, purpose = EXTRAS[package]
        raise MissingExtraError(
            f"{purpose} needs {name}, which cannot be imported ({error}): pip install {name}"
        ) from error
