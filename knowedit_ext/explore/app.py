"""`Session` in the browser, by Gradio, on this machine alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from ..extras import require
from ..notebook import html_table
from ..runs.interrupts import imported
from ..tracing.kinds import KINDS
from .session import Session

LOOPBACK = "127.0.0.1"


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

    def changed(act: Callable[[], object]) -> str:
        act()
        return log_html(session)

    with gradio.Blocks(title=f"knowedit: {session.model.name}", analytics_enabled=False) as app:
        gradio.Markdown(f"# {session.model.name}\nA prompt, its subject (the part of it that is asked about), an edit.")
        with gradio.Row():
            text = gradio.Textbox(prompt, label="Prompt", elem_id="prompt")
            about = gradio.Textbox(subject, label="Subject", elem_id="subject")
            kind = gradio.Radio(list(KINDS), value="state", label="Restore", elem_id="kind")
        gradio.Button("Trace", elem_id="trace").click(
            told(lambda *given: session.trace(*given)._repr_html_()), [text, about, kind], gradio.HTML(elem_id="map")
        )
        with gradio.Row():
            target = gradio.Textbox(label="New answer", elem_id="target")
            others = gradio.Textbox(label="Other prompts to look at, one a line", lines=3, elem_id="others")
        gradio.Button(f"Try the edit ({session.method})", elem_id="try").click(
            told(lambda *given: session.try_edit(*given)._repr_html_()),
            [text, about, target, others],
            gradio.HTML(elem_id="said"),
        )
        with gradio.Row():
            keep = gradio.Button("Keep", elem_id="keep")
            revert = gradio.Button("Revert the last one kept", elem_id="revert")
            save = gradio.Button("Save what is kept", elem_id="save")
        log = gradio.HTML(log_html(session), elem_id="log")
        keep.click(told(lambda: changed(session.keep)), None, log)
        revert.click(told(lambda: changed(session.revert)), None, log)
        save.click(told(saved), None, gradio.File(label="Edit file", elem_id="file"))
    return app


def serve(session: Session, port: int, prompt: str = "", subject: str = "", wait: bool = True) -> Any:
    """Show the page on 127.0.0.1:port, until an interrupt; wait=False: go on, and return the app, to be closed."""
    app = app_of(session, prompt, subject)
    app.queue(default_concurrency_limit=1)  # one model: one thing at a time
    app.launch(
        server_name=LOOPBACK, server_port=port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=not wait
    )
    return app


def log_html(session: Session) -> str:
    rows = [[entry["prompt"], entry["answer"]] for entry in session.log()]
    return html_table("in force", ["prompt", "answer"], rows) if rows else escape("no edit is in force")
