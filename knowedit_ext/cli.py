"""The `knowedit` command. What takes seconds to import is imported by the commands, after their options are read."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from itertools import pairwise
from typing import Annotated

import typer

from . import __version__
from .commands.ability import ability
from .commands.apply import apply
from .commands.check_edit import check_edit
from .commands.compare import compare
from .commands.demo import demo
from .commands.doctor import doctor
from .commands.download import download
from .commands.edit import edit
from .commands.editors import convert_editor, train_editor
from .commands.evaluate import evaluate
from .commands.explore import explore
from .commands.generate import generate
from .commands.methods import methods
from .commands.mistakes import explain
from .commands.moments import moments
from .commands.report import report
from .commands.running import running
from .commands.study_edits import categories, layer_token, layers, mixes, scaling
from .commands.study_facts import attention, pairs, reversal, severed
from .commands.study_localization import localization
from .commands.study_sequential import sequential
from .commands.suggest import suggest
from .commands.trace import trace
from .commands.world import train
from .starting import INTERRUPTED, as_command

MISTAKEN = 2
LONGEST = 2000  # characters of what is said of a mistake

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(help="Locate and edit facts in language models.", no_args_is_help=True, context_settings=HELP)
world = typer.Typer(help="The built-in world of invented people.", no_args_is_help=True)
study = typer.Typer(help="The papers' studies.", no_args_is_help=True)
app.add_typer(world, name="world")
app.add_typer(study, name="study")
of_editors = (train_editor, convert_editor)
of_edits = (edit, check_edit, apply, generate, evaluate, suggest, ability)
for command in (trace, moments, *of_edits, *of_editors, report, compare, explore, methods, download, demo, doctor):
    app.command()(running(command))
world.command()(running(train))
of_studies = (localization, sequential, scaling, layers, categories, mixes, layer_token)
for command in (*of_studies, severed, attention, reversal, pairs):
    study.command(command.__name__.replace("_", "-"))(running(command))


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"knowedit {__version__}")
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="The version, and nothing else.")
    ] = False,
) -> None:
    """Locate and edit facts in language models."""


def main() -> None:
    """Run the command. A mistake of the user's is one line on stderr and exit status 2, an interrupt status 130.

    With KNOWEDIT_DEBUG=1 in the environment the traceback comes too.
    """
    try:
        with as_command():
            status = _run()
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except Exception as error:
        if _interrupted(error):
            sys.exit(INTERRUPTED)
        text = _usage(error) or explain(error)
        if text is None:
            raise
        if os.environ.get("KNOWEDIT_DEBUG"):
            traceback.print_exception(error)
        status = MISTAKEN
        if len(text) > LONGEST:  # it may quote whatever was typed
            text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"
        typer.echo(f"knowedit: {text}", err=True)
    sys.exit(status)


def _refuse_empty(arguments: list[str]) -> None:
    """ValueError for an option given as "" (say, by an unset shell variable): a path would be the current folder."""
    for option, value in pairwise([*arguments, "end"]):
        if option == "--prompt":  # a BOS token may do
            continue
        if re.fullmatch("--[a-z-]+", option) and value == "" or re.fullmatch("--[a-z-]+=", option):
            raise ValueError(f"{option.rstrip('=')} is empty")


def _run() -> int | None:
    """None, or the status of what typer ends by itself: 130 after Ctrl-C inside a command."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    warnings.formatwarning = lambda message, *_: f"knowedit: warning: {message}\n"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what it only warns of, `model.pretrained` refuses
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _refuse_empty(sys.argv[1:])
    return app(standalone_mode=False)


def _interrupted(error: BaseException | None) -> bool:
    """Is an interrupt behind it? Modules in C++ that are being imported make an ImportError of one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _usage(error: Exception) -> str | None:
    """What typer says of options and arguments that cannot be read."""
    if not hasattr(error, "format_message"):
        return None
    context = getattr(error, "ctx", None)
    message = " ".join(error.format_message().split())
    command = "knowedit" if context is None else context.command_path
    early = message.startswith("No such option") and hasattr(getattr(context, "command", None), "commands")
    where = "a command's options come behind it; " if early else ""
    return f"{message} ({where}see {command} --help)" if message else f"no command was given (see {command} --help)"
