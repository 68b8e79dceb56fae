"""Hooks on a model's modules, and the state it computes in: at rest, whatever it was doing when we were called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from ..checks import as_type
from ..runs.interrupts import uninterrupted, whole_contexts
from .load import EditableModel
from .wrappers import eager

Given = ParamSpec("Given")
Result = TypeVar("Result")


class Stop(Exception):
    """Raised by a hook once what was wanted is known: ends the forward pass, and with it the block of `Hooks`."""


class Hooks(ExitStack):
    """Hooks that are removed when the block ends, whatever ends it."""

    def before(self, module: nn.Module, act: Callable[[tuple, dict[str, Any]], None], first: bool = False) -> None:
        """act(args, kwargs) in front of each call; `first`: in front of the hooks that are there already."""
        hook = lambda module, args, kwargs: act(args, kwargs)  # noqa: E731
        self.callback(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first).remove)

    def behind(
        self, module: nn.Module, act: Callable[[torch.Tensor], torch.Tensor | None], first: bool = False
    ) -> None:
        """act(output, or the first of several) behind each call; what it returns, if anything, takes its place.

        Rows without a batch (OPT's MLP) are handed over as a batch of one. first: in front of the hooks that are there
        already, so act gets what the module itself puts out.
        """

        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            out = first_of(output)
            flat = out.dim() == 2
            changed = act(out[None] if flat else out)
            if changed is None:
                return None
            changed = changed[0] if flat else changed
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        self.callback(module.register_forward_hook(hook, prepend=first).remove)

    def __exit__(self, kind: type[BaseException] | None, *raised: Any) -> bool:
        super().__exit__(kind, *raised)
        return kind is not None and issubclass(kind, Stop)


def first_of(output: Any) -> torch.Tensor:
    """A module's output tensor, whether or not it comes with more."""
    return output[0] if isinstance(output, tuple) else output


def named_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, however they were passed, in the signature's order: of layers the rows are first."""
    named = dict(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments)
    named.pop("self")
    named.update(named.pop("kwargs", {}))
    return named


@contextmanager
def resting(model: EditableModel) -> Iterator[None]:
    """Without dropout, gradient checkpointing, autocast, recorded gradients, inference mode, compiled code, or torch's
    defaults set to another dtype or device.

    Afterwards all is as before. Every module is in eval mode and no parameter asks for a gradient. Within another
    `resting` no module is looked at again: they are many.
    """
    as_type("the model", model, EditableModel)
    shared = model.shared
    with shared.alone, whole_contexts(), ExitStack() as stack:
        modules = [] if shared.resting else list(model.hf.modules())
        named = [(module, name, p) for module in modules for name, p in module._parameters.items() if p is not None]
        training = [module for module in modules if module.training]
        checkpointing = [module for module in modules if getattr(module, "gradient_checkpointing", False)]
        asking = [(module, name) for module, name, p in named if p.requires_grad and not p.is_inference()]
        if torch.is_inference_mode_enabled():  # its tensors could never be used with gradients
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", model.device.type}:  # numbers are those of the model's own precision
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(eager())
        stack.enter_context(_own_defaults())
        before = shared.resting
        try:
            _flag(training, checkpointing, asking, False)
            shared.resting = True
            yield
        finally:
            with uninterrupted():
                shared.resting = before
                _flag(training, checkpointing, asking, True)


@contextmanager
def _own_defaults() -> Iterator[None]:
    """Tensors that are made without a dtype and device are float32 and on the CPU."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


def _flag(
    training: list[nn.Module], checkpointing: list[nn.Module], asking: list[tuple[nn.Module, str]], value: bool
) -> None:
    for module in training:
        module.training = value
    for module in checkpointing:
        module.gradient_checkpointing = value
    for module, name in asking:  # by name: accelerate puts new parameters in the place of offloaded ones
        module._parameters[name].requires_grad_(value)


def at_rest(
    function: Callable[Concatenate[EditableModel, Given], Result],
) -> Callable[Concatenate[EditableModel, Given], Result]:
    """Decorates a function of a model: it runs while the model is `resting`."""

    @wraps(function)
    def run(model: EditableModel, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        with resting(model):
            return function(model, *args, **kwargs)

    return run


@contextmanager
def learning(model: EditableModel) -> Iterator[None]:
    """Gradients are recorded inside, whoever has switched that off around it."""
    for name, parameter in model.hf.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"'{name}' was made inside torch.inference_mode(), so no gradient can pass it: load the model outside"
            )
    with torch.enable_grad():
        yield
