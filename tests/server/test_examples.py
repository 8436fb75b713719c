"""The examples run as their first lines say, against a real server, and print what the server reports.

``offline_batch.py`` and ``train_indexer.py``, which start their own, are tested in ``test_engine`` and ``test_record``;
the throughput of two servers beside each other in ``test_exactness``, where there are two.
"""

from __future__ import annotations

import itertools
import pathlib
import re

import pytest
from prompts import needle
from serving import flush, run_example

from sglang_lsa.client import get_requests, get_status, savings
from sglang_lsa.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]


def numbers(text: str) -> list[int]:
    """Whole numbers in a line, without the commas in them."""
    return [int(number.replace(",", "")) for number in re.findall(r"(?<![\d.])\d[\d,]*(?![\d.])", text)]


def test_compare_budgets(whole: ServerProcess, tmp_path: pathlib.Path) -> None:
    sample = needle(1600, 0.5, 12)
    text, question = sample.prompt.rsplit("\n", 1)
    document = tmp_path / "document.txt"
    document.write_text(text)
    printed = run_example("compare_budgets", whole, "--document", document, "--question", question)
    entries = get_requests(whole.url)["finished"][-5:]
    full, *others = printed.splitlines()
    assert sample.answer in full
    assert len(others) == 4
    for entry, line in zip(entries, (full, *others), strict=True):
        assert str(savings(get_status(whole.url), [entry])) in line
    assert " (100." in full and not any(" (100." in line for line in others)


def test_agent_branches(lsa: ServerProcess) -> None:
    """Four branches over one memory: copied to the host once, computed once, each with a resident set of its own."""
    flush(lsa)
    before = get_status(lsa.url)
    printed = run_example("agent_branches", lsa, "--branches", 4, "--tokens", 1600, "--max-tokens", 24)
    after = get_status(lsa.url)
    branches = get_requests(lsa.url)["finished"][-4:]
    each, together, host, tree = printed.splitlines()[-4:]
    assert str(savings(after, branches)) in each
    context = max(entry["context_pages"] for entry in branches)
    assert all(entry["resident_pages"] < entry["context_pages"] for entry in branches)
    held = numbers(together)[0]
    assert max(entry["resident_pages"] for entry in branches) <= held < sum(e["resident_pages"] for e in branches)
    assert f"on the host once: {after['stores']['pages'] - before['stores']['pages']} pages" in host
    assert after["stores"]["pages"] - before["stores"]["pages"] < context + 3 * 4
    hit, asked = (after["radix"][name] - before["radix"][name] for name in ("hit_tokens", "prompt_tokens"))
    assert f"the radix tree had {hit:,} of {asked:,} prompt tokens" in tree
    assert hit == sum(entry["cached_tokens"] for entry in branches) > 4 * (context - 3) * 64


def test_agent_sessions(lsa: ServerProcess) -> None:
    """The context grows, what is resident does not, and what was said before is found in the tree."""
    flush(lsa)
    printed = run_example("agent_sessions", lsa, "--sessions", 3, "--turns", 2, "--tokens", 800, "--max-tokens", 16)
    heading, *turns, _, last, tree = printed.splitlines()
    finished = get_requests(lsa.url)["finished"][-6:]
    assert len(turns) == 6 and "cached" in heading
    for turn, entry in zip(turns, finished, strict=True):
        known = [entry[f"{name}"] for name in ("prompt_tokens", "cached_tokens", "resident_pages", "context_pages")]
        assert numbers(turn)[1:5] == known
    assert [entry["prompt_tokens"] for entry in finished] == sorted(entry["prompt_tokens"] for entry in finished)
    assert finished[-1]["resident_pages"] < finished[0]["context_pages"] < finished[-1]["context_pages"]
    for earlier, later in itertools.pairwise(finished):
        assert later["cached_tokens"] >= earlier["prompt_tokens"] - 2 * 64
    assert str(savings(get_status(lsa.url), [finished[-1]])) in last
    cached, prompts = (sum(entry[f"{name}_tokens"] for entry in finished) for name in ("cached", "prompt"))
    assert tree.startswith(f"{cached:,} of {prompts:,} prompt tokens")


@pytest.mark.parametrize("name", ["agent_sessions", "compare_budgets", "throughput"])
def test_without_a_server(name: str) -> None:
    """``agent_branches`` asks in the same way; importing SGLang takes it long."""
    failed = run_example(name, "http://127.0.0.1:9", status=1)
    assert failed.startswith(f"{name}.py: no server answers at http://127.0.0.1:9 (")
    assert "start one with: python -m sglang_lsa.launch_server --port 30000" in failed
