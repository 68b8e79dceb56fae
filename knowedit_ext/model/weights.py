"""Weights by their real names, whatever wraps the modules; which of them can be written, and which cannot.

`model.layers.1.mlp.down_proj.weight` is found inside compiled modules and, under a LoRA adapter, as the base weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..checks import quoted
from .families import device_of
from .hooks import resting
from .load import EditableModel
from .wrappers import ADAPTED, TRANSPARENT, inside

WRITABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class NoSuchWeightError(ValueError):
    """The model has no weight of that name."""


@dataclass(frozen=True)
class Weight:
    """One weight of a model.

    parameter: None where it cannot be written: quantised, or kept in some other form than a plain tensor.
    module: what the model calls, adapters included; holder: the module, inside that one, that has the weight.
    input_first: the weight is [d_in, d_out]; None: it is no linear map's.
    """

    name: str
    parameter: nn.Parameter | None
    module: nn.Module
    holder: nn.Module
    shape: tuple[int, ...]
    input_first: bool | None


def weight_is_input_first(module: nn.Module) -> bool:
    """[d_in, d_out] (Conv1D) or [d_out, d_in] (Linear), by module type: shapes do not tell for square weights."""
    holder = inside(module, (*TRANSPARENT, ADAPTED))
    if type(holder).__name__ == "Conv1D":
        return True
    if hasattr(holder, "in_features") and hasattr(holder, "out_features"):  # Linear, and its quantised kin
        return False
    raise TypeError(f"a down projection of type {type(holder).__name__} cannot be edited: expected Linear or Conv1D")


def is_plain(tensor: torch.Tensor | None) -> bool:
    """Whether what is written into a parameter is what is computed with: a plain tensor, in floating point."""
    return type(tensor) is nn.Parameter and tensor.dtype in WRITABLE


def find_weight(hf: nn.Module, name: str) -> Weight:
    """The weight of that real name. ValueError where it is offloaded, or there is none that could be changed."""
    path, _, leaf = name.rpartition(".")
    module = _module(hf, path)
    if module is None:
        raise NoSuchWeightError(f"the model has no parameter {quoted(name)}")
    holder = inside(module, (*TRANSPARENT, ADAPTED))
    try:
        input_first = weight_is_input_first(holder) if leaf == "weight" else None
    except TypeError:
        input_first = None
    stored = getattr(holder, leaf, None)
    if isinstance(stored, torch.Tensor) and stored.is_meta:
        raise ValueError(f"{quoted(name)} is offloaded: load the model with its edited layers in memory")
    parameter = holder._parameters.get(leaf)
    if is_plain(parameter):
        return Weight(name, parameter, module, holder, tuple(parameter.shape), input_first)
    if input_first is not False or stored is None:
        raise NoSuchWeightError(f"the model has no parameter {quoted(name)}")
    return Weight(name, None, module, holder, (int(holder.out_features), int(holder.in_features)), False)


def _module(hf: nn.Module, path: str) -> nn.Module | None:
    module = inside(hf)
    for part in path.split(".") if path else ():
        module = inside(module, (*TRANSPARENT, ADAPTED)) if part not in module._modules else module
        if module._modules.get(part) is None:
            return None
        module = inside(module._modules[part])
    return module


@dataclass(frozen=True)
class Parameter:
    """name: the real one; path: as `named_parameters` gives it; adapter: it belongs to a LoRA adapter."""

    name: str
    path: str
    adapter: bool
    tensor: torch.Tensor


def parameters(hf: nn.Module) -> Iterator[Parameter]:
    """The model's parameters, those that are shared once, in its own order."""
    for path, tensor in hf.named_parameters():
        yield Parameter(real_name(path), path, _of_adapter(hf, path), tensor)


def real_name(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in (*TRANSPARENT, ADAPTED))


def _of_adapter(hf: nn.Module, path: str) -> bool:
    module = hf
    for part in path.split(".")[:-1]:
        if ADAPTED in module._modules and part != ADAPTED:
            return True
        module = module._modules[part]
    return False


def stored_weights(model: EditableModel) -> Iterator[tuple[str, torch.Tensor]]:
    """What tells this model from another of its kind, by real name: parameters; of modules that keep their weights in
    some other form all that they keep; and of LoRA layers how far their adapters are in force."""
    modules = list(model.hf.named_modules())
    odd = {path: module for path, module in modules if _keeps_otherwise(module)}
    for each in parameters(model.hf):
        if each.path.rpartition(".")[0] not in odd:
            yield each.name, each.tensor
    for path, module in odd.items():
        yield from stored_in(model, module, real_name(path))
    for path, module in modules:
        if ADAPTED in module._modules:
            active = [] if module.disable_adapters or module.merged else module.active_adapters
            yield f"{real_name(path)}.scaling", torch.tensor([float(module.scaling.get(name, 0)) for name in active])


def _keeps_otherwise(module: nn.Module) -> bool:
    saved = (buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set)
    parameters = module._parameters.values()
    return any(b is not None for b in saved) or not all(p is None or is_plain(p) for p in parameters)


def stored_in(model: EditableModel, module: nn.Module, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a module keeps of its own, those it is not saved with and the modules inside it left out.

    A quantised one first computes a row: bitsandbytes packs its weights at the first product on a CPU, and asking for
    its state_dict would unpack them wrongly.
    """
    if isinstance(getattr(module, "in_features", None), int) and not _offloaded(module):
        row = torch.zeros(1, module.in_features, dtype=model.dtype, device=device_of(module) or model.device)
        with resting(model):
            module(row)
    buffers = {n: buffer for n, buffer in module._buffers.items() if n not in module._non_persistent_buffers_set}
    for leaf, value in (module._parameters | buffers).items():
        yield from _plain_parts(f"{name}.{leaf}", value)


def _offloaded(module: nn.Module) -> bool:
    return any(p is not None and p.is_meta for p in (module._parameters | module._buffers).values())


def _plain_parts(key: str, value: torch.Tensor | None) -> Iterator[tuple[str, torch.Tensor]]:
    if hasattr(value, "__tensor_flatten__"):  # a tensor made of others
        for part in value.__tensor_flatten__()[0]:
            yield from _plain_parts(f"{key}.{part}", getattr(value, part))
    elif value is not None:
        yield key, value
