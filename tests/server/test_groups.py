"""Groups on a real server: requests over one memory read its pages together, and say what they say alone."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prompts import prose
from read_together import AGENTS, MEMORY_PAGES, ask_together, grouped, leave_one_by_one, named, prompts
from serving import (
    Answer,
    assert_idle,
    differs_at_a_tie,
    generate,
    run_example,
    running_requests,
    wait_until_idle,
)
from soak import FLAGS

from sglang_lsa import streaming
from sglang_lsa.evaluation.client import Endpoint
from sglang_lsa.evaluation.groups import ask
from sglang_lsa.evaluation.groups_documents import make_documents
from sglang_lsa.server_process import LSA, ServerProcess
from sglang_lsa.streaming import event_of

pytestmark = [pytest.mark.server, pytest.mark.slow]
TOKENS = 12
CLOSE = 1e-3
"""Between log-probabilities in float32, when what is read is the same and only the order of sums differs."""


@pytest.fixture(scope="module")
def server(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """In float32, with a pool that holds all sets; checks tables and holders of every group before every step."""
    flags = [
        "--model-path",
        model_path,
        *FLAGS,
        "--lsa-config",
        '{"groups": true, "floor_tokens": 512}',
        "--lsa-debug",
        "--lsa-min-context",
        "1024",
    ]
    flags += ["--lsa-device-tokens", "16000", "--lsa-host-memory-gb", "0.5"]
    with ServerProcess(LSA, flags, tmp_path_factory.mktemp("groups") / "log") as server:
        server.wait_until_ready()
        ask_together(server, [(prompts()[0], {"enabled": False})], 1)  # the memory is there before the agents come
        yield server
        assert_idle(server)


def distance(one: Answer, other: Answer) -> float:
    """Largest difference between log-probabilities of tokens that both have among their best, at the first step that
    decode computed."""
    (_, first), (_, second) = one[1], other[1]
    return max(abs(first[token] - second[token]) for token in first.keys() & second.keys())


def test_all_pages_read_together_are_full_attention(server: ServerProcess) -> None:
    """Each names all of its pages; those of the memory are read once for all four, and nothing is left out."""
    before = grouped(server)
    asked = [(prompt, named(prompt)) for prompt in prompts()]
    together = ask_together(server, asked, TOKENS)
    after = grouped(server)
    assert after["steps"] >= before["steps"] + TOKENS // 2
    assert after["saved_reads"] - before["saved_reads"] >= (after["steps"] - before["steps"]) * MEMORY_PAGES
    assert after["added_reads"] == before["added_reads"]
    for prompt, seen in zip(prompts(), together, strict=True):
        (alone,) = ask_together(server, [(prompt, {"enabled": False})], TOKENS)
        differs_at_a_tie(alone, seen)
        assert distance(alone, seen) < CLOSE
    assert grouped(server)["steps"] == after["steps"], "one request is no group"


def test_a_request_may_ask_to_be_left_alone(server: ServerProcess) -> None:
    """Then it reads what it named and no more, while the others read together."""
    prompt, *others = prompts()
    few = prompt, named(prompt, range(0, MEMORY_PAGES, 4)) | {"groups": False}
    before = grouped(server)
    seen = ask_together(server, [few, *((other, named(other)) for other in others)], TOKENS)[0]
    after = grouped(server)
    steps = after["steps"] - before["steps"]
    assert after["summed_requests"] - before["summed_requests"] == len(others) * steps > 0
    alone, everything = (ask_together(server, [(prompt, sets)], TOKENS)[0] for sets in (few[1], named(prompt)))
    assert distance(seen, alone) < CLOSE < distance(seen, everything)


def test_who_reads_together_is_told_meanwhile(server: ServerProcess) -> None:
    """In the live view, of each request, and as metrics; of a server on which nobody runs, nothing."""
    asked = [(prompt, named(prompt)) for prompt in prompts()]
    with ThreadPoolExecutor(1) as pool, urllib.request.urlopen(server.url + "/lsa/events", timeout=120) as stream:
        answers = pool.submit(ask_together, server, asked, 120)
        frames = events(stream)
        frame = next(f for f in frames if answers.done() or [g["members"] for g in f["groups"]] == [AGENTS])
        told: list[Any] = []
        metrics: dict[str, float] = {}
        while not answers.done() and not (metrics.get("lsa_groups") and len(told) == AGENTS and all(told)):
            told = [request["group"] for request in running_requests(server)] or told
            metrics = group_metrics(server)
        frame_after = next(f for f in frames if answers.done() and not f["requests"])
    (group,) = frame["groups"]
    assert (group["members"], group["pages"], group["chosen"]) == (AGENTS, MEMORY_PAGES, AGENTS * MEMORY_PAGES)
    assert group["map"] == ":" * MEMORY_PAGES, "all of the memory, and nothing behind it"
    part = {"number": 0, "members": AGENTS, "pages": MEMORY_PAGES, "added_pages": 0}
    assert len(frame["requests"]) == AGENTS
    for request in frame["requests"]:
        assert request["group"] == part | {"own_pages": request["resident"] - MEMORY_PAGES}
    for own in told:
        assert own | part == own and own["own_pages"] >= 1
    shown = ("lsa_groups", "lsa_group_requests", "lsa_group_pages", "lsa_group_chosen_pages")
    assert [metrics[name] for name in shown] == [1, AGENTS, MEMORY_PAGES, AGENTS * MEMORY_PAGES]
    assert metrics["lsa_group_steps_total"] > 0 and metrics["lsa_group_saved_reads_total"] > 0
    assert frame_after["groups"] == []
    wait_until_idle(server)
    deadline = time.monotonic() + 20
    while any((metrics := group_metrics(server))[name] for name in shown):
        assert time.monotonic() < deadline, metrics
    counts = grouped(server)
    assert metrics["lsa_group_saved_reads_total"] == counts["saved_reads"] and counts["now"] == 0


def events(stream: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Snapshots of the live view as they come."""
    for line in stream:
        if (event := event_of(line)) is not None:
            yield event


def group_metrics(server: ServerProcess) -> dict[str, float]:
    """What ``/metrics`` says of groups, by names without prefix."""
    text = urllib.request.urlopen(server.url + "/metrics", timeout=60).read().decode()
    return {name: float(value) for name, value in re.findall(r"^sglang:(lsa_group\w*){.*} (.*)$", text, re.M)}


def test_a_member_reads_what_others_chose(server: ServerProcess) -> None:
    """Two of four name page 41: it is read for all, so that the third says what it says with that page, to a rounding,
    and not what it says without."""
    common, asked = list(range(40)), prompts()
    sets = [[*common, 41], [*common, 41], [*common, 43], common]
    together = ask_together(server, [(prompt, named(prompt, own)) for prompt, own in zip(asked, sets, strict=True)], 2)
    assert grouped(server)["added_reads"] > 0
    (with_it,), (without,) = (
        ask_together(server, [(asked[2], named(asked[2], own))], 2) for own in ([*common, 41, 43], sets[2])
    )
    assert distance(together[2], with_it) < CLOSE < distance(together[2], without)


def test_full_attention_is_in_no_group(server: ServerProcess) -> None:
    """A budget of 1.0 promises the tokens of stock SGLang: what it reads, and in which order, stays what it was."""
    before = grouped(server)["steps"]
    together = ask_together(server, [(prompt, {"budget": 1.0}) for prompt in prompts()], TOKENS)
    assert grouped(server)["steps"] == before
    for prompt, seen in zip(prompts(), together, strict=True):
        (alone,) = ask_together(server, [(prompt, {"enabled": False})], TOKENS)
        differs_at_a_tie(alone, seen)


def test_members_leave_in_the_middle_of_a_window(server: ServerProcess) -> None:
    """One is aborted, one ends, the others go on; their windows end at different steps, too."""
    memory = prose(2600, 7)
    generate(server, memory, 1)
    leave_one_by_one(server, [f"{memory} {prose(60, 70 + agent)}" for agent in range(AGENTS)], 160, budget=0.9)
    assert_idle(server)


def test_the_example_says_what_the_server_counted(server: ServerProcess) -> None:
    """Of so short answers it may be nothing."""
    before = grouped(server)
    printed = run_example("agent_branches", server, "--branches", 4, "--tokens", 1600, "--max-tokens", 24)
    after = grouped(server)
    steps, saved, added = (after[name] - before[name] for name in ("steps", "saved_reads", "added_reads"))
    said = f"read once for all that chose it: {saved:,} pages not read again in {steps} steps, {added:,} added"
    assert said in printed.splitlines()


def test_sets_tell_what_the_server_counts(server: ServerProcess, model_path: str) -> None:
    """``bench groups``: what eight requests read is the union of their sets where all of it is read once for those that
    chose it, and pages are read with another's set only where two chose them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    (document,) = make_documents(tokenizer, ["one"], [2048], 1, 8)

    async def asked(options: dict[str, Any]) -> dict[str, Any]:
        async with streaming.session() as http:
            return await ask(Endpoint(http, server.url), tokenizer, document, options)

    found = asyncio.run(asked({"policy": "quest", "budget": 0.6}))
    assert [answer["new_tokens"] for answer in found["answers"]] == [192] * 8
    assert all(len(answer["sets"].split(";")) >= 3 for answer in found["answers"]), "a set for every 64 tokens"
    assert all(answer["cached_tokens"] >= len(document.common) // 64 * 64 for answer in found["answers"])
    assert (found["groups"], found["members"]) == (1.0, 8.0)
    assert found["union"] < found["attention_reads"] + 0.5 < found["pages"] / 2
    assert found["attention_reads"] == pytest.approx(found["union"], rel=0.05)
    assert found["held_bytes"] is None or found["held_bytes"] == pytest.approx(found["union_bytes"], rel=0.15)
    full = asyncio.run(asked({"enabled": False}))
    assert full["group_steps"] == 0 and full["attention_reads"] == full["pages"] == 8 * full["set_pages"]
