"""Case of `run.py`: 32 facts edited by ROME and scored at six layers, as a study of localization does."""

from __future__ import annotations

from typing import Any

import naive_editing
import naive_evaluation
import torch
from editing import CONTEXTS, EDITS, check, requests_of_world, texts
from shared import peak_memory, timed

import knowedit_ext as ke
from knowedit_ext.model.facts import Fact, tokenize_fact
from knowedit_ext.model.tokens import encode
from knowedit_ext.studies.localization_scores import measure
from knowedit_ext.world import load_world

LAYERS = (0, 2, 4, 6, 8, 10)
PART = 1  # facts that the published loop is timed on; its facts go one by one, so that time goes by their number
KINDS = ("rewrite", "paraphrase", "neighborhood")


def layers_case(model: ke.EditableModel, repeat: int) -> dict[str, Any]:
    """Contexts and moments are given; 20 steps, no early stop, as in google/belief-localization (compat "hase")."""
    torch.manual_seed(0)
    requests = requests_of_world()
    by_id = {record["case_id"]: record for record in load_world().records()}
    records = [by_id[request.case_id] for request in requests]
    contexts = [context for group in CONTEXTS for context in group]
    width = model.modules.down_projection(0).nx
    matrices = {}
    for layer in LAYERS:
        a = torch.randn(2 * width, width)
        matrices[layer] = a.T @ a / len(a)

    def ours() -> list[list[dict[str, float]]]:
        moments = ke.Moments.from_arrays({layer: (m, 10 * width) for layer, m in matrices.items()})
        found = []
        for layer in LAYERS:
            params = ke.ROMEParams(layers=(layer,), v_num_grad_steps=20)
            edits = ke.rome_each(model, requests, params, moments, contexts=contexts, compat="hase")
            found.append(measure(model, records, requests, edits))
        return found

    (found, seconds), memory = peak_memory(lambda: timed(ours, repeat))

    def loop() -> list[list[dict[str, float]]]:
        """Edit, score, restore, one after the other; the inverses are computed once a layer, as they are kept there."""
        scores = []
        for layer in LAYERS:
            inverse = torch.linalg.inv(matrices[layer])
            scores.append([_plain(model, requests[n], records[n], contexts, layer, inverse) for n in range(PART)])
        return scores

    (plain, plain_seconds), plain_memory = peak_memory(lambda: timed(loop, 1))
    error = max(
        abs(mine[n][kind] - theirs[n][kind]) / theirs[n][kind]
        for mine, theirs in zip(found, plain, strict=True)
        for n in range(PART)
        for kind in KINDS
    )
    whole = plain_seconds * EDITS / PART
    note = f"layers: the plain loop took {plain_seconds:.1f} s for {PART} of {EDITS} facts, here times {EDITS // PART}"
    return check("layers", error, 1e-2, seconds, whole) | {
        "peak_mb": memory,
        "plain_peak_mb": plain_memory,
        "note": note,
    }


def _plain(
    model: ke.EditableModel,
    request: Any,
    record: dict[str, Any],
    contexts: list[str],
    layer: int,
    inverse: torch.Tensor,
) -> dict[str, float]:
    params = ke.ROMEParams(layers=(layer,), v_num_grad_steps=20)
    kl = tokenize_fact(model, Fact("{} is a", request.subject))
    left, right = naive_editing.rome(
        model.hf,
        model.modules.mlp(layer),
        model.modules.down_projection(layer),
        texts(model, request, contexts, True),
        texts(model, request, contexts, False),
        naive_editing.Text(kl.ids, kl.subject_range[1] - 1),
        inverse,
        params,
    )
    weight = model.modules.down_projection(layer).weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight += left[:, None] @ right[None]
        first = {**record, "requested_rewrite": {**record["requested_rewrite"]}}
        for sort in ("paraphrase_prompts", "neighborhood_prompts"):
            first[sort] = record[sort][:1]
        scores = naive_evaluation.evaluate_record(model.hf, lambda text: encode(model, text)[0], first)
        weight.copy_(before)
    tokens = len(tokenize_fact(model, request.fact()).target_ids)
    nll = {kind: scores[f"{kind}_prompts_probs"][0]["target_new"] for kind in KINDS}
    return {kind: float(torch.tensor(-value * tokens).exp()) for kind, value in nll.items()}
