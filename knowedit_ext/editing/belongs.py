"""Which base an edit belongs to: the weights it changes as they were before any edit, and what the model is.

Only the changed weights are read, once: the time of copying them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..model.identity import Checksums, differing_weights, fingerprint, weight_checksum
from ..model.identity import describe as describe_model
from ..model.load import EditableModel
from ..model.weights import Weight, find_weight, stored_in

logger = logging.getLogger(__name__)

QUANTISED = "quantised"


def base_checksums(model: EditableModel, names: Iterable[str], originals: Mapping[str, torch.Tensor]) -> Checksums:
    """Checksums of weights as they were before the edits that are applied to the model.

    originals: by name what those edits have replaced. ValueError for a weight that is not there or cannot be read.
    """
    checksums: Checksums = {}
    for name in names:
        weight = find_weight(model.hf, name)
        if name in originals:
            checksums[name] = weight_checksum(originals[name])
        elif weight.parameter is not None:
            checksums[name] = weight_checksum(weight.parameter)
        else:
            checksums[name] = _quantised_checksum(model, weight)
    return checksums


def _quantised_checksum(model: EditableModel, weight: Weight) -> list[str]:
    """Of all that its module keeps, bit for bit: there are no values to compare with those of another dtype."""
    stored = {key: weight_checksum(tensor) for key, tensor in stored_in(model, weight.holder, weight.name)}
    if not stored:
        raise ValueError(f"'{weight.name}' is kept in a form that cannot be read: nothing tells which model it is of")
    return [QUANTISED, "x".join(map(str, weight.shape)), fingerprint(stored)[:32]]


def check_base(
    base: Checksums, made_for: Mapping[str, Any], model: EditableModel, originals: Mapping[str, torch.Tensor]
) -> None:
    """ValueError where an edit's base is not the model's, with what differs.

    base, made_for: what the edit says; empty: it does not say (files of before), and nothing is checked. Another
    floating dtype is only logged, see `differing_weights`; so is a quantised weight, whose values cannot be compared.
    """
    here = describe_model(model)
    differences = [
        f"{key} is {here[key]}, was {made_for[key]}"
        for key in ("type", "layers", "hidden")
        if key in made_for and made_for[key] != here[key]
    ]
    checksums = base_checksums(model, base, originals)
    other = [name for name in base if name not in checksums or checksums[name][0] != base[name][0]]  # in another dtype
    unlike = [name for name in other if name not in checksums or not _floating(base[name][0], checksums[name][0])]
    differences += differing_weights(*({n: rows[n] for n in rows if n not in unlike} for rows in (base, checksums)))
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"the edit was made for another base ('{made_for.get('name')}', here '{model.name}'): "
            f"{'; '.join(differences[:3])}{more}. Empty its `base` and `model` to use it all the same"
        )
    if unlike:
        logger.warning("whether '%s' is the edit's base cannot be told: %s quantised", model.name, ", ".join(unlike))
    elif other:
        was, now = ("/".join(sorted({rows[name][0] for name in other})) for rows in (base, checksums))
        logger.warning("the edit was made on %s weights, '%s' has %s", was, model.name, now)


def _floating(*kinds: str) -> bool:
    return all(getattr(getattr(torch, kind, None), "is_floating_point", False) for kind in kinds)
