"""What restoring a cell would do, estimated to first order: one forward and one backward pass a noise sample.

Attribution patching (Nanda 2023; Syed et al. 2023): (clean - corrupted output) times the score's gradient in the
corrupted run, for all cells of all kinds at once. A probability is estimated in its log-odds, which a softmax bends
less, and so stays one. The strongest cells can be computed exactly (`refine`), which also tells how well estimates
agree. This runs the model's own forward pass and has no part in the sweep.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..model.errors import NotFiniteError
from ..model.forward import own_forward
from ..model.gradients import check_gradients
from ..model.hooks import Hooks, learning
from ..model.load import EditableModel
from .answer import answer_score
from .kinds import KINDS, window_layers

if TYPE_CHECKING:
    from .causal import FactPlan

Outputs = dict[tuple[str, int], torch.Tensor]  # (site, layer) -> [copies, positions, hidden]


class Estimates:
    """Of one fact: clean and corrupted scores [copies], and the score's first-order change at every output."""

    def __init__(self, plan: FactPlan, kinds: Sequence[str]) -> None:
        model, answer = plan.model, plan.answer
        self.plan, self.score = plan, plan.settings.score
        sites = {KINDS[kind].site for kind in kinds}
        check_gradients(model, 0, model.num_layers)
        clean, self.high = _run(model, [list(answer.clean.ids)], None, answer.targets, sites, self.score)
        ids, corrupt = plan.corruption()
        with learning(model):
            corrupted, self.low = _run(model, ids, corrupt, answer.targets, sites, self.score)
            names = list(corrupted)
            gradients = torch.autograd.grad(_linear(self.low, self.score).sum(), list(corrupted.values()))
        self.low = self.low.detach()
        if not all(bool(x.isfinite().all()) for x in (self.low, self.high, *gradients)):
            raise NotFiniteError(f"'{model.name}' gives scores or gradients that are no finite numbers")
        #: (site, layer) -> [copies, tokens]
        self.changes = {
            name: ((clean[name] - corrupted[name]).double() * gradient.double()).sum(-1)[:, : plan.length].cpu()
            for name, gradient in zip(names, gradients, strict=True)
        }

    def of(self, kind: str) -> np.ndarray:
        """Estimated scores [copies, tokens, layers]; NaN for tokens that were not asked for."""
        plan, row, layers = self.plan, KINDS[kind], self.plan.model.num_layers
        estimates = np.full((len(self.low), plan.length, layers), np.nan)
        for layer in range(layers):
            restored = window_layers(layer, plan.settings.window, layers) if row.windowed else (layer,)
            change = sum(self.changes[row.site, one] for one in restored)
            linear = _linear(self.low, self.score).double().cpu()[:, None] + change
            estimates[:, plan.cells, layer] = _score(linear, self.score)[:, plan.cells].numpy()
        return estimates


def strongest(effects: np.ndarray, count: int) -> list[tuple[int, int]]:
    """The `count` cells (token, layer) with the largest effects [tokens, layers], in size; NaN are none."""
    sizes = np.where(np.isnan(effects), -1.0, np.abs(effects)).ravel()
    order = np.argsort(-sizes, kind="stable")[: min(count, int((sizes >= 0).sum()))]
    return [divmod(int(place), effects.shape[1]) for place in order]


def agreement(estimated: np.ndarray, exact: np.ndarray) -> float:
    """Pearson's correlation of cells; NaN for fewer than three, or where one side is constant."""
    if len(estimated) < 3 or np.ptp(estimated) == 0 or np.ptp(exact) == 0:
        return float("nan")
    return float(np.corrcoef(estimated, exact)[0, 1])


def _linear(score: torch.Tensor, units: str) -> torch.Tensor:
    """What is taken to be linear: log-odds of a probability, any other score as it is."""
    return torch.logit(score.double(), eps=1e-12) if units == "probability" else score


def _score(linear: torch.Tensor, units: str) -> torch.Tensor:
    return linear.sigmoid() if units == "probability" else linear


def _run(
    model: EditableModel,
    ids: list[list[int]],
    corrupt: Callable[[torch.Tensor], torch.Tensor] | None,
    targets: torch.Tensor,
    sites: Iterable[str],
    score: str,
) -> tuple[Outputs, torch.Tensor]:
    """The outputs at `sites` of all layers, and the score [copies], of the model's own pass over prompts.

    corrupt: of the embedding's output. targets: [positions, answers] read at the last positions.
    """
    outputs: Outputs = {}

    def keep(name: tuple[str, int]) -> Callable[[torch.Tensor], None]:
        return lambda x: outputs.__setitem__(name, x)

    def embedded(x: torch.Tensor) -> torch.Tensor:
        x = x if corrupt is None else corrupt(x)
        return x.detach().requires_grad_() if torch.is_grad_enabled() else x

    count = len(targets)
    last = {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.hf.forward).parameters else {}
    with Hooks() as hooks:
        hooks.behind(model.modules.embedding, embedded)
        for site in sorted(sites):
            for layer in range(model.num_layers):
                hooks.behind(model.modules.site(site, layer), keep((site, layer)))
        logits = own_forward(model, torch.tensor(ids), use_cache=False, **last).logits[:, -count:]
    logp = logits.float().log_softmax(-1)
    wanted = targets.to(logp.device).expand(len(ids), *targets.shape)
    return outputs, answer_score(logp.gather(-1, wanted), score)
