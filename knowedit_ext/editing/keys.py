"""Keys: what the down projection reads at the subject (rome/compute_u.py, memit/compute_ks.py)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..model import EditableModel
from ..sweep.capture import clean_runs
from ..sweep.packed import PackedPrompts
from .request import EditRequest, lookup, tokenize_in_contexts


class KeyRows:
    """The prompts of many requests in their contexts, cut behind the token whose key is edited, as packed rows.

    groups: context templates by group; a key is the mean of the means of its groups (compute_ks.py:39-50).
    """

    def __init__(
        self, model: EditableModel, requests: Sequence[EditRequest], groups: Sequence[Sequence[str]], fact_token: str
    ) -> None:
        self.model = model
        contexts = [context for group in groups for context in group]
        self.per_request = len(contexts)
        self.weights = torch.tensor([1.0 / (len(groups) * len(group)) for group in groups for _ in group])
        ids, tokens = [], []
        for request in requests:
            for tokenized in tokenize_in_contexts(model, request, contexts, target=False):
                token = lookup(tokenized, fact_token)
                ids.append(tokenized.ids[: token + 1])
                tokens.append(token)
        self.packed = PackedPrompts(model, clean_runs(model, ids))
        self.lookups = torch.tensor([self.packed.row(prompt, token) for prompt, token in enumerate(tokens)])
        self.bare = self.lookups[:: self.per_request]  # the first context is the bare prompt

    @torch.no_grad()
    def pass_through(
        self, hidden: torch.Tensor, first: int, last: int, key_layer: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run layers first..last. Returns the rows behind them, and the down projection's input [prompts, d_in] and
        output [prompts, d_out] in `key_layer` at the lookups."""
        module = self.model.modules.down_projection(key_layer)
        found: dict[str, torch.Tensor] = {}

        def keep(_module: nn.Module, args: tuple, output: Any) -> None:
            rows = self.lookups.to(output.device)
            found["in"] = args[0].reshape(-1, args[0].shape[-1])[rows]
            found["out"] = output.reshape(-1, output.shape[-1])[rows]

        with ExitStack() as stack:
            stack.callback(module.register_forward_hook(keep).remove)
            hidden = self.packed.run(hidden, first, last)
        return hidden, found["in"], found["out"]

    def mean(self, rows: torch.Tensor) -> torch.Tensor:
        """[prompts, d] -> [requests, d], the weighted mean over a request's contexts, in float64."""
        grouped = rows.double().view(-1, self.per_request, rows.shape[-1])
        return (grouped * self.weights.to(grouped.device, torch.float64)[:, None]).sum(1)
