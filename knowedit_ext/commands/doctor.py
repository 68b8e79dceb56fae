"""`knowedit doctor`: what is installed."""

from __future__ import annotations

from typing import Any

from .running import say


def doctor() -> dict[str, Any]:
    """Versions, which native bodies loaded, why one did not, and the way out."""
    from ..doctor import report

    found = report()
    say(found)
    return {"report": found.splitlines()}
