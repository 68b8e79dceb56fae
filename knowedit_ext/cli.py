"""The `knowedit` command."""

from __future__ import annotations

import logging
import sys

import typer

from .commands.demo import demo
from .commands.doctor import doctor
from .commands.download import download
from .commands.edit import edit
from .commands.evaluate import evaluate
from .commands.moments import moments
from .commands.report import report
from .commands.trace import trace
from .commands.world import train

app = typer.Typer(help="Locate and edit facts in language models.", no_args_is_help=True, add_completion=False)
world = typer.Typer(help="The built-in world of invented people.", no_args_is_help=True)
app.add_typer(world, name="world")
for command in (trace, edit, moments, evaluate, report, download, demo, doctor):
    app.command()(command)
world.command()(train)


def main() -> None:
    """Run the command; a mistake of the user's is one line on stderr, exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        app(standalone_mode=False)
    except typer.Abort:
        sys.exit(130)
    except (ValueError, OSError, NotImplementedError) as error:
        typer.echo(f"knowedit: {error}", err=True)
        sys.exit(2)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # typer's own usage errors
            error.show() if hasattr(error, "show") else typer.echo(error.format_message(), err=True)
            sys.exit(error.exit_code)
        raise


if __name__ == "__main__":
    main()
