"""KE as the ROME table has it: "EFK" (De Cao et al. 2021 as re-implemented in mend, algs/efk.py).

A condition read from the text by an LSTM says, for each weight [r, c], how its gradient G is masked and what is added:
sigmoid(norm) (G * (softmax(rowa) x cola) + softmax(rowb) x colb), which is of rank tokens + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..model.load import EditableModel
from ..sweep.module_rows import Rows
from .editor import Factors, LearnedEditor
from .weights import EditedWeight, edited_weights, named_weights

HIDDEN, CONDITION = 512, 768
SPARE_ROWS = 1  # released editors were made with a padding token more than the model has


class _NormedLinear(nn.Module):
    """g v / |v|, row by row."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        plain = nn.Linear(width, out)
        self.bias = plain.bias
        self.weight_g = nn.Parameter(plain.weight.detach().norm(dim=1, keepdim=True))
        self.weight_v = plain.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True)).T + self.bias


class _Condition(nn.Module):
    """Texts' token ids -> [texts, condition]: a bidirectional LSTM's last states, a linear map, tanh."""

    def __init__(self, embedding: torch.Tensor, hidden: int, condition: int) -> None:
        super().__init__()
        # padding_idx: token 0 learns nothing
        self.embedding = nn.Embedding.from_pretrained(embedding.clone(), freeze=False, padding_idx=0)
        lstm = nn.LSTM(embedding.shape[1], hidden, bidirectional=True, batch_first=True)
        self.lstm = nn.ModuleDict({"_module": lstm})
        self.linear = nn.ModuleDict({"_linear_layers": nn.ModuleList([nn.Linear(2 * hidden, condition)])})

    def forward(self, ids: Sequence[torch.Tensor]) -> torch.Tensor:
        texts = nn.utils.rnn.pack_sequence([self.embedding(each) for each in ids], enforce_sorted=False)
        _, (last, _) = self.lstm["_module"](texts)  # [2, texts, hidden]
        return self.linear["_linear_layers"][0](torch.cat([last[0], last[1]], 1)).tanh()


class _Conditioner(nn.Module):
    def __init__(self, shape: tuple[int, int], condition: int, hidden: int) -> None:
        super().__init__()
        self.shape = shape
        width = 2 * sum(shape) + 1
        self.conditioners = nn.ModuleDict({"0": _NormedLinear(condition, hidden), "2": _NormedLinear(hidden, width)})

    def forward(self, condition: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Of each text cola [c], softmax(rowa) [r], colb [c], softmax(rowb) [r], sigmoid(norm)."""
        rows, columns = self.shape
        parts = self.conditioners["2"](self.conditioners["0"](condition).tanh())
        cola, rowa, colb, rowb, norm = parts.split([columns, rows, columns, rows, 1], 1)
        return list(zip(cola, rowa.softmax(1), colb, rowb.softmax(1), norm.sigmoid(), strict=True))


class _Network(nn.Module):
    def __init__(self, weights: Sequence[EditedWeight], embedding: torch.Tensor, hidden: int, condition: int) -> None:
        super().__init__()
        parts = {_part(weight): _Conditioner(weight.shape, condition, hidden) for weight in weights}
        self.editor = nn.ModuleDict(
            {"condition": _Condition(embedding, hidden, condition), "conditioners": nn.ModuleDict(parts)}
        )


def _part(weight: EditedWeight) -> str:
    return f"{weight.name.replace('.', '_')}_conditioner"


class EFK(LearnedEditor):
    """An editor by KE (EFK). `new`: before training; `load`: trained; see `efk` and `train_editor`."""

    name = "efk"

    @classmethod
    def new(
        cls,
        model: EditableModel,
        layers: Sequence[int] | None = None,
        seed: int = 0,
        hidden: int = HIDDEN,
        condition: int = CONDITION,
    ) -> EFK:
        """The published start. layers: whose MLPs are edited; None: the last three."""
        weights = edited_weights(model, layers)
        embedding = model.modules.embedding.weight.detach().float().cpu()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(model, weights, _Network(weights, embedding, hidden, condition))

    def check_model(self, model: EditableModel) -> None:
        super().check_model(model)
        _check_embedding(list(self.network.editor["condition"].embedding.weight.shape), model)

    @classmethod
    def _weights_in(cls, tensors: Mapping[str, torch.Tensor], model: EditableModel) -> list[EditedWeight]:
        named = {f"editor.conditioners.{_part(w)}.": w.name for w in edited_weights(model, range(model.num_layers))}
        names = [name for part, name in named.items() if any(key.startswith(part) for key in tensors)]
        if not names:
            raise ValueError("it has no tensors for a weight of the model")
        return named_weights(model, names)

    @classmethod
    def _network_for(
        cls, tensors: Mapping[str, Any], weights: Sequence[EditedWeight], model: EditableModel
    ) -> nn.Module:
        embedding = tensors["editor.condition.embedding.weight"]
        _check_embedding(list(embedding.shape), model)
        condition = tensors["editor.condition.linear._linear_layers.0.bias"].shape[0]
        hidden = tensors["editor.condition.lstm._module.weight_hh_l0"].shape[1]
        return _Network(weights, embedding, hidden, condition)

    def read(self, rows: Sequence[Rows]) -> list[Rows]:
        """Rows that are not zero on either side: the others add nothing to G."""
        read = []
        for edit in rows:
            kept = {name: (x != 0).any(1) & (delta != 0).any(1) for name, (x, delta) in edit.items()}
            read.append({name: (x[kept[name]], delta[kept[name]]) for name, (x, delta) in edit.items()})
        return read

    def factors_each(self, read: Sequence[Rows], ids: Sequence[Sequence[int]]) -> list[Factors]:
        editor = self.network.editor
        device = next(self.network.parameters()).device
        conditions = editor["condition"]([torch.tensor(list(each), device=device) for each in ids])
        factors: list[Factors] = [{} for _ in read]
        for weight in self.weights:
            parts = editor["conditioners"][_part(weight)](conditions)
            for own, edit, (cola, rowa, colb, rowb, norm) in zip(factors, read, parts, strict=True):
                x, delta = edit[weight.name]
                down, across = (x, delta) if weight.input_first else (delta, x)
                down, across = torch.cat([down * rowa, rowb[None]]), torch.cat([across * cola, colb[None]]) * norm
                own[weight.name] = (down, across) if weight.input_first else (across, down)
        return factors


def _check_embedding(shape: list[int], model: EditableModel) -> None:
    rows, width = model.modules.embedding.weight.shape
    if shape[1] != width or not 0 <= shape[0] - rows <= SPARE_ROWS:
        raise ValueError(f"its embedding is {shape}, the model's {[rows, width]}: one row more is allowed")
