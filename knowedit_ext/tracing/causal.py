"""Causal tracing (Meng et al. 2022, section 2; rome, experiments/causal_trace.py) on the segment sweep.

Every (token, layer) cell of every noise sample is one run of the sweep: exactly the published loop's numbers, at the
cost of the rows that differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property

import numpy as np
import torch

from ..checks import quoted, typed
from ..model.facts import Fact, TokenizedFact, tokenize_fact
from ..model.hooks import at_rest
from ..model.load import EditableModel
from ..sweep import Interventions, layer_zero_input
from .answer import answer_of, scores_of
from .attribution import Estimates, strongest
from .cells import Cells, Shape, add_cells, all_cells
from .corruption import Noise, Sampler, noise_of
from .kinds import KNOCKOUT, kind_of, window_for
from .knockout import Groups, KnockoutTrace, trace_knockouts
from .settings import TraceSettings
from .trace import Trace


@at_rest
@typed
def trace(
    model: EditableModel,
    fact: Fact | Sequence[Fact],
    kind: str = "state",
    window: int | None = None,
    samples: int = 10,
    noise: float | str | Sampler = "s3",
    seed: int = 1,
    sever: str | None = None,
    compat: str | None = None,
    *,
    replace: bool = False,
    corrupt_with: str | None = None,
    answer_tokens: int = 1,
    score: str = "probability",
    against: str | None = None,
    tokens: str | Sequence[int] | None = None,
    texts: Sequence[str] | None = None,
    groups: Groups | None = None,
    max_rows: int | None = None,
    method: str = "exact",
    refine: int = 0,
) -> Trace | list[Trace] | KnockoutTrace | list[KnockoutTrace]:
    """Where does the model keep this fact? Corrupt the subject, restore one cell, see whether the answer comes back.

    fact: one fact, or several, which are computed in one sweep and come back as a list.
    kind: "state" restores the residual stream behind a layer, "mlp" / "attn" the outputs of `window` layers' modules,
        layers l - window // 2 up to but without l + ceil(window / 2). None: 10, or half of the layers of a model with
        fewer than 20 (see `kinds.window_for`); one as long as the model is refused.
        "knockout" corrupts nothing: attention edges from the last token are cut in such windows (`KnockoutTrace`).
    samples, noise, seed: noise draws; a level, a sampler, or a rule such as "s3" over the subjects of the facts given
        (see `noise_level`; "m" and "t" need `texts`). The default seed reproduces the published noise exactly.
    sever: hold the restored token's "mlp" or "attn" outputs at their corrupted values in all layers.
    compat: "reference" repeats the published code where it differs: severed outputs from a noise draw of their own,
        `low_score` without `replace`.
    replace: the noise takes the place of the embeddings instead of being added.
    corrupt_with: another subject of as many tokens, instead of noise (then there is one sample).
    answer_tokens: length of the model's own (greedy) answer where the fact has no target (a target is taken whole);
        probabilities multiply.
    score: "probability", "logprob", or "logit_difference" of the answer's and `against`'s first token.
    tokens: restrict the cells: "subject_last" or token numbers; other rows of `scores` are NaN.
    groups: of a knockout: names of groups of positions that the last token (and the answer's own tokens) is not to see,
        {"subject": [0, 1, 2], ...}; None: the subject, the last token itself, and the rest.
    max_rows: rows held at once; None: from free memory. Results agree to rounding.
    method: "attribution" estimates all cells to first order from one forward and one backward pass a noise sample
        (see docs/attribution.md for how well); `refine` of them, the strongest, are then computed exactly, and
        `Trace.agreement` tells how well their estimates were.

    Returns a `Trace` (or a list of them). Warns where corruption does not lower the answer's probability.
    """
    facts = [fact] if isinstance(fact, Fact) else fact
    corruption = (window, samples, seed, sever, compat, replace, corrupt_with)
    settings = TraceSettings(*corruption, answer_tokens, score, against, tokens, max_rows, method, refine)
    if kind == KNOCKOUT:
        _refuse_corruption(settings, noise, texts)
        knockouts = trace_knockouts(model, facts, groups, settings)
        return knockouts[0] if isinstance(fact, Fact) else knockouts
    kind_of(kind)
    if groups is not None:
        raise ValueError(f"groups are positions whose edges a knockout cuts: kind={KNOCKOUT!r}, not {kind!r}")
    if texts is not None:
        noise = noise_of(model, noise, [f.subject for f in facts if isinstance(f, Fact)], replace, texts)
    fact_traces = trace_facts(model, facts, (kind,), noise, settings)
    traces = [by_kind[kind] for by_kind in fact_traces]
    for f, t in zip(facts, traces, strict=True):
        if not t.high_score > t.low_score:
            warnings.warn(
                f"corrupting '{f.subject}' does not lower the score of '{t.answer}' in '{f.text}' "
                f"({t.high_score:.4g} clean, {t.low_score:.4g} corrupted): nothing to trace",
                stacklevel=4,
            )
    return traces[0] if isinstance(fact, Fact) else traces


def _refuse_corruption(settings: TraceSettings, noise: object, texts: object) -> None:
    """ValueError for arguments that say how to corrupt or restore: a knockout does neither."""
    usual = TraceSettings()
    given = [
        n
        for n in ("samples", "seed", "sever", "compat", "replace", "corrupt_with", "tokens", "method", "refine")
        if getattr(settings, n) != getattr(usual, n)
    ]
    given += [name for name, differs in (("noise", noise != "s3"), ("texts", texts is not None)) if differs]
    if given:
        raise ValueError(f"a knockout corrupts and restores nothing: {', '.join(given)} would do nothing, leave it out")


@at_rest
def trace_facts(
    model: EditableModel,
    facts: Sequence[Fact],
    kinds: Sequence[str],
    noise: float | str | Sampler | Noise,
    settings: TraceSettings,
) -> list[dict[str, Trace]]:
    """Trace facts for several kinds in one sweep; one dict by kind for each fact."""
    return trace_plans(model, plan_facts(model, facts, kinds, noise, settings), kinds)


@at_rest
def trace_plans(model: EditableModel, plans: Sequence[FactPlan], kinds: Sequence[str]) -> list[dict[str, Trace]]:
    """The rest of `trace_facts`, for some of the kinds that were planned for."""
    settings = plans[0].settings
    if settings.method == "attribution":
        return [_estimated(plan, kinds) for plan in plans]
    interventions, cells = all_cells(tuple(plan.shape for plan in plans), tuple(kinds))
    scores = scores_of(model, plans, interventions, settings)
    return [{kind: plan.trace(kind, here, scores) for kind in kinds} for plan, here in zip(plans, cells, strict=True)]


def _estimated(plan: FactPlan, kinds: Sequence[str]) -> dict[str, Trace]:
    """Estimates of every kind; the strongest cells of each exactly, of all kinds in one sweep."""
    estimates = Estimates(plan, kinds)
    samples = {kind: estimates.of(kind) for kind in kinds}
    low = estimates.low.double().cpu().numpy()
    strong = {kind: strongest(each.mean(0) - low.mean(), plan.settings.refine) for kind, each in samples.items()}
    refined: dict[str, np.ndarray] = samples
    if any(strong.values()):
        interventions = Interventions()
        cells = add_cells(interventions, 0, plan.shape, kinds, strong)
        scores = scores_of(plan.model, [plan], interventions, plan.settings)
        refined = {kind: plan.samples(kind, cells, scores, samples[kind].copy()) for kind in kinds}
    high = float(estimates.high.double().mean())
    return {kind: plan.result(kind, refined[kind], low, high, samples[kind].mean(0), strong[kind]) for kind in kinds}


@at_rest
def plan_facts(
    model: EditableModel,
    facts: Sequence[Fact],
    kinds: Sequence[str],
    noise: float | str | Sampler | Noise,
    settings: TraceSettings,
) -> list[FactPlan]:
    """What is known of the facts before any cell is: their answers, clean runs and noise, the same for all `kinds`."""
    if not facts:
        raise ValueError("no facts: there is nothing to trace")
    for fact in facts:
        if not isinstance(fact, Fact):
            raise TypeError(f"expected a Fact, not {type(fact).__name__} {fact!r}")
    settings = replace(settings, window=window_for(model.num_layers, settings.window, kinds))
    tokenized = [tokenize_fact(model, fact) for fact in facts]
    if not isinstance(noise, Noise):
        noise = noise_of(model, noise, [fact.subject for fact in facts], settings.replace)
    return [FactPlan(model, fact, noise, settings) for fact in tokenized]


class FactPlan:
    """What is known of one fact before its cells are, and the way back from the cells' scores to its `Trace`."""

    def __init__(self, model: EditableModel, tokenized: TokenizedFact, noise: Noise, settings: TraceSettings) -> None:
        self.model, self.tokenized, self.noise, self.settings = model, tokenized, noise, settings
        self.first, self.after = tokenized.subject_range
        self.answer = answer_of(model, tokenized, settings)
        self.clean, self.length = self.answer.clean, len(tokenized.ids)
        self.cells = self._cells()
        self.copies = 1 if settings.corrupt_with is not None else settings.samples
        published = settings.compat == "reference" and settings.corrupt_with is None
        self.shape = Shape(
            layers=model.num_layers,
            tokens=len(self.clean.ids),
            first=self.first,
            copies=self.copies,
            readout=self.answer.readout,
            cells=tuple(self.cells),
            window=settings.window,
            sever=settings.sever,
            # Published: severed outputs are recorded under the first draw, the runs then made under a second one.
            second=published and settings.sever is not None,
            low=published and settings.replace,  # published: low_score adds the noise all the same
        )

    def _cells(self) -> list[int]:
        tokens = self.settings.tokens
        if tokens is None:
            return list(range(self.length))
        if tokens == "subject_last":
            return [self.after - 1]
        if isinstance(tokens, str) or not tokens or not all(0 <= t < self.length for t in tokens):
            raise ValueError(f"tokens={tokens!r}: expected 'subject_last' or token numbers 0..{self.length - 1}")
        return sorted(set(tokens))

    @cached_property
    def hidden(self) -> list[torch.Tensor]:
        """The rows of the roots that enter layer 0, see `cells.add_cells`: the clean one's, then those from the first
        corrupted token on."""
        s, model = self.settings, self.model
        if s.corrupt_with is not None:
            return [self.clean.hidden, layer_zero_input(model, self._other_subject(), 1)[:, self.first :]]
        generator = np.random.RandomState(s.seed)  # new for every prompt, as published (causal_trace.py:167-171)
        draws = [self._noise(self.noise, generator) for _ in range(1 + self.shape.second)]
        if self.shape.low:
            draws.append(self._noise(replace(self.noise, replace=False), np.random.RandomState(s.seed)))
        corrupted = [layer_zero_input(model, self.clean.ids, self.copies, draw)[:, self.first :] for draw in draws]
        return [self.clean.hidden, *corrupted]

    def corruption(self) -> tuple[list[list[int]], Callable[[torch.Tensor], torch.Tensor] | None]:
        """Token ids of the corrupted copies, and what is done to their embeddings."""
        if self.settings.corrupt_with is not None:
            return [self._other_subject()], None
        return [list(self.clean.ids)] * self.copies, self._noise(self.noise, np.random.RandomState(self.settings.seed))

    def _noise(self, noise: Noise, generator: np.random.RandomState) -> Callable[[torch.Tensor], torch.Tensor]:
        drawn = noise.draw(generator, self.copies, self.after - self.first, self.model.hidden_size)
        return noise.corrupt(drawn, self.first)

    def _other_subject(self) -> list[int]:
        """The prompt's ids with the subject's tokens exchanged for those of `corrupt_with`."""
        fact, other = self.tokenized.fact, self.settings.corrupt_with
        swapped = tokenize_fact(self.model, Fact(fact.prompt, other, occurrence=fact.occurrence, prefix=fact.prefix))
        first, after = swapped.subject_range
        if (first, after) != (self.first, self.after) or len(swapped.ids) != self.length:
            raise ValueError(
                f"corrupt_with {quoted(other)} has {after - first} tokens in {quoted(fact.prompt)}, subject "
                f"{quoted(fact.subject)} has {self.after - self.first}: they must be equally many"
            )
        return list(swapped.ids) + list(self.clean.ids[self.length :])

    # -- results ---------------------------------------------------------------------------------------------------

    def trace(self, kind: str, cells: Cells, scores: Sequence[np.ndarray]) -> Trace:
        unknown = np.full((self.copies, self.length, self.model.num_layers), np.nan)
        samples = self.samples(kind, cells, scores, unknown)
        return self.result(kind, samples, scores[cells.low], float(scores[cells.high].mean()))

    def samples(self, kind: str, cells: Cells, scores: Sequence[np.ndarray], into: np.ndarray) -> np.ndarray:
        """`into` [copies, tokens, layers] with the scores of the cells that have runs."""
        for (token, layer), run in cells.by_kind[kind].items():
            into[:, token, layer] = scores[run]
        return into

    def result(
        self,
        kind: str,
        samples: np.ndarray,
        low: np.ndarray,
        high: float,
        estimate: np.ndarray | None = None,
        refined: Sequence[tuple[int, int]] = (),
    ) -> Trace:
        """samples: scores [copies, tokens, layers]; low: [copies]; estimate: [tokens, layers] before cells were
        `refined`."""
        left_out = ("max_rows",) if estimate is not None else ("max_rows", "method", "refine")
        settings = {k: v for k, v in asdict(self.settings).items() if k not in left_out}
        level = self.noise.level
        noise = getattr(level, "__name__", "sampler") if callable(level) else level
        return Trace(
            scores=samples.mean(axis=0).astype(np.float32),
            low_score=float(low.mean()),
            high_score=high,
            answer=self.answer.text,
            answer_ids=self.answer.ids,
            tokens=list(self.tokenized.tokens),
            input_ids=np.array(self.tokenized.ids),
            subject_range=(self.first, self.after),
            kind=kind,
            window=self.settings.window,
            sample_scores=samples.astype(np.float32),
            low_samples=low.astype(np.float32),
            correct_prediction=self.answer.correct,
            settings={**settings, "noise": noise, "model": self.model.name},
            estimate=None if estimate is None else estimate.astype(np.float32),
            refined=tuple(refined),
        )
