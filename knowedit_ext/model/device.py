"""Devices and precisions by name, checked before anything is loaded."""

from __future__ import annotations

import torch


def device_named(device: str | torch.device | int | None) -> torch.device | None:
    """A device that this machine and this build of torch have; ValueError says why it is none."""
    if device is None:
        return None
    try:
        if isinstance(device, bool):
            raise TypeError("a truth value")
        resolved = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"unknown device {device!r}: expected e.g. 'cpu', 'cuda' or 'cuda:1'") from error
    if resolved.type == "cuda":
        _check_cuda(resolved)
    else:
        try:
            torch.empty(0, device=resolved)
        except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"device '{resolved}' cannot be used here ({reason}): 'cpu' always can") from error
    return resolved


def _check_cuda(device: torch.device) -> None:
    way_out = "`knowedit doctor` says more, 'cpu' always works"
    if torch.version.cuda is None and torch.version.hip is None:
        raise ValueError(f"device '{device}': this is a CPU build of torch; {way_out}")
    if not torch.cuda.is_available():
        raise ValueError(f"device '{device}': no usable GPU or driver was found; {way_out}")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device '{device}': the GPUs here are cuda:0 to cuda:{torch.cuda.device_count() - 1}")


def dtype_named(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating-point type of torch; ValueError for what is none."""
    if dtype is None:
        return None
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"unknown dtype {dtype!r}: expected e.g. 'float32', 'bfloat16', 'float16'")
    return resolved
