"""What the server tests say to a server."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence

from sglang_lsa.client import get_requests
from sglang_lsa.server_process import ServerProcess


def generate(server: ServerProcess, prompt: str, tokens: int = 24, rid: str | None = None, **lsa) -> dict:
    body = {
        "text": prompt,
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": tokens,
            "ignore_eos": True,
            **({"custom_params": {"lsa": lsa}} if lsa else {}),
        },
        **({"rid": rid} if rid else {}),
    }
    return server.post("/generate", body)


def refused(server: ServerProcess, path: str, body: dict) -> tuple[int, str]:
    """Status and text of an answer that is no success."""
    try:
        return 200, json.dumps(server.post(path, body))
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


def run_example(name: str, server: ServerProcess | str, *flags: object, status: int = 0) -> str:
    """What an example prints that asks ``server`` (or a URL): on stdout, or on stderr where it is to fail."""
    url = server if isinstance(server, str) else server.url
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--url", url, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr[-3000:]
    return done.stderr if status else done.stdout


def flush_cache(server: ServerProcess) -> None:
    """Empty the radix tree of a server, once it is idle."""
    request = urllib.request.Request(server.url + "/flush_cache?timeout=60", method="POST")
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.status == 200


def flush(server: ServerProcess) -> None:
    """Empty radix tree, allocator and ledger of an LSA server."""
    flush_cache(server)
    status = json.loads(urllib.request.urlopen(server.url + "/lsa/status", timeout=60).read())
    assert status["virtual"]["allocated"] == 0
    assert status["host"]["pages"] == 0
    assert status["physical"]["held"] + status["physical"]["cached"] == 0


def finished_request(server: ServerProcess, rid: str) -> dict:
    """All that the server knows of the request of this name that finished last."""
    return get_requests(server.url, rid)["finished"][-1]


def running_requests(server: ServerProcess) -> list[dict]:
    """The running requests, each in a few numbers."""
    return get_requests(server.url)["running"]


def is_busy(server: ServerProcess) -> bool:
    """Whether any request is running."""
    return server.get("/lsa/status")["running"]["requests"] > 0


def assert_idle(server: ServerProcess) -> None:
    """The server is alive, serves nobody, and no device page is held or promised. Its ledger checked itself."""
    status = wait_until_idle(server)
    assert status["physical"]["held"] == 0
    assert status["physical"]["promised"] == 0
    assert server.process.poll() is None


def wait_until_idle(server: ServerProcess, polls: int = 600) -> dict:
    """Status once no request is running."""
    for _ in range(polls):
        status = server.get("/lsa/status")
        if not status["running"]["requests"]:
            return status
    raise AssertionError(f"still running: {running_requests(server)}")


Answer = list[tuple[int, dict[int, float]]]
"""Greedy tokens, each with the log-probabilities of the best five candidates."""
TIE = 1e-2
"""Logit gap under which two tokens count as tied: bfloat16 sums may differ with the shape of a batch."""
BFLOAT16_STEPS = 0.25
"""Two steps between neighbouring bfloat16 numbers of the size of a logit (8 to 16): what a cached prefix, which changes
the shape of the prefill, may move."""


def complete(server: ServerProcess, prompt: str, tokens: int, custom_params: dict | None = None) -> Answer:
    """Greedy answer of exactly ``tokens`` tokens."""
    return complete_together(server, [prompt], [tokens], custom_params)[0]


def complete_together(
    server: ServerProcess,
    prompts: Sequence[str | list[int]],
    tokens: list[int],
    custom_params: dict | None = None,
) -> list[Answer]:
    """Greedy answers to prompts (texts, or all of them token ids) that arrive at the same time, of exactly as many
    tokens as asked for."""
    answers = server.post(
        "/generate",
        {
            "text" if isinstance(prompts[0], str) else "input_ids": prompts,
            "sampling_params": [
                {
                    "temperature": 0,
                    "max_new_tokens": count,
                    "ignore_eos": True,
                    **({"custom_params": custom_params} if custom_params else {}),
                }
                for count in tokens
            ],
            "return_logprob": True,
            "top_logprobs_num": 5,
        },
    )
    return [answer_tokens(answer["meta_info"]) for answer in answers]


def answer_tokens(meta: dict) -> Answer:
    """The answer of a request that asked for log-probabilities of its best candidates."""
    tops = meta["output_top_logprobs"]
    return [
        (token, {other: value for value, other, _ in top})
        for (_, token, _), top in zip(meta["output_token_logprobs"], tops, strict=True)
    ]


def gap_at_first_difference(expected: Answer, seen: Answer) -> float | None:
    """None when both answers have the same tokens; else how much more likely the first one's token was to itself, in
    natural logarithms, where they part."""
    for (token, chances), (other, _) in zip(expected, seen, strict=True):
        if token != other:
            return chances[token] - chances.get(other, float("-inf"))
    return None


def differs_at_a_tie(expected: Answer, seen: Answer, tie: float = TIE) -> bool:
    """False when both answers have the same tokens; True when they part at a tie.

    Raises:
        AssertionError: they part where the first answer's own log-probabilities leave no doubt.
    """
    gap = gap_at_first_difference(expected, seen)
    assert gap is None or gap <= tie, f"the answers part at a token that is {gap:.4f} more likely"
    return gap is not None
