"""`train_editor`: a whole training, which goes on where it was killed."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from ..checks import Compat, typed
from ..model.errors import NotFiniteError
from ..model.identity import identity
from ..model.load import EditableModel
from ..runs.files import read_tensors, write_json, write_tensors
from ..runs.lock import alone
from ..runs.ranks import Ranks
from ..runs.settings import marked, settle
from .data import Data, Source, outer_of, read_data
from .editor import LearnedEditor
from .mend import MEND
from .training import EditorTraining, EditorTrainingParams

logger = logging.getLogger(__name__)

STATE, BEST, LOG = "training.safetensors", "editor.safetensors", "validation.json"
Editor = TypeVar("Editor", bound=LearnedEditor)


@typed
def train_editor(
    model: EditableModel,
    editor: LearnedEditor,
    records: Iterable[Source],
    texts: Sequence[str],
    params: EditorTrainingParams,
    out: str | Path,
    compat: Compat = None,
    progress: bool = False,
) -> LearnedEditor:
    """Train an editor on records, whose edits should leave `texts` alone; the best, kept in `out`.

    records: of CounterFact's form; or texts, as the published editors without a data set's name were trained on: the
    edited model should say a text's last `params.edit_tokens` tokens, also where the text begins later.

    The last `params.val_edits` records are for validation; records that share a subject with them are left out.
    A folder with an unfinished training of the same settings is gone on with, after a kill too; a finished one is read.
    The ranks of a torchrun share the iterations between two steps; each returns the same editor.

    compat="reference": a record's label is its target's last token alone, the text asked about the edit's own less a
        random prefix, and `lr_lr` is dead. Default: all of the target's tokens, behind a paraphrase of the record.

    Raises ValueError for records, texts and folders that do not fit; NotFiniteError where a loss is no finite
    number: the folder then has the last good state.
    """
    ranks, out = Ranks(), Path(out)
    data = read_data(model, records, texts, params, compat)
    with alone(out, ranks):
        settle(out, _settings(model, editor, data, params, compat), ranks)
        return _Run(model, editor, data, params, out, compat, ranks).finish(progress)


def _settings(
    model: EditableModel, editor: LearnedEditor, data: Data, params: EditorTrainingParams, compat: str | None
) -> dict[str, Any]:
    begun = [str((x.shape, float(x.nan_to_num().double().sum()))) for x in editor.tensors.values()]
    about = {"method": editor.name, "weights": [weight.name for weight in editor.weights], "start": marked(*begun)}
    asked = {k: v for k, v in asdict(params).items() if k not in ("iterations", "early_stop_patience")}
    return {
        "model": {k: v for k, v in identity(model).items() if k != "name"},
        "editor": about,
        "params": asked,
        "compat": compat,
        "data": marked(repr(data)),
    }


class _Run:
    def __init__(
        self,
        model: EditableModel,
        editor: LearnedEditor,
        data: Data,
        params: EditorTrainingParams,
        out: Path,
        compat: str | None,
        ranks: Ranks,
    ) -> None:
        self.editor, self.data, self.params, self.out, self.compat = editor, data, params, out, compat
        self.ranks = ranks
        if isinstance(editor, MEND) and not (out / STATE).exists() and not _counted(editor):
            with torch.no_grad():
                editor.network.edit_lrs.fill_(params.edit_lr)
        self.training = EditorTraining(model, editor, params, compat)
        self.best, self.best_at = math.inf, 0
        self.log: list[dict[str, Any]] = []
        if (out / STATE).exists():
            self._resume()

    def finish(self, progress: bool) -> LearnedEditor:
        training, params = self.training, self.params
        silent = not (progress and self.ranks.first)
        bar = tqdm(total=params.iterations, initial=training.iteration, desc=self.editor.name, disable=silent)
        with bar:
            while training.iteration < params.iterations and not self._over():
                if training.iteration % params.val_interval == 0 and not self._validated(training.iteration):
                    self._validate()
                    continue
                begun = training.iteration
                stop = min(begun + training.until_step, params.iterations, self._next_validation(begun))
                reports = training.steps([self._batch(iteration) for iteration in range(begun, stop)])
                bar.update(stop - begun)
                bar.set_postfix(edit=f"{reports[-1]['loss/edit']:.3f}", loc=f"{reports[-1]['loss/loc']:.3f}")
        if training.iteration >= params.iterations and not self._validated(training.iteration):
            self._validate()
        self.ranks.wait()
        if (self.out / BEST).exists():
            best, _ = read_tensors(self.out / BEST)
            self.editor.network.load_state_dict(best)
        return self.editor

    def _over(self) -> bool:
        return self.best_at + self.params.early_stop_patience <= self.training.iteration and self._validated(
            self.training.iteration
        )

    def _validated(self, iteration: int) -> bool:
        return any(row["iteration"] == iteration for row in self.log)

    def _next_validation(self, iteration: int) -> int:
        return (iteration // self.params.val_interval + 1) * self.params.val_interval

    def _batch(self, iteration: int) -> tuple[list, list, list]:
        """The same for an iteration, whatever was before it: nothing of the draw has to be kept."""
        epoch, place = divmod(iteration, len(self.data.train))
        order = list(range(len(self.data.train)))
        random.Random(f"{self.params.seed} order {epoch}").shuffle(order)
        rng = random.Random(f"{self.params.seed} batch {iteration}")
        example = self.data.train[order[place]]
        loc = rng.choices(self.data.loc_train, k=self.params.loc_texts)
        return [example.edit], [outer_of(example, rng)], loc

    def _held(self, number: int) -> tuple[list, list, list]:
        rng = random.Random(f"{self.params.seed} held {number}")
        loc = rng.choices(self.data.loc_held, k=self.params.loc_texts)
        example = self.data.held[number]
        return [example.edit], [outer_of(example, rng)], loc

    def _validate(self) -> None:
        """Losses of held-out edits; the best so far is saved, then the state."""
        iteration = self.training.iteration
        row: dict[str, Any] = {"iteration": iteration}
        if not isinstance(self.editor, MEND) or _counted(self.editor):
            losses = self.training.validate([self._held(n) for n in range(len(self.data.held))]).mean(0)
            row |= dict(zip(("edit", "loc"), losses.tolist(), strict=True))
            row["total"] = self.params.cedit * row["edit"] + self.params.cloc * row["loc"]
            if not math.isfinite(row["total"]):
                raise NotFiniteError(f"the validation of iteration {iteration} is {row['total']}: try a lower lr")
            logger.info("iteration %d: edit %.4f, locality %.5f", iteration, row["edit"], row["loc"])
            if row["total"] < self.best:
                self.best, self.best_at = row["total"], iteration
                if self.ranks.first:
                    self.editor.save(self.out / BEST)
        self.log.append(row)
        if self.ranks.first:
            self._save()
            write_json(self.out / LOG, self.log)

    def _save(self) -> None:
        tensors = {f"editor.{name}": x for name, x in self.editor.tensors.items()}
        for name, parameter in self.editor.network.named_parameters():
            if parameter.grad is not None:
                tensors[f"gradient.{name}"] = parameter.grad
        for number, moments in self.training.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{key}": torch.as_tensor(x) for key, x in moments.items()}
        # Validations of before are in the state, so that a kill between two files loses none.
        state = {"iteration": self.training.iteration, "best": self.best if self.best < math.inf else None}
        about = json.dumps(state | {"best_at": self.best_at, "log": self.log})
        write_tensors(self.out / STATE, tensors, {"state": about})

    def _resume(self) -> None:
        tensors, about = read_tensors(self.out / STATE)
        state = json.loads(about["state"])
        take = lambda part: {n.removeprefix(part): x for n, x in tensors.items() if n.startswith(part)}  # noqa: E731
        self.editor.network.load_state_dict(take("editor."))
        gradients = take("gradient.")
        for name, parameter in self.editor.network.named_parameters():
            parameter.grad = gradients[name].to(parameter.device) if name in gradients else None
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, x in take("adam.").items():
            number, _, key = name.partition(".")
            moments.setdefault(int(number), {})[key] = x
        groups = self.training.optimizer.state_dict()["param_groups"]
        self.training.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.training.iteration, self.log = state["iteration"], state["log"]
        self.best, self.best_at = math.inf if state["best"] is None else state["best"], state["best_at"]


def _counted(editor: MEND) -> bool:
    return all(transform.counted > 1 for transform in editor.network.mend.values())
