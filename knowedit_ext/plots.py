"""What all figures share: colours readable without colour vision, no global state, files written atomically."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .runs.interrupts import imported

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")  # neighbours far apart in lightness
MARKERS = ("o", "s", "D", "^", "v", "x")


COLUMN, PAGE = 3.3, 6.9  # widths of a paper's column and of both, in inches


def figure_of(width: float, height: float) -> Figure:
    """An empty figure, in inches; no wider than a paper's page. In a notebook it shows itself."""
    return _picture()(figsize=(min(width, PAGE), height), dpi=200, layout="constrained")


@cache
def _picture() -> type[Figure]:
    class Picture(imported("matplotlib.figure").Figure):  # no pyplot: no global state, no display needed
        def _repr_png_(self) -> bytes:
            return png_of(self)

    return Picture


def png_of(figure: Figure) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    return drawn.getvalue()


def shown_text(text: str) -> str:
    """A token or prompt as a label: line breaks and lone bytes seen."""
    return text.replace("\n", "\\n").replace("\t", "\\t").replace("\ufffd", "·")


def drawn_text(text: str) -> str:
    """`shown_text` for matplotlib, which takes what stands between dollars for maths."""
    return shown_text(text).replace("$", r"\$")


def figure_format(path: str | Path) -> str:
    """ "png", "pdf" or "svg", as the file's name says; ValueError for another name."""
    suffix = Path(path).suffix.lower().lstrip(".")
    if suffix not in ("png", "pdf", "svg"):
        raise ValueError(f"'{path}': a figure is written as .png, .pdf or .svg")
    return suffix


def finish(figure: Figure, path: str | Path | None) -> Figure:
    """Write the figure where a path is given; the same figure gives the same bytes."""
    _find_glyphs(figure)
    if path is None:
        return figure
    from .runs.files import atomic_write  # with torch; `figure_format` is asked before it is needed

    suffix = figure_format(path)
    drawn = io.BytesIO()
    undated = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[suffix]
    figure.savefig(drawn, format=suffix, metadata=undated)
    atomic_write(path, lambda file: file.write(drawn.getvalue()))
    return figure


def _find_glyphs(figure: Figure) -> None:
    """Have texts of a writing that the usual font lacks (Chinese, Thai) drawn by an installed font that has it."""
    for text in figure.findobj(imported("matplotlib.text").Text):
        if not text.get_text().isascii():
            usual = text.get_fontfamily()
            text.set_fontfamily([*usual, *_fonts_for(frozenset(text.get_text()), tuple(usual))])


@cache
def _fonts_for(letters: frozenset[str], usual: tuple[str, ...]) -> tuple[str, ...]:
    """Families that have, together, the letters which `usual` lacks; matplotlib warns of what no font here has."""
    fonts = imported("matplotlib.font_manager")
    missing = {ord(x) for x in letters if x.isprintable()}
    missing -= _has(fonts.findfont(fonts.FontProperties(family=list(usual))))
    chosen = []
    for path in sorted(fonts.findSystemFonts()) if missing else ():
        if "lastresort" in Path(path).name.lower():  # boxes with the names of alphabets
            continue
        if found := missing & _has(path):
            fonts.fontManager.addfont(path)  # it may have been installed since matplotlib made its list
            chosen.append(fonts.get_font(path).family_name)
            missing -= found
    return tuple(dict.fromkeys(chosen))


@cache
def _has(path: str) -> frozenset[int]:
    """The letters of a font; none where the file cannot be read as one."""
    try:
        return frozenset(imported("matplotlib.font_manager").get_font(path).get_charmap())
    except (RuntimeError, OSError):
        return frozenset()
