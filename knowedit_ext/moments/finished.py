"""The layers whose moments a folder holds already, as far as they are what is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..model.identity import Checksums, differing_config, differing_weights
from ..runs.settings import differing, spell
from .corpora import Corpus
from .store import Moment, load_moment


def finished(
    folder: Path | None,
    layers: Sequence[int],
    corpus: Corpus,
    weights: Mapping[int, Checksums],
    told_by: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> tuple[dict[int, Moment], list[int]]:
    """Those that need not be collected; ValueError where they are of something else than a smaller `max_tokens`.

    Where the whole text was less than `max_tokens`, a larger one, or none, is the same: such layers come second, too,
    to be written down anew.
    """
    moments: dict[int, Moment] = {}
    renewed: list[int] = []
    hashes: dict[int, str] = {}
    for layer in layers:
        if folder is None or not (folder / f"layer_{layer}.json").exists():
            continue
        moment = load_moment(folder, layer)
        origin = moment.origin or {}
        if not origin or len(origin["texts"]) != 1:
            difference = "moments that were merged, or of unknown origin"
        else:
            text, there = origin["texts"][0], origin["settings"]
            limit, limit_there = settings["max_tokens"], there["max_tokens"]
            whole = text["ended"] == "text" and (limit is None or limit >= text["tokens"])
            larger = limit_there is not None and (limit is None or limit > limit_there)
            if whole or larger:
                there = there | {"max_tokens": limit}
            difference = spell(differing(there, dict(settings)))
            difference = difference or "; ".join(_differing(origin["weights"], weights[layer])[:3])
            difference = difference or spell(differing_config(origin.get("config", {}), told_by["config"]))
            difference = difference or ("another tokenizer" if origin["tokenizer"] != told_by["tokenizer"] else "")
            used = text["texts"]
            if not difference and used <= len(corpus) and used not in hashes:
                hashes[used] = corpus.sha256(used)
            longer = text["ended"] == "text" and used != len(corpus)
            difference = difference or ("another text" if longer or hashes.get(used) != text["sha256"] else "")
            if not difference and larger and whole:
                moment = replace(moment, origin={**origin, "settings": there})
                renewed.append(layer)
            elif not difference and larger:
                continue
        if difference:
            raise ValueError(f"'{folder}' holds moments of layer {layer} from something else ({difference})")
        moments[layer] = moment
    return moments, renewed


def _differing(there: Checksums, asked: Checksums) -> list[str]:
    """In another dtype too: what is gone on with is computed in it."""
    differences = differing_weights(there, asked)
    return differences or [
        f"'{name}' is {asked[name][0]}, was {there[name][0]}" for name in there if there[name] != asked[name]
    ]
