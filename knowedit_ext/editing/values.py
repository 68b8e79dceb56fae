"""Values: what the edited layer must put out at the subject so that the model says the new target.

Many edits are optimised at once, each as if alone: its own Adam state, stop rule, weight decay, KL term and L2 ball
(rome/compute_v.py:14-189, memit/compute_z.py:13-183). Only rows from the subject's token on, in the layers behind the
edited one, are computed in a step; the head sees the target's rows and the KL prompt's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..checks import quoted
from ..model.facts import Fact, tokenize_fact
from ..model.gradients import check_gradients
from ..model.head import distribution, likeliest, log_probabilities
from ..model.hooks import at_rest, learning
from ..model.load import EditableModel
from ..ops.reference import compute_dtype
from ..sweep.capture import EmbeddingNoise
from ..sweep.frozen import FrozenPrompts
from ..sweep.packed import PackedPrompts
from .params import EditParams
from .request import lookup
from .tokenized import TokenizedRequest

logger = logging.getLogger(__name__)

STOP_LOSS = 5e-2
KL_PROMPT = "{} is a"
LEAVE = 0.9  # converged edits leave the batch when no more than this share of it is still going
BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch.optim.Adam's


@dataclass(frozen=True)
class Prompt:
    """One row of an edit's loss: token ids, the token that is changed, and what is scored where."""

    edit: int
    ids: tuple[int, ...]
    token: int
    readout: tuple[int, ...]
    targets: tuple[int, ...]  # empty: a KL prompt
    weight: float  # of each target's log-probability, of a KL prompt's divergence
    noise: EmbeddingNoise | None = None


@dataclass(frozen=True)
class Values:
    """Optimised values [edits, hidden], the initial ones, and the last loss and number of steps of each."""

    values: torch.Tensor
    initial: torch.Tensor
    loss: torch.Tensor
    steps: torch.Tensor


@dataclass(frozen=True)
class Seen:
    """What one step says of some edits.

    edits: their numbers among the requests. owner, context, logp, right: a row for each token of the target in each
    context: its edit's place in `edits`, the context's number (0: the bare prompt), its log-probability, whether it is
    the most probable one. kl: [edits], times kl_factor. All on the CPU.
    """

    edits: Sequence[int]
    owner: torch.Tensor
    context: torch.Tensor
    logp: torch.Tensor
    right: torch.Tensor
    kl: torch.Tensor

    def certain(self) -> torch.Tensor:
        """bool [edits]: is every token of the target the most probable one in every context?"""
        return torch.zeros(len(self.edits)).index_add(0, self.owner, (~self.right).float()) == 0

    def probability(self) -> torch.Tensor:
        """[edits]: the mean over contexts of the target's probability a token (a geometric mean)."""
        contexts = int(self.context.max()) + 1
        place = self.owner * contexts + self.context
        counts = torch.bincount(place, minlength=len(self.edits) * contexts)
        sums = torch.zeros(len(counts)).index_add(0, place, self.logp)
        return (sums / counts).exp().view(-1, contexts).mean(1)


# What else than a small loss ends an edit: -> bool [edits], which are done; and what the target's negative
# log-probability weighs from the next step on [edits], of what it weighed at first.
Rule = Callable[[Seen], tuple[torch.Tensor, torch.Tensor]]


@at_rest
def optimise_values(
    model: EditableModel,
    requests: Sequence[TokenizedRequest],
    params: EditParams,
    site: str,
    layer: int,
    batch: int | None = None,
    progress: bool = False,
    *,
    beside: Sequence[str] = (),
    loss_layer: int | None = None,
    nll_factor: float = 1.0,
    rule: Rule | None = None,
    compat: str | None = None,
    more_to_minimise: int = 0,
) -> Values:
    """The values of many requests at `site` ("mlp": ROME's delta, "layer": MEMIT's) of `layer`.

    requests: in their contexts, the bare prompt first. batch: edits at once; None: from free memory.
    beside: sites of the layer that have a delta of their own, optimised with it and given up (PMET's attention output).
    loss_layer: behind which the loss is read; None: the last. nll_factor: of the target's negative log-probability.
    compat: "hase": no edit stops early, and one with nothing behind it has the value it begins with.
    more_to_minimise: updates that an edit which minimises gets beyond the others'; such a one never stops early.
    Raises ValueError where a loss is not finite, or no gradient reaches a value.
    """
    after = model.num_layers if loss_layer is None else max(loss_layer, layer) + 1
    prompts = [_prompts(model, n, request, params.fact_token) for n, request in enumerate(requests)]
    carried = [layer + 1 < after or request.ends_prompt for request in requests]
    if not all(carried) and compat != "hase":
        raise ValueError(
            f"layer {layer} is the last one before the loss: nothing behind it can carry a change to the prompt's end"
        )
    updates = [
        (params.v_num_grad_steps - 1 + more_to_minimise * r.request.minimise) * c
        for r, c in zip(requests, carried, strict=True)
    ]
    patient = compat == "hase"
    size = batch or _batch_size(model, prompts, after - layer)
    parts = []
    check_gradients(model, layer + 1, after)
    with learning(model):
        for first in tqdm(range(0, len(requests), size), desc="values", unit="batch", disable=not progress):
            part = slice(first, first + size)
            task = _Batch(
                model,
                prompts[part],
                requests[part],
                updates[part],
                patient,
                params,
                (site, *beside),
                layer,
                after,
                nll_factor,
                rule,
            )
            parts.append(task.optimise())
    names = ("values", "initial", "loss", "steps")
    optimised = Values(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
    for request, loss in zip(requests, optimised.loss.tolist(), strict=True):
        if not math.isfinite(loss):
            text = request.facts[0].fact.text
            raise ValueError(f"the loss of {quoted(text)} became {loss}: NaN or infinity in weights or activations")
    return optimised


def edits_at_once(model: EditableModel, requests: Sequence[TokenizedRequest], params: EditParams, layer: int) -> int:
    """How many values `optimise_values` optimises in one batch, unless told."""
    prompts = [_prompts(model, n, request, params.fact_token) for n, request in enumerate(requests)]
    return _batch_size(model, prompts, model.num_layers - layer)


def _prompts(model: EditableModel, edit: int, request: TokenizedRequest, fact_token: str) -> list[Prompt]:
    prompts = []
    asked = request.request
    for tokenized, token, noise in zip(request.facts, request.lookups, request.noises, strict=True):
        target = tokenized.target_ids
        ids = tokenized.ids + target[:-1]
        readout = tuple(range(len(tokenized.ids) - 1, len(ids)))
        weight = 1.0 / (len(request.facts) * len(target))  # mean over tokens, then over prompts
        prompts.append(Prompt(edit, ids, token, readout, target, weight, noise))
    kl = tokenize_fact(model, Fact(KL_PROMPT, asked.subject, occurrence=0))
    token = lookup(kl, fact_token)
    fixed = asked.noise is not None and request.stream is None
    for noise in asked.noise.draws(model, kl) if fixed else [None]:  # its distribution at that very token
        prompts.append(Prompt(edit, kl.ids[: token + 1], token, (token,), (), 1.0 / request.draws, noise))
    return prompts


def _batch_size(model: EditableModel, prompts: Sequence[Sequence[Prompt]], layers: int) -> int:
    """Edits whose activations, kept for the backward pass, take a quarter of what is free (or 4,096 rows on a CPU)."""
    from ..sweep.engine import free_bytes, row_bytes

    rows = max(sum(len(p.ids) - p.token for p in edit) for edit in prompts)
    most = free_bytes(model.device) // 4 // (row_bytes(model) * layers)
    return max(1, min(most, 4096 if model.device.type == "cpu" else most) // rows)


class _Batch:
    """Some edits on their way; those that have converged leave."""

    def __init__(
        self,
        model: EditableModel,
        prompts: Sequence[Sequence[Prompt]],
        requests: Sequence[TokenizedRequest],
        updates: Sequence[int],
        patient: bool,
        params: EditParams,
        sites: Sequence[str],
        layer: int,
        after: int,
        nll_factor: float,
        rule: Rule | None,
    ) -> None:
        self.model, self.params, self.sites, self.layer, self.after = model, params, sites, layer, after
        self.nll_factor, self.rule = nll_factor, rule
        self.prompts = prompts
        self.count = len(prompts)
        self.draws = [request.draws for request in requests]
        self.streams = [request.stream for request in requests]
        self.minimise = torch.tensor([request.request.minimise for request in requests])
        self.updates = torch.tensor(updates)
        self.impatient = ~self.minimise & (not patient)  # end with a small loss

    def optimise(self) -> Values:
        params, n = self.params, self.count
        planned = list(range(n))
        self._freeze(planned)
        # The values of the bare prompts, which are the first of an edit's prompts: [edits, sites, hidden].
        values, firsts = self.frozen.initial.to(compute_dtype(self.model.dtype)), self.bare.tolist()
        initial = torch.stack([values[at : at + k].mean(0) for at, k in zip(firsts, self.draws, strict=True)])
        delta = torch.zeros_like(initial)
        moment, variance = torch.zeros_like(delta), torch.zeros_like(delta)
        losses, steps = torch.zeros(n), torch.zeros(n, dtype=torch.int64)
        alive = torch.ones(n, dtype=torch.bool)
        weight = torch.full((n,), self.nll_factor)
        self.kl_initial: dict[int, torch.Tensor] = {}
        for step in range(params.v_num_grad_steps):
            if step and self.redrawn:
                self._freeze(planned)
            variable = delta[planned].requires_grad_()
            loss, seen = self._loss(variable, initial[planned], planned, weight[planned])
            going = alive[planned]
            losses[planned] = torch.where(going, loss.detach().cpu().float(), losses[planned])
            small = (loss.detach().cpu() < STOP_LOSS) & self.impatient[planned]
            going = going & ~small & ~self.vanished & (step < self.updates[planned])
            if seen is not None:
                done, factor = self.rule(seen)
                going, weight[planned] = going & ~done, self.nll_factor * factor
            alive[planned] = going
            if not going.any():
                if not self.redrawn or step == params.v_num_grad_steps - 1:
                    break
                continue  # as released, the passes draw on
            gradient = self._gradient(loss, variable, planned, going)
            here = torch.tensor(planned)[going].to(delta.device)
            gradient = gradient[going.to(gradient.device)]
            moment[here] = BETAS[0] * moment[here] + (1 - BETAS[0]) * gradient
            variance[here] = BETAS[1] * variance[here] + (1 - BETAS[1]) * gradient**2
            size = (variance[here].sqrt() / (1 - BETAS[1] ** (step + 1)) ** 0.5).add_(EPSILON)
            moved = delta[here] - params.v_lr / (1 - BETAS[0] ** (step + 1)) * moment[here] / size
            # Project within the L2 ball.
            most = params.clamp_norm_factor * initial[here].norm(dim=-1, keepdim=True)
            norm = moved.norm(dim=-1, keepdim=True)
            delta[here] = torch.where(norm > most, moved * (most / norm), moved)
            steps[here.cpu()] += 1
            if going.sum() <= LEAVE * len(planned) and not self.redrawn:
                kept = going[self.owner].nonzero()[:, 0].tolist()
                planned, self.frozen = torch.tensor(planned)[going].tolist(), self.frozen.only(kept)
                self._number(planned)
        return Values((initial + delta)[:, 0], initial[:, 0], losses, steps)

    def _gradient(
        self, loss: torch.Tensor, variable: torch.Tensor, planned: Sequence[int], going: torch.Tensor
    ) -> torch.Tensor:
        """Of each edit's loss; ValueError where it is exactly zero for one that is still going: it would never move."""
        (gradient,) = torch.autograd.grad(loss.sum(), variable, allow_unused=True)
        gradient = torch.zeros_like(variable) if gradient is None else gradient
        still = (going.to(gradient.device) & ~gradient.flatten(1).any(dim=1)).nonzero()
        if len(still):
            text = self.model.tokenizer.decode(self.prompts[planned[int(still[0])]][0].ids)
            raise ValueError(
                f"no gradient reaches the value of {quoted(text)} in layer {self.layer}: a part of the model behind it "
                "does not pass one on"
            )
        return gradient

    def _freeze(self, planned: Sequence[int]) -> None:
        """Run the prompts of some edits as far as they do not change."""
        chosen = [prompt for edit in planned for prompt in self.prompts[edit]]
        noises = [noise for edit in planned for noise in self._noises(edit)]
        packed = PackedPrompts.sharing(self.model, [prompt.ids for prompt in chosen], noises)
        tokens, readout = [p.token for p in chosen], [p.readout for p in chosen]
        self.frozen = FrozenPrompts(packed, self.sites, self.layer, tokens, readout, self.after)
        self._number(planned)

    def _number(self, planned: Sequence[int]) -> None:
        """Whose the prompts and the rows that are read out are, and what is scored there."""
        chosen = [prompt for edit in planned for prompt in self.prompts[edit]]
        counts = [len(self.prompts[edit]) for edit in planned]
        self.owner = torch.arange(len(planned)).repeat_interleave(torch.tensor(counts))  # prompt -> place in planned
        self.bare = torch.tensor([0, *counts]).cumsum(0)[:-1]
        owners, contexts, targets, weights = [], [], [], []
        firsts = self.bare.tolist()
        for number, (place, prompt) in enumerate(zip(self.owner.tolist(), chosen, strict=True)):
            for n in range(len(prompt.readout)):
                owners.append(place)
                contexts.append(number - firsts[place])
                targets.append(prompt.targets[n] if prompt.targets else -1)
                weights.append(prompt.weight)
        self.row_owner, self.row_target = torch.tensor(owners), torch.tensor(targets)
        self.row_weight, self.row_context = torch.tensor(weights), torch.tensor(contexts)

    @property
    def redrawn(self) -> bool:
        """Is noise drawn anew for every pass?"""
        return any(self.streams)

    def _noises(self, edit: int) -> Sequence[EmbeddingNoise | None]:
        stream, prompts = self.streams[edit], self.prompts[edit]
        return [prompt.noise for prompt in prompts] if stream is None else stream.draw(len(prompts))

    def _loss(
        self, delta: torch.Tensor, initial: torch.Tensor, planned: Sequence[int], weight: torch.Tensor
    ) -> tuple[torch.Tensor, Seen | None]:
        """[planned edits]: NLL of the target (its probability, where that is to be small) + KL to the first step's
        distribution + weight decay. delta, initial: [planned, sites, hidden]; weight: of the first."""
        params, device = self.params, delta.device
        states = self.frozen(delta[self.owner.to(device)])
        scored = self.row_target >= 0
        read = states[scored.to(states.device)]
        logp = log_probabilities(self.model, read, self.row_target[scored]).to(device)
        owner = self.row_owner[scored].to(device)
        nll = torch.zeros_like(delta[:, 0, 0]).index_add(0, owner, -logp * self.row_weight[scored].to(device))
        current = distribution(self.model, states[(~scored).to(states.device)]).to(device)  # [KL prompts, vocab]
        counts = [self.draws[edit] for edit in planned]
        for edit, rows in zip(planned, current.detach().split(counts), strict=True):
            self.kl_initial.setdefault(edit, rows)
        before = torch.cat([self.kl_initial[edit] for edit in planned])
        # kl_div(before, current, log_target=True): sum_w p_current (log p_current - log p_before)
        kl = (current.exp() * (current - before)).sum(1) * self.row_weight[~scored].to(device)
        kl = params.kl_factor * torch.zeros_like(nll).index_add(0, self.row_owner[~scored].to(device), kl)
        norm = torch.linalg.vector_norm(delta, dim=-1)  # its gradient at 0 is 0
        decay = (params.v_weight_decay * norm / initial.norm(dim=-1) ** 2).sum(1)
        minimise = self.minimise[planned]
        probability = (-nll).exp()  # a token's, the geometric mean
        self.vanished = minimise & (probability.detach() == 0).cpu()  # there is nothing left to take away
        loss = weight.to(device) * torch.where(minimise.to(device), probability, nll) + kl + decay
        return loss, None if self.rule is None else self._seen(planned, scored, read.detach(), logp, kl)

    @torch.no_grad()
    def _seen(
        self, planned: Sequence[int], scored: torch.Tensor, read: torch.Tensor, logp: torch.Tensor, kl: torch.Tensor
    ) -> Seen:
        right = likeliest(self.model, read) == self.row_target[scored]
        edits = [self.prompts[edit][0].edit for edit in planned]
        rows = self.row_owner[scored], self.row_context[scored], logp.detach().float().cpu()
        return Seen(edits, *rows, right, kl.detach().cpu())
