"""What MkDocs does beyond mkdocs.yml: a page of all commands, links into the repository, formulas without a script."""

from __future__ import annotations

import html
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = "reference/commands.md"
HEAD = """# Commands

Every command has `-v` (say more), `-q` (no progress bars), `--json` (the result for programs) and `-h`.
Of `knowedit` itself:
"""
SHARED = re.compile(r"^\* `(-v, --verbose|-q, --quiet|--json|--help)`:.*\n", re.MULTILINE)  # said once, at the top
LINK = re.compile(r"\[([^\]]*)\]\((\.\.?/[^)#\s]+)(#[^)]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
log = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: Any) -> Files:
    """The page of commands, as the parser knows them."""
    files.append(File.generated(config, COMMANDS, content=commands()))
    return files


def commands() -> str:
    told = [sys.executable, "-m", "typer", "knowedit_ext.cli", "utils", "docs", "--name", "knowedit"]
    text = subprocess.run(told, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    text = re.sub(r"(```.*?```|`[^`\n]*`)|\[", lambda match: match[1] or r"\[", text, flags=re.DOTALL)  # no links
    whole, heading, each = text.partition("\n## ")
    own = [line for line in whole.splitlines() if line.startswith(("* `--version", "* `--install", "* `--show"))]
    return "\n".join([HEAD, *own, heading + SHARED.sub("", each)])


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """A link to a file of the repository that is no page becomes its path; one to nothing fails the strict build."""
    docs = Path(config.docs_dir).resolve()
    here = (docs / page.file.src_uri).parent

    def shown(match: re.Match[str]) -> str:
        target = (here / match[2]).resolve()
        if target.is_relative_to(docs):
            return match[0]
        if not target.exists():
            log.warning("%s links to '%s', which is not there", page.file.src_uri, match[2])
        return f"{match[1]} (`{target.relative_to(ROOT)}`)"

    return LINK.sub(shown, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw by themselves; one wider than the screen is scrolled by itself."""

    def drawn(match: re.Match[str]) -> str:
        if match[2] == "(":
            return convert(html.unescape(match[3]))
        return f'<div style="overflow-x: auto">{convert(html.unescape(match[3]), display="block")}</div>'

    return FORMULA.sub(drawn, content)
