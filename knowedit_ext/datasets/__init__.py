"""The data sets that users come with, a file each (what is theirs, how it is checked, what is asked); a downloader.

`DATASETS` names those that can be evaluated, the first that `detect`s a record has it.
"""

from . import counterfact, knowedit, mquake, rippleedits, wikibigedit, zsre
from .counterfact import load_counterfact
from .dataset import Dataset
from .download import cache_folder, download
from .knowedit import load_knowedit
from .known import KnownFact, load_known
from .mquake import load_mquake
from .records import BadRecord, Records
from .rippleedits import load_rippleedits
from .snippets import load_snippets, snippets_for, wanted_snippets, with_snippets
from .tfidf import TfIdf, load_tfidf
from .wikibigedit import load_wikibigedit
from .zsre import load_zsre

_ALL = (mquake, rippleedits, wikibigedit, knowedit, zsre, counterfact)
DATASETS: dict[str, Dataset] = {module.DATASET.name: module.DATASET for module in _ALL}

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
    "load_knowedit",
    "load_known",
    "load_mquake",
    "load_rippleedits",
    "load_snippets",
    "load_tfidf",
    "load_wikibigedit",
    "load_zsre",
    "snippets_for",
    "wanted_snippets",
    "with_snippets",
]
