"""The data sets that users come with, a file each (what is theirs, how it is checked, what is asked); a downloader.

`DATASETS` names those that can be evaluated, the first that `detect`s a record has it.
"""

from . import counterfact, zsre
from .counterfact import load_counterfact
from .dataset import Dataset
from .download import cache_folder, download
from .known import KnownFact, load_known
from .records import BadRecord, Records
from .snippets import load_snippets, snippets_for, wanted_snippets, with_snippets
from .tfidf import TfIdf, load_tfidf
from .zsre import load_zsre

DATASETS: dict[str, Dataset] = {dataset.name: dataset for dataset in (zsre.DATASET, counterfact.DATASET)}

__all__ = [
    "DATASETS",
    "BadRecord",
    "Dataset",
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
