"""Keys: what the down projection reads at the subject (rome/compute_u.py, memit/compute_ks.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..model.hooks import Hooks
from ..model.load import EditableModel
from ..sweep.engine import default_max_rows
from ..sweep.packed import PackedPrompts, parts_of
from .tokenized import TokenizedRequest


class OverContexts:
    """What is read of the facts of many requests, to one for each request.

    weights: of a request's contexts, whose mean a key is, see `context_weights`.
    """

    def __init__(self, requests: Sequence[TokenizedRequest], weights: Sequence[float]) -> None:
        self.draws = [request.draws for request in requests]
        counts = torch.tensor([len(request.facts) for request in requests])
        self._owner = torch.arange(len(requests)).repeat_interleave(counts)
        self._weights = torch.tensor([w / n for n in self.draws for w in weights for _ in range(n)])
        self._bare = (counts.cumsum(0) - counts).tolist()

    def mean(self, rows: torch.Tensor) -> torch.Tensor:
        """[prompts, d] -> [requests, d], the weighted mean over a request's contexts, in float64."""
        weighted = rows.double() * self._weights.to(rows.device, torch.float64)[:, None]
        return weighted.new_zeros(len(self.draws), rows.shape[-1]).index_add(0, self._owner.to(rows.device), weighted)

    def bare(self, rows: torch.Tensor) -> torch.Tensor:
        """[prompts, d] -> [requests, d] of the bare prompts, the mean over their draws of noise, in float64."""
        return torch.stack([rows[at : at + n].double().mean(0) for at, n in zip(self._bare, self.draws, strict=True)])


class KeyRows(OverContexts):
    """The prompts of many requests in their contexts, cut behind the token whose key is edited, as packed rows.

    max_rows: rows that one pass holds; None: from free memory. `start` is what enters layer 0, a tensor a pass.
    """

    def __init__(
        self,
        model: EditableModel,
        requests: Sequence[TokenizedRequest],
        weights: Sequence[float],
        max_rows: int | None = None,
    ) -> None:
        super().__init__(requests, weights)
        self.model = model
        ids = [f.ids[: at + 1] for r in requests for f, at in zip(r.facts, r.lookups, strict=True)]
        noises = [noise for request in requests for noise in request.inputs()]
        self.parts: list[tuple[PackedPrompts, torch.Tensor]] = []  # prompts, and their last tokens' rows
        for part in parts_of([len(each) for each in ids], max_rows or default_max_rows(model)):
            packed = PackedPrompts.sharing(model, ids[part], noises[part])
            lookups = [packed.row(prompt, len(each) - 1) for prompt, each in enumerate(ids[part])]
            self.parts.append((packed, torch.tensor(lookups)))
        self.start = [packed.start for packed, _ in self.parts]

    def run(self, hidden: Sequence[torch.Tensor], first: int, after: int) -> list[torch.Tensor]:
        """All rows entering layer `first` -> entering `last`."""
        return [packed.run(rows, first, after) for (packed, _), rows in zip(self.parts, hidden, strict=True)]

    @torch.no_grad()
    def pass_through(
        self, hidden: Sequence[torch.Tensor], first: int, key_layer: int, value_layer: int, site: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run layers first..value_layer. At the lookups: what the down projection reads in `key_layer` [prompts, d_in],
        and what `site` ("layer": the residual stream behind it; "mlp") puts out in `value_layer` [prompts, hidden]."""
        modules = self.model.modules
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for (packed, lookups), rows in zip(self.parts, hidden, strict=True):
            kept: list[torch.Tensor] = []

            def keep(x: torch.Tensor, kept=kept, lookups=lookups) -> None:
                kept.append(x.reshape(-1, x.shape[-1])[lookups.to(x.device)])

            with Hooks() as hooks:
                hooks.before(modules.down_projection(key_layer), lambda args, _, keep=keep: keep(args[0]))
                hooks.behind(modules.site(site, value_layer), keep)
                packed.run(rows, first, value_layer + 1)
            pairs.append((kept[0], kept[1]))
        return tuple(torch.cat(columns) for columns in zip(*pairs, strict=True))


def bare_pass(
    model: EditableModel, requests: Sequence[TokenizedRequest], layer: int, site: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [requests, d_in] and values at `site` [requests, hidden] of the bare prompts, in a pass of their own."""
    rows = KeyRows(model, [request.bare for request in requests], [1.0])
    return tuple(rows.bare(x) for x in rows.pass_through(rows.start, 0, layer, layer, site))
