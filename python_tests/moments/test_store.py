"""Saving, loading, checking, merging moments; published .npz files; solving with them."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from moments.test_collect import texts
from support.families import tiny_hf, tiny_model, under_config
from support.tokenizers import word_level

import knowedit_ext as ke
from knowedit_ext.model.identity import checksum
from knowedit_ext.moments import NotPositiveDefiniteError, export_npz, import_npz
from knowedit_ext.moments.triangle import pack, symmetric, unpack


def random_moment(d: int = 128, count: int = 500, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / count


@pytest.fixture(scope="module")
def collected() -> ke.Moments:
    return ke.collect_moments(tiny_model("gpt2"), texts(30), [1, 2], progress=False)


def test_from_arrays_gives_the_matrix_back():
    matrix = random_moment().float()
    for given in (matrix, matrix.numpy(), matrix.double()):
        m = ke.Moments.from_arrays({3: (given, 500)})
        assert m.layers == [3] and list(m) == [3] and len(m) == 1 and 3 in m and 4 not in m
        assert m[3].count == 500 and torch.equal(m[3].matrix(), symmetric(matrix))
    m[3].matrix().zero_()
    assert m[3].matrix().any()
    with pytest.raises(KeyError, match=r"no moments of layer 5: there are those of 3"):
        m[5]


@pytest.mark.parametrize(
    "matrix, count, message",
    [
        (torch.ones(3, 4), 5, r"must be \[d_in, d_in\], got \[3, 4\]"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), 5, "not symmetric"),
        (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), 5, "not finite"),
        (torch.eye(3), 0, "keys of layer . is 0: expected at least 1"),
    ],
)
def test_from_arrays_refuses(matrix, count, message):
    with pytest.raises(ValueError, match=message):
        ke.Moments.from_arrays({1: (matrix, count)})


@pytest.mark.parametrize("matrix", [None, "x", {}, object(), [[1.0], [1.0, 2.0]], np.array(["a"]), [[10**400]]])
def test_what_is_no_matrix(matrix):
    with pytest.raises((TypeError, ValueError), match="moments of layer 1 "):
        ke.Moments.from_arrays({1: (matrix, 5)})


def test_triangles():
    matrix = random_moment(37)
    assert torch.equal(unpack(pack(matrix), 37), symmetric(matrix))
    assert torch.equal(symmetric(matrix.tril(), block=5), symmetric(matrix))
    with pytest.raises(ValueError, match="a triangle of width 4 has 10 entries, not 9"):
        unpack(torch.zeros(9), 4)


def test_save_and_load(tmp_path, collected):
    collected.save(tmp_path / "a")
    again = ke.Moments.load(tmp_path / "a")
    assert again.layers == [1, 2]
    for layer in again:
        assert torch.equal(again[layer].mean, collected[layer].mean)
        assert (again[layer].count, again[layer].origin) == (collected[layer].count, collected[layer].origin)
    again.save(tmp_path / "b")
    assert all((tmp_path / "b" / p.name).read_bytes() == p.read_bytes() for p in (tmp_path / "a").iterdir())
    assert ke.Moments.load(tmp_path / "a", layers=[2]).layers == [2]
    sidecar = json.loads((tmp_path / "a" / "layer_1.json").read_text())
    assert sidecar["count"] == collected[1].count and sidecar["width"] == 128
    assert sidecar["origin"]["texts"][0]["texts"] == 30


def test_bad_stores(tmp_path, collected):
    with pytest.raises(ValueError, match="is no folder"):
        ke.Moments.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no moments"):
        ke.Moments.load(tmp_path)
    collected.save(tmp_path)
    with pytest.raises(ValueError, match=r"no moments of layer 3: there are \[1, 2\]"):
        ke.Moments.load(tmp_path, layers=[3])
    path = tmp_path / "layer_1.json"
    text = path.read_text()
    path.write_text(text.replace(f'"count": {collected[1].count}', '"count": 7'))
    with pytest.raises(ValueError, match="not of one collection"):
        ke.Moments.load(tmp_path)
    path.write_text(text.replace("float32", "float16"))
    with pytest.raises(ValueError, match="its fingerprint is not that of the weights"):
        ke.Moments.load(tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="does not describe moments"):
        ke.Moments.load(tmp_path)
    path.write_text(text)
    path.with_suffix(".safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        ke.Moments.load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (('"batch_tokens": 64', '"batch_tokens": 65'), "not of one collection"),
        (('"missing": null', '"missing": 0.5'), "not of one collection"),
        (('"width": 128', '"width": -1'), "does not describe moments"),
        (('"width": 128', '"width": 1000000000'), "not of one collection"),
        (('"origin": {', '"origin": 3, "x": {'), "does not describe moments"),
        (("{", "[", 1), "is not JSON"),
    ],
)
def test_altered_stores(tmp_path, change, message):
    moments = ke.collect_moments(tiny_model("gpt2"), texts(10), [1], batch_tokens=64, progress=False)
    moments.save(tmp_path)
    path = tmp_path / "layer_1.json"
    text = path.read_text()
    path.write_text(text.replace(*change))
    assert path.read_text() != text
    with pytest.raises(ValueError, match=rf"layer_1\.json'.*{message}|layer_1\.json' is not JSON"):
        ke.Moments.load(tmp_path)


def changed(name: str) -> ke.EditableModel:
    hf = tiny_hf("gpt2")
    hf.get_parameter(name).data.view(-1)[-1] += 1e-3
    return ke.load_model((hf, word_level()))


def test_check_knows_the_model(collected):
    assert collected.check(tiny_model("gpt2"), 1) is collected[1]
    for name in ("transformer.wte.weight", "transformer.h.0.mlp.c_proj.weight", "transformer.h.1.mlp.c_fc.bias"):
        with pytest.raises(ValueError, match=f"collected over another model.*'{name}' has other values"):
            collected.check(changed(name), 1)
    for name in ("transformer.h.1.mlp.c_proj.weight", "transformer.h.2.attn.c_attn.weight", "transformer.ln_f.weight"):
        collected.check(changed(name), 1)  # keys of layer 1 do not depend on these
    relu = under_config(tiny_hf("gpt2"), activation_function="relu")
    with pytest.raises(ValueError, match=r"collected over another model.*config.activation_function"):
        collected.check(ke.load_model((relu, word_level())), 1)
    with pytest.raises(ValueError, match="layer 9 is outside"):
        collected.check(tiny_model("gpt2"), 9)
    # the same width, another family
    with pytest.raises(ValueError, match="collected over another model.*no weight 'transformer.h.0"):
        collected.check(tiny_model("gptj"), 1)


def test_check_knows_the_width(collected):
    with pytest.raises(ValueError, match="are 128 wide, but the down projection of .* takes keys of width 48"):
        collected.check(tiny_model("llama"), 1)
    ke.Moments.from_arrays({1: (random_moment(48), 5)}).check(tiny_model("llama"), 1)


def test_known_edits_are_recognised(collected):
    name = "transformer.h.0.mlp.c_proj.weight"
    edited, original = changed(name), tiny_hf("gpt2").get_parameter(name)
    collected.check(edited, 2, originals={name: original})
    with pytest.raises(ValueError, match="has other values"):
        collected.check(edited, 2, originals={name: original + 1})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_model_in_another_dtype_is_the_one_in_float32(collected, dtype):
    hf = tiny_hf("gpt2").to(getattr(torch, dtype))
    collected.check(ke.load_model((hf, word_level())), 1)
    hf.transformer.h[0].mlp.c_proj.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=rf"has other values \(and is {dtype}, was float32\)"):
        collected.check(ke.load_model((hf, word_level())), 1)


def test_a_store_from_before_float16_was_told_apart(collected):
    origin = dict(collected[1].origin)
    origin["weights"] = {name: row[:4] for name, row in origin["weights"].items()}
    old = ke.Moments({1: replace(collected[1], origin=origin)})
    for dtype in (torch.float32, torch.bfloat16):
        old.check(ke.load_model((tiny_hf("gpt2").to(dtype), word_level())), 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(128, 128), (33, 512), (1024, 64), (5, 7)])
def test_checksums_see_what_is_done_to_a_whole_matrix(shape, dtype):
    """Arithmetic on all entries alike, which sums of bits may not see."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    changed = [x, -x, x.abs(), x.flip(0), x.flip(1), x.roll(1, 0), x.roll(1, 1), x.roll(len(x) // 2, 0), x + 1]
    changed += [x * 2.0**power for power in range(-8, 9) if power]
    assert len({checksum(y) for y in changed}) == len(changed)


def test_checksums_see_every_entry_and_its_place():
    x = torch.randn(1000, 3)
    seen = {checksum(x), checksum(x.flip(0)), checksum(x.T)}
    for at in (0, 1500, 2999):
        y = x.clone()
        y.view(-1)[at] = torch.nextafter(y.view(-1)[at], torch.tensor(9.0))
        seen.add(checksum(y))
    assert len(seen) == 6 and checksum(x) == checksum(x.clone())
    assert checksum(torch.zeros(3)) != checksum(-torch.zeros(3))


def test_merge(collected):
    some = texts(50)
    model = tiny_model("gpt2")
    parts = [ke.collect_moments(model, t, [1, 2], progress=False) for t in (some[:20], some[20:])]
    whole, merged = ke.collect_moments(model, some, [1, 2], progress=False), ke.Moments.merge(*parts)
    for layer in (1, 2):
        assert merged[layer].count == whole[layer].count
        torch.testing.assert_close(merged[layer].mean, whole[layer].mean, rtol=1e-5, atol=1e-5)
    assert len(merged[1].origin["texts"]) == 2
    merged.check(model, 1)
    with pytest.raises(ValueError, match="two parts are over the same text"):
        ke.Moments.merge(merged, parts[0])
    other = ke.collect_moments(ke.load_model((tiny_hf("gpt2", seed=1), word_level())), some, [1], progress=False)
    with pytest.raises(ValueError, match="moments of layer 1 are of two models"):
        ke.Moments.merge(parts[0], other)
    with pytest.raises(ValueError, match="of unknown origin"):
        ke.Moments.merge(parts[0], ke.Moments.from_arrays({1: (random_moment(), 5)}))
    arrays = [ke.Moments.from_arrays({1: (random_moment(seed=s), n)}) for s, n in ((1, 100), (2, 300))]
    want = (random_moment(seed=1) + 3 * random_moment(seed=2)) / 4
    torch.testing.assert_close(ke.Moments.merge(*arrays)[1].mean, want)
    assert ke.Moments.merge(arrays[0], ke.Moments.from_arrays({2: (random_moment(), 5)})).layers == [1, 2]


def test_published_files(tmp_path, collected):
    model = tiny_model("gpt2")
    paths = export_npz(collected, tmp_path, model, "wikipedia", 100000, model_name="org/gpt2-xl")
    name = "org_gpt2-xl/wikipedia_stats/transformer.h.1.mlp.c_proj_float32_mom2_100000.npz"
    assert paths[0] == tmp_path / name
    with np.load(paths[0], allow_pickle=False) as archive:
        assert set(archive.files) == {"mom2.constructor", "mom2.count", "mom2.mom2", "sample_size"}
        assert str(archive["mom2.constructor"]) == "util.runningstats.SecondMoment()"
        assert int(archive["mom2.count"]) == collected[1].count and int(archive["sample_size"]) == 100000
        assert archive["mom2.mom2"].dtype == np.float32
    for source in (paths, paths[0].parent):
        again = import_npz(source)
        assert again.layers == [1, 2] and again[1].count == collected[1].count
        torch.testing.assert_close(again[1].matrix(), collected[1].matrix(), rtol=1e-6, atol=1e-6)
    (double, _) = export_npz(collected, tmp_path, model, precision="float64")
    assert double.name == "transformer.h.1.mlp.c_proj_float64_mom2.npz"
    assert np.load(double)["mom2.mom2"].dtype == np.float64
    torch.testing.assert_close(import_npz(double)[1].mean, collected[1].mean, rtol=1e-15, atol=1e-15)
    with pytest.raises(ValueError, match="unknown precision 'float16'"):
        export_npz(collected, tmp_path, model, precision="float16")
    import_npz(paths[1]).check(model, 2)
    again.save(tmp_path / "store")
    assert ke.Moments.load(tmp_path / "store")[1].origin is None


def test_bad_published_files(tmp_path):
    def write(name: str = "transformer.h.1.mlp.c_proj_float32_mom2.npz", **changes):
        path = tmp_path / name
        good = {"mom2.constructor": "x.SecondMoment()", "mom2.count": 3, "mom2.mom2": np.eye(2), "sample_size": 1}
        np.savez(path, **{k: v for k, v in (good | changes).items() if v is not None})
        return path

    for changes, message in [
        ({"name": "nolayer_mom2.npz"}, "no layer number in its name"),
        ({"mom2.mom2": None}, "lacks mom2.mom2"),
        ({"mom2.constructor": "x.Mean()"}, "not second moments"),
        ({"mom2.count": 0}, "mom2.count is 0: expected at least 1"),
        ({"mom2.mom2": np.array([[object()]])}, "Object arrays cannot be loaded"),
    ]:
        with pytest.raises(ValueError, match=message):
            import_npz(write(**changes))
    (tmp_path / "a.1.b_mom2.npz").write_bytes(b"PK half")
    with pytest.raises(ValueError):
        import_npz(tmp_path)


# ---- solving ----


def keys(n: int, d: int = 128) -> torch.Tensor:
    return torch.randn(d, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


@pytest.mark.parametrize("n, method", [(1, "woodbury"), (30, "woodbury"), (100, "sum")])
def test_solve(n, method):
    c, k = random_moment(), keys(n)
    m = ke.Moments.from_arrays({3: (c, 500)})
    solution = m.solve(3, k, 15000.0)
    want = torch.linalg.solve(15000 * c + k @ k.T, k)
    torch.testing.assert_close(solution.matrix, want, rtol=1e-9, atol=1e-12)
    assert solution.method == method and solution.backward_error <= 1e-14 and solution.ridge == 0


def test_factors_are_kept_by_layer_and_weight():
    m = ke.Moments.from_arrays({3: (random_moment(), 500), 4: (random_moment(seed=1), 500)})
    first = m.solve(3, keys(2), 10.0)
    assert torch.equal(m.solve(3, keys(2), 10.0).matrix, first.matrix) and (len(m.factors), m.factors.hits) == (1, 1)
    m.solve(4, keys(2), 10.0), m.solve(3, keys(2), 20.0), m.solve(3, keys(5), 20.0)
    assert (len(m.factors), m.factors.hits) == (3, 2)
    m.factors.limit = 1
    m.solve(3, keys(2), 10.0)
    assert len(m.factors) == 1
    m.factors.clear()
    m.by_layer[3] = ke.Moments.from_arrays({3: (random_moment(seed=5), 7)})[3]
    other = m.solve(3, keys(2), 10.0).matrix
    torch.testing.assert_close(other, torch.linalg.solve(10 * m[3].mean + keys(2) @ keys(2).T, keys(2)))


def test_too_few_keys():
    m = ke.Moments.from_arrays({7: (random_moment(count=20), 20)})
    with pytest.raises(NotPositiveDefiniteError, match="layer 7 are not positive definite: they are over 20 keys") as e:
        m.solve(7, keys(3), 100.0)
    assert e.value.layer == 7 and e.value.count == 20 and e.value.pivot < 1e-8
    assert e.value.pivot <= 1e-10 and 20 <= e.value.order <= 128
    ridge = e.value.ridge
    named = m.solve(7, keys(3), 100.0, ridge=ridge)
    assert named.ridge == ridge and named.backward_error <= 1e-12
    asked = m.solve(7, keys(3), 100.0, ridge="smallest")
    assert asked.ridge == ridge and torch.equal(asked.matrix, named.matrix)
    with pytest.raises(NotPositiveDefiniteError):
        m.solve(7, keys(3), 100.0)  # only what was asked for gets a ridge
    sound = ke.Moments.from_arrays({7: (random_moment(), 500)})
    assert sound.solve(7, keys(3), 100.0, ridge="smallest").ridge == 0


def test_low_precision(caplog):
    m = ke.Moments.from_arrays({3: (random_moment(), 500)})
    solution = m.solve(3, keys(4), 10.0, low_precision=True)
    assert solution.steps >= 1 and solution.backward_error <= 1e-14 and solution.method == "woodbury"
    q = torch.linalg.qr(keys(128)).Q
    m = ke.Moments.from_arrays({3: ((q * torch.logspace(-10, 0, 128, dtype=torch.float64)) @ q.T, 500)})
    with caplog.at_level(logging.INFO):
        solution = m.solve(3, keys(4), 10.0, low_precision=True)
    assert solution.backward_error <= 1e-14


def test_solve_refuses():
    m = ke.Moments.from_arrays({3: (random_moment(), 500)})
    for bad, message in [
        (dict(keys=keys(2, 100)), r"keys of layer 3 must be \[128, n\], got \[100, 2\]"),
        (dict(keys=keys(2) * float("nan")), "keys of layer 3 are not finite"),
        (dict(weight=0.0), "weight must be positive"),
        (dict(ridge="some"), "unknown ridge 'some'"),
    ]:
        with pytest.raises(ValueError, match=message):
            m.solve(**(dict(layer=3, keys=keys(2), weight=1.0) | bad))


@pytest.mark.parametrize("wrong", [dict(dataset="../x"), dict(model_name=".."), dict(dataset="a/b")])
def test_no_name_leads_out_of_the_folder(tmp_path, collected, wrong):
    with pytest.raises(ValueError, match="cannot name a file"):
        export_npz(collected, tmp_path, tiny_model("gpt2"), **wrong)
    assert not list(tmp_path.iterdir())
