"""EasyEdit (zjunlp/EasyEdit) on us: `install()`, or `python -m knowedit_ext.compat.easyedit script.py ARGS...`.

    from knowedit_ext.compat import easyedit
    easyedit.install()                      # or: with easyedit.installed(): ...
    from easyeditor import BaseEditor, ...  # as ever

Without EasyEdit the functions here stand alone, with its signatures and for any hparams object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from . import ahead, stats
from .closed_form import ALPHAEDIT, EMMET, MEMIT, PMET
from .contexts import generate_fast
from .editing import Editors
from .metrics_easyedit import compute_edit_quality, expecting, test_prediction_acc
from .neurons import get_refined_neurons
from .swap import Backend, MovedError, Swap, Upstream
from .translate import Library

__all__ = [
    "CONTEXT_TEMPLATES_CACHE",
    "MovedError",
    "apply_ft_to_model",
    "apply_memit_to_model",
    "apply_r_rome_to_model",
    "apply_rome_to_model",
    "calls",
    "execute_ft",
    "execute_memit",
    "execute_r_rome",
    "execute_rome",
    "generate_fast",
    "install",
    "installed",
    "test_prediction_acc",
    "uninstall",
]

KINS = (MEMIT, EMMET, ALPHAEDIT, PMET)

# Contexts by algorithm ("ROME", "R-ROME", "MEMIT"), of the functions that stand alone: generated once, or yours.
CONTEXT_TEMPLATES_CACHE: dict[str, Any] = {}

Edited = tuple[nn.Module, dict[str, torch.Tensor]]


def _target(request: Mapping[str, Any], algorithm: str, model: nn.Module) -> str:
    """MEMIT and its kin give a target its space where it lacks one (PMET with GPTs alone), the others always: two
    then, if it had one."""
    target = request["target_new"]
    if algorithm == "PMET" and "gpt" not in model.name_or_path.lower():
        return target
    lacking = target[:1] != " " or algorithm not in {kin.name for kin in KINS}
    return f" {target}" if lacking else target


def _folder(model_name: str) -> str:
    return model_name.rsplit("/")[-1]


_library = Library(_target, lambda hparams, swapped: hparams.stats_dir, _folder, right_padding=False)
_editors = Editors(_library, lambda: CONTEXT_TEMPLATES_CACHE)
execute_rome = _editors.execute_rome
execute_r_rome = _editors.execute_r_rome
execute_memit, execute_emmet, execute_alphaedit, execute_pmet = map(_editors.executing, KINS)
execute_ft = _editors.execute_ft

# -- alone -----------------------------------------------------------------------------------------------------------


def apply_rome_to_model(
    model: nn.Module,
    tok: Any,
    request: Sequence[Mapping[str, Any]],
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    **kwargs: Any,
) -> Edited:
    """ROME of the first request. Returns the model (a copy with `copy`) with the edit in its weights, and with
    `return_orig_weights` these as they were before this call.

    ValueError: hyper-parameters of another method, models and settings that we do not serve.
    """
    options = dict(copy=copy, return_orig_weights=return_orig_weights)
    return _editors.apply_rome(model, tok, request, hparams, "ROME", **options)


def apply_r_rome_to_model(
    model: nn.Module,
    tok: Any,
    request: Sequence[Mapping[str, Any]],
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    **kwargs: Any,
) -> Edited:
    """R-ROME of the first request, see `apply_rome_to_model`."""
    options = dict(copy=copy, return_orig_weights=return_orig_weights)
    return _editors.apply_rome(model, tok, request, hparams, "R-ROME", **options)


def apply_memit_to_model(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    cache_template: str | None = None,
    keep_original_weight: bool = False,
    **kwargs: Any,
) -> Edited:
    """MEMIT of all requests, see `apply_rome_to_model`. cache_template: files of values, with places for layer, clamp
    factor and case."""
    options = dict(copy=copy, return_orig_weights=return_orig_weights, cache_template=cache_template)
    return _editors.apply_memit(model, tok, requests, hparams, **options)


def apply_ft_to_model(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    **kwargs: Any,
) -> Edited:
    """Fine-tuning on the requests, one a batch, see `apply_rome_to_model`."""
    options = dict(copy=copy, return_orig_weights=return_orig_weights)
    return _editors.apply_ft(model, tok, requests, hparams, **options)


# -- swapped in ------------------------------------------------------------------------------------------------------


def _edit_requests(
    editor: Any,
    requests: Sequence[Mapping[str, Any]],
    sequential_edit: bool = False,
    *args: Any,
    upstream: Upstream,
    **kwargs: Any,
) -> Any:
    """BaseEditor's loop: first metrics of all requests, then edits; where it puts the model back after each of them,
    what they need is computed together."""
    with ExitStack() as stack:
        if not sequential_edit:
            stack.enter_context(ahead.planned(requests))
            if kwargs.get("pre_edit") is None:
                stack.enter_context(expecting(requests))
        return upstream.function(editor, requests, sequential_edit, *args, **kwargs)


_REQUEST = ("model", "tok", "request", "hparams")
_REQUESTS = ("model", "tok", "requests", "hparams")
_STATS = ("model", "tokenizer", "layer_name", "stats_dir", "ds_name", "to_collect", "model_name", "sample_size")
_layer_stats = partial(stats.layer_stats, library=_library)

TABLE = (
    Swap("easyeditor.models.rome.rome_main", "execute_rome", _REQUEST, execute_rome),
    Swap("easyeditor.models.r_rome.r_rome_main", "execute_r_rome", _REQUEST, execute_r_rome),
    Swap("easyeditor.models.memit.memit_main", "execute_memit", _REQUESTS, execute_memit),
    Swap("easyeditor.models.emmet.emmet_main", "execute_emmet", _REQUESTS, execute_emmet, optional=True),
    Swap(
        "easyeditor.models.alphaedit.AlphaEdit_main",
        "execute_AlphaEdit",
        _REQUESTS,
        execute_alphaedit,
        optional=True,
    ),
    Swap("easyeditor.models.pmet.pmet_main", "execute_pmet", _REQUESTS, execute_pmet, optional=True),
    Swap(
        "easyeditor.models.kn.knowledge_neurons.knowledge_neurons.knowledge_neurons",
        "KnowledgeNeurons.get_refined_neurons",
        ("prompts", "ground_truth", "p", "steps", "coarse_adaptive_threshold", "refine"),
        get_refined_neurons,
        optional=True,
    ),
    Swap("easyeditor.models.ft.ft_main", "execute_ft", _REQUESTS, execute_ft),
    Swap("easyeditor.models.rome.layer_stats", "layer_stats", _STATS, _layer_stats),
    Swap("easyeditor.models.r_rome.layer_stats", "layer_stats", _STATS, _layer_stats, optional=True),
    Swap("easyeditor.util.generate", "generate_fast", ("model", "tok", "prompts", "max_out_len"), generate_fast),
    Swap(
        "easyeditor.evaluate.evaluate",
        "test_prediction_acc",
        ("model", "tok", "hparams", "prompts", "targets", "device", "locality"),
        test_prediction_acc,
    ),
    Swap(
        "easyeditor.evaluate.evaluate",
        "compute_edit_quality",
        ("model", "model_name", "hparams", "tok", "record"),
        compute_edit_quality,
        optional=True,
    ),
    Swap(
        "easyeditor.editors.editor",
        "BaseEditor.edit_requests",
        ("requests", "sequential_edit"),
        _edit_requests,
        optional=True,
    ),
)
BACKEND = Backend("easyedit", "EasyEdit", packages=("easyeditor",), roots=("easyeditor",), table=TABLE)
install, uninstall, installed, calls = BACKEND.install, BACKEND.uninstall, BACKEND.installed, BACKEND.calls


if __name__ == "__main__":
    from knowedit_ext.compat import easyedit, runner

    runner.main(easyedit.BACKEND)
