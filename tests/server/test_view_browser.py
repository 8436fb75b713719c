"""The live view in headless Chromium: over made-up snapshots, and over a real server."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from prompts import needle
from serving import generate
from view_pages import ARGUMENTS, CHROMIUM, Crowd, ViewServer

from sglang_lsa.serve.view.snapshot import ARRIVING, CACHED, HOST, RECALLED, RESIDENT, SINK, encode
from sglang_lsa.server_process import ServerProcess

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: run `make setup`")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium")

COLOURS = {
    HOST: "host",
    CACHED: "cached",
    ARRIVING: "arriving",
    RESIDENT: "resident",
    RECALLED: "recalled",
    SINK: "sink",
}
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
TOOK = """
window.took = [];
new PerformanceObserver(list => {
  for (const entry of list.getEntries()) if (entry.name === "lsa-update") took.push(entry.duration);
}).observe({entryTypes: ["measure"]});
"""
MAP = """
canvas => {
  const pen = canvas.getContext("2d"), {data, width, height} = pen.getImageData(0, 0, canvas.width, canvas.height);
  const rows = [];
  for (let y = 0; y < height; y++)
    rows.push(Array.from({length: width}, (_, x) => [0, 1, 2, 3].map(i => data[4 * (y * width + x) + i])));
  return rows;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A page that fails its test if it logs an error."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000}, color_scheme="dark")
    troubles: list[str] = []
    page.on("console", lambda message: message.type == "error" and troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.troubles = troubles
    page.add_init_script(TOOK)
    yield page
    page.close()
    assert not troubles


class Fixed:
    """One request whose map is set from outside."""

    def __init__(self, states: list[int], column: int = 1, rid: str = "r") -> None:
        self.crowd = Crowd(1)
        self.states, self.column, self.rid = np.array(states, dtype=np.uint8), column, rid
        self.policy = "quest"

    async def __call__(self) -> str:
        frame = self.crowd.next()
        pages = {"pages": len(self.states), "column": self.column, "map": encode(self.states, self.column)}
        frame["requests"][0] |= {"rid": self.rid, "policy": self.policy, **pages}
        return json.dumps(frame)


@contextlib.contextmanager
def viewing(tab: Any, ask: Callable[[], Awaitable[str]], seconds: float) -> Iterator[ViewServer]:
    """The page is open over made-up snapshots, and left before its server ends."""
    with ViewServer(ask, seconds) as server:
        tab.goto(server.url + "/lsa")
        yield server
        tab.goto("about:blank")


def colours(tab: Any) -> dict[int, list[int]]:
    """RGBA of each state, from the page's own style."""
    found = {}
    for state, name in COLOURS.items():
        text = tab.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()")
        found[state] = [int(text[start : start + 2], 16) for start in (1, 3, 5)] + [255]
    return found


def until(tab: Any, condition: str, seconds: float = 120) -> None:
    """Playwright's own waiting compiles text in the page, which the page's policy forbids."""
    deadline = time.monotonic() + seconds
    while not tab.evaluate(condition):
        assert time.monotonic() < deadline, condition
        tab.wait_for_timeout(20)


def wait_for_updates(tab: Any, count: int) -> None:
    until(tab, f"took.length >= {count}")


def test_the_map_shows_the_states(tab: Any) -> None:
    """Every state in its colour; the updates before stay above, aligned by page; a longer request has wider columns."""
    first = [SINK, HOST, CACHED, ARRIVING, RESIDENT, RECALLED, HOST, RESIDENT]
    source = Fixed(first)
    with viewing(tab, source, 0.05):
        tab.wait_for_selector("canvas.now")
        until(tab, "document.querySelector('canvas.now').width === 8")
        expected = colours(tab)
        assert len({tuple(colour) for colour in expected.values()}) == 6
        assert tab.eval_on_selector("canvas.now", MAP) == [[expected[state] for state in first]]
        source.states = np.array([SINK, RESIDENT, *[HOST] * 8], dtype=np.uint8)
        until(tab, "document.querySelector('canvas.now').width === 10")
        past = tab.eval_on_selector("canvas.past", MAP)
        assert len(past) == 60
        clear = [0, 0, 0, 0]
        assert [expected[state] for state in first] + [clear, clear] in past
        assert past[-1] == [expected[SINK], expected[RESIDENT], *[expected[HOST]] * 8]
        source.states, source.column = np.array([RESIDENT] * 4 + [HOST] * 8, dtype=np.uint8), 4
        until(tab, "document.querySelector('canvas.now').width === 3")
        (now,) = tab.eval_on_selector("canvas.now", MAP)
        assert now == [expected[RESIDENT], expected[HOST], expected[HOST]]
        source.states = np.array([RESIDENT, HOST, HOST, HOST, *[HOST] * 8], dtype=np.uint8)
        until(tab, f"took.length > {tab.evaluate('took.length')} + 2")
        (now,) = tab.eval_on_selector("canvas.now", MAP)
        pale = now[0]
        for channel in range(3):
            between = sorted((expected[HOST][channel], expected[RESIDENT][channel]))
            assert between[0] <= pale[channel] <= between[1]
        assert pale not in (expected[HOST], expected[RESIDENT]), "a quarter of its pages is read"


def test_hovering_names_the_page(tab: Any) -> None:
    with viewing(tab, Fixed([SINK, HOST, CACHED, ARRIVING, RESIDENT, RECALLED, HOST, RESIDENT]), 0.05):
        until(tab, "document.querySelector('canvas.now')?.width === 8")
        box = tab.locator("canvas.now").bounding_box()
        for page, words in enumerate(
            ("sink", "on the host", "on the device, not read", "on its way", "resident", "recalled")
        ):
            tab.mouse.move(box["x"] + box["width"] * (page + 0.5) / 8, box["y"] + box["height"] / 2)
            assert tab.inner_text("#tip").startswith(f"page {page}: {words}")
        tab.hover("#tree", position={"x": 5, "y": 5})
        assert "running requests read through it" in tab.inner_text("#tip")
        tab.mouse.move(2, 2)
        assert tab.is_hidden("#tip")


def test_ids_are_text(tab: Any) -> None:
    """Whoever sends a request chooses its id."""
    source = Fixed([SINK, HOST], rid=EVIL)
    source.policy = "<b>bold</b>"
    with viewing(tab, source, 0.05):
        wait_for_updates(tab, 3)
        assert tab.inner_text(".request .name") == EVIL
        assert "<b>bold</b>" in tab.inner_text(".request dl")
        assert tab.title() == "sglang-lsa: live view"
        assert tab.locator("#requests img, #requests script, #requests b").count() == 0


def test_who_reads_together_is_seen(tab: Any) -> None:
    """A letter and a colour for each group: in the list of groups, at its requests, and below their maps."""
    crowd = Crowd(6, groups=[[0, 3], [1, 2, 5]])
    with viewing(tab, crowd, 0.05):
        wait_for_updates(tab, 5)
        assert tab.locator(".group .badge").all_inner_texts() == ["A", "B"]
        assert [text.split("\n")[1] for text in tab.locator(".group").all_inner_texts()] == ["2 requests", "3 requests"]
        badges = tab.evaluate("[...document.querySelectorAll('.request .badge')].map(b => b.hidden ? '' : b.innerText)")
        assert badges == ["A", "B", "B", "A", "", "B"]
        assert re.fullmatch(
            r"5 requests; \d+ pages? a step not read again, [\d,]+ a second", tab.inner_text("#together-words")
        )
        crowd.frozen = True
        wait_for_updates(tab, tab.evaluate("took.length") + 2)
        frame = crowd.last
        group, own = frame["groups"][1], frame["requests"][2]["group"]
        assert f"{group['pages']} pages read once instead of {group['chosen']} times" in tab.inner_text("#groups")
        added = f", {own['added_pages']} added" if own["added_pages"] else ""
        words = f"{own['pages']} pages for 3{added}; {own['own_pages']} by itself"
        assert words in tab.locator(".request").nth(2).inner_text()
        assert "together" not in tab.locator(".request").nth(4).inner_text()
        assert tab.locator(".request").nth(4).locator(".strip").is_hidden()
        request, strip = frame["requests"][2], tab.locator(".request").nth(2).locator(".strip")
        (drawn,) = strip.evaluate(MAP)
        ratio = request["column"] // group["column"]
        for x, pixel in enumerate(drawn):
            columns = group["map"][x * ratio : (x + 1) * ratio]
            assert (pixel[3] > 0) == (any(share != "0" for share in columns)), x
        x = next(x for x, pixel in enumerate(drawn) if pixel[3])
        box = tab.locator(".request").nth(2).locator("canvas.now").bounding_box()
        tab.mouse.move(box["x"] + box["width"] * (x + 0.5) / len(drawn), box["y"] + box["height"] / 2)
        assert "read once for group B" in tab.inner_text("#tip")


def test_a_group_keeps_its_letter(tab: Any) -> None:
    """While most of its members are the same, whatever its number; a new one gets a letter that is free."""
    crowd = Crowd(7, groups=[[0, 3], [1, 2, 5]])

    def letters() -> str:
        wait_for_updates(tab, tab.evaluate("took.length") + 2)
        badges = "[...document.querySelectorAll('.request .badge')].map(b => b.hidden ? '-' : b.innerText).join('')"
        return tab.evaluate(badges)

    with viewing(tab, crowd, 0.05):
        wait_for_updates(tab, 2)
        assert letters() == "ABBA-B-"
        crowd.groups = [[1, 2, 4]]
        assert letters() == "-BB-B--"
        crowd.groups = [[0, 6], [1, 4]]
        assert letters() == "AB--B-A"
        crowd.groups = [[0, 1, 4], [2, 3], [5, 6]]
        assert letters() == "BBCCBAA", "B by most of its members, A by one"
        crowd.groups = []
        assert letters() == "-------"
        assert tab.is_visible("#no-groups") and tab.locator(".group").count() == 0
        crowd.groups = [[place, place + 1] for place in range(0, 6, 2)]
        assert letters() == "AABBCC-"


def test_a_server_without_groups_shows_nothing_of_them(tab: Any) -> None:
    with viewing(tab, Crowd(3), 0.05):
        wait_for_updates(tab, 3)
        assert tab.is_hidden("#together")
        assert tab.locator(".request .badge:visible, .request .strip:visible").count() == 0
        assert "together" not in tab.inner_text("#requests")


def test_a_hundred_requests(tab: Any) -> None:
    groups = [list(range(first, first + 6)) for first in range(0, 96, 6)]
    with viewing(tab, Crowd(100, groups=groups), 0.1):
        wait_for_updates(tab, 80)
        assert tab.locator(".request").count() == 100
        assert tab.inner_text("#running") == "Running requests: 100"
        took = sorted(tab.evaluate("took.slice(10)"))
        print(f"scripting per update: median {took[len(took) // 2]:.1f} ms, most {took[-1]:.1f} ms")
        tab.locator(".request").nth(99).scroll_into_view_if_needed()
        until(tab, "document.querySelectorAll('.request')[99].row.drawn")
        drawn = tab.locator(".request").nth(99).locator("canvas.now").evaluate(MAP)[0]
        expected = colours(tab)
        assert expected[HOST] in drawn and drawn[0] not in (expected[HOST], [0, 0, 0, 0])


def test_nothing_grows(tab: Any) -> None:
    """1,500 updates while requests come and go: the page keeps 60 of them, and nothing of requests that are gone."""
    crowd = Crowd(20)

    async def ask() -> str:
        frame = crowd.next()
        for request in frame["requests"]:
            request["rid"] = f"{request['rid']}-{crowd.updates // 50}"
        return json.dumps(frame)

    with viewing(tab, ask, 0.004):
        wait_for_updates(tab, 300)
        # Frames that took long are those of a busy machine, and Chromium keeps 200 of them.
        entries = "performance.getEntries().filter(entry => entry.entryType !== 'long-animation-frame')"
        count = f"document.querySelectorAll('*').length + {entries}.length"
        before = tab.evaluate(count)
        wait_for_updates(tab, 1500)
        # A busy machine adds an entry or two of its own; what stays of every update, or of every request that is gone,
        # would be hundreds.
        assert tab.evaluate(count) <= before + 12
        assert tab.evaluate("shown.size") == tab.locator(".request").count() == 20
        assert tab.evaluate("Math.max(...[...shown.values()].map(row => row.rows.length))") <= 60
        assert tab.evaluate("Math.max(...Object.values(lines).map(line => line.values.length))") == 120


def test_a_hidden_page_reads_nothing(tab: Any) -> None:
    with viewing(tab, Crowd(3), 0.05) as server:
        wait_for_updates(tab, 2)
        tab.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
        tab.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        deadline = time.monotonic() + 20
        while server.broadcast.poller is not None and time.monotonic() < deadline:
            tab.wait_for_timeout(20)
        assert server.broadcast.poller is None and not server.broadcast.streams
        seen = tab.evaluate("took.length")
        tab.evaluate("Object.defineProperty(document, 'hidden', {value: false, configurable: true})")
        tab.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        wait_for_updates(tab, seen + 2)


def test_an_error_is_shown_and_left_again(tab: Any) -> None:
    crowd, broken = Crowd(2), [True]

    async def ask() -> str:
        return (
            json.dumps({"error": "the scheduler could not describe itself"}) if broken[0] else json.dumps(crowd.next())
        )

    with viewing(tab, ask, 0.05):
        until(tab, "document.querySelector('#state').className === 'bad'")
        assert tab.inner_text("#state").endswith("the scheduler could not describe itself")
        broken[0] = False
        until(tab, "document.querySelector('#state').className === 'live'")


@pytest.mark.server
@pytest.mark.slow
def test_a_real_server(lsa: ServerProcess, tab: Any) -> None:
    """Two requests decode while the page is open."""
    tab.goto(lsa.url + "/lsa")
    wait_for_updates(tab, 1)
    with ThreadPoolExecutor(2) as pool:
        texts = [needle(1800, 0.5, 3).prompt + f" Question {number}." for number in range(2)]
        running = [pool.submit(generate, lsa, text, 200, rid) for text, rid in zip(texts, ("seen", EVIL), strict=True)]
        until(tab, "[...document.querySelectorAll('dl')].filter(list => list.innerText.includes('quest')).length === 2")
        assert set(tab.locator(".request .name").all_inner_texts()) == {
            "seen",
            EVIL[:63] + "…",
        }
        first = tab.locator(".request").first.locator("canvas.now").evaluate(MAP)[0]
        expected = colours(tab)
        assert first[0] == expected[SINK]
        assert expected[RESIDENT] in first and first[-1] in (expected[RESIDENT], expected[RECALLED])
        for future in running:
            future.result()
    until(tab, "!document.querySelector('.request')")
    assert tab.is_visible("#none")


@pytest.mark.server
def test_the_page_asks_for_the_key(keyed: ServerProcess, tab: Any) -> None:
    """``sglang-lsa view`` serves the page of a server that wants its key; what is typed there goes to the server."""
    command = [sys.executable, "-m", "sglang_lsa.cli", "view", keyed.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().removeprefix("Open ").strip()
        tab.goto(address)
        tab.wait_for_selector("#key", state="visible")
        for key, words in (("wrong", "the server refused this key"), ("secret", "live")):
            tab.fill("#secret", key)
            tab.press("#secret", "Enter")
            until(tab, f"document.querySelector('#state').textContent === {words!r}")
        assert tab.is_hidden("#key")
        assert tab.input_value("#secret") == ""
        assert tab.url == address, "the key is in no address"
        tab.goto("about:blank")
    finally:
        process.terminate()
        process.wait(20)
    refused = [text for text in tab.troubles if "401" in text]
    assert len(refused) == len(tab.troubles) == 2, "the browser logs refused requests, and nothing else went wrong"
    tab.troubles.clear()
