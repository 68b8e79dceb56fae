"""`make real`: commands that go on, and the inputs that they share."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def module(name: str) -> ModuleType:
    """By its path: with benchmarks/ on sys.path, its modules would stand before packages of the same names."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    made = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


real_parts, real, real_inputs = map(module, ("real_parts", "real", "real_inputs"))
trained_editors, real_editors = map(module, ("trained_editors", "real_editors"))


def test_a_command_runs_until_it_ends_well(tmp_path: Path) -> None:
    script, count = tmp_path / "a.py", tmp_path / "count"
    script.write_text(
        f"import sys; n = len(open({str(count)!r}, 'a+').read() or ''); f = open({str(count)!r}, 'a'); f.write('x'); "
        f"f.close(); n = len(open({str(count)!r}).read()); print('said', n, {str(tmp_path / 'a')!r}); sys.exit(n < 2)"
    )
    command, printed, called = f"python {script}", tmp_path / "out" / "printed.md", {tmp_path: "WORK"}
    printed.parent.mkdir()
    printed.write_text("said by an earlier command\n")
    with pytest.raises(SystemExit, match="ended with status 1"):
        real.once(command, tmp_path / "commands", printed, called)
    assert printed.read_text() == "said by an earlier command\n"
    took = real.once(command, tmp_path / "commands", printed, called)
    assert took["ended"] and took["seconds"] > 0 and printed.read_text() == "said 2 WORK/a\n"
    assert real.once(command, tmp_path / "commands", printed, called) == took and len(count.read_text()) == 2
    printed.unlink()  # what it prints is asked for again
    real.once(command, tmp_path / "commands", printed, called)
    assert printed.read_text() == "said 3 WORK/a\n"


def test_every_command_can_be_asked_for(monkeypatch, capsys) -> None:
    """Placeholders are known, commands are ours, and what they read a part before them has made."""
    monkeypatch.setattr(sys, "argv", ["real.py", "--list"])
    real.main()
    listed = capsys.readouterr().out
    places = dict(smollm2="S", gemma3="G", here="H", work="W", data="D", records=1, generated=1)
    for name, part in real_parts.PARTS.items():
        assert f"# {name}: {part.about}" in listed
        for command in part.commands.format(**places).splitlines():
            assert command.startswith(("knowedit ", "python H/")), command
            if command.startswith("python"):
                assert (BENCHMARKS / command.split()[1].removeprefix("H/")).is_file()
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["real.py", "nothing"])
        real.main()


def test_a_model_that_is_not_there_is_named(tmp_path: Path, monkeypatch) -> None:
    flags = ["--models", str(tmp_path / "none"), "--work", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["real.py", "tracing_gemma3", *flags])
    with pytest.raises(SystemExit, match="tracing_gemma3 needs .*none/gemma3: see docs"):
        real.main()


def test_snippets_name_the_object(tmp_path: Path, monkeypatch) -> None:
    filler = " word" * 40
    text = (
        f" = Anna = \n A violin{filler} .\n = = Life = = \n Violins{filler} .\n short violin .\n"
        f" = Bo = \n the violin{filler} , drums{filler}\n"
    )
    assert [title for title, _ in real_inputs.paragraphs(text)] == ["Anna", "Anna", "Bo"]
    rewrite = lambda new, number: {"relation_id": "P1", "target_new": {"str": new, "id": f"Q{number}"}}  # noqa: E731
    records = [{"requested_rewrite": rewrite(name, n)} for n, name in enumerate(["violin", "drums", "tuba"])]
    for name, part in zip(real_inputs.FILES, (records[:2], records[2:]), strict=True):
        (tmp_path / name).write_text(json.dumps(part))
    (tmp_path / "wikitext2_test.raw").write_text(text)
    monkeypatch.setattr(sys, "argv", ["real_inputs.py", "--data", str(tmp_path), "--out", str(tmp_path)])
    real_inputs.main()
    made = json.loads((tmp_path / "snippets.json").read_text())
    assert [(e["target_id"], [s["name"] for s in e["samples"]]) for e in made] == [
        ("Q0", ["Anna", "Bo"]),
        ("Q1", ["Bo"]),
    ]
    assert json.loads((tmp_path / "counterfact.json").read_text()) == records
    assert json.loads((tmp_path / "with_snippets.json").read_text()) == records[:2]


def test_editors_learn_by_others_and_by_sentences() -> None:
    text = " = Rome = \n\n It is the capital of Italy , and an old one . Short . " + "word " * 40 + ".\n"
    assert real_editors.sentences(text) == ["It is the capital of Italy , and an old one ."]
    records = [{"requested_rewrite": {"subject": subject}} for subject in ("Rome", "Paris", "Rome")]
    assert trained_editors.of_other_people(records, records[:1]) == records[1:2]
