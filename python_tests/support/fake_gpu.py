"""A GPU that computes nothing: what would wait for it, or be sent to it from the host, is told by name and place.

Tensors are torch's fake ones: they have a shape, a dtype and a device, and no numbers. What asks for a number (`item`,
`nonzero`, a boolean index) would wait for the device on CUDA, and cannot go on here unless `Watch` answers for it.
"""

from __future__ import annotations

import copy
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import knowedit_ext as ke
from knowedit_ext.sweep import capture

HOSTS = ("cpu", "meta")
ASKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "bincount")


class Watch(TorchDispatchMode):
    """Counts, by kind and the lines of ours that lead there, what the host and the device have to say to each other.

    waits: the host waits for the device. sent: a tensor goes from the host to the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = any(x.device.type not in HOSTS for x in tensors)
        name = func.overloadpacket.__name__
        chosen = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if on_device and (name in ASKS or chosen):
            self.waits[self._told(name)] += 1
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_") and isinstance(out, torch.Tensor):
            source = args[1] if name == "copy_" else args[0]
            if source.device.type != out.device.type:
                (self.waits if out.device.type in HOSTS else self.sent)[self._told(name)] += 1
        return out

    @staticmethod
    def _told(name: str) -> str:
        ours = [f for f in traceback.extract_stack() if "/knowedit_ext/" in f.filename]
        return " < ".join([name, *(f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in reversed(ours[-3:]))])


class _OnCPUBuilds(TorchFunctionMode):
    """What a build without CUDA lacks for fake tensors, by operations that it has."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and args[0].device.type not in HOSTS:
            return _getitem(*args)
        if func is torch.Tensor.__setitem__ and args[0].device.type not in HOSTS:
            x, index, value = args
            torch.ops.aten.copy_.default(_getitem(x, index), value)  # of views: nothing here writes by index tensors
            return None
        if func is torch.Tensor.contiguous and args[0].device.type not in HOSTS:
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        if func is torch.Tensor.to:
            return self._to(args[0], *torch._C._nn._parse_to(*args[1:], **(kwargs or {}))[:2])
        return func(*args, **(kwargs or {}))

    def _to(self, x: torch.Tensor, device: torch.device | None, dtype: torch.dtype | None) -> torch.Tensor:
        x = x if isinstance(x, FakeTensor) else self.fake.from_tensor(x)
        device = x.device if device is None or device.type == x.device.type else device
        if device == x.device and dtype in (None, x.dtype):
            return x
        return torch.ops.aten._to_copy.default(x, dtype=dtype, device=device)


def _getitem(x: torch.Tensor, index: Any) -> torch.Tensor:
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        at = next(n for n, part in enumerate(parts) if part is Ellipsis)
        used = sum(part is not None for part in parts) - 1
        parts[at : at + 1] = [slice(None)] * (x.dim() - used)
    dim, picked = 0, []
    for part in parts:
        if isinstance(part, slice):
            x = torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop, part.step or 1)
        elif part is None:
            x = x.unsqueeze(dim)
        elif isinstance(part, int) and not isinstance(part, bool):
            x, dim = x.select(dim, part), dim - 1
        else:
            part = torch.as_tensor(part)
            picked += [None] * (dim - len(picked)) + [part]
            dim += part.dim() - 1 if part.dtype == torch.bool else 0
        dim += 1
    return torch.ops.aten.index.Tensor(x, picked) if picked else x


@contextmanager
def fake_gpu(model: ke.EditableModel) -> Iterator[ke.EditableModel]:
    """The model on a GPU that is not there; all tensors made within are fake."""
    faked = ke.EditableModel(copy.deepcopy(model.hf), model.tokenizer)
    faked.probed = True
    numbers = mock.patch.object(capture, "_sight", lambda mask, length: None)  # reads them, and fake masks have none
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, _OnCPUBuilds(fake), numbers:
        for module in faked.hf.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    fake = torch.empty(p.shape, dtype=p.dtype, device="cuda")
                    module._parameters[name] = nn.Parameter(fake, requires_grad=False)
            for name, b in module._buffers.items():
                if b is not None:
                    module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cuda")
        yield faked


def moved(thing: Any, model: ke.EditableModel, done: dict[int, Any] | None = None) -> Any:
    """A copy of something of ours with all its tensors on the fake GPU, and with this model; within `fake_gpu`."""
    done = {} if done is None else done
    if id(thing) in done:
        return done[id(thing)]
    if isinstance(thing, torch.Tensor):
        new = thing.to("cuda")
    elif isinstance(thing, ke.EditableModel):
        return model
    elif isinstance(thing, (list, tuple)) and not hasattr(thing, "_fields"):
        new = type(thing)(moved(x, model, done) for x in thing)
    elif isinstance(thing, dict):
        new = {key: moved(x, model, done) for key, x in thing.items()}
    elif type(thing).__module__.startswith("knowedit_ext.") and hasattr(thing, "__dict__"):
        new = done[id(thing)] = copy.copy(thing)
        for name, value in vars(thing).items():
            object.__setattr__(new, name, moved(value, model, done))
    else:
        return thing
    done[id(thing)] = new
    return new
