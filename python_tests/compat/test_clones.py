"""The libraries themselves on us, against what they gave alone; only where their clones are, see docs/dropin.md."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from .clones import CONFORMANCE, clone, run, write_folder

# ROME divides by a float32 inverse of second moments that are close to singular: statistics or keys that differ by
# their own rounding (2e-7) give NLLs that are 1e-3 to 3e-3 apart, so that nobody can be closer to what was recorded.
NLL, WEIGHTS = {"ROME": 4e-3, "MEMIT": 2e-4, "FT": 2e-4}, 1e-3

# Run by the runner, so that what is imported here is swapped. Contexts are given: they depend on the random state.
SCRIPTS = """
import importlib, json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
given = json.load(open("given.json"))
for name in sys.argv[1:]:
    importlib.import_module(f"{name}.{name}_main").CONTEXT_TEMPLATES_CACHE = given["contexts"][name]
from experiments.evaluate import main
from experiments.py.demo import demo_model_editing
changes = {}
for run in given["runs"]:
    kind, algorithm, *rest = run["name"].split() + [""]
    if kind == "evaluate":
        several = {"num_edits": 3 if algorithm == "MEMIT" else 1, "generation_test_interval": 1}
        main(algorithm, "gpt2-tiny", hparams_fname="gpt2-tiny.json", ds_name=rest[0], dataset_size_limit=6,
             continue_from_run=None, skip_generation_tests=True, conserve_memory=False, dir_name=algorithm,
             **(several if "memit" in sys.argv else {}))
    if kind == "demo":
        model = AutoModelForCausalLM.from_pretrained("gpt2-tiny").cuda()
        tok = AutoTokenizer.from_pretrained("gpt2-tiny")
        tok.pad_token = tok.eos_token
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        edited, copies = demo_model_editing(model, tok, run["requests"], ["The birthplace of"], alg_name=algorithm)
        assert all(torch.equal(before[name], copy) for name, copy in copies.items())
        for name in copies:
            changes[f"demo/{algorithm}/{name}"] = (edited.get_parameter(name) - before[name]).detach().numpy()
np.savez("changes.npz", **changes)
from knowedit_ext.compat import rome
json.dump(rome.calls(), open("calls.json", "w"))
"""


@pytest.mark.parametrize("library", ["rome", "memit"])
def test_scripts_of_rome_and_memit(library: str, tmp_path) -> None:
    folder = clone(library)
    given = json.loads((CONFORMANCE / "vectors_dropin" / f"{library}_scripts.json").read_text())
    write_folder(tmp_path, given)
    (tmp_path / "scripts.py").write_text(SCRIPTS)
    names = {"rome": ["rome"], "memit": ["memit", "rome"]}[library]
    done = run(["-m", "knowedit_ext.compat.rome", "scripts.py", *names], tmp_path, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    calls = json.loads((tmp_path / "calls.json").read_text())
    assert calls["test_batch_prediction"] and calls["generate_fast"] and "s own execute" not in done.stderr
    assert calls["execute_rome"] == {"rome": 9, "memit": 6}[library]
    for step in given["runs"]:
        if "cases" in step:
            algorithm = step["name"].split()[1]
            check_cases(step["cases"], tmp_path / "results" / algorithm / "run_000", step["files"], NLL[algorithm])
    check_weights(library, tmp_path / "changes.npz")


def check_cases(wanted: list, folder: Path, files: list[str], allowed: float) -> None:
    for file, case in zip(files, wanted, strict=True):
        ours = json.loads((folder / file).read_text())
        assert ours.keys() == case.keys()
        for when in ("pre", "post"):
            assert ours.get(when, {}).keys() == case.get(when, {}).keys()
            for key, values in case.get(when, {}).items():
                if key.endswith("correct"):
                    assert ours[when][key] == values, (file, when, key)
                    continue
                for one, other in zip(ours[when][key], values, strict=True):
                    assert one == pytest.approx(other, abs=allowed), (file, when, key)


def check_weights(library: str, file: Path) -> None:
    """ROME's change is weighed by the second moments: its effect on a typical key."""
    wanted, ours = np.load(CONFORMANCE / "vectors_dropin" / f"{library}_scripts.npz"), np.load(file)
    c = np.load(CONFORMANCE / "vectors" / "rome.npz")["moment_2"].astype(np.float64)
    assert set(ours.files) == set(wanted.files)
    for name in wanted.files:
        error, size = ours[name].astype(np.float64) - wanted[name], wanted[name].astype(np.float64)
        norm = (lambda d: np.sqrt(np.trace(d.T @ c @ d))) if "ROME" in name else np.linalg.norm
        assert norm(error) <= WEIGHTS * norm(size), (name, norm(error) / norm(size))


TRACE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from experiments import causal_trace
from knowedit_ext.compat import rome
model = AutoModelForCausalLM.from_pretrained("gpt2-tiny").eval()
mt = causal_trace.ModelAndTokenizer(model=model, tokenizer=AutoTokenizer.from_pretrained("gpt2-tiny"))
asked = dict(prompt="Uma Garcia was born in the city of", subject="Uma Garcia", samples=3, noise=0.3, window=3)
calls = [dict(kind=kind) for kind in (None, "mlp", "attn")] + [dict(token_range="subject_last")]
calls += [dict(uniform_noise=True), dict(expect="nothing"), dict(replace=True)]
ours = [causal_trace.calculate_hidden_flow(mt, **asked, **call) for call in calls]
assert rome.calls()["calculate_hidden_flow"] == len(calls)
rome.uninstall()
theirs = [causal_trace.calculate_hidden_flow(mt, **asked, **call) for call in calls]
for one, other in zip(ours, theirs):
    assert one.keys() == other.keys(), (one.keys(), other.keys())
    for key, value in other.items():
        assert type(one[key]) is type(value), (key, type(one[key]), type(value))
        if torch.is_tensor(value):
            assert one[key].shape == value.shape and one[key].dtype == value.dtype, key
            assert torch.allclose(one[key], value, atol=1e-5), (key, one[key] - value)
        else:
            assert abs(one[key] - value) < 1e-5 if isinstance(value, float) else one[key] == value, key
"""


def test_tracing_of_rome(tmp_path) -> None:
    folder = clone("rome")
    write_folder(tmp_path, {})
    (tmp_path / "trace.py").write_text(TRACE)
    done = run(["-m", "knowedit_ext.compat.rome", "trace.py"], tmp_path, folder)
    assert done.returncode == 0, done.stderr[-3000:]


EASYEDIT = """
import copy, importlib, json, logging, sys
import torch
from knowedit_ext.compat import easyedit
logging.disable(logging.INFO)
easyedit.install()
import easyeditor
easyedit.uninstall()
given = json.load(open("given.json"))
modules = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "easyeditor"}
before = {n: dict(vars(m)) for n, m in modules.items()}
methods = dict(vars(easyeditor.BaseEditor))
for scenario in given["scenarios"]:
    algorithm, values = scenario["alg"], dict(scenario["hparams"])
    main = {"ROME": "rome.rome_main", "R-ROME": "r_rome.r_rome_main", "MEMIT": "memit.memit_main"}.get(algorithm)
    if main:
        contexts = given["contexts"]["memit" if algorithm == "MEMIT" else "rome"]
        importlib.import_module(f"easyeditor.models.{main}").CONTEXT_TEMPLATES_CACHE = contexts
    kind = getattr(easyeditor, algorithm.replace("-", "_") + "HyperParams")
    used = sum(easyedit.calls().values())
    with easyedit.installed():
        editor = easyeditor.BaseEditor.from_hparams(kind(**values))
        metrics, model, copies = getattr(editor, scenario["method"])(**copy.deepcopy(scenario["call"]))
    assert sum(easyedit.calls().values()) > used
    assert model is editor.model and sorted(copies) == sorted(scenario["weights_copy"])
    for one, other in zip(json.loads(json.dumps(metrics, default=float)), scenario["metrics"], strict=True):
        one.pop("time", None), other.pop("time", None)
        assert one == other, (scenario["name"], one, other)
for name, module in modules.items():
    now = {k: v for k, v in vars(module).items() if k != "CONTEXT_TEMPLATES_CACHE"}
    was = {k: v for k, v in before[name].items() if k != "CONTEXT_TEMPLATES_CACHE"}
    assert now.keys() == was.keys() and all(now[k] is was[k] for k in was), name
assert all(vars(easyeditor.BaseEditor)[k] is v for k, v in methods.items())
"""


def test_easyedit(tmp_path) -> None:
    """One scenario of each kind; uninstalled, every global is as it was."""
    folder = clone("easyedit")
    given = json.loads((CONFORMANCE / "vectors_dropin" / "easyedit.json").read_text())
    chosen = ("rome", "r-rome-prompt-keys", "memit-batch", "ft-target-new", "ft-batch")
    given["scenarios"] = [s for s in given["scenarios"] if s["name"] in chosen]
    assert len(given["scenarios"]) == len(chosen)
    write_folder(tmp_path, {"scenarios": given["scenarios"], "contexts": given["contexts"]})
    (tmp_path / "script.py").write_text(EASYEDIT)
    done = run(["script.py"], tmp_path, folder)
    assert done.returncode == 0, done.stderr[-3000:]


def test_easyedit_run_by_the_runner(tmp_path) -> None:
    folder = clone("easyedit")
    (tmp_path / "user.py").write_text(
        "import sys\nfrom easyeditor import BaseEditor\nfrom easyeditor.models.rome.rome_main import execute_rome\n"
        "from knowedit_ext.compat import easyedit\nassert execute_rome.__wrapped__ and sys.argv[1:] == ['--x', '1']\n"
    )
    done = run(["-m", "knowedit_ext.compat.easyedit", "user.py", "--x", "1"], tmp_path, folder)
    assert done.returncode == 0, done.stderr[-3000:]
