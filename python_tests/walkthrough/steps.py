"""The steps: the commands of docs/index.md as they stand there, and what comes after them."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "index.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ACTIVATE = "source .venv/bin/activate"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HEADLESS = "--headless --no-sandbox --disable-gpu --virtual-time-budget=20000 --dump-dom"
FACT = '--prompt "{} was born in" --subject "Caltor Braksted"'
# Of somebody who has transformers and the folder, and not this package.
READ = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("edited"), AutoTokenizer.from_pretrained("edited")
asked = tokenizer("Caltor Braksted was born in", return_tensors="pt")
print(tokenizer.decode(model.generate(**asked, max_new_tokens=1, do_sample=False)[0]))
"""


@dataclass(frozen=True)
class Step:
    """A command of the shell. place: folder below the walk's. says: what its output holds. makes: files it leaves."""

    title: str
    command: str
    place: str = "clone"
    says: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()


def steps_of(source: str) -> list[Step]:
    """From the clone to the page in the browser. The environment is active from where the page says so."""
    return [Step("clone", f"git clone --quiet {shlex.quote(source)} clone", "."), *of_the_page(), *beyond()]


EXPECTED = {  # of the page's commands
    "make demo": dict(says=("MEMIT",)),
    "knowedit trace": dict(makes=("trace.png",)),
    "knowedit edit": dict(makes=("edit.safetensors",)),
    "knowedit generate": dict(says=("Boston", "Oslo")),
    "knowedit check-edit": dict(says=("efficacy",)),
    "knowedit evaluate": dict(says=("edited",), makes=("runs/one/report.md",)),
    "knowedit apply": dict(),
    "python": dict(says=("Oslo", "edited")),
}


def of_the_page(page: Path = PAGE) -> Iterator[Step]:
    """Each command of its `sh` blocks, and each block of Python as a program; ValueError for one not in `EXPECTED`."""
    active = ""
    for language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        lines = [code] if language == "python" else code.replace("\\\n", " ").splitlines()
        for line in lines:
            if line.strip() == ACTIVATE:
                active = f"{ACTIVATE} && "
                continue
            command = f"python - <<'END'\n{line}END" if language == "python" else " ".join(line.split())
            known = [start for start in EXPECTED if command.startswith(start)]
            if not known:
                raise ValueError(f"{page.name} has a command that nothing is expected of: {command}")
            title = "the same in Python" if language == "python" else command
            yield Step(title, active + command, **EXPECTED[known[0]])


def beyond() -> Iterator[Step]:
    """The edit handed on, and applied elsewhere to the model's folder; a page in the browser."""
    own, other = f"{ACTIVATE} && ", "source ../clone/.venv/bin/activate && "
    model = '$(python -c "from knowedit_ext.world import load_world; print(load_world().folder)")'
    handed = f"{own}mkdir ../elsewhere && cp edit.safetensors ../elsewhere && cp -r {model} ../elsewhere/model"
    apply = "knowedit apply model --edit edit.safetensors --out edited"
    page = f"knowedit trace world {FACT} --html trace.html"
    yield Step("hand it to somebody who has the model's folder", handed)
    yield Step("there: what is it?", f"{other}knowedit edit --show edit.safetensors", "elsewhere", ("Caltor Braksted",))
    yield Step(f"there: {apply}", other + apply, "elsewhere", makes=("edited/config.json",))
    yield Step("there: read by transformers alone", f"{other}python - <<'END'\n{READ}END", "elsewhere", ("Oslo",))
    yield Step(page, own + page, makes=("trace.html",))
    if browser := next(filter(None, map(shutil.which, BROWSERS)), None):
        seen = f'{browser} {HEADLESS} "file://$PWD/trace.html"'
        yield Step("open it in a browser", seen, says=("main-svg", "sted"))
