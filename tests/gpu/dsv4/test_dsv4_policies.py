"""The policies that look at the index of a tiny DeepSeek-V4, on a GPU: scores and sets are those of torch."""

from __future__ import annotations

import json
import pathlib

import pytest
from dsv4_pools import LONG
from dsv4_servers import (
    Difference,
    ask,
    on_both,
    random_ids,
)
from serving import finished_request

from sglang_lsa.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.mark.parametrize("policy", ["native", "retriever"])
def test_scores_and_sets_are_those_of_torch(
    policy: str, folder: pathlib.Path, ordered: ServerProcess, stock: ServerProcess
) -> None:
    """By what entered the index, and by the copies of its keys in host memory. How far the answer is from that of stock
    is printed, not judged: drawn weights know nothing."""
    rid, prompt = f"scored-{policy}", random_ids(LONG, 7)
    expected, seen = on_both(
        stock, ordered, lambda server: ask(server, prompt, 200, rid, policy=policy, budget=0.3, prompt_lookup=0)
    )
    lines = [json.loads(line) for line in (folder / "scores").read_text().splitlines()]
    scored = [line for line in lines if line.get("rid") == rid]
    chosen = [line for line in lines if line["policy"] == policy and "set" in line]
    print(f"\n{Difference.between(expected, seen)}", *scored, *chosen, sep="\n")
    assert seen.finite
    assert len(scored) >= 3
    assert len(chosen) >= 3
    assert all(line["inputs"] and line["keys"] and line["missing"] == 0 for line in scored)
    assert all(line["far"] <= 0.02 for line in scored), "the kernel's scores are not those of torch"
    assert all(line["best_shared"] >= 0.8 for line in scored), "float64 chooses other pages"
    assert all(line["shared"] >= 0.98 * line["set"] for line in chosen)
    assert len({part.split(":")[2] for part in finished_request(ordered, rid)["sets"].split(";")}) > 1


def test_sets_are_refreshed_in_cuda_graphs(lsa: ServerProcess) -> None:
    """By queries that a graph has recorded: they change, and so do the sets."""
    before = lsa.get("/lsa/status")
    seen = ask(lsa, random_ids(LONG, 8), 300, "native", policy="native", budget=0.3)
    sets = finished_request(lsa, "native")["sets"].split(";")
    after = lsa.get("/lsa/status")
    print("\n" + "\n".join(sets))
    assert seen.finite
    assert after["refreshes"] >= before["refreshes"] + 4
    assert after["fallbacks"] == before["fallbacks"]
    assert after["graphless_steps"] == 0
    assert len({part.split(":")[2] for part in sets}) > 1
