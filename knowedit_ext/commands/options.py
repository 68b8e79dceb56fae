"""What several commands take, checked before any work is done."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import knowedit_ext as ke

from ..checks import one_of, quoted
from ..documents import PARAMETER_FILES
from ..plots import figure_format
from ..world.store import WORLD
from .names import check_device, may_be_preset

LARGEST_SEED = 2**32 - 1
WORLD_DATA = Path(WORLD)
DTYPES = ("float32", "bfloat16", "float16", "float64")


def _place(path: Path, folder: bool) -> Path:
    """A path that a file, or files in a folder, can be written to."""
    if folder and path.exists() and not path.is_dir():
        raise typer.BadParameter(f"'{path}' is a file, expected a folder")
    if not folder and path.is_dir():
        raise typer.BadParameter(f"'{path}' is a folder, expected a file")
    above = path if folder else path.parent
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise typer.BadParameter(f"'{path}' cannot be made: '{above}' is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"'{path}' cannot be written: no permission in '{above}'")
    return path


def _figure(path: Path) -> Path:
    figure_format(path)
    return _place(path, folder=False)


def _page(path: Path) -> Path:
    from ..pages.page import check_name

    check_name(path)
    return _place(path, folder=False)


def _checked(check: Callable[[Path], Path], help: str) -> Any:
    return typer.Option(help=help, callback=lambda path: None if path is None else check(path))


def folder_to_fill(help: str) -> Any:
    return _checked(partial(_place, folder=True), help)


def file_to_write(help: str) -> Any:
    return _checked(partial(_place, folder=False), help)


def page_to_write(help: str) -> Any:
    return _checked(_page, help)


def figure_to_write(help: str) -> Any:
    return _checked(_figure, help)


def file_to_read(help: str) -> Any:
    return typer.Option(help=help, exists=True, dir_okay=False, readable=True)


def data_to_read(help: str) -> Any:
    """A data file, or "world" for the built-in world's."""
    return _checked(_data, f'{help}; "world": the built-in one.')


def _data(path: Path) -> Path:
    if path == WORLD_DATA:
        return path
    if not path.exists():
        raise typer.BadParameter(f"there is no file '{path}' (\"world\" is the built-in one)")
    if path.is_dir() or not os.access(path, os.R_OK):
        raise typer.BadParameter(f"'{path}' is {'a folder, expected a file' if path.is_dir() else 'not readable'}")
    return path


def choice(name: str, allowed: Sequence[str], help: str) -> Any:
    """An option, or a list of them, of these values alone, if it is given."""
    return read_by(lambda value: one_of(name, value, allowed), help)


def read_by(read: Callable[[str], object], help: str, *names: str) -> Any:
    """An option, or a list of them, whose texts `read` takes, if it is given. names: other than its variable's."""

    def check(given: Any) -> Any:
        for value in (given,) if isinstance(given, str) else given or ():
            if value:
                read(value)
        return given

    return typer.Option(*names, help=help, callback=check)


def positive(name: str, help: str) -> Any:
    """A number above 0, if it is given."""

    def check(given: float | None) -> float | None:
        if given is not None and not 0 < given < math.inf:
            raise ValueError(f"{name} is {given:g}: expected more than 0")
        return given

    return typer.Option(help=help, callback=check)


def template(help: str) -> Any:
    return typer.Option(help=help, callback=_template)


def _template(prompt: str | None) -> str | None:
    if prompt is not None and (slots := prompt.count("{}")) != 1:
        raise ValueError(
            f"--prompt {quoted(prompt)} has {slots or 'no'} '{{}}': exactly one must mark where the subject goes"
        )
    return prompt


def folder_to_read(help: str) -> Any:
    return typer.Option(help=help, exists=True, file_okay=False, readable=True)


ModelName = Annotated[
    str, typer.Argument(help='Hub name or folder of a Hugging Face decoder; "world": the built-in one.')
]
Device = Annotated[str | None, read_by(check_device, 'Where to run, e.g. "cpu" or "cuda".')]
Dtype = Annotated[str | None, choice("dtype", DTYPES, f"{', '.join(DTYPES)}; default: as the checkpoint says.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N of them.")]
MaxRows = Annotated[int | None, typer.Option(min=1, help="Rows held at once; default: from free memory.")]
ValueStore = Annotated[
    Path | None,
    folder_to_fill("Folder for optimised values: killed runs go on there, others that need the same share it."),
]
ContextSeed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the generated contexts.")]
Html = Annotated[Path | None, page_to_write("A page to click (.html): charts, and the numbers as tables.")]
Edits = Annotated[list[Path], file_to_read("A saved edit (.safetensors); may be repeated: their sum.")]
MomentsFolder = Annotated[Path | None, folder_to_read("Folder made by `knowedit moments`.")]
Params = Annotated[str, typer.Option(help='A preset, e.g. "gpt2-xl", or a file (JSON, YAML) of published keys.')]


def meaningless(given: dict[str, Any], why: str) -> None:
    """ValueError for options that were given although they mean nothing here."""
    if names := [name for name, value in given.items() if value not in (None, False, (), [], "")]:
        raise ValueError(f"{', '.join(names)} cannot be given here: {why}")


def data_of(model: str, data: Path | None) -> Path:
    """The data file, or the world's; ValueError where there is none."""
    if data is None and model != WORLD:
        raise ValueError('--data FILE is missing ("--data world": the built-in world\'s facts)')
    return WORLD_DATA if data is None else data


def preset_or(given: str, method: str, model: str) -> str:
    """--params, or the preset that is called as the model is; "" where there is none. ValueError for what is neither a
    preset nor a file."""
    name = given or Path(model).name.lower()
    if Path(given).suffix in PARAMETER_FILES:
        if not Path(given).is_file():
            raise ValueError(f"--params: there is no file {quoted(given)}")
        return given
    if not may_be_preset(name):
        if given:
            files = ", ".join(PARAMETER_FILES)
            raise ValueError(f"no {method} preset {quoted(given)}: `knowedit methods` lists them; or a file ({files})")
        return ""
    from ..editing.methods import method_of

    return given or (name if name in method_of(method).presets else "")


def load(model: str, device: str | None, dtype: str | None) -> ke.EditableModel:
    """The model of a command line."""
    return ke.load_model(model, device=device, dtype=dtype)
