"""Exploring by hand: the session without its page, and the page in a browser where Gradio and one are there."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import knowedit_ext as ke
from knowedit_ext.explore import Session
from knowedit_ext.explore.app import map_html

from .support.unchanged import assert_unchanged, snapshot

RECORD = ke.world_records()[0]["requested_rewrite"]
SUBJECT = RECORD["subject"]
PROMPT = RECORD["prompt"].replace("{}", SUBJECT)
OLD, NEW = RECORD["target_true"]["str"], RECORD["target_new"]["str"]
OTHER = ke.world_records()[1]["requested_rewrite"]


@pytest.fixture(scope="module")
def moments() -> ke.Moments:
    return ke.collect_moments(ke.load_model("world"), "world", layers=[3], max_tokens=2_000)


@pytest.fixture
def session(moments: ke.Moments) -> Session:
    return Session(ke.load_model("world"), "rome", "world", moments)


def test_an_edit_is_tried_kept_and_reverted(session: Session) -> None:
    before = snapshot(session.model.hf)
    assert session.trace(PROMPT, SUBJECT, samples=2).answer.strip() == OLD
    said = session.try_edit(PROMPT, SUBJECT, NEW, others=f"\n{PROMPT}\n She is \n", tokens=2)
    assert said.prompts == [PROMPT, "She is"]
    assert said.before[0].text.strip().startswith(OLD) and said.after[0].text.strip().startswith(NEW)
    assert_unchanged(before, session.model.hf)  # it is not kept yet
    assert session.log() == []
    session.keep()
    assert session.trace(PROMPT, SUBJECT, samples=2).answer.strip() == NEW
    assert session.log() == [{"prompt": PROMPT, "answer": NEW}]
    session.revert()
    assert_unchanged(before, session.model.hf)
    assert session.log() == []


def test_the_log_is_an_edit_file(session: Session, tmp_path: Path) -> None:
    """Edits made on top of each other, and their sum on another model: the same bits."""
    for fact in (RECORD, OTHER):
        session.try_edit(fact["prompt"].replace("{}", fact["subject"]), fact["subject"], fact["target_new"]["str"])
        session.keep()
    session.save(tmp_path / "log.safetensors")
    loaded = ke.Edit.load(tmp_path / "log.safetensors")
    assert [request["subject"] for request in loaded.requests] == [SUBJECT, OTHER["subject"]]
    assert (tmp_path / "log.safetensors").stat().st_size > 0
    other = ke.load_model("world")
    with loaded.applied(other):
        for fact in (RECORD, OTHER):
            answer = ke.trace(other, ke.Fact(fact["prompt"], fact["subject"]), samples=2).answer
            assert fact["target_new"]["str"].startswith(answer.strip())
    session.revert()
    assert [entry["prompt"] for entry in session.log()] == [PROMPT]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda s: s.keep(), "no edit to keep"),
        (lambda s: s.revert(), "nothing to revert"),
        (lambda s: s.save("x.safetensors"), "nothing to save"),
        (lambda s: s.trace("", SUBJECT), "the prompt is empty"),
        (lambda s: s.trace(PROMPT, " "), "the subject is empty"),
        (lambda s: s.trace(PROMPT, "Nobody"), "does not occur"),
        (lambda s: s.try_edit(PROMPT, SUBJECT, " "), "new answer is empty"),
        (lambda s: Session(s.model, "nothing"), "unknown method"),
    ],
)
def test_mistakes_are_said_in_words(session: Session, act: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act(session)


def test_what_was_tried_on_top_of_a_reverted_edit_is_not_kept(session: Session) -> None:
    session.try_edit(PROMPT, SUBJECT, NEW)
    session.keep()
    session.try_edit(OTHER["prompt"].replace("{}", OTHER["subject"]), OTHER["subject"], OTHER["target_new"]["str"])
    session.revert()
    with pytest.raises(ValueError, match="no edit to keep"):
        session.keep()
    session.try_edit(PROMPT, SUBJECT, NEW)
    with pytest.raises(ValueError):
        session.try_edit(PROMPT, SUBJECT, "")
    session.keep()  # a slip of the hand loses nothing


def test_only_what_was_tried_last_is_kept(session: Session) -> None:
    """Of several windows on one model."""
    session.try_edit(PROMPT, SUBJECT, NEW)
    mine = session.tried
    session.try_edit(OTHER["prompt"].replace("{}", OTHER["subject"]), OTHER["subject"], OTHER["target_new"]["str"])
    with pytest.raises(ValueError, match="try it again"):
        session.keep(mine)
    kept = session.keep(session.tried)
    with pytest.raises(ValueError, match="this edit is kept"):
        session.keep(kept)
    assert session.kept == [kept]


def test_a_map_of_nothing_is_said_to_be_one(session: Session) -> None:
    known = session.trace(PROMPT, SUBJECT, samples=2)
    assert map_html(known) == known._repr_html_() and "strong" not in map_html(known)
    assert "hardly changes" in map_html(replace(known, low_score=0.95 * known.high_score))
    assert "hardly changes" not in map_html(replace(known, low_score=0.85 * known.high_score))


@pytest.fixture
def page(session: Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Session]]:
    pytest.importorskip("gradio", reason="the extra app is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium")
    from knowedit_ext.explore.app import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = session.app = serve(session, port, PROMPT, SUBJECT, wait=False)
    try:
        with playwright.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
            context, asked, said = browser.new_context(), [], []
            context.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
            tab = context.new_page()
            context.on("request", lambda request: asked.append(request.url))
            tab.goto(f"http://127.0.0.1:{port}")
            yield tab, session
            browser.close()
        away = [url for url in asked if not re.match(rf"(http|ws)://127\.0\.0\.1:{port}/|data:|blob:", url)]
        assert asked and not away, away  # nothing leaves the machine
        assert not said, said
    finally:
        app.close()


def test_the_page_does_what_the_session_does(page: tuple[Any, Session], tmp_path: Path) -> None:
    tab, session = page
    acts = [each for each in session.app.fns.values() if each.queue is not False and each.fn]
    assert acts and {each.concurrency_id for each in acts} == {"model"}  # never two at a time
    tab.locator("#subject textarea, #subject input").fill("")
    prompt = tab.locator("#prompt textarea, #prompt input")
    prompt.evaluate("(box, [from, to]) => { box.focus(); box.setSelectionRange(from, to); }",
                    [PROMPT.index(SUBJECT), PROMPT.index(SUBJECT) + len(SUBJECT)])  # fmt: skip
    prompt.dispatch_event("select")
    tab.wait_for_function("(wanted) => document.querySelector('#subject textarea, #subject input').value === wanted",
                          arg=SUBJECT)  # fmt: skip
    assert tab.locator("#prompt textarea, #prompt input").input_value() == PROMPT
    tab.locator("#trace").click()
    tab.locator("#map td").first.wait_for(timeout=60_000)
    shown = [float(x) for x in tab.locator("#map td").all_inner_texts()]
    assert shown == pytest.approx(session.trace(PROMPT, SUBJECT).scores.ravel().tolist(), abs=6e-3)
    tab.locator("#keep").click()
    tab.get_by_text("there is no edit to keep").wait_for(timeout=30_000)
    tab.locator("#target textarea, #target input").fill(NEW)
    tab.locator("#try").click()
    tab.locator("#said td").first.wait_for(timeout=120_000)
    before, after = tab.locator("#said td").all_inner_texts()
    assert before.strip().startswith(OLD) and after.strip().startswith(NEW)
    tab.locator("#keep").click()
    tab.locator("#log td").first.wait_for(timeout=30_000)
    assert session.log() == [{"prompt": PROMPT, "answer": NEW}]
    other = tab.context.new_page()  # shows what is in force, and has nothing of its own to keep
    other.goto(tab.url)
    other.locator("#log td").first.wait_for(timeout=30_000)
    other.locator("#keep").click()
    other.get_by_text("there is no edit to keep").wait_for(timeout=30_000)
    tab.locator("#save").click()
    link = tab.locator("#file a").first
    link.wait_for(timeout=30_000)
    with tab.expect_download() as download:
        link.click()
    download.value.save_as(tmp_path / "kept.safetensors")
    assert ke.Edit.load(tmp_path / "kept.safetensors").requests[0]["subject"] == SUBJECT
    tab.locator("#revert").click()
    for window in (tab, other):
        window.locator("#log").get_by_text("no edit is in force").wait_for(timeout=30_000)
    assert session.log() == []
