"""Causal tracing (Meng et al. 2022, section 2; rome, experiments/causal_trace.py) on the segment sweep.

Every (token, layer) cell of every noise sample is one run of the sweep: exactly the published loop's numbers, at the
cost of the rows that differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import torch

from ..checks import quoted, typed
from ..model.facts import Fact, TokenizedFact, tokenize_fact
from ..model.hooks import at_rest
from ..model.load import EditableModel
from ..sweep import Interventions, Patch, layer_zero_input
from .answer import answer_of, scores_of
from .attribution import Estimates, strongest
from .corruption import Noise, Sampler, noise_of
from .kinds import KINDS, KNOCKOUT, kind_of, window_for, window_layers
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
    if settings.method == "attribution":
        return [_estimated(plan, kinds) for plan in _plans(model, facts, kinds, noise, settings)]
    plans, interventions = plan_traces(model, facts, kinds, noise, settings)
    scores = scores_of(model, plans, interventions, settings)
    return [{kind: plan.trace(kind, scores) for kind in kinds} for plan in plans]


@at_rest
def plan_traces(
    model: EditableModel,
    facts: Sequence[Fact],
    kinds: Sequence[str],
    noise: float | str | Sampler | Noise,
    settings: TraceSettings,
) -> tuple[list[FactPlan], Interventions]:
    """What `trace_facts` sweeps: the plans of the facts, and the roots and runs of all of them."""
    plans = _plans(model, facts, kinds, noise, settings)
    interventions = Interventions()
    for number, plan in enumerate(plans):
        plan.add_roots(interventions, number)
        plan.add_runs(interventions, kinds)
    return plans, interventions


def _estimated(plan: FactPlan, kinds: Sequence[str]) -> dict[str, Trace]:
    """Estimates of every kind; the strongest cells of each exactly, of all kinds in one sweep."""
    estimates = Estimates(plan, kinds)
    samples = {kind: estimates.of(kind) for kind in kinds}
    low = estimates.low.double().cpu().numpy()
    strong = {kind: strongest(each.mean(0) - low.mean(), plan.settings.refine) for kind, each in samples.items()}
    scores: dict[int, np.ndarray] = {}
    if any(strong.values()):
        interventions = Interventions()
        plan.add_roots(interventions, 0)
        plan.add_runs(interventions, kinds, strong)
        scores = scores_of(plan.model, [plan], interventions, plan.settings)
    high = float(estimates.high.double().mean())
    traces = {}
    for kind in kinds:
        estimate = samples[kind].mean(0)
        for (token, layer), run in plan.runs.get(kind, {}).items():
            samples[kind][:, token, layer] = scores[run]
        traces[kind] = plan.result(kind, samples[kind], low, high, estimate, strong[kind])
    return traces


def _plans(
    model: EditableModel,
    facts: Sequence[Fact],
    kinds: Sequence[str],
    noise: float | str | Sampler | Noise,
    settings: TraceSettings,
) -> list[FactPlan]:
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
    """The roots and runs of one fact, and the way back from their scores to its `Trace`."""

    def __init__(self, model: EditableModel, tokenized: TokenizedFact, noise: Noise, settings: TraceSettings) -> None:
        self.model, self.tokenized, self.noise, self.settings = model, tokenized, noise, settings
        self.first, self.after = tokenized.subject_range
        self.answer = answer_of(model, tokenized, settings)
        self.clean, self.readout = self.answer.clean, self.answer.readout
        self.length = len(tokenized.ids)
        self.cells = self._cells()
        self.copies = 1 if settings.corrupt_with is not None else settings.samples
        self.runs: dict[str, dict[tuple[int, int], int]] = {}

    def _cells(self) -> list[int]:
        tokens = self.settings.tokens
        if tokens is None:
            return list(range(self.length))
        if tokens == "subject_last":
            return [self.after - 1]
        if isinstance(tokens, str) or not tokens or not all(0 <= t < self.length for t in tokens):
            raise ValueError(f"tokens={tokens!r}: expected 'subject_last' or token numbers 0..{self.length - 1}")
        return sorted(set(tokens))

    # -- roots and runs --------------------------------------------------------------------------------------------

    def add_roots(self, interventions: Interventions, prompt: int) -> None:
        s, model, noise = self.settings, self.model, self.noise
        self.clean_root = interventions.add_root(self.clean.hidden, prompt=prompt)
        if s.corrupt_with is not None:
            other = layer_zero_input(model, self._other_subject(), 1)
            self.corrupted_root = self.frozen_root = self.low_root = self._branch(interventions, prompt, other)
            return
        generator = np.random.RandomState(s.seed)  # new for every prompt, as published (causal_trace.py:167-171)
        first = self._noised(interventions, prompt, noise, generator)
        self.corrupted_root = self.frozen_root = self.low_root = first
        if s.compat == "reference" and s.sever is not None:
            # Published: severed outputs are recorded under the first draw, the runs then made under a second one.
            self.corrupted_root = self._noised(interventions, prompt, noise, generator)
        if s.compat == "reference" and s.replace:  # published: low_score adds the noise all the same
            added, generator = replace(noise, replace=False), np.random.RandomState(s.seed)
            self.low_root = self._noised(interventions, prompt, added, generator)

    def corruption(self) -> tuple[list[list[int]], Callable[[torch.Tensor], torch.Tensor] | None]:
        """Token ids of the corrupted copies, and what is done to their embeddings."""
        if self.settings.corrupt_with is not None:
            return [self._other_subject()], None
        return [list(self.clean.ids)] * self.copies, self._noise(self.noise, np.random.RandomState(self.settings.seed))

    def _noise(self, noise: Noise, generator: np.random.RandomState) -> Callable[[torch.Tensor], torch.Tensor]:
        drawn = noise.draw(generator, self.copies, self.after - self.first, self.model.hidden_size)
        return noise.corrupt(drawn, self.first)

    def _noised(self, interventions: Interventions, prompt: int, noise: Noise, generator: np.random.RandomState) -> int:
        hidden = layer_zero_input(self.model, self.clean.ids, self.copies, self._noise(noise, generator))
        return self._branch(interventions, prompt, hidden)

    def _branch(self, interventions: Interventions, prompt: int, hidden: torch.Tensor) -> int:
        if self.first == 0:
            return interventions.add_root(hidden, prompt=prompt)
        return interventions.add_root(hidden[:, self.first :], prompt=prompt, start=self.first, parent=self.clean_root)

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

    def add_runs(
        self,
        interventions: Interventions,
        kinds: Sequence[str],
        only: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    ) -> None:
        """only: of each kind the cells (token, layer); None: all."""
        every = [(token, layer) for token in self.cells for layer in range(self.model.num_layers)]
        add = lambda root, patches=(): interventions.add_run(root, patches, self.readout)  # noqa: E731
        self.high_run, self.low_run = add(self.clean_root), add(self.low_root)
        self.base_run = self.low_run if self.low_root == self.corrupted_root else add(self.corrupted_root)
        for kind in kinds:
            self.runs[kind] = {}
            for token, layer in every if only is None else only[kind]:
                if token < self.first:  # left of the noise all runs are equal
                    self.runs[kind][token, layer] = self.base_run
                else:
                    self.runs[kind][token, layer] = add(self.corrupted_root, self._patches(kind, token, layer))

    def _patches(self, kind: str, token: int, layer: int) -> list[Patch]:
        layers, sever = self.model.num_layers, self.settings.sever
        row = KINDS[kind]
        restored = window_layers(layer, self.settings.window, layers) if row.windowed else (layer,)
        patches = [Patch(row.site, restored, (token,), self.clean_root)]
        if sever is not None:
            patches.append(Patch(sever, tuple(range(layers)), (token,), self.frozen_root))
        return patches

    # -- results ---------------------------------------------------------------------------------------------------

    def all_runs(self) -> list[int]:
        cells = [run for by_cell in self.runs.values() for run in by_cell.values()]
        return [self.high_run, self.low_run, self.base_run, *cells]

    def trace(self, kind: str, scores: dict[int, np.ndarray]) -> Trace:
        samples = np.full((self.copies, self.length, self.model.num_layers), np.nan)
        for (token, layer), run in self.runs[kind].items():
            samples[:, token, layer] = scores[run]
        return self.result(kind, samples, scores[self.low_run], float(scores[self.high_run].mean()))

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
