"""KN: knowledge neurons made to say another token (Dai et al. 2022; rome, baselines/kn, knowledge_neurons.py:680-779).

Each neuron's row of the down projection: w += sum_i e(target_i) - 2 e(said), with e the embedding and `said` the token
that the model itself says behind the prompt. The same for every row, so a layer's change is of rank one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ...checks import Compat, typed
from ...model.facts import tokenize_fact
from ...model.hooks import at_rest
from ...model.load import EditableModel
from ...model.tokens import encode_part
from ...model.weights import find_weight, weight_is_input_first
from ...sweep.newborn import neurons_of
from ..changes import LowRank
from ..edit import Edit
from ..method import Method
from ..neurons import KNParams, knowledge_neurons
from ..request import EditRequest, check_requests, warn_of_known


@at_rest
@typed
def kn(
    model: EditableModel,
    request: EditRequest | Mapping[str, Any] | Iterable[EditRequest | Mapping[str, Any]],
    params: KNParams,
    prompts: Sequence[str] | None = None,
    compat: Compat = None,
) -> Edit:
    """One fact: a rank-one change in each layer that has one of its neurons.

    prompts, compat: see `knowledge_neurons`; compat="reference" takes the new target without its space too.

    The model is left as it was. Raises ValueError for what `knowledge_neurons` refuses, and where no neuron is left.
    """
    requests = check_requests(request)
    if len(requests) != 1:
        raise ValueError(f"kn edits one fact at a time, got {len(requests)} requests")
    fact = tokenize_fact(model, requests[0].fact())
    if compat is None:
        warn_of_known(model, requests, [fact])
    target = list(fact.target_ids) if compat is None else encode_part(model, requests[0].target_new.lstrip())
    owed = knowledge_neurons(model, requests[0], params, prompts, compat)
    if not owed.neurons:
        raise ValueError(
            f"no neuron is left that '{owed.answer.strip()}' after '{fact.fact.text}' is owed to: lower p, or leave "
            "refine out"
        )
    embedding = find_weight(model.hf, _embedding_name(model)).parameter
    if embedding is None:
        raise ValueError("the embedding is quantised: KN adds its rows to weights, load the model in floating point")
    change = embedding[target].float().sum(0) - 2 * embedding[owed.said].float()  # kn.py:749-753
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, neuron in owed.neurons:
        by_layer[layer].append(neuron)
    edit = Edit({}, METHOD.name, [requests[0].to_dict()], params.to_dict(), [], compat)
    for layer, neurons in by_layer.items():
        chosen = torch.zeros(neurons_of(model, layer), 1)
        chosen[neurons] = 1.0
        name = f"{model.modules.parameter_name(layer)}.weight"
        input_first = weight_is_input_first(model.modules.down_projection(layer))
        edit.changes[name] = LowRank(chosen, change[:, None].cpu().clone(), input_first)
    return edit.bind(model)


def _embedding_name(model: EditableModel) -> str:
    family = model.modules.family
    return f"{family.base}.{family.embedding}.weight"


METHOD = Method("kn", "KN: neurons of one fact made to say another", kn, KNParams, single=True)
