"""What every command has: -v, -q and --json, and one way to say what it found."""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from ..starting import started

_AS_JSON = ContextVar("as_json", default=False)
SHARED = {
    "verbose": Annotated[bool, typer.Option("--verbose", "-v", help="Say more of what is done.")],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, and no warnings of the log.")],
    "as_json": Annotated[bool, typer.Option("--json", help="The result as JSON, for programs.")],
}


class Ended(typer.Exit):
    """What a command found, where its exit status is not 0."""

    def __init__(self, status: int, found: Any) -> None:
        super().__init__(status)
        self.found = found


def say(text: object) -> None:
    """A line of what was found, for people; with --json what the command returns is printed in its place."""
    if not _AS_JSON.get():
        typer.echo(str(text))


def running(command: Callable[..., Any]) -> Callable[..., None]:
    """The command with the options that all have. It returns what it found, for --json."""

    @wraps(command)
    def run(*, verbose: bool, quiet: bool, as_json: bool, **options: Any) -> None:
        started()  # until here an interrupt ends the process: typer imports more to read options
        _set_loudness(verbose, quiet)
        token, ended = _AS_JSON.set(as_json), None
        try:
            found = command(**options)
        except Ended as end:
            found, ended = end.found, end
        finally:
            _AS_JSON.reset(token)
        if as_json:
            typer.echo(json.dumps(_plain(found), ensure_ascii=False, indent=1))
        if ended is not None:
            raise ended

    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in SHARED.items()
    ]
    own = inspect.signature(command, eval_str=True)
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), *flags])  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in run.__signature__.parameters.items()}
    del run.__wrapped__  # whose annotations typer would read
    return run


def _set_loudness(verbose: bool, quiet: bool) -> None:
    if verbose and quiet:
        raise ValueError("--verbose and --quiet cannot be given together")
    logging.getLogger("knowedit_ext").setLevel(logging.INFO if verbose else logging.ERROR if quiet else logging.NOTSET)
    if quiet:  # read as tqdm is imported; what is asked for by name, as `disable` is by ours, goes before these
        os.environ |= {"TQDM_DISABLE": "1", "TQDM_DELAY": str(10**9)}


def _plain(value: Any) -> Any:
    """As JSON has it: arrays as lists, paths as text, what is no finite number as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
