"""`execute_rome`, `execute_r_rome`, `execute_memit` and its kin, `execute_ft` of the other libraries, for any of them.

`Editors(library, ...)` holds what differs. Its `execute_*` give what the library's functions give and are what is
swapped; its `apply_*` stand alone. Neither changes the requests or, before it is done, the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import knowedit_ext as ke
from knowedit_ext.editing.methods.r_rome import r_rome_each

from . import ahead, translate
from .caches import read_vectors, rome_cache, write_vectors
from .closed_form import MEMIT, Kin, closed_form
from .contexts import memit_templates, rome_templates
from .stats import moments_of, statistics
from .swap import NotServed, Upstream
from .translate import (
    Library,
    check_agreement,
    check_fact_token,
    check_modules,
    opened,
    params_of,
    request_of,
    statement_of,
    weights_at,
)

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Editors:
    """templates: the contexts that a user has given by algorithm, filled with generated ones (as their
    CONTEXT_TEMPLATES_CACHE, for when nothing is swapped)."""

    library: Library
    templates: Callable[[], dict[str, Any]]

    # -- swapped in --------------------------------------------------------------------------------------------------

    def execute_rome(
        self,
        model: nn.Module,
        tok: Any,
        request: Mapping[str, Any],
        hparams: Any,
        cache_template: str | None = None,
        *,
        upstream: Upstream | None = None,
    ) -> Factors:
        """{weight: (u [d_in], v [d_out])}, float32, where the weight is."""
        edit = self._rome(model, tok, request, hparams, "ROME", upstream, cache_template)
        return _vectors(model, edit)

    def execute_r_rome(
        self,
        model: nn.Module,
        tok: Any,
        request: Mapping[str, Any],
        hparams: Any,
        *,
        upstream: Upstream | None = None,
    ) -> Factors:
        """As `execute_rome`."""
        return _vectors(model, self._rome(model, tok, request, hparams, "R-ROME", upstream))

    def execute_ft(
        self,
        model: nn.Module,
        tok: Any,
        requests: Sequence[Mapping[str, Any]],
        hparams: Any,
        *,
        upstream: Upstream | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """{weight: its change}, in its shape and dtype, where it is."""
        edit = self._ft(model, tok, requests, hparams)
        return {name: edit.delta(name).to(translate.weight_of(model, name)) for name in edit.changes}

    def executing(self, kin: Kin) -> Callable[..., dict[str, Any]]:
        """The function of MEMIT or one of its kin."""

        def execute(
            model: nn.Module,
            tok: Any,
            requests: Sequence[Mapping[str, Any]],
            hparams: Any,
            cache_template: str | None = None,
            *,
            upstream: Upstream | None = None,
        ) -> dict[str, Any]:
            """What the library's own gives, by weight, in the order of the layers."""
            edit = closed_form(self, kin, model, tok, requests, hparams, upstream, cache_template)
            return {name: kin.given(model, edit, name) for name in edit.changes}

        execute.__name__ = execute.__qualname__ = f"execute_{kin.name.lower()}"
        return execute

    # -- alone -------------------------------------------------------------------------------------------------------

    def apply(
        self,
        make: Callable[[nn.Module], ke.Edit],
        model: nn.Module,
        copy: bool,
        return_orig_weights: bool,
    ) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        """The model (a copy of it, with `copy`) with the edit in its weights, and these as they were before."""
        if copy:
            model = deepcopy(model)
        copies: dict[str, torch.Tensor] | None = {} if return_orig_weights else None
        translate.insert(model, make(model), copies)
        return model, copies or {}

    def apply_rome(
        self,
        model: nn.Module,
        tok: Any,
        requests: Sequence[Any],
        hparams: Any,
        algorithm: str,
        cache_template: str | None = None,
        **options: Any,
    ) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        """The first request."""
        make = lambda m: self._rome(m, tok, requests[0], hparams, algorithm, None, cache_template)  # noqa: E731
        return self.apply(make, model, **options)

    def apply_memit(
        self,
        model: nn.Module,
        tok: Any,
        requests: Sequence[Any],
        hparams: Any,
        cache_template: str | None = None,
        **options: Any,
    ) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        make = lambda m: closed_form(self, MEMIT, m, tok, requests, hparams, None, cache_template)  # noqa: E731
        return self.apply(make, model, **options)

    def apply_ft(
        self, model: nn.Module, tok: Any, requests: Sequence[Any], hparams: Any, **options: Any
    ) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        return self.apply(lambda m: self._ft(m, tok, requests, hparams), model, **options)

    # -- ROME and R-ROME ---------------------------------------------------------------------------------------------

    def _rome(
        self,
        model: nn.Module,
        tok: Any,
        raw: Mapping[str, Any],
        hparams: Any,
        algorithm: str,
        upstream: Upstream | None,
        cache_template: str | None = None,
    ) -> ke.Edit:
        layers = sorted(hparams.layers)
        each, params = _rome_settings(hparams, algorithm, layers)
        with opened(model, tok) as editable:
            check_modules(editable, hparams, layers)
            check_fact_token(hparams)
            cache = rome_cache(cache_template, raw, layers, hparams)
            if cache is not None and cache.exists():
                return read_vectors(editable, cache, layers)
            contexts = self.contexts(model, tok, algorithm, upstream, hparams.context_template_length_params)
            moments = self.moments(editable, hparams, layers, upstream, True) if params.mom2_adjustment else None

            def make(raws: Sequence[Mapping[str, Any]]) -> Sequence[ke.Edit]:
                requests = [request_of(self.library, one, algorithm, model) for one in raws]
                return each(editable, requests, params, moments, contexts=contexts)

            weights = weights_at(editable, layers)
            edit = ahead.taken(raw, (algorithm, params), weights, make)
        translate.as_left_by_upstream(model)
        if cache is not None:
            write_vectors(cache, edit)
        return edit

    # -- fine-tuning -------------------------------------------------------------------------------------------------

    def _ft(self, model: nn.Module, tok: Any, raws: Sequence[Mapping[str, Any]], hparams: Any) -> ke.Edit:
        given: dict[str, Any] = {}
        bound = getattr(hparams, "norm_constraint", None)
        given["norm_constraint"] = bound if type(bound) is float else None  # as they read it
        power = getattr(hparams, "wd_power_law", None)
        given["wd_power_law"] = None
        if isinstance(power, tuple):
            given["weight_decay"] = float(len(raws) ** power[0] * np.exp(power[1]))
        params = params_of(ke.FTParams, hparams, "FT", **given)
        batched = min(len(raws), params.batch_size) > 1
        if batched and not (self.library.right_padding and tok.padding_side == "right"):
            raise NotServed("fine-tuning in batches: padding shifts the positions that it reads")
        with opened(model, tok) as editable:
            requests = [statement_of(self.library, raw, "FT", model) for raw in raws]
            check_agreement(requests)
            edit = ke.finetune(editable, requests, params, compat="reference")
        translate.as_left_by_upstream(model, list(edit.changes))
        return edit

    # -- shared ------------------------------------------------------------------------------------------------------

    def contexts(self, model: nn.Module, tok: Any, algorithm: str, upstream: Upstream | None, *lengths: Any) -> Any:
        """Through the library's own cache, so that contexts a user has put there count; or through ours."""
        own = getattr(upstream and upstream.module, "get_context_templates", None)
        if own is not None:
            return own(model, tok, *lengths)
        templates = self.templates()
        if templates.get(algorithm) is None:
            make = rome_templates if lengths else memit_templates
            templates[algorithm] = make(model, tok, *lengths)
        return templates[algorithm]

    def moments(
        self,
        editable: ke.EditableModel,
        hparams: Any,
        layers: Sequence[int],
        upstream: Upstream | None,
        inverted: bool = False,
    ) -> ke.Moments:
        swapped = upstream is not None
        folder = self.library.model_folder(getattr(editable.hf.config, "_name_or_path", ""))
        place, url = self.library.stats_dir(hparams, swapped), self.library.stats_url() if swapped else None
        stats = statistics(place, folder, hparams.mom2_dataset, hparams.mom2_n_samples, hparams.mom2_dtype, url)
        return moments_of(stats, editable, layers, inverted)


def _rome_settings(hparams: Any, algorithm: str, layers: list[int]) -> tuple[Callable[..., Sequence[ke.Edit]], Any]:
    """What makes the edits, and its parameters.

    R-ROME looks at `enable_random_prefix_keys` first: with it, `original_implementation` changes nothing.
    """
    original = getattr(hparams, "original_implementation", False)
    if algorithm == "ROME" or (original and not hparams.enable_random_prefix_keys):
        return _published_rome, params_of(ke.ROMEParams, hparams, algorithm, layers=layers)
    given = {"enable_prompt_keys": False} if original else {}
    return r_rome_each, params_of(ke.RROMEParams, hparams, algorithm, layers=layers, **given)


def _published_rome(*args: Any, **options: Any) -> Sequence[ke.Edit]:
    return ke.rome_each(*args, compat="reference", **options)


def _vectors(model: nn.Module, edit: ke.Edit) -> Factors:
    vectors = {}
    for name, change in edit.changes.items():
        device = translate.weight_of(model, name).device
        vectors[name] = tuple(x[:, 0].to(device, torch.float32) for x in (change.inputs, change.outputs))
    return vectors
