"""Locate and edit facts in language models.

The public names stand in `__init__.pyi`. Each is imported when it is first asked for: torch takes seconds.
"""

import re
from pathlib import Path
from typing import Any

from . import starting  # before all that takes long

__version__ = "0.1.0"

_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_PACKAGES = {name: package for package, name in re.findall(r"^from \.(\w+) import (\w+)", _STUB, re.MULTILINE)}
__all__ = sorted(_PACKAGES)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        value = getattr(starting.package(f"{__name__}.{_PACKAGES[name]}"), name)
    elif not name.startswith("_") and (Path(__file__).parent / name / "__init__.py").exists():
        value = starting.package(f"{__name__}.{name}")  # a package of ours, such as `studies`
    else:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
