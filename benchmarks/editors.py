"""Cases of `run.py`: MEND's edits of 32 records, and its training, against the published loops."""

from __future__ import annotations

from typing import Any

import naive_editors
import torch
from editing import check, requests_of_world
from shared import timed

import knowedit_ext as ke
from knowedit_ext.editors.texts import Text, text_of_request
from knowedit_ext.model.tokens import encode_all
from knowedit_ext.world import load_world

RANK, ITERATIONS, LOC_TOKENS = 1920, 8, 100


def mend_editor(model: ke.EditableModel) -> ke.MEND:
    """Of the published size, its network random, with statistics of random rows."""
    editor = ke.MEND.new(model, rank=RANK)
    torch.manual_seed(0)
    with torch.no_grad():
        for transform in editor.network.mend.values():
            for layer in transform.mlp["layers"]:
                layer.u.normal_(std=1e-3)
            transform.observe(*(torch.randn(64, width) for width in transform.widths))
    return editor


def mend_case(model: ke.EditableModel, repeat: int) -> dict[str, Any]:
    """An edit of each of 32 records, in one packed pass."""
    editor, requests = mend_editor(model), requests_of_world()
    names, tensors = [weight.name for weight in editor.weights], editor.tensors
    ke.mend_each(model, requests[:1], editor)  # the probe of the model
    ours, seconds = timed(lambda: ke.mend_each(model, requests, editor), repeat)
    texts = [text_of_request(model, request.fact()) for request in requests]

    def loop() -> list[dict[str, torch.Tensor]]:
        changes = []
        for text in texts:
            rows = naive_editors.gradient_rows(model.hf, text.ids, len(text.scored), names)
            changes.append(naive_editors.changes(tensors, rows, names))
        return changes

    plain, plain_seconds = timed(loop, 1)
    pairs = [(edit.delta(name), one[name]) for edit, one in zip(ours, plain, strict=True) for name in names]
    error = max(float((ours - plain).norm() / plain.norm()) for ours, plain in pairs)
    return check("mend", error, 1e-3, seconds, plain_seconds)


def train_editor_case(model: ke.EditableModel, repeat: int) -> dict[str, Any]:
    """Iterations of training, each of one edit and two texts of 100 tokens, no step of the optimiser between them."""
    return _training(model, repeat, seen=False)


def train_editor_again_case(model: ke.EditableModel, repeat: int) -> dict[str, Any]:
    """The same where all texts were met before: a training draws them again and again."""
    return _training(model, repeat, seen=True)


def _training(model: ke.EditableModel, repeat: int, seen: bool) -> dict[str, Any]:
    requests = requests_of_world()[:ITERATIONS]
    texts = [text_of_request(model, request.fact()) for request in requests]
    (long,) = encode_all(model, [" ".join(load_world().statements())])
    loc = [Text.of_last(long[n * LOC_TOKENS : (n + 1) * LOC_TOKENS], LOC_TOKENS) for n in range(2 * ITERATIONS)]
    batches = [([text], [text], loc[2 * n : 2 * n + 2]) for n, text in enumerate(texts)]
    params = ke.EditorTrainingParams(accumulate_bs=1000)

    def begun() -> ke.EditorTraining:
        training = ke.EditorTraining(model, mend_editor(model), params)
        for transform in training.editor.network.mend.values():
            transform.observe = lambda *_: None  # statistics stand still, so that both loops have the same
        return training

    trainings = [begun() for _ in range(repeat)]
    if seen:
        for training in trainings:
            training.steps(batches)
            training.optimizer.zero_grad()
    waiting = iter(trainings)

    def ours() -> tuple[list[tuple[float, float]], torch.Tensor]:
        training = next(waiting)
        losses = [(report["loss/edit"], report["loss/loc"]) for report in training.steps(batches)]
        return losses, training.editor.network.edit_lrs.grad

    def loop() -> tuple[list[tuple[float, float]], torch.Tensor]:
        editor = mend_editor(model)
        tensors = {**editor.tensors, **dict(editor.network.named_parameters())}
        names = [weight.name for weight in editor.weights]
        for parameter in model.hf.parameters():
            parameter.requires_grad_(True)
        losses = []
        for n, text in enumerate(texts):
            asked = (text.ids, len(text.scored))
            given = [each.ids for each in loc[2 * n : 2 * n + 2]]
            losses.append(naive_editors.iteration(model.hf, tensors, names, asked, asked, given, 0.1, 1.0, 1000))
        return losses, editor.network.edit_lrs.grad

    (losses, gradient), seconds = timed(ours, repeat)
    (plain, plain_gradient), plain_seconds = timed(loop, 1)
    error = float((torch.tensor(losses) - torch.tensor(plain)).norm() / torch.tensor(plain).norm())
    error = max(error, float((gradient - plain_gradient).norm() / plain_gradient.norm()))
    return check("train_editor_again" if seen else "train_editor", error, 1e-3, seconds, plain_seconds)
