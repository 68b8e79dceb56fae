"""Every further family: traced, scored, edited and fine-tuned as plain Hugging Face loops do it, or refused by name."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing.methods.finetune import finetune
from knowedit_ext.evaluation.edited import Edited
from knowedit_ext.evaluation.generation import continuations
from knowedit_ext.evaluation.nll import score
from knowedit_ext.model import head
from knowedit_ext.model.families import FAMILIES
from knowedit_ext.sweep import attention, capture, clean_run, engine
from knowedit_ext.sweep.probe import probe
from knowedit_ext.sweep.whole import mixes_whole

from ..editing import test_finetune as plain_ft
from ..editing.plain import moments_of, plain_value, probability, weight_name
from ..editing.test_rome import PARAMS as SURE
from ..editing.test_values import CONTEXTS, PARAMS, REQUESTS, as_published, values
from ..evaluation.test_nll import assert_equal as assert_scores
from ..evaluation.test_nll import random_edit, some_questions
from ..support import families
from ..support.more_families import DENSE, EXPERTS, config, known, more_hf, more_model
from ..support.oracle import plain_trace
from ..support.tokenizers import word_level
from ..support.unchanged import assert_unchanged, snapshot
from ..tracing.test_against_the_loop import FACTS, IDS, NOISE, SAMPLES, assert_equal, noisy

pytestmark = pytest.mark.filterwarnings("ignore:corrupting")

OFF = "the logits of a sweep are off by"
CASES = [("state", 10, None), ("mlp", 3, None), ("attn", 2, "mlp")]
EDITED, TRACED = known(DENSE), known(EXPERTS)
FACT = ke.EditRequest("w17 w18 {}", "w33", "w27")


@cache
def model_of(family: str) -> ke.EditableModel:
    """Shared between tests, which leave it as it is."""
    return more_model(family)


def test_every_entry_is_tried() -> None:
    if len(EDITED + TRACED) < len(DENSE | EXPERTS):
        pytest.skip("this transformers has not all of them")
    configs = [config(family) for family in EDITED + TRACED] + [make() for make in families.CONFIGS.values()]
    assert set(FAMILIES) == {config.get_text_config(decoder=True).model_type for config in configs}


@pytest.mark.parametrize("family", EDITED + TRACED)
def test_traces(family: str) -> None:
    model, spread = model_of(family), 0.0
    for kind, window, sever in CASES:
        if {kind, sever} & {*model.modules.family.without}:
            with pytest.raises(ke.UnsupportedModelError, match="no module of .* puts out what its"):
                ke.trace(model, FACTS[0], kind=kind, window=window, sever=sever, samples=2, noise=NOISE)
            continue
        got = ke.trace(model, FACTS[0], kind=kind, window=window, sever=sever, samples=SAMPLES, noise=NOISE)
        want = plain_trace(model.hf, IDS[0], noisy(0), got.answer_ids, kind, window, sever)
        assert_equal(got, want)
        spread = max(spread, float(np.ptp(want.scores)))
    assert spread > 0.005  # otherwise nothing was compared


@pytest.mark.parametrize("family", EDITED + TRACED)
def test_scores(family: str) -> None:
    model, questions = model_of(family), some_questions(4, seed=1)
    edit = random_edit(model, 2, 0) if family in DENSE else None
    before = snapshot(model.hf)
    pre, post = score(model, questions, edit and Edited(model, edit))
    assert_unchanged(before, model.hf)
    assert_scores(model, pre, questions)
    if edit:
        with edit.applied(model):
            assert_scores(model, post, questions)


@pytest.mark.parametrize("family", EDITED + TRACED)
def test_texts_go_on_as_alone(family: str) -> None:
    """Prompts of different lengths in one batch, with the family's cache, beside the model's own forward for each."""
    model, wanted = model_of(family), []
    for ids in IDS:
        text = list(ids)
        with torch.no_grad():
            for _ in range(4):
                text.append(int(model.hf(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        wanted.append(text[len(ids) :])
    assert continuations(model, IDS, 4) == wanted


@pytest.mark.parametrize("family", EDITED)
def test_values(family: str) -> None:
    model = model_of(family)
    got = values(model, REQUESTS[:1])
    as_published(got, 0, plain_value(model, REQUESTS[0], CONTEXTS, PARAMS, "mlp", 1))


@pytest.mark.parametrize("family", EDITED)
def test_a_fact_goes_in_and_comes_out(family: str, tmp_path) -> None:
    """Into the layer as saved and loaded, and as peft's adapter."""
    model = model_of(family)
    before, moments = snapshot(model.hf), moments_of(model, [1])
    edit = ke.rome(model, FACT, replace(SURE, layers=(1,)), moments, contexts=["{}"])
    assert_unchanged(before, model.hf)
    known = probability(model, FACT)
    edit.save(tmp_path / "edit.safetensors")
    edit = ke.Edit.load(tmp_path / "edit.safetensors")
    ids = torch.tensor([model.tokenizer("w17 w18 w33 w5 w6").input_ids])
    with torch.no_grad(), edit.applied(model):
        assert probability(model, FACT) > 1.3 * known and list(edit.changes) == [weight_name(model, 1)]
        wanted = model.hf(input_ids=ids).logits
    assert_unchanged(before, model.hf)
    peft = pytest.importorskip("peft")
    edit.to_peft(tmp_path / "adapter")
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model.hf), tmp_path / "adapter").eval()
        plain, adapted = model.hf(input_ids=ids).logits, adapted(input_ids=ids).logits
    assert (adapted - wanted).norm() <= 1e-3 * (wanted - plain).norm()


@pytest.mark.parametrize("family", EDITED)
def test_finetuning(family: str) -> None:
    model = ke.load_model((more_hf(family, scale=6.0).double(), word_level()))
    edit = finetune(model, plain_ft.REQUESTS, plain_ft.BRIEF)
    want = plain_ft.plain_finetune(model, plain_ft.REQUESTS, plain_ft.BRIEF, [weight_name(model, 1)], False, alone=True)
    plain_ft.assert_close(edit, want, 1e-4)


@pytest.mark.parametrize("family", TRACED)
def test_without_a_down_projection_nothing_is_edited(family: str) -> None:
    model = model_of(family)
    moments = ke.Moments.from_arrays({1: (np.eye(48, dtype=np.float64), 100)})
    before = snapshot(model.hf)
    for call in (
        lambda: ke.rome(model, FACT, SURE, moments, contexts=["{}"]),
        lambda: ke.memit(model, [FACT], ke.MEMITParams(layers=(1,)), moments, contexts=[["{}"]]),
        lambda: finetune(model, [FACT], plain_ft.BRIEF),
        lambda: ke.collect_moments(model, ["w5 w6"], layers=[1]),
    ):
        with pytest.raises(ke.UnsupportedModelError, match="mixture-of-experts blocks|names no (down_projection|mlp)"):
            call()
    assert_unchanged(before, model.hf)


# -- planted faults --------------------------------------------------------------------------------------------------


def refused(model: ke.EditableModel) -> None:
    model.probed = False
    try:
        with pytest.raises(ke.UnsupportedModelError, match=OFF):
            probe(model)
    finally:
        model.probed = False


@pytest.mark.parametrize("family", EDITED + TRACED)
def test_faults_are_found(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each kind that the family has: another scale, no window, no soft-cap, no sinks, other slopes, a forgotten
    factor or cap of the logits, a neighbour's row in what runs whole."""
    model = model_of(family)
    seen: set[str] = set()
    right, mix = attention.tree_attention, attention.mix_whole

    def attend(q, k, v, table, scale, window=0, softcap=0.0, sinks=None, bias=None, frozen=0, *, fault: str = ""):
        has = dict(window=window, softcap=softcap, sinks=sinks is not None, bias=bias is not None)
        seen.update(name for name, x in has.items() if x)
        seen.add("scale")
        changed = {"window": 0} if fault == "window" else {"softcap": 0.0} if fault == "softcap" else {}
        given = {"window": window, "softcap": softcap, "frozen": frozen} | changed
        if sinks is not None and fault != "sinks":
            given["sinks"] = sinks
        if bias is not None:
            given["bias"] = bias * (1.25 if fault == "bias" else 1.0)
        return right(q, k, v, table, scale * (1.05 if fault == "scale" else 1.0), **given)

    def whole(*args, fault: str = ""):
        seen.add("whole")
        out = mix(*args)
        first = out[0] if isinstance(out, tuple) else out
        if fault == "whole":
            first[:, 1:] += 0.1 * first[:, :-1].clone()
        return out

    monkeypatch.setattr(attention, "tree_attention", attend)
    monkeypatch.setattr(attention, "mix_whole", whole)
    model.probed = False
    probe(model)
    for fault in sorted(seen):
        with monkeypatch.context() as patch:
            patch.setattr(attention, "tree_attention", lambda *a, fault=fault, **k: attend(*a, fault=fault, **k))
            patch.setattr(attention, "mix_whole", lambda *a, fault=fault: whole(*a, fault=fault))
            refused(model)
    form = head.LogitForm.of(model.modules)
    if form != head.LogitForm():
        with monkeypatch.context() as patch:
            patch.setattr(head.LogitForm, "of", classmethod(lambda cls, modules: cls()))
            refused(model)
    for fault in faults_of_lines(model):
        with monkeypatch.context() as patch:
            fault(model, patch)
            refused(model)


def in_a_sweep() -> bool:
    return attention._attending.get(None) is not None


def faults_of_lines(model: ke.EditableModel) -> list:
    """What a sweep of ours could leave out, of any family: where a row stands, what an MLP (a router of experts) does,
    the final norm, what the tokens in front of a row are."""
    faults = [final_norm_left_out, tokens_read_by_a_layer, layers_that_look_at_other_rows]
    if "mlp" not in model.modules.family.without:
        faults.append(mlp_otherwise)
    rotary = [named.get("position_embeddings") for named in clean_run(model, IDS[0]).arguments]
    if any(x is not None for x in rotary) and not mixes_whole(model.modules):
        faults.append(later_rows_placed_otherwise)
    return faults


def final_norm_left_out(model: ke.EditableModel, patch: pytest.MonkeyPatch) -> None:
    right = engine.final_states
    patch.setattr(engine, "final_states", lambda model, rows: 0.5 * (right(model, rows) + rows))


def mlp_otherwise(model: ke.EditableModel, patch: pytest.MonkeyPatch) -> None:
    module = model.modules.mlp(1)
    right = module.forward

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        first = first + 0.3 * first.roll(1, -1)
        return (first, *out[1:]) if isinstance(out, tuple) else first

    patch.setattr(module, "forward", lambda *args, **kwargs: (wrong if in_a_sweep() else right)(*args, **kwargs))


def later_rows_placed_otherwise(model: ke.EditableModel, patch: pytest.MonkeyPatch) -> None:
    right = capture.RowArguments.__init__

    def wrong(self, runs, index, *others):
        places = torch.cat([torch.arange(len(run.ids)) for run in runs])[index.cpu()].to(index.device)
        right(self, runs, torch.where(places >= 6, index - 1, index), *others)

    patch.setattr(capture.RowArguments, "__init__", wrong)


def tokens_read_by_a_layer(model: ke.EditableModel, patch: pytest.MonkeyPatch) -> None:
    """By another way than its arguments: something of what was embedded last."""
    last: list[torch.Tensor] = []
    embedding, layer = model.modules.embedding, model.modules.layers[1]
    embed, right = embedding.forward, layer.forward

    def keep(*args, **kwargs):
        out = embed(*args, **kwargs)
        last[:] = [0.5 * (100 * out.float().mean()).sin()]
        return out

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        first = first + last[0] * first.roll(1, -1)  # no mere factor: norms take those out again
        return (first, *out[1:]) if isinstance(out, tuple) else first

    patch.setattr(embedding, "forward", keep)
    patch.setattr(layer, "forward", wrong)


def layers_that_look_at_other_rows(model: ke.EditableModel, patch: pytest.MonkeyPatch) -> None:
    """A state that goes from token to token."""
    layer = model.modules.layers[1]
    right = layer.forward

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        first = first + 0.1 * torch.cat([torch.zeros_like(first[:, :1]), first[:, :-1]], 1)
        return (first, *out[1:]) if isinstance(out, tuple) else first

    patch.setattr(layer, "forward", wrong)
