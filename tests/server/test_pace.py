"""Prompts and decode steps take turns where they are told to; what is said stays the same."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from prompts import prose
from serving import flush, generate

from sglang_lsa.config import LSAConfig
from sglang_lsa.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.release]

PROMPT, CHUNK = 3000, 512
"""Tokens, about, of a prompt that is streamed, and of its chunks."""
TOKENS = 150
BURST = LSAConfig.prefill_burst_tokens


@pytest.fixture
def paced(small: ServerProcess) -> Iterator[ServerProcess]:
    """16 decode steps for each chunk, while somebody decodes."""
    small.post("/lsa/config", {"prefill_tokens_per_step": CHUNK // 16})
    yield small
    small.post("/lsa/config", {"prefill_tokens_per_step": 0, "prefill_burst_tokens": BURST})


def test_somebody_decodes_while_a_long_prompt_is_computed(paced: ServerProcess) -> None:
    paced.post("/lsa/config", {"prefill_burst_tokens": 0})
    short, long = prose(600, 1), prose(PROMPT, 2)
    alone = generate(paced, short, TOKENS)["text"], generate(paced, long, 4)["text"]
    flush(paced)
    before = waits(paced)
    with ThreadPoolExecutor(1) as pool:
        stream = tokens_of(paced, short)
        next(stream)
        asked = pool.submit(generate, paced, long, 4)
        texts = [(text, asked.done()) for text in stream]
        answer = asked.result()
    meanwhile = sum(not done for _, done in texts)
    assert (texts[-1][0], answer["text"]) == alone
    chunks = PROMPT // CHUNK  # the last one is not waited for
    assert waits(paced) - before >= 16 * (chunks - 1)
    assert meanwhile >= 16 * (chunks - 1)


def test_a_prompt_that_is_no_burst_is_computed_in_one_go(paced: ServerProcess) -> None:
    """Nobody waits between its chunks; the prompt after it waits for the steps that it is worth."""
    short, prompts = prose(600, 1), [prose(PROMPT, 2), prose(PROMPT, 4)]
    texts = [generate(paced, prompt, 4)["text"] for prompt in prompts]
    for together in (prompts[:1], prompts):
        flush(paced)
        before = waits(paced)
        with ThreadPoolExecutor(2) as pool:
            stream = tokens_of(paced, short)
            for _ in range(600 // (CHUNK // 16) + 4):  # until the steps that its own prompt is worth are done
                next(stream)
            answers = list(pool.map(lambda prompt: generate(paced, prompt, 4)["text"], together))
            for _ in stream:
                pass
        assert answers == texts[: len(together)]
        waited = waits(paced) - before
        assert waited >= 16 * (PROMPT // CHUNK - 1) if len(together) > 1 else waited == 0


def test_nobody_is_waited_for(paced: ServerProcess) -> None:
    before = waits(paced)
    generate(paced, prose(PROMPT, 3), 4)
    assert waits(paced) == before


def waits(server: ServerProcess) -> int:
    return server.get("/lsa/status")["pressure"]["paced_passes"]


def tokens_of(server: ServerProcess, prompt: str) -> Iterator[str]:
    """All that is said so far, after every token."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    body = {"text": prompt, "stream": True, "sampling_params": sampling}
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))["text"]
    connection.close()
