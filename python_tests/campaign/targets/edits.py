"""Edits: as files, as objects in memory; published values and moments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

import knowedit_ext as ke
from knowedit_ext.editing.changes import LowRank
from knowedit_ext.editing.methods import METHODS
from knowedit_ext.editing.published import export_values, import_values
from knowedit_ext.moments import export_npz, import_npz

from .. import containers, mutations, subjects
from ..outcome import Case


def edit_files(random: Random, folder: Path) -> Case:
    """A damaged file is refused or read as it was; a well-formed other one is refused or put on and taken off."""
    edit = subjects.edit(random.choice(list(METHODS)))
    path = folder / "edit.safetensors"
    edit.save(path)
    damaged = random.random() < 0.5
    change = mutations.octets if damaged else containers.safetensors
    path.write_bytes(change(random, path.read_bytes()))

    def call() -> ke.Edit:
        found = ke.Edit.load(path)
        found.summary()
        if not damaged:
            with found.applied(subjects.model()):
                _still_finite()
        return found

    def check(found: ke.Edit) -> None:
        if damaged:
            assert subjects.same_edit(found, edit), "a damaged file is read as another edit"
            assert found.requests == edit.requests, "a damaged file is read as another edit"

    return Case(call, check, ("edit.safetensors",) if damaged else (), "damaged" if damaged else "another header")


def edit_objects(random: Random, folder: Path) -> Case:
    """Factors and dense changes that are no such thing, on a model."""
    sound = subjects.edit(random.choice(list(METHODS)))
    rename = random.random() < 0.1
    fields = {
        field: mutations.json_value(random, getattr(sound, field) or mutations.value(random))
        for field in ("requests", "params", "contexts", "model", "base", "method")
        if random.random() < 0.1
    }
    rows = [(mutations.text(random, n) if rename else n, _parts(random, c)) for n, c in sound.changes.items()]
    do = random.choice(("apply", "twice", "save", "merge", "evaluate", "evaluate each", "peft"))
    model, made = subjects.model(), random.random() < 0.5

    def call() -> Any:
        changes = {name: LowRank(*parts) if isinstance(parts, tuple) else parts for name, parts in rows}
        edit = replace(sound, **fields)
        edit.changes = changes
        edit = replace(edit) if made else edit
        if do == "apply":
            with edit.applied(model):
                _still_finite()
        elif do == "twice":
            with edit.applied(model), edit.applied(model):
                _still_finite()
        elif do == "save":
            edit.save(folder / "edit.safetensors")
            return ke.Edit.load(folder / "edit.safetensors")
        elif do == "merge":
            return ke.Edit.merge([edit, sound])
        elif do == "peft":
            edit.to_peft(folder / "adapter")
        else:
            edits = edit if do == "evaluate" else [edit, sound]
            return ke.evaluate(model, subjects.RECORDS, edits, generation=False)
        return None

    def check(found: Any) -> None:
        assert do != "twice", "the same edit twice"
        if do in ("save", "merge"):
            assert all(torch.isfinite(delta).all() for delta in subjects.deltas(found).values()), "not finite"

    return Case(call, check, shown=do)


def _parts(random: Random, change: Any) -> Any:
    """A dense change, or what a low-rank one is made of, with something wrong."""
    if not isinstance(change, LowRank):
        return _tensor(random, change)
    parts = [change.inputs, change.outputs, change.input_first]
    at = random.randrange(3)
    if at == 2:
        parts[2] = not parts[2] if random.random() < 0.5 else mutations.value(random)
    else:
        parts[at] = _tensor(random, parts[at])
    return tuple(parts)


def _tensor(random: Random, tensor: torch.Tensor) -> Any:
    if random.random() < 0.1:
        return mutations.value(random)
    found = mutations.array(random, tensor.detach().float().cpu().numpy())
    return torch.from_numpy(np.ascontiguousarray(found)) if found.dtype.kind in "fib" else found


def _still_finite() -> None:
    for name, parameter in subjects.model().hf.named_parameters():
        assert bool(torch.isfinite(parameter).all()), f"'{name}' is not finite under the edit"


def values(random: Random, folder: Path) -> Case:
    """Published value caches, one .npz a case."""
    model, params = subjects.model(), ke.MEMITParams.from_dict(subjects.params("memit"))
    sound = torch.linspace(-1, 1, model.hidden_size)
    path = export_values(sound[None], [subjects.REQUEST], params, folder, model)[0]
    damaged = _damage(random, path, {"v_star": sound.numpy()})
    request = dict(subjects.REQUEST, case_id=mutations.value(random)) if random.random() < 0.1 else subjects.REQUEST

    def check(found: torch.Tensor) -> None:
        assert found.shape == (1, model.hidden_size) and bool(torch.isfinite(found).all())
        assert not damaged or torch.equal(found[0], sound), "a damaged file is read as other values"

    return Case(lambda: import_values(path.parent, [request], params, model), check)


def published_moments(random: Random, folder: Path) -> Case:
    """The .npz files of moments that others collected."""
    moments = subjects.moments()
    paths = export_npz(moments, folder, subjects.model())
    path = random.choice(paths)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    damaged = _damage(random, path, arrays)

    def check(found: ke.Moments) -> None:
        for layer in found:
            moment = found[layer]
            assert moment.count >= 1 and bool(torch.isfinite(moment.mean).all())
            if damaged:
                assert moment.count == moments[layer].count
                assert torch.allclose(moment.matrix(), moments[layer].matrix()), "read as other moments"

    return Case(lambda: import_npz(path.parent), check, (path.name,))


def arrays(random: Random, folder: Path) -> Case:
    """`Moments.from_arrays`, and an edit with what it takes."""
    moment = subjects.moments()[1]
    given: Any = {1: (mutations.array(random, moment.matrix().numpy()), moment.count)}
    if random.random() < 0.4:
        layer = random.choice((1, 1, -1, 3, 1.0, "1", "x", None, True, float("nan"), float("inf"), 10**400, (1,)))
        given = {layer: (moment.matrix(), mutations.value(random))}

    def call() -> ke.Edit:
        found = ke.Moments.from_arrays(given)
        options = subjects.options("rome") | dict(moments=found, ridge="smallest")
        return ke.edit(subjects.model(), [subjects.REQUEST], "rome", params=subjects.params("rome"), **options)

    def check(edit: ke.Edit) -> None:
        assert all(torch.isfinite(delta).all() for delta in subjects.deltas(edit).values()), "not finite"

    return Case(call, check)


def _damage(random: Random, path: Path, arrays: dict[str, np.ndarray]) -> bool:
    """Change a file; True: by bytes, so that it must be refused or read as it was."""
    damaged = random.random() < 0.5
    path.write_bytes(mutations.octets(random, path.read_bytes()) if damaged else containers.npz(random, arrays))
    return damaged


def trace_files(random: Random, folder: Path) -> Case:
    """A trace's .npz, read and drawn."""
    path, sound = folder / "trace.npz", subjects.trace()
    sound.save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    damaged = _damage(random, path, arrays)
    draw = random.random() < 0.05

    def call() -> ke.Trace:
        found = ke.Trace.load(path)
        if draw:
            found.plot(folder / "trace.png")
        return found

    def check(found: ke.Trace) -> None:
        assert np.isfinite(found.scores).all() and np.isfinite([found.low_score, found.high_score]).all(), "not finite"
        assert len(found.tokens) == len(found.scores)
        assert not damaged or np.array_equal(found.scores, sound.scores), "a damaged file is read as another trace"

    return Case(call, check, ("trace.npz",))


DOORS = (edit_files, edit_objects, values, published_moments, arrays, trace_files)
