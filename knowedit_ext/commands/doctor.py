"""`knowedit doctor`: what is installed."""

from __future__ import annotations

import typer

from ..doctor import report


def doctor() -> None:
    """Versions, which native bodies loaded, why one did not, and the way out."""
    typer.echo(report())
