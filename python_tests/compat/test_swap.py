"""Coming and going of our functions in packages that look like the libraries."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
import types
from dataclasses import replace

import pytest

from knowedit_ext.compat import easyedit, rome
from knowedit_ext.compat.swap import MovedError

from . import fakes
from .fakes import folder  # noqa: F401

HEAVY = {
    "easyeditor.models.rome.rome_main": ("execute_rome", "generate_fast", "layer_stats"),
    "easyeditor.models.r_rome.r_rome_main": ("execute_r_rome",),
    "easyeditor.models.memit.memit_main": ("execute_memit", "layer_stats"),
    "easyeditor.models.emmet.emmet_main": ("execute_emmet", "layer_stats"),
    "easyeditor.models.alphaedit.AlphaEdit_main": ("execute_AlphaEdit", "layer_stats"),
    "easyeditor.models.pmet.pmet_main": ("execute_pmet", "layer_stats"),
    "easyeditor.models.ft.ft_main": ("execute_ft",),
    "easyeditor.models.rome.layer_stats": ("layer_stats",),
    "easyeditor.util.generate": ("generate_fast",),
    "easyeditor.evaluate.evaluate": ("test_prediction_acc",),
    "easyeditor.editors.editor": ("execute_rome", "test_prediction_acc"),
}


def globals_now(package: str = "easyeditor") -> dict[str, dict]:
    here = {name: module for name, module in sys.modules.items() if name.split(".")[0] == package}
    namespaces = {name: dict(vars(module)) for name, module in here.items()}
    if f"{package}.editors.editor" in here:
        namespaces["BaseEditor"] = dict(vars(here[f"{package}.editors.editor"].BaseEditor))
    return namespaces


def same(one: dict[str, dict], other: dict[str, dict]) -> bool:
    return one.keys() == other.keys() and all(
        one[m].keys() == other[m].keys() and all(one[m][k] is other[m][k] for k in one[m]) for m in one
    )


def is_ours(function) -> bool:
    return hasattr(function, "_knowedit_backend")


def swapped() -> set[tuple[str, str]]:
    return {(m, k) for m, values in globals_now().items() for k, v in values.items() if is_ours(v)}


EVERYWHERE = {(module, name) for module, names in HEAVY.items() for name in names} | {("BaseEditor", "edit_requests")}


@pytest.fixture
def library(folder):  # noqa: F811
    fakes.write(folder, fakes.EASYEDIT)
    for module in HEAVY:
        importlib.import_module(module)
    return globals_now()


def test_every_global_that_refers_to_a_heavy_function_is_ours_and_comes_back(library) -> None:
    assert not swapped()
    easyedit.install()
    assert swapped() == EVERYWHERE
    easyedit.install()  # once more
    assert swapped() == EVERYWHERE
    easyedit.uninstall()
    assert same(globals_now(), library)
    easyedit.uninstall()
    assert same(globals_now(), library)


def test_blocks_nest_and_leave_an_installation_alone(library) -> None:
    with easyedit.installed():
        with easyedit.installed():
            pass
        assert swapped() == EVERYWHERE
    assert same(globals_now(), library)
    easyedit.install()
    with easyedit.installed():
        pass
    assert swapped() == EVERYWHERE
    easyedit.uninstall()
    with pytest.raises(RuntimeError, match="theirs"), easyedit.installed():
        raise RuntimeError("theirs")
    assert same(globals_now(), library)


def test_what_is_imported_later_is_ours_too_and_comes_back(folder) -> None:  # noqa: F811
    fakes.write(folder, fakes.EASYEDIT)
    easyedit.install(only_as_imported=True)
    assert not any(name.startswith("easyeditor") for name in sys.modules)
    for module in HEAVY:
        importlib.import_module(module)
    assert swapped() == EVERYWHERE
    easyedit.uninstall()
    assert not swapped()
    assert sys.modules["easyeditor.editors.editor"].execute_rome(0, 0, 0, 0) == "their execute_rome"


OPTIONAL = {swap.module for swap in easyedit.TABLE if swap.optional and swap.name.startswith("execute")}


@pytest.mark.parametrize("module", sorted(set(HEAVY) - OPTIONAL - {"easyeditor.editors.editor"}))
def test_a_function_that_moved_is_named_and_nothing_is_swapped(module, folder) -> None:  # noqa: F811
    name = next(n for n in HEAVY[module] if (f"{n}(") in fakes.EASYEDIT[f"{module.replace('.', '/')}.py"])
    fakes.write(folder, fakes.without(fakes.EASYEDIT, f"{module.replace('.', '/')}.py", name) | later_users(name))
    importlib.import_module("easyeditor.models")
    with pytest.raises(MovedError, match=rf"nothing is swapped.*{module}\.{name}\("):
        easyedit.install()
    assert not swapped() and easyedit.BACKEND._finder not in sys.meta_path
    with pytest.raises(MovedError), easyedit.installed():
        pass


@pytest.mark.parametrize("module", sorted(OPTIONAL))
def test_a_method_that_an_earlier_version_lacks_is_left_out(module, folder) -> None:  # noqa: F811
    file, name = f"{module.replace('.', '/')}.py", HEAVY[module][0]
    for files in (fakes.without(fakes.EASYEDIT, file, name), {k: v for k, v in fakes.EASYEDIT.items() if k != file}):
        fakes.forget(("easyeditor",))
        (folder / file).unlink(missing_ok=True)
        fakes.write(folder, files)
        with easyedit.installed():
            assert (module, name) not in swapped()
            assert is_ours(sys.modules["easyeditor.models.memit.memit_main"].execute_memit)


def later_users(name: str) -> dict[str, str]:
    """Files that import the function, without that line: only its absence is at issue."""
    others = {}
    for file, text in fakes.EASYEDIT.items():
        lines = [line for line in text.splitlines() if not line.endswith(f"import {name}")]
        if len(lines) < len(text.splitlines()):
            others[file] = "\n".join(lines) + "\n"
    return others


def test_other_arguments_are_named(folder) -> None:  # noqa: F811
    file = "easyeditor/models/memit/memit_main.py"
    fakes.write(folder, fakes.EASYEDIT | {file: fakes.EASYEDIT[file].replace("hparams", "settings")})
    with pytest.raises(MovedError, match=r"execute_memit\(.*\) \(it takes no hparams\)"):
        easyedit.install()
    assert not swapped()


def test_a_function_that_moved_is_named_when_it_is_imported_later(folder) -> None:  # noqa: F811
    fakes.write(folder, fakes.without(fakes.EASYEDIT, "easyeditor/models/ft/ft_main.py", "execute_ft"))
    easyedit.install(only_as_imported=True)
    importlib.import_module("easyeditor.models.memit.memit_main")
    assert swapped()
    with pytest.raises(MovedError, match="execute_ft"):
        importlib.import_module("easyeditor.models.ft.ft_main")
    assert not swapped()


def test_a_library_that_is_not_there(folder) -> None:  # noqa: F811
    with pytest.raises(ImportError, match="EasyEdit is not to be found: put the folder of its clone on sys.path"):
        easyedit.install()
    with pytest.raises(ImportError, match="no module rome or memit"):
        rome.install()
    assert not any(backend.BACKEND._finder in sys.meta_path for backend in (easyedit, rome))


def test_rome_without_memit(folder) -> None:  # noqa: F811
    """Outside of rome and memit themselves, modules are swapped when they are imported."""
    fakes.write(folder, fakes.ROME)
    rome.install()
    main = sys.modules["rome.rome_main"]
    assert is_ours(main.execute_rome) and is_ours(main.generate_fast) and is_ours(main.layer_stats)
    assert is_ours(importlib.import_module("experiments.py.eval_utils_counterfact").test_batch_prediction)
    assert is_ours(importlib.import_module("baselines.ft.ft_main").execute_ft)
    rome.uninstall()
    assert not any(
        is_ours(value) for name in rome.BACKEND.packages for m in globals_now(name).values() for value in m.values()
    )


def test_what_we_do_not_serve_is_theirs_with_one_line(library, caplog) -> None:
    class Slow:
        is_fast = False

    with easyedit.installed():
        before = easyedit.calls()
        main = sys.modules["easyeditor.models.memit.memit_main"]
        hparams = type("H", (), {"layers": [2, 1]})()
        assert [main.execute_memit(None, Slow(), [], hparams) for _ in range(3)] == ["their execute_memit"] * 3
        assert easyedit.calls() == before
    messages = [r.message for r in caplog.records if "execute_memit" in r.message]
    assert len(messages) <= 1 and all("not in ascending order" in line for line in messages)


@pytest.mark.parametrize(
    ("signature", "call", "kept"),
    [
        ("request, hparams, model, tok", "(request, hparams, model, tok)", True),  # another order
        ("model, tok, request, hparams, device=None", "(model, tok, request, hparams, None)", True),
        ("model, tok, request, hparams, device=None", "(model, tok, request, hparams, device='cpu')", False),
        ("model, tok, request, hparams, **more", "(model, tok, request, hparams=hparams)", True),
        ("model, tok, request, hparams, **more", "(model, tok, request, hparams, device='cpu')", False),
        ("*args, **kwargs", "(model, tok, request, hparams)", True),
    ],
)
def test_arguments_are_those_of_the_version_by_name(signature, call, kept, folder, monkeypatch) -> None:  # noqa: F811
    file, seen = "easyeditor/models/rome/rome_main.py", []
    theirs = f"def execute_rome({signature}):\n    return 'theirs'\n"
    first = fakes.EASYEDIT[file].split("def execute_rome")[0]
    fakes.write(folder, fakes.EASYEDIT | {file: first + theirs})

    def ours(model, tok, request, hparams, cache_template=None, *, upstream=None):
        seen.append((model, tok, request, hparams, cache_template))
        return "ours"

    table = [replace(s, ours=ours) if s.name == "execute_rome" else s for s in easyedit.TABLE]
    monkeypatch.setattr(easyedit.BACKEND, "table", table)
    with easyedit.installed():
        main = sys.modules["easyeditor.models.rome.rome_main"]
        given = {name: name for name in ("model", "tok", "request", "hparams")}
        got = eval(f"main.execute_rome{call}", {"main": main, **given})
        with pytest.raises(TypeError):  # its own
            main.execute_rome() if "*args" not in signature else main.execute_rome(1, 2, 3, 4, 5, 6, 7)
    assert got == ("ours" if kept else "theirs")
    assert seen[:1] == ([("model", "tok", "request", "hparams", None)] if kept else [])


def test_what_somebody_kept_is_theirs_once_uninstalled(library) -> None:
    """A user's import while installed; a wrapper around ours that stands in its place."""
    main = sys.modules["easyeditor.models.ft.ft_main"]
    easyedit.install()
    kept, before = main.execute_ft, easyedit.calls()
    main.execute_ft = wrapper = lambda *args: kept(*args)  # noqa: E731
    easyedit.uninstall()
    assert main.execute_ft is wrapper
    assert kept(0, 0, 0, 0) == wrapper(0, 0, 0, 0) == "their execute_ft" and easyedit.calls() == before


def test_a_users_wrapper_that_looks_like_ours_stays(library) -> None:
    """`functools.wraps` copies attributes, ours among them."""
    main = sys.modules["easyeditor.models.rome.rome_main"]
    original = main.execute_rome
    for _ in range(2):
        easyedit.install()
        ours = main.execute_rome
        main.execute_rome = wrapper = functools.wraps(ours)(lambda *args: ("seen", ours(*args)))  # noqa: B023
        easyedit.uninstall()
        assert main.execute_rome is wrapper and main.execute_rome(0, 0, 0, 0) == ("seen", "their execute_rome")
        assert sys.modules["easyeditor.editors.editor"].execute_rome is original
        main.execute_rome = original
    assert same(globals_now(), library)


def test_an_optional_method_that_cannot_be_imported_is_left_out(folder) -> None:  # noqa: F811
    name, needed = "easyeditor/models/pmet/pmet_main.py", "easyeditor/models/memit/memit_main.py"
    for broken in ("import no_such_package\n", "from os import no_such_name\n"):
        fakes.forget(("easyeditor",))
        fakes.write(folder, fakes.EASYEDIT | {name: broken + fakes.EASYEDIT[name]})
        with easyedit.installed():
            assert swapped() == {pair for pair in EVERYWHERE if "pmet" not in pair[0]}
        fakes.forget(("easyeditor",))
        fakes.write(folder, fakes.EASYEDIT | {needed: broken + fakes.EASYEDIT[needed]})
        with pytest.raises(ImportError, match="no_such"):
            easyedit.install()
        assert not swapped()


@pytest.mark.parametrize("module", sorted(m for m in HEAVY if HEAVY[m][0].startswith("execute_") and "pmet" not in m))
def test_hyper_parameters_that_we_do_not_read_are_the_librarys_to_judge(module, library) -> None:
    name = HEAVY[module][0]
    for others in ({"alg_name": "theirs"}, {"clamp_norm_factor": "much", "lr": "much"}):
        with easyedit.installed():
            hparams = types.SimpleNamespace(layers=[1], **others)
            assert getattr(sys.modules[module], name)(None, None, {}, hparams) == f"their {name}"
    assert sum(line.startswith(f"EasyEdit's own {name} runs: ") for line in easyedit.BACKEND._logged) >= 2


def test_a_module_that_is_loaded_again_is_ours_and_comes_back(library) -> None:
    main = sys.modules["easyeditor.models.memit.memit_main"]
    easyedit.install()
    importlib.reload(main)
    assert is_ours(main.execute_memit) and is_ours(main.layer_stats)
    easyedit.uninstall()
    assert not swapped() and main.execute_memit(0, 0, 0, 0) == "their execute_memit"


def test_what_a_user_put_there_comes_back(library) -> None:
    """Whose function is replaced does not matter; what he puts in the place of ours stays."""
    main, ft = sys.modules["easyeditor.models.rome.rome_main"], sys.modules["easyeditor.models.ft.ft_main"]
    own = lambda model, tok, request, hparams: "the user's"  # noqa: E731
    main.execute_rome = own
    with easyedit.installed():
        assert is_ours(main.execute_rome)
        ft.execute_ft = own
    assert main.execute_rome is own and ft.execute_ft is own


def test_threads(library) -> None:
    """Many at once: nobody finds a function half swapped, and at the end all is as it was."""
    failures, begin = [], threading.Barrier(8)

    def work() -> None:
        begin.wait()
        try:
            for _ in range(30):
                with easyedit.installed():
                    assert swapped() == EVERYWHERE
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert same(globals_now(), library)
