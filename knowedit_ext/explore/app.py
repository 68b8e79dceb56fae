"""`Session` in the browser, by Gradio, on this machine alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from ..editing import Edit
from ..extras import require
from ..notebook import html_table
from ..runs.interrupts import imported
from ..tracing import Trace
from ..tracing.kinds import KINDS
from .session import Session

LOOPBACK = "127.0.0.1"
ALONE = {"concurrency_id": "model", "concurrency_limit": 1}  # one model: one thing at a time, from whatever window
LITTLE = 0.1  # of the answer's score, that corrupting the subject is to take at least
SECONDS = 2  # after which a window shows what another one kept
MARKED = """(subject) => {
    const prompt = document.querySelector("#prompt textarea, #prompt input");
    return prompt.value.slice(prompt.selectionStart, prompt.selectionEnd).trim() || subject;
}"""  # what is marked in the prompt becomes the subject


def app_of(session: Session, prompt: str = "", subject: str = "") -> Any:
    """The page (`gradio.Blocks`) of a session. prompt, subject: what it begins with."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing leaves the machine
    require("gradio")
    gradio = imported("gradio")
    folder = tempfile.TemporaryDirectory(prefix="knowedit_explore_")  # goes with the page

    def told(act: Callable[..., Any]) -> Callable[..., Any]:
        """A mistake is said on the page, in words."""

        def safely(*given: Any) -> Any:
            try:
                return act(*given)
            except (ValueError, TypeError) as error:
                raise gradio.Error(str(error), print_exception=False) from error

        return safely

    def saved() -> str:
        path = Path(folder.name) / "edit.safetensors"
        session.save(path)
        return str(path)

    def shown() -> str:
        return log_html(session)

    def changed(act: Callable[..., object], *given: Any) -> str:
        act(*given)
        return shown()

    def keep_mine(edit: Edit | None) -> Edit:
        if edit is None:
            raise ValueError("there is no edit to keep: try one first")
        return session.keep(edit)

    def tried(*given: str) -> tuple[str, Edit | None]:
        return session.try_edit(*given)._repr_html_(), session.tried

    title, kept_for = f"knowedit: {session.model.name}", 3600  # seconds, of what was saved
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(kept_for, kept_for)) as app:
        gradio.Markdown(f"# {session.model.name}\nA prompt, its subject (the part of it that is asked about), an edit.")
        with gradio.Row():
            text = gradio.Textbox(prompt, label="Prompt", elem_id="prompt")
            about = gradio.Textbox(subject, label="Subject (type it, or mark it in the prompt)", elem_id="subject")
            kind = gradio.Radio(
                [(row.label, name) for name, row in KINDS.items()], value="state", label="Restore", elem_id="kind"
            )
        text.select(None, [about], about, js=MARKED)
        gradio.Button("Trace", elem_id="trace").click(
            told(lambda *given: map_html(session.trace(*given))),
            [text, about, kind],
            gradio.HTML(elem_id="map"),
            **ALONE,
        )
        with gradio.Row():
            target = gradio.Textbox(label="New answer", elem_id="target")
            others = gradio.Textbox(label="Other prompts to look at, one a line", lines=3, elem_id="others")
        mine = gradio.State(None)  # what this window tried
        gradio.Button(f"Try the edit ({session.method})", elem_id="try").click(
            told(tried), [text, about, target, others], [gradio.HTML(elem_id="said"), mine], **ALONE
        )
        with gradio.Row():
            keep = gradio.Button("Keep", elem_id="keep")
            revert = gradio.Button("Revert the last one kept", elem_id="revert")
            save = gradio.Button("Save what is kept", elem_id="save")
        log = gradio.HTML(shown(), elem_id="log")
        keep.click(told(partial(changed, keep_mine)), mine, log, **ALONE)
        revert.click(told(partial(changed, session.revert)), None, log, **ALONE)
        save.click(told(saved), None, gradio.File(label="Edit file", elem_id="file", height=90), **ALONE)
        gradio.Timer(SECONDS).tick(shown, None, log, show_progress="hidden", queue=False)
        app.load(shown, None, log, show_progress="hidden", queue=False)
    return app


def serve(session: Session, port: int, prompt: str = "", subject: str = "", wait: bool = True) -> Any:
    """Show the page on 127.0.0.1:port, until an interrupt; wait=False: go on, and return the app, to be closed."""
    app = app_of(session, prompt, subject)
    app.launch(
        server_name=LOOPBACK,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=not wait,
        footer_links=[],
    )
    return app


def map_html(trace: Trace) -> str:
    """The map; a warning where there is nothing to see on it, for its colours reach as far as its effects."""
    little = trace.high_score - trace.low_score < LITTLE * trace.high_score
    warning = "<p><strong>Corrupting the subject hardly changes the answer: the map shows noise.</strong></p>"
    return (warning if little else "") + trace._repr_html_()


def log_html(session: Session) -> str:
    rows = [[entry["prompt"], entry["answer"]] for entry in session.log()]
    return html_table("in force", ["prompt", "answer"], rows) if rows else escape("no edit is in force")
