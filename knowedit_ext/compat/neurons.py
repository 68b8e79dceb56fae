"""EasyEdit's search for knowledge neurons (KN): what it then does with them stays its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import knowedit_ext as ke
from knowedit_ext.model.tokens import encode_part

from .swap import NotServed, Upstream
from .translate import opened

_ANSWERING = ("gpt", "llama", "qwen")  # whose answers it reads by the tokenizer


def get_refined_neurons(
    searched: Any,
    prompts: Sequence[str],
    ground_truth: str,
    negative_examples: Sequence[str] | None = None,
    p: float = 0.5,
    batch_size: int = 10,
    steps: int = 20,
    coarse_adaptive_threshold: float | None = 0.3,
    coarse_threshold: float | None = None,
    coarse_percentile: float | None = None,
    quiet: bool = False,
    refine: bool = False,
    *,
    upstream: Upstream | None = None,
) -> list[list[int]]:
    """[[layer, neuron]] that `ground_truth` behind the prompts is owed to.

    searched: its KnowledgeNeurons, with a model, a tokenizer and a model_type. negative_examples change nothing there
    either.
    """
    if coarse_adaptive_threshold is None or coarse_threshold is not None or coarse_percentile is not None:
        raise NotServed("a threshold of neurons other than a share of the highest score")
    if not any(family in searched.model_type for family in _ANSWERING):
        raise NotServed(f"knowledge neurons of a '{searched.model_type}'")
    first, *others = prompts
    request = ke.EditRequest("{}", first, ground_truth, target_true=ground_truth, space=False)
    params = ke.KNParams(steps=steps, adaptive_threshold=coarse_adaptive_threshold, p=p, refine=refine)
    with opened(searched.model, searched.tokenizer) as model:
        if list(searched.tokenizer.encode(ground_truth)) != list(encode_part(model, ground_truth.lstrip())):
            raise NotServed("the answer's tokens there hold a special one, or a space in front")
        owed = ke.knowledge_neurons(model, request, params, others or None, compat="reference")
    return [list(neuron) for neuron in owed.neurons]
