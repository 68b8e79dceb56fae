"""Trace and edit by hand: what `knowedit explore` shows."""

from .session import Session

__all__ = ["Session"]
