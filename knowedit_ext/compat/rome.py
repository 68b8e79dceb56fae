"""kmeng01/rome and kmeng01/memit on us: `install()`, or `python -m knowedit_ext.compat.rome -m experiments.evaluate`.

    from knowedit_ext.compat import rome
    rome.install()                          # or: with rome.installed(): ...
    from experiments.py.demo import demo_model_editing  # as ever

Without them the functions here stand alone, with their signatures and for any hparams object. Statistics are then
looked for in `hparams.stats_dir`, or data/stats.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from . import stats
from .closed_form import MEMIT
from .contexts import generate_fast
from .editing import Editors
from .metrics_rome import test_batch_prediction, test_batch_prediction_acc
from .swap import Backend, MovedError, Swap
from .tracing import calculate_hidden_flow
from .translate import Library

__all__ = [
    "CONTEXT_TEMPLATES_CACHE",
    "MovedError",
    "apply_ft_to_model",
    "apply_memit_to_model",
    "apply_rome_to_model",
    "calculate_hidden_flow",
    "calls",
    "execute_ft",
    "execute_memit",
    "execute_rome",
    "generate_fast",
    "install",
    "installed",
    "test_batch_prediction",
    "test_batch_prediction_acc",
    "uninstall",
]

# Contexts by algorithm ("ROME", "MEMIT"), of the functions that stand alone: generated once, or yours.
CONTEXT_TEMPLATES_CACHE: dict[str, Any] = {}

STATS_DIR = "data/stats"  # globals.yml

Edited = tuple[nn.Module, dict[str, torch.Tensor]]


def _target(request: Mapping[str, Any], algorithm: str, model: nn.Module) -> str:
    """With a space where it lacks one."""
    target = request["target_new"]["str"]
    return target if target[:1] == " " else f" {target}"


def _folder(model_name: str) -> str:
    return model_name.replace("/", "_")


def _stats_dir(hparams: Any, swapped: bool) -> Any:
    return _globals().STATS_DIR if swapped else getattr(hparams, "stats_dir", STATS_DIR)


def _globals() -> Any:
    """What the library reads from its globals.yml."""
    return importlib.import_module("util.globals")


_library = Library(_target, _stats_dir, _folder, right_padding=True, stats_url=lambda: _globals().REMOTE_ROOT_URL)
_editors = Editors(_library, lambda: CONTEXT_TEMPLATES_CACHE)
execute_rome = _editors.execute_rome
execute_memit = _editors.executing(MEMIT)
execute_ft = _editors.execute_ft

# -- alone -----------------------------------------------------------------------------------------------------------


def apply_rome_to_model(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    cache_template: str | None = None,
) -> Edited:
    """ROME of one request after the other. Returns the model (a copy with `copy`) with the edits in its weights, and
    with `return_orig_weights` these as they were before.

    cache_template: as memit's: a file of the first request's vectors, with places for layer, clamp factor and case.
    ValueError: hyper-parameters of another method, models and settings that we do not serve.
    """
    copies: dict[str, torch.Tensor] = {}
    for number, request in enumerate(requests):
        options = dict(copy=copy and not number, return_orig_weights=return_orig_weights)
        cache = None if number else cache_template  # the model has changed since
        model, before = _editors.apply_rome(model, tok, [request], hparams, "ROME", cache_template=cache, **options)
        copies = before | copies
    return model, copies


def apply_memit_to_model(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    cache_template: str | None = None,
) -> Edited:
    """MEMIT of all requests, see `apply_rome_to_model`. cache_template: files of values."""
    options = dict(copy=copy, return_orig_weights=return_orig_weights, cache_template=cache_template)
    return _editors.apply_memit(model, tok, requests, hparams, **options)


def apply_ft_to_model(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    **kwargs: Any,
) -> Edited:
    """Fine-tuning on the requests, see `apply_rome_to_model`."""
    return _editors.apply_ft(model, tok, requests, hparams, copy=copy, return_orig_weights=return_orig_weights)


# -- swapped in ------------------------------------------------------------------------------------------------------

_REQUEST = ("model", "tok", "request", "hparams")
_REQUESTS = ("model", "tok", "requests", "hparams")
_STATS = ("model", "tokenizer", "layer_name", "stats_dir", "ds_name", "to_collect", "model_name", "sample_size")
_TARGETS = ("model", "tok", "prefixes", "target_new", "target_true")
_FLOW = ("mt", "prompt", "subject", "samples", "noise", "window", "kind", "expect")

TABLE = (
    Swap("rome.rome_main", "execute_rome", _REQUEST, execute_rome),
    Swap("memit.memit_main", "execute_memit", _REQUESTS, execute_memit),
    Swap("baselines.ft.ft_main", "execute_ft", _REQUESTS, execute_ft),
    Swap("rome.layer_stats", "layer_stats", _STATS, partial(stats.layer_stats, library=_library)),
    Swap("util.generate", "generate_fast", ("model", "tok", "prompts", "max_out_len"), generate_fast),
    Swap("experiments.py.eval_utils_counterfact", "test_batch_prediction", _TARGETS, test_batch_prediction),
    Swap(
        "experiments.py.eval_utils_zsre",
        "test_batch_prediction_acc",
        ("model", "tok", "prompts", "target"),
        test_batch_prediction_acc,
    ),
    Swap("experiments.causal_trace", "calculate_hidden_flow", _FLOW, calculate_hidden_flow),
)
BACKEND = Backend(
    "rome",
    "rome or memit",
    packages=("rome", "memit", "baselines", "util", "experiments"),
    roots=("rome", "memit"),
    table=TABLE,
)
install, uninstall, installed, calls = BACKEND.install, BACKEND.uninstall, BACKEND.installed, BACKEND.calls


if __name__ == "__main__":
    from knowedit_ext.compat import rome, runner

    runner.main(rome.BACKEND)
