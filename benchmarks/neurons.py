"""A case of `run.py`: the scores of all neurons for one fact, against the published loop."""

from __future__ import annotations

from typing import Any

import torch
from editing import check
from shared import peak_memory, timed
from torch import nn

import knowedit_ext as ke
from knowedit_ext.model.facts import tokenize_fact
from knowedit_ext.world import load_world

STEPS = 20
TOKENS = 8  # of a prompt: the median of CounterFact's under GPT-2's tokenizer; known_1000's is 9
SHORT = 6  # three in four of CounterFact's are longer


def published_scores(hf: nn.Module, modules: list[nn.Module], ids: list[int], target: int, steps: int) -> torch.Tensor:
    """[layers, neurons]: whole prompts, layer by layer (knowledge_neurons.py:449-531, integrated gradients)."""
    scores = []
    for module in modules:
        clean: list[torch.Tensor] = []

        def keep(module: nn.Module, args: tuple, output: torch.Tensor, clean: list[torch.Tensor] = clean) -> None:
            clean.append(output[0, -1].detach())

        handle = module.register_forward_hook(keep)
        with torch.no_grad():
            hf(torch.tensor([ids]))
        handle.remove()
        scaled = (torch.linspace(0, 1, steps)[:, None] * clean[0]).requires_grad_()

        def put(module: nn.Module, args: tuple, output: torch.Tensor, scaled: torch.Tensor = scaled) -> torch.Tensor:
            output = output.clone()
            output[:, -1] = scaled
            return output

        handle = module.register_forward_hook(put)
        p = hf(torch.tensor([ids] * steps)).logits[:, -1].softmax(-1)[:, target]
        handle.remove()
        (gradient,) = torch.autograd.grad(p.sum(), scaled)
        scores.append(clean[0] / steps * gradient.sum(0))
    return torch.stack(scores)


def neurons_case(model: ke.EditableModel, repeat: int, tokens: int = TOKENS) -> dict[str, Any]:
    """A fact of the world whose answer is one token and whose prompt has so many, 20 points in each of 12 layers."""
    facts = ((ke.EditRequest.of(record)) for record in load_world().records())
    for request in facts:
        fact = tokenize_fact(model, ke.Fact(request.prompt, request.subject, request.target_true))
        if len(fact.target_ids) == 1 and len(fact.ids) == tokens:
            break
    params = ke.KNParams(steps=STEPS)
    modules = [model.modules.gate_projection(layer) for layer in range(model.num_layers)]
    ours = lambda: ke.knowledge_neurons(model, request, params)  # noqa: E731
    ours()  # once for the probe of the model and for its layers' arguments
    (neurons, seconds), memory = peak_memory(lambda: timed(ours, repeat))
    loop = lambda: published_scores(model.hf, modules, list(fact.ids), fact.target_ids[0], STEPS)  # noqa: E731
    (plain, plain_seconds), plain_memory = peak_memory(lambda: timed(loop, 1))
    error = float((torch.from_numpy(neurons.scores) - plain).abs().max() / plain.abs().max())
    return check("neurons", error, 1e-4, seconds, plain_seconds) | {"peak_mb": memory, "plain_peak_mb": plain_memory}


def short_neurons_case(model: ke.EditableModel, repeat: int) -> dict[str, Any]:
    """The same of a short prompt, where the published loop computes fewer rows for nothing."""
    return neurons_case(model, repeat, SHORT)
