"""The training of MEND and EFK, iteration by iteration (mend, trainer.py).

Below the lowest edited layer nothing ever changes, and what the unedited model says does not either: `Frozen`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from ..checks import Compat, Count, NotNegative, Positive, Seed, read_fields, typed
from ..model.errors import NotFiniteError
from ..model.gradients import check_gradients
from ..model.head import divergence, final_states
from ..model.hooks import learning, resting
from ..model.load import EditableModel
from ..runs.ranks import Ranks
from ..sweep.engine import default_max_rows
from ..sweep.module_rows import Rows
from ..sweep.packed import parts_of
from .edited import edited
from .editor import Factors, LearnedEditor
from .frozen import Frozen
from .mend import MEND
from .texts import Scored, Text, gradient_rows, texts_of
from .weights import EditedWeight


@dataclass(frozen=True)
class EditorTrainingParams:
    """lr, lr_lr: of Adam, for the network and for MEND's rates `edit_lrs`, which begin at `edit_lr`. cedit, cloc:
    weights of the two losses. accumulate_bs: iterations a step. grad_clip: the norm that gradients are clipped to.

    iterations: at most; val_interval: iterations from one validation to the next, on `val_edits` records that are not
    trained on; early_stop_patience: iterations without a better one, after which training ends. loc_texts: locality
    texts an iteration; loc_tokens: their length at most. edit_tokens: scored of a text that is trained on, its last.
    seed: of the order of records and texts.
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
    edit_tokens: Count = 10
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


class Batch(NamedTuple):
    """The edit of the texts `edit`, asked for `outer`, should leave `loc` alone."""

    edit: list[Text]
    outer: list[Text]
    loc: list[Text]

    @classmethod
    def of(cls, given: Sequence[Mapping[str, Any] | Sequence[Text]]) -> Batch:
        batch = cls(*(texts_of(part) if isinstance(part, Mapping) else list(part) for part in given))
        if not all(batch):
            raise ValueError(
                "an iteration takes what to edit, what to ask and what to leave alone: at least one text each"
            )
        return batch

    @property
    def runs(self) -> list[tuple[int, ...]]:
        """What the edited model reads."""
        return [*(text.run for text in self.outer), *(text.ids for text in self.loc)]

    @property
    def rows(self) -> int:
        return sum(map(len, self.runs))


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
        self.frozen, self.ranks = Frozen(model, self.first), Ranks()
        self.most = default_max_rows(model)  # rows at a time
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
        return self.steps([(edit, outer, loc)])[0]

    def steps(self, batches: Sequence[Sequence[Mapping[str, Any] | Sequence[Text]]]) -> list[dict[str, Any]]:
        """Iterations as `step` makes them one by one, but for "norms", which the last of those together has.

        Iterations between two steps of the optimiser share the editor: they are computed together, and by all ranks of
        a torchrun, which end with the same editor.
        """
        reports: list[dict[str, Any]] = []
        todo = [Batch.of(batch) for batch in batches]
        while todo:
            count = self.until_step
            reports += self._together(todo[:count])
            todo = todo[count:]
        return reports

    @property
    def until_step(self) -> int:
        """Iterations from here to the next step of the optimiser, with the one that makes it."""
        every = self.params.accumulate_bs
        return max(1, -(-self.iteration // every)) * every - self.iteration + 1

    def _together(self, batches: Sequence[Batch]) -> list[dict[str, Any]]:
        last = self.iteration + len(batches) - 1
        losses = self._accumulated(batches)
        reports: list[dict[str, Any]] = [
            {"loss/edit": edit, "loss/loc": loc, "stepped": False} for edit, loc in losses.tolist()
        ]
        named = self.editor.network.named_parameters()
        reports[-1]["norms"] = {name: 0.0 if p.grad is None else float(p.grad.norm()) for name, p in named}
        if last > 0 and last % self.params.accumulate_bs == 0:
            reports[-1] |= {"stepped": True, "grad": self._step()}
        self.iteration += len(batches)
        return reports

    def _accumulated(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Losses [batches, 2]; gradients of all ranks' batches are added to the parameters'."""
        parameters = list(self.editor.network.parameters())
        before = [p.grad for p in parameters]
        self.editor.network.train()
        try:
            own, factors = self._factors(batches)
            leaves = [{n: tuple(x.detach().requires_grad_() for x in sides) for n, sides in f.items()} for f in factors]
            losses = self._losses(own, leaves, self._backward)
            losses = self._of_all(losses, len(batches))
            for number, total in enumerate((losses @ self._weights(losses)).tolist()):
                if not math.isfinite(total):
                    raise NotFiniteError(f"the loss of iteration {self.iteration + number} is {total}: try a lower lr")
            self.optimizer.zero_grad()
            pairs = [
                (x, leaf.grad)
                for made, each in zip(factors, leaves, strict=True)
                for name in made
                for x, leaf in zip(made[name], each[name], strict=True)
                if x.requires_grad and leaf.grad is not None
            ]
            if pairs:
                torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
        finally:
            self.editor.network.eval()
        for p, earlier in zip(parameters, before, strict=True):
            if self.ranks.size > 1:
                p.grad = self.ranks.total(torch.zeros_like(p) if p.grad is None else p.grad).to(p.device)
            if earlier is not None:
                p.grad = earlier if p.grad is None else earlier.add_(p.grad)
        return losses

    def _weights(self, losses: torch.Tensor) -> torch.Tensor:
        return losses.new_tensor([self.params.cedit, self.params.cloc])

    def _backward(self, losses: torch.Tensor) -> None:
        (losses @ self._weights(losses) / self.params.accumulate_bs).sum().backward()

    def _step(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.editor.network.parameters(), self.params.grad_clip)
        if not torch.isfinite(norm):
            raise NotFiniteError(f"the gradient of iteration {self.iteration} is {float(norm)}: try a lower lr")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    @torch.no_grad()
    def validate(self, batches: Sequence[Sequence[Mapping[str, Any] | Sequence[Text]]]) -> torch.Tensor:
        """(edit, locality) losses [batches, 2] by the editor as it stands: its statistics stay as they are."""
        self.editor.network.eval()
        given = [Batch.of(batch) for batch in batches]
        return self._of_all(self._losses(*self._factors(given)), len(given))

    # -- of batches that share the editor; each rank has every size-th ------------------------------------------------

    def _of_all(self, losses: torch.Tensor, count: int) -> torch.Tensor:
        """[own batches, 2] -> [batches, 2], in float64."""
        every = torch.zeros(count, 2, dtype=torch.float64)
        every[self.ranks.rank :: self.ranks.size] = losses.double().cpu()
        return self.ranks.total(every)

    def _factors(self, batches: Sequence[Batch]) -> tuple[Sequence[Batch], list[Factors]]:
        """The rank's own batches, and the change of each."""
        mine = slice(self.ranks.rank, None, self.ranks.size)
        own = batches[mine]
        rows: list[Rows] = []
        with resting(self.model), learning(self.model):
            for part in parts_of([sum(len(text.run) for text in batch.edit) for batch in own], self.most):
                rows += gradient_rows(self.model, [b.edit for b in own[part]], self.editor.weights, self.frozen)
        if self.editor.counting and self.editor.network.training:  # all ranks count the rows of all, in order
            read = self.editor.read(self._rows_of_all(rows, batches))[mine]
        else:
            read = self.editor.read(rows)
        return own, self.editor.factors_each(read, [batch.edit[0].ids for batch in own]) if own else []

    def _rows_of_all(self, rows: Sequence[Rows], batches: Sequence[Batch]) -> list[Rows]:
        if self.ranks.size == 1:
            return list(rows)
        every: list[Rows] = []
        given = iter(rows)
        for number, batch in enumerate(batches):
            count = sum(len(text.run) for text in batch.edit)
            has = number % self.ranks.size == self.ranks.rank
            every.append(next(given) if has else {w.name: self._nothing(count, w) for w in self.editor.weights})
        flat = torch.cat([x.flatten().cpu() for each in every for sides in each.values() for x in sides])
        shapes = [x.shape for each in every for sides in each.values() for x in sides]
        parts = iter(self.ranks.total(flat).split([shape.numel() for shape in shapes]))
        return [
            {n: tuple(next(parts).view(x.shape).to(self.model.device) for x in sides) for n, sides in each.items()}
            for each in every
        ]

    @staticmethod
    def _nothing(count: int, weight: EditedWeight) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(count, weight.d_in), torch.zeros(count, weight.d_out)

    def _losses(
        self,
        batches: Sequence[Batch],
        factors: Sequence[Factors],
        backward: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """[batches, 2]: mean -log p of the scored tokens of `outer`; mean over the tokens of `loc` of KL(before |
        after). As many batches at a time as fit, each time followed by `backward`."""
        found = [torch.zeros(0, 2)]
        with resting(self.model), torch.set_grad_enabled(backward is not None):
            for part in parts_of([batch.rows for batch in batches], self.most):
                losses = self._losses_at_once(batches[part], factors[part])
                if backward is not None:
                    backward(losses)
                found.append(losses.detach().cpu())
        return torch.cat(found)

    def _losses_at_once(self, batches: Sequence[Batch], factors: Sequence[Factors]) -> torch.Tensor:
        model = self.model
        before = self.frozen.said([text.ids for batch in batches for text in batch.loc])
        packed, hidden = self.frozen.packed([run for batch in batches for run in batch.runs])
        modules = {weight.name: weight.module_in(model) for weight in self.editor.weights}
        with edited(modules, factors, [batch.rows for batch in batches]):
            states = final_states(model, packed.run(hidden, self.first, model.num_layers))
        asked, left, prompt = [], [], 0
        for batch in batches:
            asked.append([(prompt + n, text) for n, text in enumerate(batch.outer)])
            begun = packed.row(prompt + len(batch.outer), 0)
            left.append(torch.arange(begun, begun + sum(len(text.ids) for text in batch.loc)))
            prompt += len(batch.runs)
        kl = divergence(model, before, states[torch.cat(left).to(states.device)])
        kl = torch.stack([each.mean() for each in kl.split([len(rows) for rows in left])])
        return torch.stack([Scored(packed, asked).nll(model, states).to(kl), kl], 1)
