"""Every body of an op that can run here, chosen one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from knowedit_ext.ops import _native

BODIES = ["reference", "baseline", "avx2", "avx512"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=BODIES)
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Makes ops run on one body; yields the device to put tensors on."""
    name = request.param
    if name == "reference":
        monkeypatch.setattr(_native, "module", lambda device: None)
        yield "cpu"
    elif name == "cuda":
        yield "cuda"
    else:
        native, reason = _native.status("cpu")
        if native is None:
            pytest.skip(f"no native module: {reason}")
        if name not in native.cpu_isas():
            pytest.skip(f"this machine has no {name}")
        before = native.cpu_isa()
        native.use_cpu_isa(name)
        yield "cpu"
        native.use_cpu_isa(before)


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """Memory that nobody wrote shows as NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
