"""What people put around a decoder (torch.compile, DataParallel, PEFT): taken off, or refused with what to pass.

What is taken off shares its weights with the model inside, so that an edit of these changes what the wrapper says.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .errors import UnsupportedModelError

# Names of submodules that stand for the very module they are in. A LoRA layer adds to what its base layer puts out.
TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module")
ADAPTED = "base_layer"
_MERGE = "pass (peft_model.merge_and_unload(), tokenizer), or the model without the adapter"


def unwrapped(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside torch.compile, (Distributed)DataParallel, AveragedModel or a PEFT model with LoRA.

    Raises `UnsupportedModelError` for what cannot be taken off: weights sharded over processes, adapters other than
    plain LoRA, and what is no Hugging Face model at all.
    """
    while True:
        kinds = _kinds(model)
        if "OptimizedModule" in kinds:
            model = model._orig_mod
        elif kinds & {"DataParallel", "DistributedDataParallel", "AveragedModel"}:
            model = model.module
        elif kinds & {"PeftModel", "PeftMixedModel"}:
            _refuse_prompts(model)
            model = model.base_model
        elif "BaseTuner" in kinds:
            model = model.model
        else:
            break
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no Hugging Face decoder: pass (hf_model, tokenizer), unwrapped (a wrapper "
            "often keeps the model in its attribute .module)"
        )
    _refuse_inside(model)
    return model


def _kinds(module: object) -> set[str]:
    """Names of its classes: to know a class by itself would mean to import the library it comes from."""
    return {kind.__name__ for kind in type(module).__mro__}


def _refuse_prompts(model: nn.Module) -> None:
    for config in model.peft_config.values():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"{type(model).__name__} with {config.peft_type.value}: its learned prompts come in front of every "
                "text, which is not a model of the text alone; pass the model without the adapter"
            )


def _refuse_inside(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kinds = _kinds(module)
        if "FullyShardedDataParallel" in kinds or "FSDPModule" in kinds:
            raise UnsupportedModelError(
                f"'{name}' is sharded by FSDP: no process holds its weights; load the model whole, or with device_map="
            )
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise UnsupportedModelError(
                f"'{name}' is quantised by torch.ao ({type(module).__name__}): what it says of a text depends on the "
                "texts beside it; pass the model as it was before, or quantised by transformers"
            )
        lora = "LoraLayer" in kinds and "ParamWrapper" not in kinds
        if "AuxiliaryTrainingWrapper" in kinds or ("BaseTunerLayer" in kinds and not lora):
            raise UnsupportedModelError(
                f"'{name}' is wrapped by PEFT as {type(module).__name__}; of PEFT's adapters plain LoRA is known: "
                f"{_MERGE}"
            )
        variants = getattr(module, "lora_variant", None) if lora else None
        if variants:
            variant = type(next(iter(variants.values()))).__name__
            raise UnsupportedModelError(
                f"'{name}' has a LoRA adapter of a special kind ({variant}), which changes what the base weight does: "
                f"{_MERGE}"
            )
    for name, parameter in model.named_parameters():
        if "DTensor" in _kinds(parameter):
            raise UnsupportedModelError(f"'{name}' is sharded over processes (DTensor): load the model whole")


def inside(module: nn.Module, names: tuple[str, ...] = TRANSPARENT) -> nn.Module:
    """The module that stands behind wrappers of these names."""
    while (name := next((name for name in names if name in module._modules), None)) is not None:
        module = module._modules[name]
    return module


@contextmanager
def eager() -> Iterator[None]:
    """Inside, what is compiled in this process runs as written: compiled code does not see hooks added later."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def forget_compiled() -> None:
    """Compiled code is made anew at its next call, and sees the hooks there are then."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
