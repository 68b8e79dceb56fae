"""From another library's objects to ours: models, requests, hyper-parameters; and edits back to its factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

import knowedit_ext as ke

from .swap import NotServed

# fact_token "subject_first": the published code counts from the end of a padded row, and meets another token.
FACT_TOKENS = ("subject_last", "last")


@dataclass(frozen=True)
class Library:
    """How the libraries differ.

    target: (request, algorithm, model) -> the target's text with its space. stats_dir: (hparams, is it swapped?) ->
    where statistics are kept. model_folder: the model's name -> its folder there. stats_url: where published ones are
    to be had, None or an address that is known when it is swapped. right_padding: fine-tuning in batches reads the
    right tokens where padding is on the right.
    """

    target: Callable[[Mapping[str, Any], str, nn.Module], str]
    stats_dir: Callable[[Any, bool], Any]
    model_folder: Callable[[str], str]
    right_padding: bool
    stats_url: Callable[[], str | None] = lambda: None


@contextmanager
def opened(model: nn.Module, tok: Any) -> Iterator[ke.EditableModel]:
    """The model as ours; its modules are in training mode afterwards where they were."""
    if not getattr(tok, "is_fast", False):
        raise NotServed(f"{type(tok).__name__} is a slow tokenizer (load it with use_fast=True)")
    training = [module for module in model.modules() if module.training]
    try:
        yield loaded(model, tok)
    finally:
        for module in training:
            module.training = True


def loaded(model: nn.Module, tok: Any) -> ke.EditableModel:
    try:
        return ke.load_model((model, tok))
    except ke.UnsupportedModelError as error:
        raise NotServed(str(error)) from error


def values_of(hparams: Any) -> dict[str, Any]:
    """Names and values of any hparams object: a dataclass, a namespace, a mapping."""
    if isinstance(hparams, Mapping):
        return dict(hparams)
    return {name: getattr(hparams, name) for name in dir(hparams) if _is_value(hparams, name)}


def _is_value(hparams: Any, name: str) -> bool:
    return not name.startswith("_") and not callable(getattr(hparams, name))


def params_of(kind: type, hparams: Any, algorithm: str, **given: Any) -> Any:
    """`kind` with the values that hparams have for its fields. NotServed: another method's, values that are missing
    or make no sense to us."""
    values = values_of(hparams)
    named = values.get("alg_name", algorithm)
    if named != algorithm:
        raise NotServed(f"these hyper-parameters are {named}'s; here is {algorithm}")
    names = {field.name for field in fields(kind)}
    chosen = {name: value for name, value in values.items() if name in names} | given
    try:
        return kind.from_dict(chosen)
    except (TypeError, ValueError) as error:
        raise NotServed(str(error)) from error


def check_modules(model: ke.EditableModel, hparams: Any, layers: Sequence[int]) -> None:
    """What hparams call the edited module must be our down projection."""
    for layer in layers:
        named = hparams.rewrite_module_tmp.format(layer)
        if not 0 <= layer < model.num_layers:
            raise ValueError(f"layer {layer} is out of range: the model has layers 0..{model.num_layers - 1}")
        if named != model.modules.parameter_name(layer):
            ours = model.modules.parameter_name(layer)
            raise NotServed(f"'{named}' is edited there, here '{ours}' would be")


def check_fact_token(hparams: Any) -> None:
    if hparams.fact_token not in FACT_TOKENS:
        raise NotServed(f"fact_token '{hparams.fact_token}' is another token there, beside padding")


def request_of(library: Library, raw: Mapping[str, Any], algorithm: str, model: nn.Module) -> ke.EditRequest:
    """The target already has the space that the library gives it."""
    target = library.target(raw, algorithm, model)
    plain = {"prompt": raw["prompt"], "subject": raw["subject"], "target_new": target, "space": False}
    return ke.EditRequest.of(plain | {"case_id": raw.get("case_id")})


def check_agreement(requests: Sequence[ke.EditRequest]) -> None:
    targets: dict[tuple[str, str], str] = {}
    for request in requests:
        if targets.setdefault((request.prompt, request.subject), request.target_new) != request.target_new:
            raise NotServed("two requests give one prompt different targets")


def statement_of(library: Library, raw: Mapping[str, Any], algorithm: str, model: nn.Module) -> ke.EditRequest:
    """A request whose subject does not matter: the whole prompt stands for it (it may be missing, or occur twice)."""
    prompt = raw["prompt"]
    if "subject" in raw and "{}" in prompt:
        prompt = prompt.replace("{}", raw["subject"])
    return ke.EditRequest("{}", prompt, library.target(raw, algorithm, model), space=False)


# -- back ------------------------------------------------------------------------------------------------------------


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    return model.get_parameter(name)


def weights_at(model: ke.EditableModel, layers: Sequence[int]) -> dict[str, torch.Tensor]:
    """The down projections' weights by name."""
    names = [f"{model.modules.parameter_name(layer)}.weight" for layer in layers]
    return {name: weight_of(model.hf, name) for name in names}


def as_left_by_upstream(model: nn.Module, trained: Sequence[str] = ()) -> None:
    """The published loops leave only what they trained asking for gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained and parameter.is_floating_point())


@torch.no_grad()
def insert(model: nn.Module, edit: ke.Edit, copies: dict[str, torch.Tensor] | None = None) -> None:
    """Add an edit to the weights for good. copies: gets the weights before the first change of each."""
    for name in edit.changes:
        weight = weight_of(model, name)
        if copies is not None and name not in copies:
            copies[name] = weight.detach().clone()
        weight.copy_(weight.double() + edit.delta(name).to(weight.device, torch.float64))
