"""What a model says before an edit and after it: likeliest next tokens, both targets, and the text that goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checks import Count, typed
from ..datasets.questions import Question
from ..editing.edit import Edit
from ..frames import frame
from ..model.head import distribution, final_states
from ..model.hooks import at_rest
from ..model.load import EditableModel
from ..model.spelling import spaced
from ..model.tokens import encode
from ..notebook import html_table
from ..plots import png_of
from ..sweep.capture import clean_runs
from ..sweep.engine import default_max_rows
from ..sweep.packed import PackedPrompts, parts_of
from .nll import score
from .plots import plot_before_after
from .written import written

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


MOST = 100  # of an edit's own prompts


@dataclass(frozen=True)
class Said:
    """likeliest: the next tokens with their probabilities, the likeliest first. text: what goes on from the prompt,
    always the likeliest token. targets: probability of each target asked for."""

    likeliest: list[tuple[str, float]]
    text: str
    targets: dict[str, float] = field(default_factory=dict)

    def chances(self, most: int | None = None) -> dict[str, float]:
        """Of the `most` likeliest tokens by their text; tokens that read alike (bytes of letters) are one."""
        chances: dict[str, float] = {}
        for token, p in self.likeliest[:most]:
            chances[token] = chances.get(token, 0.0) + p
        return chances


@dataclass(frozen=True)
class BeforeAfter:
    """prompts; before and after: what was said behind each (after: None where there is no edit)."""

    prompts: list[str]
    before: list[Said]
    after: list[Said] | None
    edit: str = ""

    def rows(self) -> list[dict[str, Any]]:
        """Tidy, a token each: prompt, side, rank, token, p; and of the targets, whose rank is None."""
        sides = {"before": self.before} | ({} if self.after is None else {"after": self.after})
        return [
            {"prompt": prompt, "side": side, "rank": rank, "token": token, "p": p}
            for side, said in sides.items()
            for prompt, each in zip(self.prompts, said, strict=True)
            for rank, token, p in [
                *((n, token, p) for n, (token, p) in enumerate(each.likeliest)),
                *((None, target, p) for target, p in each.targets.items()),
            ]
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_pandas(self) -> pandas.DataFrame:
        """`rows` as a DataFrame (needs pandas)."""
        return frame(self.rows())

    def to_html(self, path: str | Path) -> None:
        """One self-contained page: bars for each prompt, before beside after (needs plotly and jinja2)."""
        from ..pages.edits import before_after_page
        from ..pages.page import write_page

        write_page(path, before_after_page(self))

    def plot(self, path: str | Path | None = None) -> Figure:
        """Bars of the likeliest next tokens, before beside after; written where a path is given."""
        return plot_before_after(self, path)

    def table(self) -> str:
        """Markdown: a line a prompt, what goes on from it and what each target has."""
        head, rule = "| prompt | before |", "|---|---|"
        if self.after is not None:
            head, rule = head + " after |", rule + "---|"
        lines = [head, rule]
        for n, prompt in enumerate(self.prompts):
            told = [_told(side[n]) for side in (self.before, self.after) if side is not None]
            lines.append(f"| {' | '.join(_cell(text) for text in (prompt, *told))} |")
        return "\n".join(lines) + "\n"

    def __repr__(self) -> str:
        return f"BeforeAfter({len(self.prompts)} prompts{'' if self.after is None else ', with an edit'})"

    def _repr_html_(self) -> str:
        """The table, in a notebook."""
        sides = {"before": self.before} | ({} if self.after is None else {"after": self.after})
        rows = [[prompt, *(_told(each[n]) for each in sides.values())] for n, prompt in enumerate(self.prompts)]
        return html_table("what goes on from each prompt", ["prompt", *sides], rows)

    def _repr_png_(self) -> bytes:
        """The bars, where a notebook takes no HTML."""
        return png_of(self.plot())


def _told(said: Said) -> str:
    targets = "".join(f"; p({target.strip()}) {p:.3f}" for target, p in said.targets.items())
    return f"{said.text}{targets}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


@typed
def before_after(
    model: EditableModel,
    edit: Edit | None = None,
    prompts: Sequence[str] | None = None,
    *,
    targets: Sequence[str] = (),
    tokens: Count = 20,
    likeliest: Count = 10,
) -> BeforeAfter:
    """What `model` says behind prompts, and what it says with `edit`; the model is left as it was.

    prompts: None: those that the edit is of, the first 100 at most. targets: texts whose probability is wanted too; of
    an edit's own prompts the new one and the true one are. tokens: of the text that goes on. likeliest: next tokens
    that are told.
    """
    asked = {} if edit is None else {_filled(r): _targets(r) for r in edit.requests if "prompt" in r and "subject" in r}
    prompts = list(asked)[:MOST] if prompts is None else list(prompts)
    if not prompts:
        raise ValueError("no prompts: give some, or an edit that says what it is of")
    wanted = [list(dict.fromkeys([*asked.get(p, ()), *(spaced(t, p) for t in targets)])) for p in prompts]
    before = _said(model, prompts, wanted, tokens, likeliest)
    after = None
    if edit is not None:
        with edit.applied(model):
            after = _said(model, prompts, wanted, tokens, likeliest)
    return BeforeAfter(prompts, before, after, "" if edit is None else edit.summary())


def _filled(request: dict[str, Any]) -> str:
    return request["prompt"].replace("{}", request["subject"])


def _targets(request: dict[str, Any]) -> list[str]:
    texts = [request[name] for name in ("target_new", "target_true") if isinstance(request.get(name), str)]
    return [spaced(text, _filled(request), request.get("space")) for text in texts]


@at_rest
def _said(
    model: EditableModel, prompts: Sequence[str], targets: Sequence[Sequence[str]], tokens: int, likeliest: int
) -> list[Said]:
    texts = written(model, prompts, tokens)
    questions = [Question(prompt, tuple(wanted)) for prompt, wanted in zip(prompts, targets, strict=True) if wanted]
    scores = iter(score(model, questions)[0] or ()) if questions else iter(())
    chances = [{t: s.probability for t, s in zip(w, next(scores), strict=True)} if w else {} for w in targets]
    told = zip(_next_tokens(model, prompts, likeliest), texts, chances, strict=True)
    return [Said(*each) for each in told]


def _next_tokens(model: EditableModel, prompts: Sequence[str], count: int) -> list[list[tuple[str, float]]]:
    ids = [encode(model, prompt)[0] for prompt in prompts]
    found = []
    for part in parts_of([len(each) for each in ids], default_max_rows(model)):
        packed = PackedPrompts(model, clean_runs(model, [tuple(each) for each in ids[part]]))
        states = packed.run(packed.start, 0, model.num_layers)
        last = [packed.row(n, len(each) - 1) for n, each in enumerate(ids[part])]
        states = final_states(model, states[torch.tensor(last, device=states.device)])
        chances, tokens = distribution(model, states).exp().topk(count, dim=-1)
        for p, t in zip(chances.tolist(), tokens.tolist(), strict=True):
            found.append([(model.tokenizer.decode([token]), chance) for token, chance in zip(t, p, strict=True)])
    return found
