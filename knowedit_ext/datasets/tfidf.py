"""The published tf-idf statistics: idf.npy and tfidf_vocab.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .records import read_json


@dataclass(frozen=True)
class TfIdf:
    """Inverse document frequencies, float64 [terms], and the place of each term among them."""

    idf: np.ndarray
    vocabulary: dict[str, int]


def load_tfidf(idf: str | Path, vocabulary: str | Path) -> TfIdf:
    """The two published files, checked.

    idf: `.npy` of positive numbers, [terms] (natural logarithm, smoothed as by scikit-learn).
    vocabulary: JSON object term -> index, each of 0..terms-1 once.

    Raises ValueError that names the file and what is wrong in it.
    """
    weights, terms = _read_idf(idf), read_json(vocabulary, dict, "an object term -> index")
    if len(weights) != len(terms):
        raise ValueError(f"'{idf}' has {len(weights)} numbers, '{vocabulary}' {len(terms)} terms: not of one pair")
    places = list(terms.values())
    if not all(type(place) is int for place in places) or sorted(places) != list(range(len(terms))):
        raise ValueError(f"'{vocabulary}': the terms do not have the numbers 0..{len(terms) - 1}, each once")
    return TfIdf(weights, terms)


def _read_idf(path: str | Path) -> np.ndarray:
    try:
        idf = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged header raises whatever it meets
        raise ValueError(f"'{path}' is not a .npy file of numbers: {error}") from error
    if not isinstance(idf, np.ndarray) or idf.ndim != 1 or not len(idf) or idf.dtype.kind != "f":
        kind = f"{idf.dtype} {list(idf.shape)}" if isinstance(idf, np.ndarray) else type(idf).__name__
        raise ValueError(f"'{path}' holds {kind}, expected floating-point numbers [terms]")
    if not (np.isfinite(idf) & (idf > 0)).all():
        raise ValueError(f"'{path}' has numbers that are not finite and positive")
    return idf.astype(np.float64)
