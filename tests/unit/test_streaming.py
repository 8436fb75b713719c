"""The streaming client and who uses it, against a server that says what it is told to. More of it: ``test_bench``."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from sglang_lsa.demo.client import ANSWER_TOKENS, Request, ask_at_once, ask_in_sequence
from sglang_lsa.evaluation.client import Answer, Endpoint, EndpointFailed
from sglang_lsa.streaming import RequestFailed, Stream, event_of, session
from sglang_lsa.texts.document import FACTS, Document, Question

USAGE = {"prompt_tokens": 40, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 32}}
NUMBER = FACTS[0].number


def said(text: str) -> dict[str, Any]:
    return {"choices": [{"text": text}]}


def chat(text: str | None) -> dict[str, Any]:
    return {"choices": [{"delta": {"role": "assistant", "content": text}}]}


class Says(http.server.BaseHTTPRequestHandler):
    """Answers a POST with prepared chunks, and knows one model."""

    chunks: list[Any] = []  # noqa: RUF012
    status = 200
    bodies: list[dict[str, Any]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.reply(b'{"data": [{"id": "toy"}]}')

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        lines = [chunk if isinstance(chunk, str) else json.dumps(chunk) for chunk in self.chunks]
        self.reply("".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode())

    def reply(self, body: bytes) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Says, "bodies", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Says) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


# --- streams ---------------------------------------------------------------------------------------------------------


def taken(*chunks: dict[str, Any]) -> Stream:
    stream = Stream(1.0)
    for time, chunk in enumerate(chunks, 2):
        stream.take(chunk, float(time))
    return stream


def test_every_protocol_is_read_the_same() -> None:
    meta = {"prompt_tokens": 40, "cached_tokens": 32}
    own = taken(*({"text": "abcd"[:n], "meta_info": {**meta, "completion_tokens": n}} for n in (1, 2, 4)))
    assert own.tokens == [1, 2, 4]
    completion = taken(said("a"), said("b"), said("cd"), {"choices": [], "usage": {**USAGE, "completion_tokens": 4}})
    assert completion.tokens == [0, 0, 0, 4]
    chatted = taken(chat(""), chat(None), chat("ab"), chat("cd"), {"choices": [], "usage": USAGE})
    assert chatted.text_times == [4.0, 5.0] and len(chatted.times) == 5
    for stream, count in ((own, 4), (completion, 4), (chatted, 3)):
        assert (stream.text, stream.count, stream.prompt_tokens, stream.cached) == ("abcd", count, 40, 32)


def test_a_server_without_a_tokenizer_sends_no_text() -> None:
    stream = taken({"meta_info": {"completion_tokens": 2}}, {"text": None, "meta_info": {"completion_tokens": 3}})
    assert (stream.text, stream.count, stream.cached) == ("", 3, None)


def test_errors_in_a_stream() -> None:
    with pytest.raises(RequestFailed, match="no room"):
        taken(said("a"), {"error": {"message": "no room"}})


@pytest.mark.parametrize(
    ("line", "event"), [(b'data: {"a": 1}\n', {"a": 1}), (b"data: [DONE]\n", None), (b"\n", None), (b": ping\n", None)]
)
def test_events(line: bytes, event: dict[str, Any] | None) -> None:
    assert event_of(line) == event


# --- an endpoint of the evaluation -----------------------------------------------------------------------------------


def complete(url: str, **more: Any) -> Answer:
    async def ask() -> Answer:
        async with session() as connection:
            return await Endpoint(connection, url + "/", api_key="key").complete((5, 6), 7, **more)

    return asyncio.run(ask())


def test_a_completion(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Says, "chunks", [said("It is "), said("so."), {"choices": [], "usage": USAGE}])
    answer = complete(url)
    assert (answer.text, answer.tokens, answer.cached) == ("It is so.", 3, 32)
    assert 0 < answer.seconds[0] <= answer.seconds[1]
    complete(url, rid="r", options={"policy": "quest"}, salt="s")
    plain, ours = Says.bodies
    expected = {"model": "toy", "prompt": [5, 6], "max_tokens": 7, "temperature": 0, "stream": True}
    assert plain == expected | {"stream_options": {"include_usage": True}}
    assert ours == plain | {"rid": "r", "custom_params": {"lsa": {"policy": "quest"}}, "cache_salt": "s"}


@pytest.mark.parametrize(
    ("status", "chunks", "words"),
    [
        (503, [], r"http://127.0.0.1:\d+: HTTP 503: data"),
        (200, [said("a"), {"error": "no room"}], r"http://127.0.0.1:\d+: no room"),
        (200, [said("a")], "an answer ended early, without usage"),
        (200, [said("a"), "{no"], "failed in the middle of an answer: JSONDecodeError"),
        (200, [{"id": 1}], "failed in the middle of an answer: KeyError"),
    ],
    ids=["refused", "error in the stream", "early end", "no JSON", "another protocol"],
)
def test_endpoints_that_fail(
    status: int, chunks: list[Any], words: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Says, "chunks", chunks)
    monkeypatch.setattr(Says, "status", status)

    async def ask() -> Answer:
        async with session() as connection:
            return await Endpoint(connection, url, "toy").complete((5,), 7)

    with pytest.raises(EndpointFailed, match=words):
        asyncio.run(ask())


# --- questions of the demo -------------------------------------------------------------------------------------------

QUESTION = Question(Document(FACTS[0], "A text.", 3), "What is the number for {word}?")


def test_questions_of_the_demo(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [chat(""), chat(" It"), chat(" is"), chat(f" {NUMBER}. "), {"choices": [], "usage": USAGE}]
    monkeypatch.setattr(Says, "chunks", chunks)
    done: list[int] = []
    requests = [Request(QUESTION), Request(QUESTION, {"policy": "quest"}, 64, ignore_eos=True)]
    answers = ask_in_sequence(url, requests, lambda: done.append(1)) + ask_at_once(url, requests)
    assert len(done) == 2 and len({answer.rid for answer in answers}) == 4
    for answer in answers:
        assert (answer.text, answer.right) == (f"It is {NUMBER}.", True)
        assert (answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens) == (40, 32, 3)
        assert answer.ttft > 0 <= answer.tpot
    stock, ours = Says.bodies[:2]
    assert (stock["messages"], stock["max_tokens"], stock["ignore_eos"]) == (QUESTION.messages, ANSWER_TOKENS, False)
    assert "custom_params" not in stock
    assert (ours["custom_params"], ours["max_tokens"], ours["ignore_eos"]) == ({"lsa": {"policy": "quest"}}, 64, True)


def test_an_answer_of_the_demo_that_ends_early(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Says, "chunks", [chat("It"), chat(" is")])
    with pytest.raises(RequestFailed, match="ended after 2 pieces of text, token counts: None"):
        ask_in_sequence(url, [Request(QUESTION)])


def test_nobody_there() -> None:
    with pytest.raises(aiohttp.ClientError):
        ask_in_sequence("http://127.0.0.1:9", [Request(QUESTION)])
