"""Published value caches: written where the published code looks, read by case; anything else is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from knowedit_ext.editing.methods.memit import MEMITParams, memit, memit_values
from knowedit_ext.editing.published import export_values, import_values, value_path
from knowedit_ext.editing.request import EditRequest

from ..support.families import WIDTH
from .models import editable, fresh
from .plain import moments_of

PARAMS = MEMITParams(layers=(0, 2), v_num_grad_steps=2)
GROUPS = [["{}"], ["w11 w12. {}"]]
RECORDS = [
    {"case_id": case, "requested_rewrite": {"prompt": p, "subject": s, "target_new": {"str": t}}}
    for case, p, s, t in [(7, "w5 {} w9", "w3 w7", "w20"), (0, "{} w9", "w33", "w22 w23"), (12, "w6 {}", "w30", "w25")]
]


def write(folder: Path, case: int = 7, layer: int = 2, clamp: str = "0.75", dataset: str = "mcf", **arrays) -> Path:
    path = folder / f"{dataset}_layer_{layer}_clamp_{clamp}_case_{case}.npz"
    np.savez(path, **(arrays or {"v_star": np.ones(WIDTH, np.float32)}))
    return path


def test_the_case_is_kept() -> None:
    request = EditRequest.of(RECORDS[0])
    assert request.case_id == 7 and request == replace(request, case_id=None)
    assert EditRequest.of(request.to_dict()).case_id == 7
    assert EditRequest.of({"case_id": 3, **RECORDS[0]["requested_rewrite"]}).case_id == 3  # what memit_main.py gets
    assert EditRequest("{} a", "b", "c").case_id is None


def test_written_where_the_published_code_looks(tmp_path) -> None:
    model = editable("gpt2")
    values = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    paths = export_values(values, RECORDS, PARAMS, tmp_path, model, model_name="org/gpt2-xl")
    assert paths[1] == tmp_path / "org_gpt2-xl_MEMIT" / "mcf_layer_2_clamp_0.75_case_0.npz"
    for value, record in zip(values, RECORDS, strict=True):  # as experiments/evaluate.py and memit_main.py put it
        template = tmp_path / f"{'org/gpt2-xl'.replace('/', '_')}_MEMIT" / "mcf_layer_{}_clamp_{}_case_{}.npz"
        data = np.load(str(template).format(PARAMS.layers[-1], PARAMS.clamp_norm_factor, record["case_id"]))
        assert data.files == ["v_star"] and torch.equal(torch.from_numpy(data["v_star"]), value)
    four = replace(PARAMS, clamp_norm_factor=4.0)  # 4 in a file of settings
    assert value_path("kv", "x", four, 5, "zsre") == Path("kv/x_MEMIT/zsre_layer_2_clamp_4_case_5.npz")


def test_read_by_case(tmp_path) -> None:
    model = editable("gpt2")
    values = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    paths = export_values(values, RECORDS, PARAMS, tmp_path, model)
    some = [RECORDS[2], RECORDS[0]]
    for files in (paths[0].parent, str(paths[0].parent), paths, [str(path) for path in paths[::-1]]):
        assert torch.equal(import_values(files, some, PARAMS, model), values[[2, 0]])
    assert torch.equal(import_values(paths[1], RECORDS[1], PARAMS, model), values[[1]])


def test_memit_takes_them(tmp_path) -> None:
    model = editable("llama")
    moments = moments_of(model, PARAMS.layers)
    own = memit(model, RECORDS, PARAMS, moments, contexts=GROUPS)
    values = memit_values(model, RECORDS, PARAMS, contexts=GROUPS)
    folder = export_values(values, RECORDS, PARAMS, tmp_path, model)[0].parent
    for given in (values, folder, sorted(folder.iterdir())):
        edit = memit(model, RECORDS, PARAMS, moments, contexts=GROUPS, values=given)
        assert all(torch.equal(edit.delta(name), own.delta(name)) for name in own.changes)
    assert [request["case_id"] for request in own.requests] == [7, 0, 12]
    again = memit(
        model, RECORDS[::-1], PARAMS, moments, contexts=GROUPS, values=folder
    )  # matched by case, not by place
    for name in own.changes:
        assert (again.delta(name) - own.delta(name)).norm() < 1e-5 * own.delta(name).norm()


def test_values_refuse_what_memit_refuses() -> None:
    model = fresh("llama")
    model.modules.mlp(2).register_forward_hook(lambda module, args, output: output.tanh())
    with pytest.raises(ValueError, match="MEMIT is not defined for 'llama'"):
        memit_values(model, RECORDS, PARAMS)
    with pytest.raises(ValueError, match="layer 9 is out of range"):
        memit_values(editable("gpt2"), RECORDS, replace(PARAMS, layers=(0, 9)))
    with pytest.raises(ValueError, match="no edit requests"):
        memit_values(editable("gpt2"), [], PARAMS)


@pytest.mark.parametrize(
    "kept, message",
    [
        (dict(case=8), "no value of case 7 for layer 2 and clamp 0.75$"),
        (dict(layer=1), "no value of case 7 for layer 2 and clamp 0.75: there is one for layer 1 and clamp 0.75"),
        (dict(clamp="4"), "no value of case 7 for layer 2 and clamp 0.75: there is one for layer 2 and clamp 4"),
        (dict(v_star=np.ones(WIDTH - 1, np.float32)), rf"case_7.npz' holds float32 \[31\]: expected \[{WIDTH}\]"),
        (dict(v_star=np.ones((1, WIDTH))), rf"holds float64 \[1, {WIDTH}\]"),
        (dict(v_star=np.ones(WIDTH, np.int64)), "holds int64"),
        (dict(v_star=np.full(WIDTH, np.nan)), "case_7.npz' holds NaN"),
        (dict(left_vector=np.ones(WIDTH), right_vector=np.ones(4)), "lacks v_star and holds left_vector, right_vector"),
        (dict(v_star=np.array([{}])), "case_7.npz' is not the .npz file expected: .*allow_pickle"),
    ],
)
def test_files_that_do_not_fit(kept: dict, message: str, tmp_path) -> None:
    write(tmp_path, **kept)
    with pytest.raises(ValueError, match=message):
        import_values(tmp_path, RECORDS[:1], PARAMS, editable("gpt2"))


def test_what_cannot_be_found(tmp_path) -> None:
    model = editable("gpt2")
    with pytest.raises(ValueError, match="folder '.*' has no value file"):
        import_values(tmp_path, RECORDS, PARAMS, model)
    with pytest.raises(FileNotFoundError):
        import_values(tmp_path / "mcf_layer_2_clamp_0.75_case_7.npz", RECORDS[:1], PARAMS, model)
    path = write(tmp_path)
    with pytest.raises(ValueError, match="no value of case 0 for layer 2"):
        import_values(tmp_path, RECORDS, PARAMS, model)
    with pytest.raises(ValueError, match="the request 'w5 w3 w9' has no case_id"):
        import_values(tmp_path, EditRequest("w5 {} w9", "w3", "w20"), PARAMS, model)
    write(tmp_path, dataset="zsre")
    with pytest.raises(ValueError, match=r"case 7 has several values \('.*mcf_.*', '.*zsre_.*'\): name the files"):
        import_values(tmp_path, RECORDS[:1], PARAMS, model)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="case_7.npz' is not the .npz file expected"):
        import_values([path], RECORDS[:1], PARAMS, model)
    with pytest.raises(ValueError, match="'values.npz' is not named like a value file"):
        import_values(["values.npz"], RECORDS[:1], PARAMS, model)


def test_what_is_not_written(tmp_path) -> None:
    model = editable("gpt2")
    with pytest.raises(ValueError, match=r"values are \[2, 32\]: expected \[3 requests, 32\]"):
        export_values(torch.zeros(2, WIDTH), RECORDS, PARAMS, tmp_path, model)
    with pytest.raises(ValueError, match="case 7 comes twice"):
        export_values(torch.zeros(2, WIDTH), [RECORDS[0], RECORDS[0]], PARAMS, tmp_path, model)
    with pytest.raises(ValueError, match="has no case_id"):
        export_values(torch.zeros(1, WIDTH), EditRequest("{} a", "b", "c"), PARAMS, tmp_path, model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong", [dict(dataset="../../x"), dict(dataset="/x"), dict(case="../../x"), dict(case="a\0b"), dict(name="..")]
)
def test_no_name_leads_out_of_the_folder(tmp_path, wrong) -> None:
    record = RECORDS[0] | {"case_id": wrong.get("case", 7)}
    dataset, name = wrong.get("dataset", "mcf"), wrong.get("name")
    with pytest.raises(ValueError, match="cannot name a file"):
        export_values(torch.zeros(1, WIDTH), [record], PARAMS, tmp_path, editable("gpt2"), dataset, name)
    assert not list(tmp_path.iterdir())
