"""Its steps are those of the page, and faults are seen. The walk itself takes minutes: `make walkthrough`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from walkthrough.steps import Step, of_the_page, steps_of
from walkthrough.walk import Walk


@pytest.mark.walkthrough
def test_the_walk(tmp_path: Path) -> None:
    walk, said = Walk(tmp_path), []
    walk.say = said.append
    walk.go(steps_of(str(Path(__file__).resolve().parents[2])))
    assert not walk.failed, "\n".join(said)


def test_the_steps_are_those_of_the_page() -> None:
    titles = [step.title for step in steps_of(".")]
    assert titles[:2] == ["clone", "make demo"] and len(set(titles)) == len(titles)
    order = [[t.startswith(f"knowedit {name} ") for t in titles].index(True) for name in ("trace", "edit", "apply")]
    assert order == sorted(order)
    assert not next(s for s in steps_of(".") if s.title == "make demo").command.startswith("source")
    assert next(s for s in steps_of(".") if s.title.startswith("knowedit edit")).command.startswith("source .venv")


def test_a_command_of_the_page_that_nothing_is_expected_of_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```sh\nknowedit fly world\n```\n")
    with pytest.raises(ValueError, match="nothing is expected of: knowedit fly"):
        list(of_the_page(page))


@pytest.mark.parametrize(
    "step, said",
    [
        (Step("a", "echo words >&2; exit 3", "."), "exit status 3\nwords"),
        (Step("a", "echo one", ".", says=("two",)), r"does not say \['two'\]"),
        (Step("a", "true", ".", makes=("file",)), r"did not make \['file'\]"),
        (Step("a", "false | true", "."), "exit status 1"),
    ],
)
def test_a_step_that_fails_ends_the_walk(tmp_path: Path, step: Step, said: str) -> None:
    told: list[str] = []
    walk = Walk(tmp_path, told.append)
    walk.go([Step("first", "echo x > there", ".", makes=("there",)), step, Step("never", "true", ".")])
    assert walk.failed and list(walk.seconds) == ["first", "a"]
    assert re.search(said, told[-1])
    assert "| first |" in walk.table() and "| all |" in walk.table()


def test_a_newcomer_has_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("KNOWEDIT_REQUIRE_NATIVE", "1")
    walk = Walk(tmp_path)
    walk.go([Step("a", 'test -z "$PYTHONPATH$KNOWEDIT_REQUIRE_NATIVE"', ".")])
    assert not walk.failed
