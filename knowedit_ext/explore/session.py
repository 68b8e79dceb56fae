"""What someone does who explores a model: trace a prompt, try an edit, keep it or not, save what was kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checks import quoted
from ..editing import METHODS, Edit, EditRequest
from ..editing import edit as make_edit
from ..evaluation.before_after import BeforeAfter, before_after
from ..model.facts import Fact
from ..model.load import EditableModel
from ..model.spelling import mark_subject
from ..moments import Moments
from ..tracing import Trace, trace


class Session:
    """kept: edits in force on the model, the oldest first. tried: the edit that was tried last, not in force.

    method, params, moments: how edits are made, as in `ke.edit`.
    """

    def __init__(
        self, model: EditableModel, method: str = "rome", params: Any = None, moments: Moments | None = None
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"unknown method {quoted(method)}: expected one of {', '.join(METHODS)}")
        self.model, self.method, self.params = model, method, params
        self.moments = {"moments": moments} if moments is not None and METHODS[method].takes("moments") else {}
        self.kept: list[Edit] = []
        self.tried: Edit | None = None

    def trace(self, prompt: str, subject: str, kind: str = "state", samples: int = 10) -> Trace:
        """Where the answer to a prompt is kept, with the edits that were kept in force."""
        return trace(self.model, Fact(_template(prompt, subject), subject.strip()), kind=kind, samples=samples)

    def try_edit(self, prompt: str, subject: str, target: str, others: str = "", tokens: int = 10) -> BeforeAfter:
        """Make an edit and say what it does to its prompt, and to `others` (a line each); it is not kept yet."""
        if not target.strip():
            raise ValueError("say what is to follow the prompt: the new answer is empty")
        request = EditRequest(_template(prompt, subject), subject.strip(), target.strip())
        self.tried = None
        made = make_edit(self.model, request, self.method, params=self.params, **self.moments)
        prompts = [prompt.strip(), *(line.strip() for line in others.splitlines() if line.strip())]
        said = before_after(self.model, made, list(dict.fromkeys(prompts)), tokens=tokens)
        self.tried = made
        return said

    def keep(self, edit: Edit | None = None) -> Edit:
        """Put the edit that was tried in force. edit: which one it has to be, where several windows try edits."""
        if edit is not None and edit is not self.tried:
            raise ValueError("this edit is kept, or another one was tried, kept or reverted since: try it again")
        if self.tried is None:
            raise ValueError("there is no edit to keep: try one first")
        self.tried.apply(self.model)
        self.kept.append(self.tried)
        self.tried = None
        return self.kept[-1]

    def revert(self) -> Edit:
        """Take the last edit that was kept back, bit for bit."""
        if not self.kept:
            raise ValueError("no edit is in force: there is nothing to revert")
        self.kept[-1].revert(self.model)
        self.tried = None  # it was made on top of what has just gone
        return self.kept.pop()

    def log(self) -> list[dict[str, str]]:
        """What was kept: prompt and new answer of each edit."""
        return [
            {"prompt": request["prompt"].replace("{}", request["subject"]), "answer": request["target_new"].strip()}
            for edit in self.kept
            for request in edit.requests
        ]

    def save(self, path: str | Path) -> Edit:
        """What was kept, as one file for `knowedit apply`, `evaluate` and `ke.Edit.load`."""
        if not self.kept:
            raise ValueError("no edit is in force: there is nothing to save")
        whole = self.kept[0] if len(self.kept) == 1 else Edit.merge(self.kept)
        whole.save(path)
        return whole


def _template(prompt: str, subject: str) -> str:
    """The prompt with {} in the subject's place."""
    prompt, subject = prompt.strip(), subject.strip()
    if not prompt or not subject:
        raise ValueError(f"the {'subject' if prompt else 'prompt'} is empty")
    return prompt if "{}" in prompt else mark_subject(prompt, subject, first=True)
