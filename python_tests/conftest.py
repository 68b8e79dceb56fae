"""Fixtures for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # as the command does before it imports transformers

ROOT = Path(__file__).resolve().parent.parent
LONG = ("test_docs.py", "test_notebooks.py", "test_mistakes.py", "studies", "campaign")  # with tests of half a minute


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The walk-through only where it is asked for. What takes long comes first: no process ends with it alone."""
    items.sort(key=lambda item: not any(name in item.path.parts for name in LONG))
    if "walkthrough" not in config.getoption("markexpr"):
        walks = [item for item in items if item.get_closest_marker("walkthrough")]
        config.hook.pytest_deselected(items=walks)
        items[:] = [item for item in items if item not in walks]


@pytest.fixture(scope="session", autouse=True)
def moments_of_the_world_once() -> Iterator[None]:
    """A command on the built-in world collects its moments, which takes seconds; here once for all tests."""
    from knowedit_ext.world import moments

    collect, kept = moments.collect, {}

    def once(model: Any, layers: Any) -> Any:
        asked = (model.dtype, str(model.device), *layers)
        if asked not in kept:
            kept[asked] = collect(model, layers)
        return kept[asked]

    moments.collect = once
    yield
    moments.collect = collect


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of public data sets: $KNOWEDIT_DATA, or shared/data beside the repository; skips without one."""
    folder = Path(os.environ.get("KNOWEDIT_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}; KNOWEDIT_DATA names another folder")
    return folder


@pytest.fixture(params=["cpu"] + (["cuda"] if torch.cuda.is_available() else []))
def device(request: pytest.FixtureRequest) -> str:
    """Every device found here."""
    return request.param
