"""The studio in a real browser, on real weights: a run from the form to an answer at a strength."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
]

MINUTES = 60_000
PAGES = ("Progress", "New run", "Inside", "Results", "Answers")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A studio with no run."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    runs = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "polylens", "studio", "--runs", runs, "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def asked() -> set[str]:
    """Hosts that the browser has asked for anything."""
    return set()


@pytest.fixture(scope="module")
def page(address: str, asked: set[str]) -> Iterator[Any]:
    """The studio in Chromium; the tests below go through it in order."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(2 * MINUTES)
        page.on("request", lambda request: asked.add(urlsplit(request.url).hostname or "data"))
        page.goto(address)
        yield page
        browser.close()


def turn_to(page: Any, name: str) -> None:
    """Open a tab by keyboard."""
    page.get_by_role("tab", name=name).focus()
    page.keyboard.press("Enter")


def says(page: Any, place: str, text: str, minutes: float = 2) -> None:
    sync_api.expect(page.locator(place)).to_contain_text(text, timeout=minutes * MINUTES)


def test_faults_are_said_and_a_run_is_started(page: Any) -> None:
    turn_to(page, "New run")
    page.get_by_label("Name", exact=True).fill("trial")
    languages = page.get_by_label("Target languages")
    languages.fill("swahilli")
    start = page.get_by_role("button", name="Start", exact=True)
    start.click()
    says(page, "#said [role=alert]", "did you mean 'swahili'?")
    languages.fill("sw, ar")
    page.get_by_role("button", name="Settings").click()
    for label, value in (
        ("Texts to probe", "8"),
        ("Training rows", "8"),
        ("Held-out rows", "8"),
        ("Rise of bits per byte", "9"),
        ("Longest answer, in tokens", "12"),
    ):
        page.get_by_label(label).first.fill(value)
    page.get_by_role("button", name="Check, and estimate").click()
    says(page, "#said table", "smollm2-135m-instruct, 135 M parameters")
    start.focus()
    page.keyboard.press("Enter")
    says(page, "#progress", "trial is under way")


def test_a_run_is_stopped_and_resumed(page: Any) -> None:
    says(page, "#progress", "Probing the language subspaces")
    page.get_by_role("button", name="Stop").click()
    says(page, "#progress", "trial is stopped")
    page.get_by_role("button", name="Resume").click()
    says(page, "#progress", "trial is under way")
    says(page, "#progress", "left")  # the time
    says(page, "#progress", "trial is finished; 8 of 8", minutes=15)
    sync_api.expect(page.locator(".figure .scatterlayer .js-line").first).to_be_visible()


def test_the_result_is_read(page: Any, address: str) -> None:
    turn_to(page, "Results")
    says(page, "#results", "beyond chance")
    says(page, "#results", "bits_per_byte_sw")
    with page.expect_popup() as opened:
        page.get_by_role("link", name="Report").click()
    sync_api.expect(opened.value.locator("h1")).to_contain_text("Swahili")
    opened.value.close()
    with page.expect_download() as download:
        page.get_by_role("link", name="Delta").click()
    assert Path(download.value.path()).stat().st_size > 10**6


def test_a_point_shows_its_text_at_every_layer(page: Any) -> None:
    turn_to(page, "Inside")
    page.get_by_role("button", name="every layer").click()
    slider = page.locator("#layer input[type=range]")
    slider.wait_for()
    slider.focus()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    sync_api.expect(slider).to_have_value("10")
    page.wait_for_timeout(5000)
    point = page.locator(".scatterlayer .point:visible").first.bounding_box()
    page.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    hover = page.locator(".hoverlayer .hovertext").first
    hover.wait_for()
    assert len(hover.text_content().removeprefix("English")) > 15  # a prompt, and its language


def test_the_dial_changes_the_answer(page: Any) -> None:
    turn_to(page, "Answers")
    page.locator("#prompt textarea").fill("ما هو المطر؟")
    page.get_by_role("button", name="Answer", exact=True).click()
    says(page, "#answers", "After, strength 1")
    dial = page.get_by_label("range slider for Strength of the delta")
    dial.focus()
    page.keyboard.press("Home")
    says(page, "#answers", "After, strength 0")
    before, after = page.locator("#answers [dir=auto]").all_inner_texts()
    assert before == after
    assert before
    direction = "element => getComputedStyle(element).direction"
    # A prompt in Arabic, and whatever answers are in Arabic, run from the right.
    assert page.locator("#answers [dir=auto]").count() == 2
    page.evaluate("document.querySelector('#answers [dir=auto]').textContent = 'ما هو المطر؟'")
    assert page.locator("#answers [dir=auto]").first.evaluate(direction) == "rtl"


def test_everything_is_within_reach_of_the_keyboard(page: Any) -> None:
    page.evaluate("document.activeElement.blur()")
    names = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        names.add(
            page.evaluate(
                """() => { const e = document.activeElement;
                return e.getAttribute('aria-label') || e.innerText || e.id || e.tagName; }"""
            ).strip()
        )
    assert names >= {"Run", "Refresh", "Answer", "range slider for Strength of the delta"}
    assert names & set(PAGES)


def test_a_phone_shows_it_all(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    for name in PAGES:
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(1500)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, name


def test_no_request_leaves_the_machine(page: Any, asked: set[str]) -> None:
    assert asked <= {"127.0.0.1", "data"}
