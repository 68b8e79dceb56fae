"""Fixtures for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # as the command does before it imports transformers

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The walk-through only where it is asked for."""
    if "walkthrough" not in config.getoption("markexpr"):
        walks = [item for item in items if item.get_closest_marker("walkthrough")]
        config.hook.pytest_deselected(items=walks)
        items[:] = [item for item in items if item not in walks]


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
