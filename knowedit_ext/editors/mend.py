"""MEND's network (Mitchell et al. 2022; mend, algs/mend.py): a gradient's rows, normalised, through a residual net.

The rows of all weights of one shape (d_in, d_out) share a network and its statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..editing.running import Running
from ..model.load import EditableModel
from ..sweep.module_rows import Rows
from .editor import Factors, LearnedEditor
from .weights import EditedWeight, edited_weights

EDIT_RATE = 1e-4  # what edit_lrs begin with
EPSILON = 1e-7


class _Layer(nn.Module):
    """z + clamp((U (V z) + b) * scale_m + shift_m, min=0); m: which of the weights of the shape."""

    def __init__(self, width: int, rank: int, modes: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.v = nn.Parameter(torch.randn(rank, width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.mode_shift = nn.Embedding(modes, width, _weight=torch.zeros(modes, width))
        self.mode_scale = nn.Embedding(modes, width, _weight=torch.ones(modes, width))

    def forward(self, z: torch.Tensor, mode: torch.Tensor) -> torch.Tensor:
        """z [rows, width], mode [rows]."""
        inner = torch.addmm(self.bias, z @ self.v.T, self.u.T)
        # clamp: its gradient at 0 is 1, and at the start all units are there (relu would never begin to learn)
        return z + (inner * self.mode_scale.weight[mode] + self.mode_shift.weight[mode]).clamp(min=0)


class _Transform(nn.Module):
    """Statistics and network of one shape; k, u_s, v_s: count and sums of squared differences from the means."""

    def __init__(self, d_in: int, d_out: int, rank: int, modes: int) -> None:
        super().__init__()
        self.widths = (d_in, d_out)
        for side, width in zip("uv", self.widths, strict=True):
            for part in ("mean", "std", "s"):
                self.register_buffer(f"{side}_{part}", torch.full((width,), float("nan")))
        self.register_buffer("k", torch.full((1,), float("nan")))
        width = d_in + d_out
        self.mlp = nn.ModuleDict({"layers": nn.ModuleList(_Layer(width, min(rank, width), modes) for _ in range(2))})

    @property
    def counted(self) -> int:
        return int(self.k) if bool(torch.isfinite(self.k).all()) else 0

    def observe(self, x: torch.Tensor, delta: torch.Tensor) -> None:
        """Count rows [n, d_in] and [n, d_out]. ValueError where one row is all that was ever seen."""
        for side, rows in zip("uv", (x, delta), strict=True):
            parts = [Running.of(rows)] if len(rows) else []
            if self.counted:
                mean, squares = (getattr(self, f"{side}_{part}").double() for part in ("mean", "s"))
                parts.insert(0, Running(self.counted, mean, squares))
            count = sum(part.count for part in parts)
            if count < 2:
                raise ValueError(
                    f"MEND has seen {count} of a gradient's rows, and two are the least to normalise by: edit more "
                    "layers than the last, or score more tokens"
                )
            now = Running.join(parts)
            getattr(self, f"{side}_mean").copy_(now.mean)
            getattr(self, f"{side}_s").copy_(now.squares)
            getattr(self, f"{side}_std").copy_((now.squares / (count - 1)).sqrt())
        self.k.fill_(count)

    def normalised(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """[rows, d_in + d_out], by what was counted until now."""
        u, v = (x - self.u_mean) / (self.u_std + EPSILON), (delta - self.v_mean) / (self.v_std + EPSILON)
        return torch.cat([u, v], 1)

    def forward(self, z: torch.Tensor, mode: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.mlp["layers"]:
            z = layer(z, mode)
        return z.split(self.widths, 1)


class _Network(nn.Module):
    def __init__(self, weights: Sequence[EditedWeight], rank: Mapping[str, int]) -> None:
        super().__init__()
        self.edit_lrs = nn.Parameter(torch.full((len(weights),), EDIT_RATE))
        shapes: dict[str, list[EditedWeight]] = {}
        for weight in weights:
            shapes.setdefault(weight.key, []).append(weight)
        self.mend = nn.ModuleDict(
            {key: _Transform(same[0].d_in, same[0].d_out, rank[key], len(same)) for key, same in shapes.items()}
        )


class MEND(LearnedEditor):
    """An editor by MEND. `new`: before training; `load`: trained; see `mend` and `train_editor`."""

    name = "mend"
    counting = True

    @classmethod
    def new(cls, model: EditableModel, layers: Sequence[int] | None = None, rank: int = 1920, seed: int = 0) -> MEND:
        """The published start. layers: whose MLPs are edited; None: the last three. rank: at most d_in + d_out."""
        weights = edited_weights(model, layers)
        if rank < 1:
            raise ValueError(f"rank is {rank}: expected at least 1")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(model, weights, _Network(weights, dict.fromkeys((w.key for w in weights), rank)))

    @classmethod
    def _weights_in(cls, tensors: Mapping[str, torch.Tensor], model: EditableModel) -> list[EditedWeight]:
        layers = len(tensors["edit_lrs"]) // 2
        return edited_weights(model, range(model.num_layers - layers, model.num_layers))

    @classmethod
    def _network_for(
        cls, tensors: Mapping[str, Any], weights: Sequence[EditedWeight], model: EditableModel
    ) -> nn.Module:
        keys = {weight.key for weight in weights}
        return _Network(weights, {key: tensors[f"mend.{key}.mlp.layers.0.u"].shape[1] for key in keys})

    def check_statistics(self) -> None:
        """ValueError where nothing was counted yet: normalising by nothing is no edit."""
        for key, transform in self.network.mend.items():
            if transform.counted < 2 or not bool(torch.isfinite(transform.u_std).all()):
                raise ValueError(
                    f"the editor has no statistics of {key} yet ({transform.counted} rows counted): train it first"
                )

    def counted_rows(self, rows: Rows, weight: EditedWeight) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, delta): rows that are exactly zero on a side say nothing, and are dropped (mend.py:131-136)."""
        x, delta = rows[weight.name]
        kept = (x != 0).any(1) & (delta != 0).any(1)
        return x[kept], delta[kept]

    def read(self, rows: Sequence[Rows]) -> list[dict[str, torch.Tensor]]:
        """By weight, normalised [rows, d_in + d_out].

        In training mode the rows of a weight are counted, then it is normalised, then the next one's are.
        """
        read = []
        for edit in rows:
            read.append({})
            for weight in self.weights:
                x, delta = self.counted_rows(edit, weight)
                if self.network.training:
                    self.network.mend[weight.key].observe(x, delta)
                read[-1][weight.name] = self.network.mend[weight.key].normalised(x, delta)
        return read

    def factors_each(self, read: Sequence[dict[str, torch.Tensor]], ids: Sequence[Sequence[int]] = ()) -> list[Factors]:
        """All weights of a shape go through its network together."""
        sides: dict[str, tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]] = {}
        for key, transform in self.network.mend.items():
            same = [weight.name for weight in self.weights if weight.key == key]
            rows = [edit[name] for name in same for edit in read]
            modes = torch.tensor([mode for mode in range(len(same)) for _ in read])
            modes = modes.repeat_interleave(torch.tensor([len(x) for x in rows])).to(rows[0].device)
            x, delta = (side.split([len(x) for x in rows]) for side in transform(torch.cat(rows), modes))
            for mode, name in enumerate(same):
                own = slice(mode * len(read), (mode + 1) * len(read))
                sides[name] = (x[own], delta[own])
        rates = dict(zip((weight.name for weight in self.weights), self.network.edit_lrs, strict=True))
        return [
            {name: (rate * sides[name][0][n], sides[name][1][n]) for name, rate in rates.items()}
            for n in range(len(read))
        ]
