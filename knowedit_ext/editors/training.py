"""The training of MEND and EFK, iteration by iteration (mend, trainer.py).

Below the lowest edited layer nothing ever changes: states that enter it are computed once for each text and kept.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..checks import Compat, Count, NotNegative, Positive, Seed, read_fields, typed
from ..model.errors import NotFiniteError
from ..model.gradients import check_gradients
from ..model.head import distribution, final_states, log_probabilities
from ..model.hooks import learning, resting
from ..model.load import EditableModel
from ..sweep.capture import CleanRun, clean_runs
from ..sweep.module_rows import module_rows
from ..sweep.packed import PackedPrompts
from .edited import edited
from .editor import LearnedEditor
from .mend import MEND
from .texts import Text, nll_shares, scored_rows, texts_of

logger = logging.getLogger(__name__)

KEPT_BYTES = 1 << 30  # of states that enter the lowest edited layer


@dataclass(frozen=True)
class EditorTrainingParams:
    """lr, lr_lr: of Adam, for the network and for MEND's rates `edit_lrs`, which begin at `edit_lr`. cedit, cloc:
    weights of the two losses. accumulate_bs: iterations a step. grad_clip: the norm that gradients are clipped to.

    iterations: at most; val_interval: iterations from one validation to the next, on `val_edits` records that are not
    trained on; early_stop_patience: iterations without a better one, after which training ends. loc_texts: locality
    texts an iteration; loc_tokens: their length at most. seed: of the order of records and texts.
    """

    lr: Positive = 1e-4
    lr_lr: Positive = 1e-4
    edit_lr: float = 1e-4
    cedit: NotNegative = 0.1
    cloc: NotNegative = 1.0
    accumulate_bs: Count = 10
    grad_clip: Positive = 100.0
    iterations: Count = 100_000
    val_interval: Count = 500
    val_edits: Count = 100
    early_stop_patience: Count = 20_000
    loc_texts: Count = 1
    loc_tokens: Count = 200
    seed: Seed = 0

    def __post_init__(self) -> None:
        read_fields(self, spelled=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EditorTrainingParams:
        """ValueError that names keys which there are not."""
        known = [field.name for field in fields(cls)]
        if unknown := [str(key) for key in values if key not in known]:
            raise ValueError(f"EditorTrainingParams: unknown keys {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**values)


class Frozen:
    """States of texts that enter layer `first`, kept by token ids as long as they fit in `KEPT_BYTES`."""

    def __init__(self, model: EditableModel, first: int) -> None:
        self.model, self.first = model, first
        self._kept: dict[tuple[int, ...], tuple[CleanRun, torch.Tensor]] = {}
        self._bytes = 0

    def packed(self, texts: Sequence[tuple[int, ...]]) -> tuple[PackedPrompts, torch.Tensor]:
        """The texts as packed rows, and the rows that enter the layer."""
        states = {ids: self._kept[ids] for ids in texts if ids in self._kept}
        if new := [ids for ids in dict.fromkeys(texts) if ids not in states]:
            runs = clean_runs(self.model, new)
            packed = PackedPrompts(self.model, runs)
            with torch.no_grad():
                hidden = packed.run(packed.start, 0, self.first)
            for ids, run, rows in zip(new, runs, hidden.split([len(ids) for ids in new]), strict=True):
                states[ids] = run, rows.clone()
                self._keep(ids, states[ids])
        packed = PackedPrompts(self.model, [states[ids][0] for ids in texts])
        return packed, torch.cat([states[ids][1] for ids in texts])

    def _keep(self, ids: tuple[int, ...], entry: tuple[CleanRun, torch.Tensor]) -> None:
        size = 2 * entry[1].numel() * entry[1].element_size()
        while self._kept and self._bytes + size > KEPT_BYTES:
            _, (_, old) = self._kept.popitem()
            self._bytes -= 2 * old.numel() * old.element_size()
        self._kept[ids] = entry
        self._bytes += size


class EditorTraining:
    """A training in progress. compat="reference": `lr_lr` is dead, edit_lrs move at `lr` like all else."""

    made_by = "EditorTraining(model, editor, EditorTrainingParams(...))"

    @typed
    def __init__(
        self, model: EditableModel, editor: LearnedEditor, params: EditorTrainingParams, compat: Compat = None
    ) -> None:
        editor.check_model(model)
        self.model, self.editor, self.params = model, editor, params
        self.first = editor.layers[0]
        check_gradients(model, self.first, model.num_layers)
        self.frozen = Frozen(model, self.first)
        self.iteration = 0
        named = dict(editor.network.named_parameters())
        rates = [named["edit_lrs"]] if isinstance(editor, MEND) and compat is None else []
        others = [p for p in named.values() if not any(p is rate for rate in rates)]
        groups = [{"params": others, "lr": params.lr}]
        self.optimizer = torch.optim.Adam([*groups, *([{"params": rates, "lr": params.lr_lr}] if rates else [])])
        self.optimizer.zero_grad()

    def step(
        self,
        edit: Mapping[str, Any] | Sequence[Text],
        outer: Mapping[str, Any] | Sequence[Text],
        loc: Mapping[str, Any] | Sequence[Text],
    ) -> dict[str, Any]:
        """One iteration: the edit of the texts `edit`, asked for `outer`, should leave `loc` alone.

        Texts, or padded batches of input_ids, attention_mask and labels (-100: not scored). Returns "loss/edit",
        "loss/loc", "norms" (of each parameter's accumulated gradient), "stepped" (every `accumulate_bs` iterations,
        never at the first), and then "grad", the norm before clipping.

        Raises NotFiniteError where a loss or gradient is no finite number; nothing is stepped then.
        """
        self.editor.network.train()
        try:
            losses = self._losses(*(texts_of(b) if isinstance(b, Mapping) else list(b) for b in (edit, outer, loc)))
            total = self.params.cedit * losses["edit"] + self.params.cloc * losses["loc"]
            if not torch.isfinite(total):
                raise NotFiniteError(f"the loss of iteration {self.iteration} is {float(total)}: try a lower lr")
            (total / self.params.accumulate_bs).backward()
        finally:
            self.editor.network.eval()
        named = dict(self.editor.network.named_parameters())
        norms = {name: 0.0 if p.grad is None else float(p.grad.norm()) for name, p in named.items()}
        report: dict[str, Any] = {f"loss/{name}": float(loss) for name, loss in losses.items()}
        report |= {"norms": norms, "stepped": self.iteration > 0 and self.iteration % self.params.accumulate_bs == 0}
        if report["stepped"]:
            report["grad"] = self._step()
        self.iteration += 1
        return report

    def _step(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.editor.network.parameters(), self.params.grad_clip)
        if not torch.isfinite(norm):
            raise NotFiniteError(f"the gradient of iteration {self.iteration} is {float(norm)}: try a lower lr")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    @torch.no_grad()
    def validate(self, edit: Sequence[Text], outer: Sequence[Text], loc: Sequence[Text]) -> dict[str, torch.Tensor]:
        """The two losses of an edit by the editor as it stands: its statistics stay as they are."""
        self.editor.network.eval()
        return self._losses(edit, outer, loc)

    def _losses(self, edit: Sequence[Text], outer: Sequence[Text], loc: Sequence[Text]) -> dict[str, torch.Tensor]:
        """Mean -log p of the scored tokens of `outer`; mean over the tokens of `loc` of KL(before | after)."""
        model, layers, asked = self.model, self.model.num_layers, torch.is_grad_enabled()
        with resting(model), learning(model):
            packed, hidden = self.frozen.packed([text.run for text in edit])
            rows, tokens = scored_rows(packed, edit)
            shares = torch.tensor(nll_shares(edit, together=True))
            modules = {weight.name: weight.module_in(model) for weight in self.editor.weights}

            def loss(states: torch.Tensor) -> torch.Tensor:
                logp = log_probabilities(model, final_states(model, states[rows.to(states.device)]), tokens)
                return -(logp * shares.to(logp.device)).sum()

            _, gathered = module_rows(packed, hidden, self.first, modules, loss)
            with torch.set_grad_enabled(asked):
                given = {name: (x.float(), delta.float()) for name, (x, delta) in gathered.items()}
                factors = self.editor.factors(given, edit[0].ids)
                packed, hidden = self.frozen.packed([*(text.run for text in outer), *(text.ids for text in loc)])
                begun = packed.row(len(outer), 0)
                with torch.no_grad():
                    before = distribution(model, final_states(model, packed.run(hidden, self.first, layers)[begun:]))
                with edited(modules, factors):
                    states = final_states(model, packed.run(hidden, self.first, layers))
                rows, tokens = scored_rows(packed, outer)
                shares = torch.tensor(nll_shares(outer, together=True))
                logp = log_probabilities(model, states[rows.to(states.device)], tokens)
                after = distribution(model, states[begun:])
                kl = (before.exp() * (before - after)).sum(-1).mean()
                return {"edit": -(logp * shares.to(logp.device)).sum(), "loc": kl}
