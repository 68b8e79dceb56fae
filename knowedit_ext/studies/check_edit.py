"""Is this edit safe? Does it do what it says, does it leave others alone, and does the model still read and weigh what
it did: a traffic light, with the reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..checks import Count, as_type, quoted, typed
from ..datasets import load_counterfact
from ..datasets.questions import Question, Score, TokenizedQuestion
from ..editing.changes import dense
from ..editing.edit import Edit
from ..editing.request import EditRequest
from ..evaluation.edited import Edited
from ..evaluation.generation import continuations
from ..evaluation.nll import score, tokenize_question
from ..model.hooks import at_rest
from ..model.load import EditableModel
from ..model.spelling import spaced
from ..model.weights import find_weight
from .bystanders import SUBJECTS, TEXTS
from .perplexity import text_perplexity

GREEN, YELLOW, RED = LIGHTS = ("green", "yellow", "red")
Limit = tuple[float, float | None]


@dataclass(frozen=True)
class Limits:
    """Where green and where yellow ends, each in its own unit; None: it never turns red.

    efficacy, generalisation: per cent that must be reached; neighbourhood: points that may be lost; perplexity, norm:
    per cent that may be added. A weight that has grown is no damage by itself: it drowns later edits and, in 16 bits,
    its own small entries.
    """

    efficacy: Limit = (95.0, 80.0)
    generalisation: Limit = (85.0, 65.0)
    neighbourhood: Limit = (3.0, 10.0)
    perplexity: Limit = (2.0, 10.0)
    norm: Limit = (5.0, None)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            green, yellow = as_type(f"the limits of {name}", value, Limit)
            least = name in ("efficacy", "generalisation")
            if yellow is None and least or yellow is not None and (green < yellow if least else green > yellow):
                raise ValueError(
                    f"the limits of {name} are {value}: expected green's, which asks for more, and yellow's"
                )
            object.__setattr__(self, name, (green, yellow))


@dataclass(frozen=True)
class Measure:
    """name: as in `Limits`. before, after: the edit; light; reason: a sentence."""

    name: str
    before: float | None
    after: float
    light: str
    reason: str


@dataclass(frozen=True)
class EditCheck:
    """measures: of what could be measured. light: the worst of theirs."""

    measures: tuple[Measure, ...]

    def __repr__(self) -> str:
        return f"EditCheck({self.light}: {', '.join(f'{one.name} {one.light}' for one in self.measures)})"

    @property
    def light(self) -> str:
        return max((measure.light for measure in self.measures), key=LIGHTS.index)

    @property
    def reasons(self) -> list[str]:
        """Why it is not green; of a green one all that was looked at."""
        told = [measure for measure in self.measures if measure.light != GREEN] or self.measures
        return [measure.reason for measure in sorted(told, key=lambda one: -LIGHTS.index(one.light))]

    def table(self) -> str:
        """Markdown: a line a measure, below the light and its reasons."""
        lines = [
            f"**{self.light}**: {'; '.join(self.reasons)}",
            "",
            "| measure | before | after | |",
            "|---|--:|--:|---|",
        ]
        for one in self.measures:
            before = "" if one.before is None else f"{one.before:.4g}"
            lines.append(f"| {one.name} | {before} | {one.after:.4g} | {one.light} |")
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        return {"light": self.light, "reasons": self.reasons, "measures": [asdict(one) for one in self.measures]}


@at_rest
@typed
def check_edit(
    model: EditableModel,
    edit: Edit,
    records: Any = None,
    *,
    texts: Sequence[str] = TEXTS,
    limits: Limits | Mapping[str, Any] | None = None,
    limit: Count | None = 100,
) -> EditCheck:
    """A traffic light for an edit that is not applied, from what the model says before it and under it.

    efficacy: share of the edit's requests (of the first `limit`) whose new target is what the model says, or likelier
    than the true one. neighbourhood: share of prompts about others at which the right answer is likelier than the new
    target. Where `records` (CounterFact, a file or records) have a request, right is their true target, their
    neighbourhood prompts are asked, and generalisation is the efficacy of their paraphrases; elsewhere the request's
    own prompt is asked about `bystanders.SUBJECTS`, and right is the token that the unedited model says.
    perplexity: of `texts`, whose first 128 tokens are read. norm: the largest growth of a changed weight's Frobenius
    norm; quantised weights are left out.

    ValueError for an edit without requests, of a problem's (see `as_problem`), of another model, or that is applied.
    """
    limits = limits if isinstance(limits, Limits) else Limits(**(limits or {}))
    if not edit.requests:
        raise ValueError("the edit does not say what it was asked for (it has no requests): its efficacy is unknown")
    requests = [EditRequest.of(request) for request in edit.requests[:limit]]
    if problem := next((request for request in requests if request.is_problem), None):
        text = quoted(problem.prompt)
        raise ValueError(f"{text} asks for less of a target, or under noise: see `knowedit evaluate --problem`")
    edited = Edited(model, edit)
    known = {} if records is None else {_key(EditRequest.of(one)): one for one in load_counterfact(records)}
    prompts = [prompt for request in requests for prompt in _prompts(request, known.get(_key(request)))]
    before, after = score(model, _questions(model, prompts), edited)
    answers = list(zip(prompts, before, after, strict=True))
    shares = [
        _share(name, [answer for answer in answers if answer[0].measure == name], getattr(limits, name))
        for name in dict.fromkeys(prompt.measure for prompt in prompts)
    ]
    return EditCheck((*shares, _perplexity(model, edit, texts, limits.perplexity), *_norm(model, edit, limits.norm)))


@dataclass(frozen=True)
class _Prompt:
    """text: what is asked; right: the answer that the new one is compared with; None: the unedited model's."""

    measure: str
    text: str
    request: EditRequest
    right: str | None


def _key(request: EditRequest) -> tuple[str, str]:
    return request.fact().text, request.target_new


def _prompts(request: EditRequest, record: Mapping[str, Any] | None) -> list[_Prompt]:
    own = _Prompt("efficacy", request.fact().text, request, request.target_true)
    if record is None:
        others = [request.prompt.replace("{}", subject) for subject in SUBJECTS if subject != request.subject]
        return [own, *(_Prompt("neighbourhood", text, request, None) for text in others)]
    right = record["requested_rewrite"]["target_true"]["str"]
    kinds = {"generalisation": "paraphrase_prompts", "neighbourhood": "neighborhood_prompts"}
    asked = [_Prompt(name, text, request, right) for name, key in kinds.items() for text in record.get(key) or ()]
    return [replace(own, right=right), *asked]


def _questions(model: EditableModel, prompts: Sequence[_Prompt]) -> list[TokenizedQuestion]:
    """Each with two targets: the new one and the right one."""
    questions = []
    for prompt in prompts:
        targets = [target for target in (prompt.request.target_new, prompt.right) if target is not None]
        answers = tuple(spaced(target, prompt.text, prompt.request.space) for target in targets)
        questions.append(tokenize_question(model, Question(prompt.text, answers)))
    unknown = [n for n, prompt in enumerate(prompts) if prompt.right is None]
    said = continuations(model, [questions[n].ids for n in unknown], 1)
    for n, own in zip(unknown, said, strict=True):
        asked = questions[n]
        questions[n] = replace(
            asked, joint=(*asked.joint, asked.ids + tuple(own)), shared=(*asked.shared, len(asked.ids))
        )
    return questions


def _share(name: str, answers: Sequence[tuple[_Prompt, list[Score], list[Score]]], limits: Limit) -> Measure:
    """Of prompts at which the model does what it should."""
    right = _left_alone if name == "neighbourhood" else _done
    counts = [sum(right(prompt, *scores[when]) for prompt, *scores in answers) for when in (0, 1)]
    before, after = (100.0 * count / len(answers) for count in counts)
    if name == "neighbourhood":
        light = _light(before - after, limits)
        reason = f"neighbourhood: the right answer is likelier at {counts[1]} of {len(answers)} prompts about others"
        return Measure(name, before, after, light, f"{reason}, before the edit at {counts[0]}")
    where = "prompts" if name == "efficacy" else "paraphrases"
    light = _light(-after, (-limits[0], -(limits[1] or 0.0)))
    return Measure(name, before, after, light, f"{name}: the new target comes at {counts[1]} of {len(answers)} {where}")


def _done(prompt: _Prompt, new: Score, right: Score) -> bool:
    return new.correct or (prompt.right is not None and new.nll < right.nll)


def _left_alone(prompt: _Prompt, new: Score, right: Score) -> bool:
    """By mean log-probabilities, as published; the model's own answer is one token, so then by whole ones."""
    return right.nll < new.nll if prompt.right is not None else right.probability >= new.probability


def _light(value: float, limits: Limit) -> str:
    green, yellow = limits
    return GREEN if value <= green else YELLOW if yellow is None or value <= yellow else RED


def _percent(growth: float) -> str:
    return f"{growth:+,.0f} %" if abs(growth) >= 10 else f"{growth:+.2g} %"


def _perplexity(model: EditableModel, edit: Edit, texts: Sequence[str], limits: Limit) -> Measure:
    before = text_perplexity(model, texts)
    with edit.applied(model):
        after = text_perplexity(model, texts)
    growth = 100.0 * (after / before - 1)
    light = _light(growth, limits)
    return Measure("perplexity", before, after, light, f"perplexity of plain texts: {_percent(growth)}")


def _norm(model: EditableModel, edit: Edit, limits: Limit) -> list[Measure]:
    norms = {}
    for name, change in edit.changes.items():
        weight = find_weight(model.hf, name).parameter
        if weight is not None:
            weight = weight.detach().double()
            norms[name] = float(weight.norm()), float((weight + dense(change, weight.dtype).to(weight.device)).norm())
    if not norms:
        return []
    growths = {name: 100.0 * (after / before - 1) for name, (before, after) in norms.items()}
    name = max(growths, key=growths.__getitem__)
    reason = f"norm of {name}: {_percent(growths[name])}"
    return [Measure("norm", *norms[name], _light(growths[name], limits), reason)]
