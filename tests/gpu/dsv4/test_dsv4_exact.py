"""What a tiny DeepSeek-V4 answers on a GPU is what SGLang answers, of everything and of a named set."""

from __future__ import annotations

import pytest
from dsv4_model import PAGE_BYTES, PAGE_TOKENS
from dsv4_pools import CHUNK, LONG, PAGES
from dsv4_servers import (
    Difference,
    Noise,
    Said,
    Servers,
    answers,
    ask,
    ask_together,
    check_all,
    on_both,
    random_ids,
)
from serving import finished_request, flush_cache

from sglang_lsa.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]
BOUNDARIES = (63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 2047, 2049, CHUNK - 1, CHUNK, CHUNK + 1)
"""Lengths of prompts about a window, a page, the top-k, and a chunk."""


# -- what a difference means, and everything read ----------------------------------------------------------------------


def test_the_noise_of_stock(noise: Noise) -> None:
    """Small enough for the others to say something."""
    print(f"\n{noise}")
    assert noise.repeated < 0.1
    assert noise.ordered < 1e-4


@pytest.mark.parametrize("lengths", [BOUNDARIES, (LONG, 65_536)], ids=["boundaries", "long"])
def test_full_budget_equals_stock(
    lengths: tuple[int, ...], stock: ServerProcess, lsa: ServerProcess, noise: Noise
) -> None:
    """With CUDA graphs; answers cross the next page where there is one nearby."""
    prompts = [random_ids(length, length) for length in lengths]
    expected, seen = on_both(stock, lsa, lambda server: answers(server, prompts, 16, budget=1.0))
    check_all(noise, "budget 1.0, with graphs", expected, seen)
    assert lsa.get("/lsa/status")["graphless_steps"] == 0


def test_full_budget_equals_stock_without_graphs(masked: ServerProcess, ordered: ServerProcess, noise: Noise) -> None:
    prompts = [random_ids(length, length) for length in (*BOUNDARIES, LONG)]
    expected, seen = on_both(masked, ordered, lambda server: answers(server, prompts, 16, budget=1.0))
    check_all(noise, "budget 1.0, without graphs", expected, seen, "ordered")


def test_batches_equal_stock(stock: ServerProcess, lsa: ServerProcess, noise: Noise) -> None:
    """Requests of different lengths, and padding rows of a graph of eight, in one step."""
    prompts = [random_ids(length, length) for length in (300, 2500, 4097, 5000, 9000)]

    def question(server: ServerProcess) -> list[Said]:
        flush_cache(server)
        return ask_together(server, prompts, 40, lsa=[{"budget": 1.0}] * len(prompts))

    expected, seen = on_both(stock, lsa, question)
    check_all(noise, "together", expected, seen, "together")


# -- named sets --------------------------------------------------------------------------------------------------------

HALF = ",".join(map(str, range(0, PAGES, 2)))
THIRD = ",".join(map(str, range(1, PAGES, 3)))
LITTLE = "0,2,9"
"""With less than the top-k's entries."""
SETS = {
    "half": f"{LONG + 1}:{PAGES}:{HALF}",
    "half, then a third": f"{LONG + 1}:{PAGES}:{HALF};{LONG + 40}:{PAGES}:{THIRD}",
    "little": f"{LONG + 1}:{PAGES}:{LITTLE}",
    "all, then the tail": f"{LONG + 1}:0:;{LONG + 30}:{PAGES}:",
}


def first_token_of_less(sets: str) -> int:
    """Which token of the answer is the first one that cannot look at everything."""
    parts = (part.split(":") for part in sets.split(";"))
    return next(int(begins) for begins, tail_start, _ in parts if int(tail_start)) - LONG


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("which", ["ordered", "lsa"])
def test_a_named_set_is_a_mask(
    which: str, name: str, servers: Servers, masked: ServerProcess, everything: Said, noise: Noise
) -> None:
    """Of the index, in the decode steps from the set's token on; the answer crosses a page. With graphs the answer is
    nearer to that of the mask than what is left out has moved it; in order it is the same."""
    server, prompt, rid = servers[which], random_ids(LONG, 1), f"{which}-{name}"

    def question(of: ServerProcess) -> Said:
        flush_cache(of)
        return ask(of, prompt, 128, rid, sets=SETS[name])

    expected, seen = on_both(masked, server, question)
    print()
    found = noise.check(f"{which}, {name}", expected, seen, "ordered" if which == "ordered" else "repeated")
    assert finished_request(server, rid)["sets"] == SETS[name]
    begins = first_token_of_less(SETS[name])
    shown = Difference.between(everything.since(begins), expected.since(begins))
    print(f"what the set leaves out: {shown}")
    assert shown.mean > 10 * noise.tolerance("ordered"), "this model does not show what it reads"
    assert found.mean < shown.mean / 2


def test_recalled_pages_are_the_same(masked: ServerProcess, ordered: ServerProcess, noise: Noise) -> None:
    """A prompt, another one for which all of its pages leave the device, and the first again, from the host."""
    first, other = random_ids(LONG, 2), random_ids(LONG, 3)
    before = ordered.get("/lsa/status")["recalls"]["pages"]

    def question(of: ServerProcess) -> list[Said]:
        flush_cache(of)
        return [ask(of, prompt, 80, sets=SETS["half, then a third"]) for prompt in (first, other, first)]

    expected, seen = on_both(masked, ordered, question)
    check_all(noise, "from the host", expected, seen, "ordered")
    assert seen[2].cached >= expected[2].cached > LONG - 2 * PAGE_TOKENS
    recalled = ordered.get("/lsa/status")["recalls"]["pages"] - before
    print(f"{recalled} pages recalled, {recalled * PAGE_BYTES} bytes")
    assert recalled > PAGES // 2
