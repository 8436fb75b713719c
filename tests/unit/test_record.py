"""``sglang-lsa record`` without a server: which prompts are made, pools, and how servers share the work."""

from __future__ import annotations

import pathlib
import threading
from typing import Any

import pytest

from sglang_lsa.embedded_model import embedded_model_path
from sglang_lsa.indexer.manifest import Entry
from sglang_lsa.texts.corpus import Prompt, Tokens, make_prompts, name_of
from sglang_lsa.training import record
from sglang_lsa.training.pool import LEAST_GB, LEAST_TOKENS, pool_flags


def test_known_prompts_are_not_made() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    families = ("facts", "pairs")
    every = [prompt.name for prompt, _ in make_prompts(tokenizer, "train", (600,), 2, families)]
    assert every == [name_of("train", family, 600, number) for number in range(2) for family in families]
    left = make_prompts(tokenizer, "train", (600,), 2, families, known=lambda name: name != every[2])
    assert [prompt.name for prompt, _ in left] == [every[2]]


def test_a_pool_is_of_what_is_asked_for() -> None:
    """SmolLM2 keeps 3 heads of 64 numbers, keys and values, in 30 layers."""
    model = str(embedded_model_path())
    flags = pool_flags(model, 32_100, 2, "")
    assert flags[::2] == ["--lsa-device-tokens", "--lsa-host-memory-gb"]
    assert int(flags[1]) == 64_256 and float(flags[3]) == pytest.approx(
        2 * 64_256 * 2 * 30 * 3 * 64 * 4 / 1e9, abs=0.01
    )
    assert pool_flags(model, 600, 2, "--lsa-host-memory-gb 1") == ["--lsa-device-tokens", str(LEAST_TOKENS)]
    least = pool_flags(model, 600, 2, "--lsa-device-memory-gb 1")
    assert least[0] == "--lsa-host-memory-gb" and float(least[1]) >= LEAST_GB
    assert pool_flags(model, 600, 2, """--lsa-config '{"device_tokens": 9984}'""") == []


def entry(name: str) -> Entry:
    return Entry(name, "facts", "train", "a text", 600, 5, (1,), 10)


class Server:
    """Stands for a server process."""

    def __init__(self, ready: threading.Event, fails: bool = False):
        self.ready, self.fails, self.asked = ready, fails, list[str]()

    def wait_until_ready(self) -> Server:
        assert self.ready.wait(30)
        if self.fails:
            raise record.ServerFailed("it ended")
        return self


def prompts(made: list[str], count: int) -> Any:
    for number in range(count):
        made.append(f"p{number}")
        yield Prompt(f"p{number}", "facts", "train", "", ""), Tokens([1], 0, ())


def answer(server: Server, output: pathlib.Path, prompt: Prompt, *more: Any) -> Entry:
    server.asked.append(prompt.name)
    return entry(prompt.name)


def test_prompts_are_made_while_servers_start(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(record, "_record_one", answer)
    ready = threading.Event()
    made: list[str] = []

    def all_made() -> Any:
        yield from prompts(made, 40)
        assert not any(server.asked for server in servers)
        ready.set()

    servers: list[Any] = [Server(ready) for _ in range(3)]
    found = list(record._entries(servers, all_made(), tmp_path, 8, 1))
    assert sorted(each.name for each in found) == sorted(made)
    assert sum(len(server.asked) for server in servers) == 40


def test_a_server_that_fails_ends_it(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """And the rest is not asked of the others."""
    monkeypatch.setattr(record, "_record_one", answer)
    ready = threading.Event()
    ready.set()
    servers: list[Any] = [Server(ready, fails=True)]
    with pytest.raises(record.ServerFailed, match="it ended"):
        list(record._entries(servers, prompts([], 1000), tmp_path, 8, 1))


def test_nobody_waits_for_the_others_when_one_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """They may take minutes to start, or to record; they are stopped once the failure is told."""
    monkeypatch.setattr(record, "_record_one", answer)
    at_once, late, told = threading.Event(), threading.Event(), threading.Event()
    at_once.set()

    def ask() -> None:
        with pytest.raises(record.ServerFailed, match="it ended"):
            list(record._entries([Server(late), Server(at_once, fails=True)], prompts([], 8), tmp_path, 8, 1))  # type: ignore[list-item]
        told.set()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        assert told.wait(10)
    finally:
        late.set()
        asking.join()


def test_an_interrupted_one_asks_nothing_more(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    begun, going_on = threading.Semaphore(0), threading.Event()
    asked: list[str] = []

    def slow(server: Server, output: pathlib.Path, prompt: Prompt, *more: Any) -> Entry:
        asked.append(prompt.name)
        begun.release()
        assert going_on.wait(30)
        return entry(prompt.name)

    def interrupted() -> Any:
        yield from prompts([], 20)
        begun.acquire()
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "_record_one", slow)
    ready = threading.Event()
    ready.set()
    ended = threading.Event()

    def ask() -> None:
        with pytest.raises(KeyboardInterrupt):
            list(record._entries([Server(ready)], interrupted(), tmp_path, 8, 1))  # type: ignore[list-item]
        ended.set()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        assert ended.wait(10)
    finally:
        going_on.set()
        asking.join()
    assert asked == ["p0"]
