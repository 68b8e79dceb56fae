"""The functions by themselves: as the libraries' own would be called, for models and data made here."""

from __future__ import annotations

import copy
import sys
import threading
import types

import numpy as np
import pytest
import torch
from transformers import T5Config

import knowedit_ext as ke
from knowedit_ext.compat import ahead, easyedit, metrics_easyedit, rome
from knowedit_ext.compat.metrics_easyedit import asking
from knowedit_ext.compat.runner import CudaIsCPU, main
from knowedit_ext.compat.swap import NotServed, Upstream
from knowedit_ext.moments import export_npz

from ..editing.models import fresh
from ..editing.plain import moments_of

LAYERS, SAMPLES = [1, 2], 300
ASKED = [
    {"prompt": "w5 w3 w7 w9 w10", "subject": "w3 w7", "target_new": "w20"},
    {"prompt": "w33 w9", "subject": "w33", "target_new": "w22 w4"},
    {"prompt": "w8 w12 w9", "subject": "w12", "target_new": "w30"},
]
CONTEXTS = ["{}", "w1 w2. {}", "w4. {}"]


def as_rome(request: dict) -> dict:
    return {
        **request,
        "prompt": request["prompt"].replace(request["subject"], "{}"),
        "target_new": {"str": request["target_new"]},
    }


@pytest.fixture
def model():
    editable = fresh("gpt2")
    editable.tokenizer.pad_token = editable.tokenizer.pad_token or "w0"
    editable.hf.config._name_or_path = "some/gpt2-tiny"
    return editable


@pytest.fixture
def hparams(model, tmp_path):
    """Every key that any of the methods reads; statistics where both kinds of library look for them."""
    for name in ("gpt2-tiny", "some_gpt2-tiny"):
        export_npz(moments_of(model, LAYERS), tmp_path, model, "wikipedia", SAMPLES, name)
    easyedit.CONTEXT_TEMPLATES_CACHE = {"ROME": CONTEXTS, "R-ROME": CONTEXTS, "MEMIT": [CONTEXTS[:1], CONTEXTS[1:]]}
    rome.CONTEXT_TEMPLATES_CACHE = easyedit.CONTEXT_TEMPLATES_CACHE

    def make(**changes):
        values = dict(
            layers=[1], fact_token="subject_last", v_num_grad_steps=4, v_lr=0.5, v_loss_layer=3, v_weight_decay=0.5,
            clamp_norm_factor=4, kl_factor=0.0625, mom2_adjustment=True, context_template_length_params=[[3, 5]],
            mom2_update_weight=100.0, mom2_dataset="wikipedia", mom2_n_samples=SAMPLES, mom2_dtype="float32",
            stats_dir=str(tmp_path), rewrite_module_tmp="transformer.h.{}.mlp.c_proj", max_length=40,
            num_steps=3, lr=1e-3, weight_decay=0, norm_constraint=False, batch_size=1,
        )  # fmt: skip
        return types.SimpleNamespace(**values | changes)

    return make


def deltas(model, apply, *args, **options) -> dict[str, torch.Tensor]:
    before = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    edited, copies = apply(model.hf, model.tokenizer, *args, return_orig_weights=True, **options)
    assert edited is model.hf and all(torch.equal(before[name], kept) for name, kept in copies.items())
    changes = {
        name: p.detach() - before[name] for name, p in model.hf.named_parameters() if not torch.equal(p, before[name])
    }
    assert changes.keys() == copies.keys()
    with torch.no_grad():
        for name, kept in copies.items():
            model.hf.get_parameter(name).copy_(kept)
    return changes


def request(target: str, number: int = 0) -> ke.EditRequest:
    return ke.EditRequest.of({**ASKED[number], "target_new": target, "space": False})


def agree(changes: dict[str, torch.Tensor], edit: ke.Edit) -> None:
    assert changes.keys() == edit.changes.keys()
    for name, change in changes.items():
        torch.testing.assert_close(change, edit.delta(name).float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("given", ["w20", " w20"])
def test_easyedit_gives_targets_another_space_except_in_memit(model, hparams, given) -> None:
    asked, moments = [{**ASKED[0], "target_new": given}], moments_of(model, LAYERS)
    params = ke.ROMEParams(layers=(1,), v_num_grad_steps=4, mom2_adjustment=False)
    agree(
        deltas(model, easyedit.apply_rome_to_model, asked, hparams(mom2_adjustment=False)),
        ke.rome(model, request(" " + given), params, contexts=CONTEXTS, compat="reference"),
    )
    own = ke.MEMITParams(
        layers=(1, 2), v_num_grad_steps=4, clamp_norm_factor=4, mom2_update_weight=100.0, v_loss_layer=3
    )
    agree(
        deltas(model, easyedit.apply_memit_to_model, asked, hparams(layers=[1, 2])),
        ke.memit(model, [request(" w20")], own, moments, contexts=[CONTEXTS[:1], CONTEXTS[1:]]),
    )


def test_rome_edits_one_request_after_the_other(model, hparams) -> None:
    asked = [as_rome(one) for one in ASKED[:2]]
    both = deltas(model, rome.apply_rome_to_model, asked, hparams())
    first = deltas(model, rome.apply_rome_to_model, asked[:1], hparams())
    (name,) = both
    assert not torch.allclose(both[name], first[name])
    untouched = copy.deepcopy(model.hf.state_dict())
    other, none = rome.apply_rome_to_model(model.hf, model.tokenizer, asked, hparams(), copy=True)
    assert other is not model.hf and none == {} and not torch.equal(other.state_dict()[name], untouched[name])
    assert all(torch.equal(value, untouched[key]) for key, value in model.hf.state_dict().items())


def test_memits_files_of_values_are_written_and_read(model, hparams, tmp_path) -> None:
    asked = [{**as_rome(one), "case_id": n} for n, one in enumerate(ASKED)]
    template = str(tmp_path / "kv" / "layer_{}_clamp_{}_case_{}.npz")
    settings = hparams(layers=[1, 2])
    fresh_one = deltas(model, rome.apply_memit_to_model, asked, settings, cache_template=template)
    file = tmp_path / "kv" / "layer_2_clamp_4_case_1.npz"
    assert np.load(file)["v_star"].shape == (model.hidden_size,)
    again = deltas(model, rome.apply_memit_to_model, asked, settings, cache_template=template)
    assert all(torch.allclose(again[name], change, atol=1e-6) for name, change in fresh_one.items())
    np.savez(file, v_star=np.zeros(model.hidden_size, np.float32))
    other = deltas(model, rome.apply_memit_to_model, asked, settings, cache_template=template)
    assert not any(torch.allclose(other[name], change) for name, change in fresh_one.items())


def test_fine_tuning_needs_no_subject(model, hparams) -> None:
    asked = [{"prompt": ASKED[0]["prompt"], "target_new": "w20"}]
    settings = hparams(objective_optimization="target_new", norm_constraint=1)  # no float: no bound, as they read it
    params = ke.FTParams(
        (1,), 3, 1e-3, rewrite_module_tmp="transformer.h.{}.mlp.c_proj", objective_optimization="target_new"
    )
    agree(
        deltas(model, easyedit.apply_ft_to_model, asked, settings),
        ke.finetune(model, [request(" w20")], params, compat="reference"),
    )
    with pytest.raises(NotServed, match="in batches"):
        easyedit.apply_ft_to_model(model.hf, model.tokenizer, asked * 2, hparams(batch_size=2))


def test_gradients_are_as_the_published_loops_leave_them(model, hparams) -> None:
    easyedit.execute_rome(model.hf, model.tokenizer, ASKED[0], hparams())
    assert not any(p.requires_grad for p in model.hf.parameters())
    easyedit.execute_ft(model.hf, model.tokenizer, ASKED[:1], hparams(objective_optimization="target_new"))
    asking_for = [name for name, p in model.hf.named_parameters() if p.requires_grad]
    assert asking_for == ["transformer.h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj.bias"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alg_name": "GRACE"}, "these hyper-parameters are GRACE's; here is ROME"),
        ({"layers": [9]}, "layer 9 is out of range"),
        ({"v_lr": -1}, "v_lr"),
        ({"mom2_dataset": "books"}, "data set 'books'"),
        ({"rewrite_module_tmp": "transformer.h.{}.mlp.c_fc"}, "'transformer.h.1.mlp.c_fc' is edited there"),
        ({"fact_token": "subject_first"}, "fact_token 'subject_first'"),
    ],
)
def test_bad_hyper_parameters(model, hparams, changes, message) -> None:
    before = copy.deepcopy(model.hf.state_dict())
    with pytest.raises(ValueError, match=message):
        easyedit.apply_rome_to_model(model.hf, model.tokenizer, ASKED[:1], hparams(**changes))
    assert all(torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())


def test_models_and_tokenizers_that_are_refused(model, hparams) -> None:
    slow = types.SimpleNamespace(is_fast=False)
    with pytest.raises(NotServed, match="slow tokenizer"):
        easyedit.execute_rome(model.hf, slow, ASKED[0], hparams())
    unknown = torch.nn.Linear(2, 2)
    unknown.config = T5Config()
    with pytest.raises(NotServed, match="'t5' is an encoder-decoder"):
        easyedit.execute_rome(unknown, model.tokenizer, ASKED[0], hparams())


def test_planned_requests_are_computed_once_and_alone_once_weights_differ(model) -> None:
    made = []
    weights = {"w": torch.zeros(3)}

    def make(requests):
        made.append(len(requests))
        return [r["n"] for r in requests]

    requests = [{"n": n} for n in range(4)]
    assert ahead.taken(requests[1], "s", weights, make) == 1  # nothing planned
    with ahead.planned(requests):
        assert [ahead.taken(r, "s", weights, make) for r in requests[:2]] == [0, 1]
        weights["w"][0] = 1.0
        assert ahead.taken(requests[2], "s", weights, make) == 2
        assert ahead.taken(requests[3], "other", weights, make) == 3
        assert ahead.taken({"n": 7}, "s", weights, make) == 7  # another one, though equal to none
    assert made == [1, 4, 1, 1, 1]


def test_the_same_request_again_and_a_failure_within_a_plan() -> None:
    one, weights, made = {"n": 0}, {"w": torch.zeros(1)}, []

    def make(requests):
        made.append(len(requests))
        return [len(made)] * len(requests)

    with pytest.raises(RuntimeError, match="theirs"), ahead.planned([one, one]):
        assert ahead.taken(one, "s", weights, make) == 1 and ahead.taken(one, "s", weights, make) == 2
        raise RuntimeError("theirs")
    assert ahead.taken(one, "s", weights, make) == 3 and made[-1] == 1  # nothing is planned any more


def test_requests_computed_together_are_as_alone(model, hparams) -> None:
    alone = [easyedit.execute_rome(model.hf, model.tokenizer, one, hparams()) for one in ASKED]
    with ahead.planned(ASKED):
        together = [easyedit.execute_rome(model.hf, model.tokenizer, one, hparams()) for one in ASKED]
    for one, other in zip(alone, together, strict=True):
        for name in one:
            for a, b in zip(one[name], other[name], strict=True):
                assert a.dtype == torch.float32
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_threads_edit_one_model_in_turns(model, hparams) -> None:
    alone = [easyedit.execute_rome(model.hf, model.tokenizer, one, hparams()) for one in ASKED]
    before, given = copy.deepcopy(model.hf.state_dict()), {}

    def work(number: int) -> None:
        with ahead.planned(ASKED[number : number + 1]):  # a plan is its thread's own
            given[number] = easyedit.execute_rome(model.hf, model.tokenizer, ASKED[number], hparams())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(ASKED))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(given) == list(range(len(ASKED)))
    for number, wanted in enumerate(alone):
        for name, pair in wanted.items():
            for a, b in zip(given[number][name], pair, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())


def plain_accuracy(model, tok, prompts, targets, locality) -> list:
    """Padded on the left, positions counted from the padding on."""
    tok.padding_side = "left"
    ids = tok([f"{p} {t}" for p, t in zip(prompts, targets, strict=True)], padding=True, return_tensors="pt")
    tok.padding_side = "right"
    with torch.no_grad():
        likeliest = model(**ids).logits.argmax(-1)
    rows = []
    for row, text, target in zip(range(len(prompts)), likeliest, targets, strict=True):
        count = len(tok.encode(f"{prompts[row]} {target}")) - len(tok.encode(prompts[row]))
        predicted, wanted = text[-count - 1 : -1].tolist(), ids["input_ids"][row, -count:].tolist()
        rows.append(predicted if locality else np.mean(np.equal(predicted, wanted)))
    return rows


def test_accuracy_is_that_of_the_padded_batch(model) -> None:
    settings = types.SimpleNamespace(max_length=40)
    prompts, targets = ["w5 w3 w7 w9 w10", "w9", "w8 w12"], ["w20 w3", "w22", "w30 w31 w2"]
    record = {"prompt": prompts[0], "target_new": targets[0], "rephrase_prompt": prompts[1]}
    record |= {"locality": {"near": {"prompt": prompts, "ground_truth": targets}}}
    record |= {"portability": {"far": {"prompt": prompts[2], "ground_truth": targets[2]}}}
    calls = [([prompts[0]], [targets[0]], False), ([prompts[1]], [targets[0]], False), (prompts, targets, True)]
    calls += [([prompts[2]], [targets[2]], False), (prompts, targets, False)]
    passes = []
    model.hf.register_forward_pre_hook(lambda *_: passes.append(1))
    wanted = [plain_accuracy(model.hf, model.tokenizer, *call) for call in calls]
    for together in (False, True):
        passes.clear()
        with asking(record) if together else asking({}):
            for (p, t, locality), want in zip(calls, wanted, strict=True):
                p, t = (p[0], t[0]) if len(p) == 1 else (p, t)
                got = easyedit.test_prediction_acc(model.hf, model.tokenizer, settings, p, t, "cpu", locality=locality)
                assert got == want and all(isinstance(g, list if locality else np.float64) for g in got)
        assert len(passes) == (2 if together else 5)  # the last call is none of the record's
    assert model.tokenizer.padding_side == "right"


RECORDS = [
    {"prompt": "w5 w3 w7 w9", "target_new": "w20", "rephrase_prompt": "w9 w8 w3 w7", "locality": {}, "portability": {}},
    {
        "prompt": "w33 w9",
        "target_new": "w20 w21",
        "rephrase_prompt": None,
        "locality": {"near": {"prompt": ["w1 w2 w3", "w4"], "ground_truth": ["w5", "w6 w7"]}},
        "portability": {"far": {"prompt": "w30 w31 w32 w33 w34", "ground_truth": "w9"}},
    },
    {"prompt": "w5 w3 w7 w9", "target_new": "w20"},  # asks what the first one asks
]


@pytest.mark.parametrize("changed", [None, 0, 1, 2], ids=lambda after: f"after {after}")
@pytest.mark.parametrize("at_once", [1, 2, 32])
def test_metrics_of_requests_to_come_are_read_together_while_the_model_stays(
    model, monkeypatch, changed, at_once
) -> None:
    passes, options = [], types.SimpleNamespace(max_length=40)
    monkeypatch.setattr(metrics_easyedit, "REQUESTS", at_once)
    model.hf.register_forward_hook(lambda *_: passes.append(1))
    weight = model.hf.get_parameter("transformer.h.1.mlp.c_proj.weight")

    def asked(record: dict) -> list:
        with metrics_easyedit.asking(record):
            questions = metrics_easyedit.questions_of(record)
            return [
                easyedit.test_prediction_acc(
                    model.hf, model.tokenizer, options, q.prompts, q.targets, "cpu", q.locality
                )
                for q in questions
            ]

    def walk() -> list:
        said = []
        for number, record in enumerate(RECORDS):
            said.append(asked(record))
            if number == changed:
                with torch.no_grad():
                    weight.mul_(-30.0)
        return said + [asked(record) for record in RECORDS]  # and once more

    unchanged, before, clean = [asked(record) for record in RECORDS], weight.detach().clone(), walk()
    with torch.no_grad():
        weight.copy_(before)
    passes.clear()
    with metrics_easyedit.expecting(RECORDS):
        assert walk() == clean
    first = {1: 3, 2: 2, 32: 1}[at_once] if changed is None else len(passes) - 3
    assert len(passes) == first + 3
    if changed is not None:
        assert clean[3:] != unchanged  # it matters
    assert metrics_easyedit._EXPECTED.get() is None


def test_generated_text_depends_on_torchs_seed_and_counts_the_prompt(model) -> None:
    def texts(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return easyedit.generate_fast(model.hf, model.tokenizer, ["w5 w3", "w9"], n_gen_per_prompt=2, max_out_len=8)

    assert texts(1) == texts(1) != texts(2)
    assert all(len(model.tokenizer.encode(text)) <= 8 for text in texts(1))  # special tokens are left out
    assert texts(1)[0].startswith("w5 w3") and texts(1)[3].startswith("w9")


def test_missing_statistics_are_collected_together_from_the_model_as_it_is(
    model, hparams, tmp_path, monkeypatch
) -> None:
    texts = [{"text": f"w{n} w{n + 1} w{n + 2} w3 w9"} for n in range(40)]
    data = types.SimpleNamespace(load_dataset=lambda *names: {"train": texts})
    monkeypatch.setitem(sys.modules, "datasets", data)
    settings = hparams(layers=[1, 2], stats_dir=str(tmp_path / "new"), mom2_n_samples=30)
    upstream = Upstream(types.ModuleType("theirs"), lambda *args, **named: (args[2], named))
    ours = next(swap.ours for swap in easyedit.TABLE if swap.name == "layer_stats")
    called, named = ours(
        model.hf, model.tokenizer, "transformer.h.1.mlp.c_proj", settings.stats_dir, "wikipedia", ["mom2"],
        sample_size=30, precision="float32", hparams=settings, upstream=upstream,
    )  # fmt: skip
    assert called == "transformer.h.1.mlp.c_proj" and named["sample_size"] == 30
    folder = tmp_path / "new" / "gpt2-tiny" / "wikipedia_stats"
    files = sorted(folder.iterdir())
    assert [f.name for f in files] == [f"transformer.h.{n}.mlp.c_proj_float32_mom2_30.npz" for n in (1, 2)]
    wanted = ke.collect_moments(model, [t["text"] for t in texts], LAYERS, max_texts=30, shuffle=1)
    for file, layer in zip(files, LAYERS, strict=True):
        arrays = np.load(file)
        assert int(arrays["mom2.count"]) == wanted[layer].count
        np.testing.assert_allclose(arrays["mom2.mom2"] / wanted[layer].count, wanted[layer].mean, rtol=1e-5, atol=1e-6)


def test_zsre_reads_the_first_token_behind_each_prompt(model) -> None:
    prompts = ["w5 w3 w7", "w9", "w8 w12 w9 w1"]
    with torch.no_grad():
        likeliest = [int(model.hf(**model.tokenizer(p, return_tensors="pt")).logits[0, -1].argmax()) for p in prompts]
    answers = [model.tokenizer.decode([token]) for token in likeliest]
    assert rome.test_batch_prediction_acc(model.hf, model.tokenizer, prompts, answers) == [True] * 3
    assert rome.test_batch_prediction_acc(model.hf, model.tokenizer, prompts, [answers[0], "w0", answers[2]])[1] is (
        answers[1] == "w0"
    )


def test_cuda_means_the_cpu() -> None:
    with CudaIsCPU():
        assert torch.zeros(2).to("cuda").cuda().device.type == "cpu"
        assert (
            torch.zeros(2, device="cuda:1").device.type
            == torch.tensor(1, device=torch.device("cuda")).device.type
            == "cpu"
        )
        assert torch.nn.Linear(2, 2).cuda().to("cuda").weight.device.type == "cpu"
        assert torch.zeros(2).to(torch.float64, copy=True).dtype == torch.float64


def test_the_runner_names_a_script_that_is_not_there(capsys) -> None:
    with pytest.raises(
        SystemExit, match=r"no such script: gone.py\nusage: python -m knowedit_ext.compat.easyedit SCRIPT"
    ):
        main(easyedit.BACKEND, ["gone.py"])
    with pytest.raises(SystemExit, match="usage"):
        main(easyedit.BACKEND, [])
