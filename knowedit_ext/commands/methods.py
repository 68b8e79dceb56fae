"""`knowedit methods`: the editing methods there are."""

from __future__ import annotations

from typing import Any

from .running import say


def methods() -> dict[str, Any]:
    """The editing methods, with the presets of their parameters."""
    from ..editing.methods import METHODS

    say("| method | what | presets |\n|---|---|---|")
    for name, method in METHODS.items():
        say(f"| {name} | {method.title} | {', '.join(method.presets)} |")
    return {name: {"title": method.title, "presets": method.presets} for name, method in METHODS.items()}
