"""Values: what the edited layer must put out at the subject so that the model says the new target.

Many edits are optimised at once, each as if alone: its own Adam state, stop rule, weight decay, KL term and L2 ball
(rome/compute_v.py:14-189, memit/compute_z.py:13-183). Only rows from the subject's token on, in the layers behind the
edited one, are computed in a step; the head sees the target's rows and the KL prompt's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from tqdm import tqdm

from ..checks import quoted
from ..model.facts import Fact, tokenize_fact
from ..model.gradients import check_gradients
from ..model.head import distribution, likeliest, log_probabilities
from ..model.hooks import at_rest, learning
from ..model.load import EditableModel
from ..model.precision import backward_products
from ..ops.reference import compute_dtype
from ..sweep.capture import EmbeddingNoise
from ..sweep.frozen import FrozenPrompts
from ..sweep.packed import PackedPrompts
from .changes import check_tensor
from .in_progress import InProgress, ReadRows
from .params import EditParams
from .request import lookup
from .tokenized import TokenizedRequest

logger = logging.getLogger(__name__)

STOP_LOSS = 5e-2
KL_PROMPT = "{} is a"
LEAVE = 0.9  # converged edits leave the batch when no more than this share of it is still going


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
    """Optimised values [edits, hidden], the initial ones, the last loss computed (before the last step) and the number
    of steps of each. What was read beside them of each request's facts, in order: keys [facts, d_in], what the down
    projection reads, and outputs [facts, hidden], what the site puts out; None unless asked for.
    """

    values: torch.Tensor
    initial: torch.Tensor
    loss: torch.Tensor
    steps: torch.Tensor
    keys: torch.Tensor | None = None
    outputs: torch.Tensor | None = None


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
    keys: bool = False,
) -> Values:
    """The values of many requests at `site` ("mlp": ROME's delta, "layer": MEMIT's) of `layer`.

    requests: in their contexts, the bare prompt first. batch: edits at once; None: from free memory.
    beside: sites of the layer that have a delta of their own, optimised with it and given up (PMET's attention output).
    loss_layer: behind which the loss is read; None: the last. nll_factor: of the target's negative log-probability.
    compat: "hase": no edit stops early, and one with nothing behind it has the value it begins with.
    more_to_minimise: updates that an edit which minimises gets beyond the others'; such a one never stops early.
    keys: give those too; not where noise is drawn anew for every pass.
    Raises ValueError where a loss or a value is not finite, or no gradient reaches a value.
    """
    after = model.num_layers if loss_layer is None else max(loss_layer, layer) + 1
    prompts = [_prompts(model, n, request, params.fact_token) for n, request in enumerate(requests)]
    behind = any(not model.modules.reads_keys(number) for number in range(layer + 1, after))
    carried = [behind or request.ends_prompt for request in requests]
    if not all(carried) and compat != "hase":
        why = (
            "is the last one before the loss"
            if layer + 1 == after
            else "has only layers behind it that read the keys of earlier ones"
        )
        raise ValueError(f"layer {layer} {why}: nothing behind it can carry a change to the prompt's end")
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
                keys,
            )
            parts.append(task.optimise())
    columns = ([getattr(part, field.name) for part in parts] for field in fields(Values))
    optimised = Values(*(None if column[0] is None else torch.cat(column) for column in columns))
    finite = optimised.values.isfinite().all(1).tolist()
    for request, loss, known in zip(requests, optimised.loss.tolist(), finite, strict=True):
        if not (math.isfinite(loss) and known):
            text, what = quoted(request.facts[0].fact.text), "value" if math.isfinite(loss) else "loss"
            became = "no number" if what == "value" else loss
            raise ValueError(f"the {what} of {text} became {became}: NaN or infinity in weights or activations")
    return optimised


def check_values(model: EditableModel, values: torch.Tensor, requests: Sequence[object]) -> None:
    """ValueError for a tensor that cannot be the values of so many requests."""
    if tuple(values.shape) != (len(requests), model.hidden_size):
        raise ValueError(f"values are {list(values.shape)}: expected [{len(requests)} requests, {model.hidden_size}]")
    check_tensor(values, "the tensor of values")


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
        keys: bool,
    ) -> None:
        self.model, self.params, self.sites, self.layer, self.after = model, params, sites, layer, after
        self.nll_factor, self.rule, self.keys = nll_factor, rule, keys
        self.prompts = prompts
        self.count = len(prompts)
        self.draws = [request.draws for request in requests]
        self.streams = [request.stream for request in requests]
        self.minimise = torch.tensor([request.request.minimise for request in requests])
        self.updates = torch.tensor(updates)
        self.impatient = ~self.minimise & (not patient)  # end with a small loss
        self.kl_before: torch.Tensor | None = None  # [KL prompts of the edits in progress, vocab], the first step's

    def optimise(self) -> Values:
        params, n = self.params, self.count
        planned = list(range(n))
        self._freeze(planned)
        read = self._read_facts() if self.keys else (None, None)
        # The values of the bare prompts, which are the first of an edit's prompts: [edits, sites, hidden].
        values, firsts = self.frozen.initial.to(compute_dtype(self.model.dtype)), self.bare.tolist()
        initial = torch.stack([values[at : at + k].mean(0) for at, k in zip(firsts, self.draws, strict=True)])
        self.now = now = InProgress.begin(initial, self.nll_factor, self.minimise, self.updates, self.impatient)
        delta, losses, steps = torch.zeros_like(initial), torch.zeros(n), torch.zeros(n, dtype=torch.int64)
        drawn = 1
        # The published loop has a pass behind the last update, which says what the loss has become and nothing else.
        for step in range(int(self.updates.max())):
            if step and self.redrawn:
                self._freeze(planned)
                drawn += 1
            variable = now.delta.requires_grad_()
            loss, vanished, seen = self._loss(variable, planned)
            going = now.alive & ~((loss.detach() < STOP_LOSS) & now.impatient) & ~vanished & (step < now.updates)
            if seen is not None:
                done, factor = self.rule(seen)
                going, now.weight = going & ~done.to(going.device), self.nll_factor * factor.to(going.device)
            # The one time in a step that the device is waited for.
            found, counted, goes, stuck = torch.stack(
                [x.detach().to(loss.dtype) for x in (loss, now.alive, going, now.stuck)]
            ).cpu()
            self._check_moved(stuck, planned)
            losses[planned] = torch.where(counted > 0, found.float(), losses[planned])
            now.alive = going
            if not goes.any():
                break
            with backward_products(self.model.precision):
                (gradient,) = torch.autograd.grad(loss.sum(), variable, allow_unused=True)
            now.move(torch.zeros_like(variable) if gradient is None else gradient, step, params)
            steps[planned] += goes.long()
            if goes.sum() <= LEAVE * len(planned) and not self.redrawn:
                delta[planned] = now.delta.detach()
                kept, prompts = (x.nonzero()[:, 0].tolist() for x in (goes, goes[self.owner.cpu()]))
                self.kl_before = self.kl_before[goes.repeat_interleave(self._draws(planned)) > 0]
                self.now = now = now.only(kept)
                planned, self.frozen = [planned[n] for n in kept], self.frozen.only(prompts)
                self._number(planned)
        self._check_moved(now.stuck.cpu(), planned)
        delta[planned] = now.delta.detach()
        if self.redrawn:  # as released, the passes draw on
            for _ in range(drawn, params.v_num_grad_steps):
                for edit in planned:
                    self._noises(edit)
        return Values((initial + delta)[:, 0], initial[:, 0], losses, steps, *read)

    def _read_facts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and outputs of all prompts but those of the KL term."""
        facts = [n for n, p in enumerate(prompt for each in self.prompts for prompt in each) if p.targets]
        return self.frozen.keys[facts], self.frozen.initial[facts, 0]

    def _check_moved(self, stuck: torch.Tensor, planned: Sequence[int]) -> None:
        """ValueError where the last gradient was exactly zero for an edit that goes on: it would never move."""
        if stuck.any():
            text = self.model.tokenizer.decode(self.prompts[planned[int(stuck.nonzero()[0])]][0].ids)
            raise ValueError(
                f"no gradient reaches the value of {quoted(text)} in layer {self.layer}: a part of the model behind it "
                "does not pass one on"
            )

    def _draws(self, planned: Sequence[int]) -> torch.Tensor:
        """KL prompts of each edit."""
        return torch.tensor([self.draws[edit] for edit in planned])

    def _freeze(self, planned: Sequence[int]) -> None:
        """Run the prompts of some edits as far as they do not change."""
        chosen = [prompt for edit in planned for prompt in self.prompts[edit]]
        noises = [noise for edit in planned for noise in self._noises(edit)]
        packed = PackedPrompts.sharing(self.model, [prompt.ids for prompt in chosen], noises)
        tokens, readout = [p.token for p in chosen], [p.readout for p in chosen]
        self.frozen = FrozenPrompts(packed, self.sites, self.layer, tokens, readout, self.after, self.keys)
        self._number(planned)

    def _number(self, planned: Sequence[int]) -> None:
        """Whose the prompts and the rows that are read out are, and what is scored there."""
        chosen = [prompt for edit in planned for prompt in self.prompts[edit]]
        counts = [len(self.prompts[edit]) for edit in planned]
        owner = torch.arange(len(planned)).repeat_interleave(torch.tensor(counts))  # prompt -> place in planned
        self.bare = torch.tensor([0, *counts]).cumsum(0)[:-1]
        context = torch.arange(len(chosen)) - self.bare[owner]
        rows = [len(prompt.readout) for prompt in chosen]
        target = torch.tensor([t for prompt in chosen for t in prompt.targets or (-1,)])
        of_prompt = torch.arange(len(chosen)).repeat_interleave(torch.tensor(rows))
        weight = torch.tensor([prompt.weight for prompt in chosen])[of_prompt]
        self.seen_owner, self.seen_context = owner[of_prompt][target >= 0], context[of_prompt][target >= 0]
        device = self.frozen.initial.device
        self.owner = owner.to(device)
        self.scored, self.kl = (
            ReadRows(*(x.to(device) for x in (at, owner[of_prompt[at]], weight[at], target[at])))
            for at in (x.nonzero()[:, 0] for x in (target >= 0, target < 0))
        )

    @property
    def redrawn(self) -> bool:
        """Is noise drawn anew for every pass?"""
        return any(self.streams)

    def _noises(self, edit: int) -> Sequence[EmbeddingNoise | None]:
        stream, prompts = self.streams[edit], self.prompts[edit]
        return [prompt.noise for prompt in prompts] if stream is None else stream.draw(len(prompts))

    def _loss(self, delta: torch.Tensor, planned: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, Seen | None]:
        """[planned edits]: NLL of the target (its probability, where that is to be small) + KL to the first step's
        distribution + weight decay; where there is nothing left to take away. delta: [planned, sites, hidden]."""
        params, now, device = self.params, self.now, delta.device
        states = self.frozen(delta[self.owner])
        read, known = (states[rows.at.to(states.device)] for rows in (self.scored, self.kl))
        logp = log_probabilities(self.model, read, self.scored.target).to(device)
        nll = self.scored.sums(-logp, len(planned))
        current = distribution(self.model, known).to(device)  # [KL prompts, vocab]
        if self.kl_before is None:
            self.kl_before = current.detach()
        # kl_div(before, current, log_target=True): sum_w p_current (log p_current - log p_before)
        kl = params.kl_factor * self.kl.sums((current.exp() * (current - self.kl_before)).sum(1), len(planned))
        norm = torch.linalg.vector_norm(delta, dim=-1)  # its gradient at 0 is 0
        decay = (params.v_weight_decay * norm / now.initial.norm(dim=-1) ** 2).sum(1)
        probability = (-nll).exp()  # a token's, the geometric mean
        loss = now.weight * torch.where(now.minimise, probability, nll) + kl + decay
        vanished = now.minimise & (probability.detach() == 0)
        return loss, vanished, None if self.rule is None else self._seen(planned, read.detach(), logp, kl)

    @torch.no_grad()
    def _seen(self, planned: Sequence[int], read: torch.Tensor, logp: torch.Tensor, kl: torch.Tensor) -> Seen:
        right = likeliest(self.model, read) == self.scored.target.cpu()
        edits = [self.prompts[edit][0].edit for edit in planned]
        return Seen(edits, self.seen_owner, self.seen_context, logp.detach().float().cpu(), right, kl.detach().cpu())
