"""Loaders and validators for the data sets that users come with, and a downloader."""

from .counterfact import load_counterfact
from .download import cache_folder, download
from .known import KnownFact, load_known
from .records import BadRecord, Records
from .snippets import load_snippets, snippets_for, wanted_snippets, with_snippets
from .tfidf import TfIdf, load_tfidf
from .zsre import load_zsre

__all__ = [
    "BadRecord",
    "KnownFact",
    "Records",
    "TfIdf",
    "cache_folder",
    "download",
    "load_counterfact",
    "load_known",
    "load_snippets",
    "load_tfidf",
    "load_zsre",
    "snippets_for",
    "wanted_snippets",
    "with_snippets",
]
