"""A tiny DeepSeek-V4 on a GPU, beside SGLang without LSA: the same answers, of fewer pages on the device.

All servers have the same drawn weights (``dsv4_plugin``) and start at the same time:

- ``stock``: SGLang as it comes.
- ``masked``: SGLang with a mask over index logits, which is what a named resident set must amount to.
- ``lsa``: CUDA graphs, SGLang's own kernels throughout, a small device pool whose free pages hold NaN.
- ``retracting``: the same, and SGLang takes its place from a request that decodes every so many passes.
- ``ordered``: without graphs, a pool of little more than one prompt; attention adds up in the order of ``masked``.

What a difference means is measured first, between answers of SGLang without LSA. ``masked`` repeats itself to the bit,
and ``ordered`` must then repeat it; SGLang's own top-k hands on what it selects in any order, so that answers of
``stock`` to long prompts differ from run to run, and those of ``lsa`` may differ as much.
"""

from __future__ import annotations

import http.client
import importlib
import json
import os
import pathlib
import random
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dsv4_kernels
import pytest
import torch
from dsv4_model import PAGE_BYTES, PAGE_TOKENS, write_config
from dsv4_servers import (
    Difference,
    Noise,
    Said,
    ask,
    ask_together,
    install_plugin,
    on_both,
    random_ids,
    start,
    write_retriever,
)
from gpu_servers import STOCK
from serving import assert_idle, finished_request, flush, flush_cache

from sglang_lsa.server_process import LSA, ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]
READY_SECONDS = 540
VIRTUAL_PAGES, DEVICE_PAGES, FEW_PAGES = 2048, 320, 96
MIRROR_GB = (VIRTUAL_PAGES + 1.5) * PAGE_BYTES / 2**30
CHUNK = 8192
"""A chunk of so many tokens is scored over gathered keys, a shorter one over pages."""
COMMON = ["--max-total-tokens", str(VIRTUAL_PAGES * PAGE_TOKENS), "--chunked-prefill-size", str(CHUNK)]
WITH_LSA = ["--lsa-host-memory-gb", f"{MIRROR_GB:.6f}", "--lsa-min-context", "1024", "--lsa-debug"]
EAGER = ["--disable-cuda-graph"]
RETRACTING = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "50"}
"""As when memory is full, which the pools of these servers never are for long enough."""
IN_ORDER = {"SGLANG_TOPK_TRANSFORM_512_TORCH": "1", "DSV4_TEST_SORTED": "1"}
BOUNDARIES = (63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 2047, 2049, CHUNK - 1, CHUNK, CHUNK + 1)
"""Lengths of prompts about a window, a page, the top-k, and a chunk."""
LONG = 20_150
"""Tokens of a prompt of some 5,000 entries, of which the model selects 512; its 80th page begins 74 tokens later."""
PAGES = LONG // PAGE_TOKENS


def missing() -> str | None:
    """Why DeepSeek-V4 cannot be served here; None if it can."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return "needs a GPU of compute capability 9 (Hopper)"
    for name in ("deep_gemm", "sgl_kernel.flash_mla", "tilelang"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"{name} is not here ({error})"
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Logs, and what the plugin writes."""
    return pathlib.Path(os.environ.get("SGLANG_LSA_TEST_LOGS", "") or tmp_path_factory.mktemp("dsv4"))


class Servers(dict[str, ServerProcess]):
    """By name; one that did not start fails the tests that ask for it, and no others."""

    def __init__(self, started: dict[str, ServerProcess]):
        super().__init__(started)
        self.failed: dict[str, Exception] = {}
        for name, server in started.items():
            try:
                server.wait_until_ready(READY_SECONDS)
            except RuntimeError as error:
                self.failed[name] = error
                del self[name]

    def __missing__(self, name: str) -> ServerProcess:
        raise RuntimeError(f"{name} did not start") from self.failed.get(name)


@pytest.fixture(scope="module")
def servers(folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, extra: list[str]) -> Iterator[Servers]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    subprocess.run([sys.executable, dsv4_kernels.__file__, str(CHUNK)], timeout=600)
    own = tmp_path_factory.mktemp("plugin")
    model, plugin = write_config(own / "model"), install_plugin(own / "site")
    pool = ["--lsa-device-tokens", str(DEVICE_PAGES * PAGE_TOKENS)]
    few = ["--lsa-device-tokens", str(FEW_PAGES * PAGE_TOKENS)]
    retriever = write_retriever(own / "retriever.pt")
    poison, scores = {"DSV4_TEST_POISON": str(folder / "poisoned")}, {"DSV4_TEST_SCORES": str(folder / "scores")}
    (folder / "scores").unlink(missing_ok=True)
    kinds: dict[str, tuple[str, list[str], dict[str, str]]] = {
        "stock": (STOCK, [], {}),
        "masked": (STOCK, [*EAGER, "--disable-overlap-schedule"], {**IN_ORDER, "DSV4_TEST_MASKED": "1"}),
        "lsa": (LSA, [*WITH_LSA, *pool], poison),
        "retracting": (LSA, [*WITH_LSA, *pool], RETRACTING),
        "ordered": (LSA, [*WITH_LSA, *few, *EAGER, "--lsa-indexer", str(retriever)], {**IN_ORDER, **scores}),
    }
    started = {
        name: start(
            module,
            model,
            plugin,
            [*COMMON, *flags, *extra],
            folder / f"dsv4-{name}.log",
            DSV4_TEST_POOLS=str(folder / f"pools-{name}.json"),
            **environment,
        )
        for name, (module, flags, environment) in kinds.items()
    }
    try:
        yield Servers(started)
    finally:
        for server in started.values():
            server.stop()


@pytest.fixture
def stock(servers: Servers) -> ServerProcess:
    return servers["stock"]


@pytest.fixture
def masked(servers: Servers) -> ServerProcess:
    return servers["masked"]


@pytest.fixture
def lsa(servers: Servers) -> ServerProcess:
    return servers["lsa"]


@pytest.fixture
def retracting(servers: Servers) -> ServerProcess:
    return servers["retracting"]


@pytest.fixture
def ordered(servers: Servers) -> ServerProcess:
    return servers["ordered"]


@pytest.fixture(autouse=True)
def nothing_is_left(servers: Servers) -> Iterator[None]:
    """Servers live, and no page is held once nobody asks; ``--lsa-debug`` has checked the ledger after every pass."""
    yield
    for name, server in servers.items():
        assert server.process.poll() is None, f"{name} ended:\n{server.log_tail()}"
        if server.module == LSA:
            assert_idle(server)
            assert server.get("/lsa/status")["failures"] == {"refreshes": 0, "batches": 0, "integrity": 0}


@pytest.fixture(scope="module")
def noise(servers: Servers) -> Noise:
    """Of SGLang without LSA, against itself."""
    lengths = (300, 1500, 3000, 4100, 5000, 6000, 9000, 12_000)
    prompts = [random_ids(length, length) for length in lengths]

    def repeats(server: ServerProcess) -> float:
        return largest(*(answers(server, [*prompts, random_ids(LONG, 1)], 24) for _ in range(2)))

    with ThreadPoolExecutor(2) as pool:
        repeated, ordered = pool.map(repeats, (servers["stock"], servers["masked"]))
    first = answers(servers["stock"], prompts, 24)
    flush_cache(servers["stock"])
    return Noise(repeated, largest(first, ask_together(servers["stock"], prompts, 24)), ordered)


def largest(first: list[Said], second: list[Said]) -> float:
    return max(Difference.between(*pair).mean for pair in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def everything(servers: Servers) -> Said:
    """What the longest prompt is answered where nothing is left out."""
    return ask(servers["masked"], random_ids(LONG, 1), 128)


def answers(server: ServerProcess, prompts: list[list[int]], tokens: int, **lsa: Any) -> list[Said]:
    """One prompt at a time, from an empty cache."""
    flush_cache(server)
    return [ask(server, prompt, tokens, **lsa) for prompt in prompts]


def check_all(noise: Noise, name: str, expected: list[Said], seen: list[Said], of: str = "repeated") -> None:
    print()
    for number, pair in enumerate(zip(expected, seen, strict=True)):
        noise.check(f"{name}, {number}", *pair, of)


# -- 0 and 1: what a difference means, and everything read ------------------------------------------------------------


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


# -- 2: named sets -----------------------------------------------------------------------------------------------------

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


# -- 3: what is not there is not touched -------------------------------------------------------------------------------


def test_free_pages_hold_nan_and_nobody_reads_them(
    folder: pathlib.Path, lsa: ServerProcess, ordered: ServerProcess, noise: Noise
) -> None:
    """Random sets over a pool that is too small for all requests; each is asked once more, alone, on a server that
    keeps what free pages held."""
    flush(lsa)
    prompts = [random_ids(length, length) for length in (16_000, 16_300, 16_500, 17_000, 17_400, 17_900)]
    rids = [f"poison-{len(prompt)}" for prompt in prompts]
    before, filled = lsa.get("/lsa/status"), int((folder / "poisoned").read_text())
    seen = ask_together(lsa, prompts, 200, rids, [{"policy": "random", "budget": 0.3}] * len(prompts))
    after = lsa.get("/lsa/status")
    recalled = after["recalls"]["pages"] - before["recalls"]["pages"]
    filled = int((folder / "poisoned").read_text()) - filled
    print(f"\n{recalled} pages recalled, {filled} filled with NaN")
    assert all(answer.finite for answer in seen)
    assert recalled > 0
    assert filled > 0
    for rid, prompt, answer in list(zip(rids, prompts, seen, strict=True))[::2]:
        sets = finished_request(lsa, rid)["sets"]
        assert len(sets.split(";")) >= 3
        noise.check(rid, ask(ordered, prompt, 200, sets=sets), answer, "together")


# -- 4: memory ---------------------------------------------------------------------------------------------------------


def test_the_same_slots_take_fewer_bytes(folder: pathlib.Path, stock: ServerProcess, lsa: ServerProcess) -> None:
    """Entries and index keys are as many as the device pool has pages; everything else is what SGLang makes it."""
    pools = [json.loads((folder / f"pools-{name}.json").read_text()) for name in ("stock", "lsa")]
    print("\n" + "\n".join(f"{name:32} {pools[0][name]:12,} {pools[1].get(name, 0):12,}" for name in pools[0]))
    status = lsa.get("/lsa/status")
    assert status["virtual"]["pages"] == VIRTUAL_PAGES
    assert status["physical"]["pages"] == DEVICE_PAGES
    assert status["page_bytes"] == PAGE_BYTES
    paged = ("c4_kv_pool", "c4_indexer_kv_pool")
    for name, size in pools[0].items():
        if name == "layer_mapping":
            continue  # the entries of both kinds once more, by layer
        expected = size * (DEVICE_PAGES + 1) / (VIRTUAL_PAGES + 1) if name in paged else size
        assert pools[1][name] == pytest.approx(expected, rel=0.02), name
    kept = sum(status["physical"]["overhead_bytes"].values())
    totals = [sum(pool[name] for name in paged) for pool in pools]
    print(f"entries and index keys: {totals[0]:,} bytes, with LSA {totals[1]:,} and {kept:,} beside them")
    assert totals[1] + kept < totals[0]
    assert totals[1] >= status["physical"]["kv_bytes"] > 0.98 * totals[1]


# -- 5: the radix tree -------------------------------------------------------------------------------------------------


def test_prefixes_are_found_as_in_stock(stock: ServerProcess, lsa: ServerProcess, noise: Noise) -> None:
    """A document, questions behind it, and the same after its windows have been given up for those of others: then it
    is computed once more, and the tree takes the new pages or keeps its own."""
    document, questions = random_ids(9100, 11), [random_ids(300, 20 + number) for number in range(4)]
    others = [random_ids(700, 100 + number) for number in range(130)]

    def question(server: ServerProcess) -> list[Said]:
        flush_cache(server)
        asked = [document, document + questions[0], document + questions[0], document + questions[1]]
        said = [ask(server, prompt, 20, budget=1.0) for prompt in asked]
        for other in others:
            ask(server, other, 1)
        asked = [document + questions[2], document + questions[3], document + questions[0], document]
        said += [ask(server, prompt, 20, budget=1.0) for prompt in asked]
        together = random_ids(9100, 12)
        said += ask_together(server, [together] * 3, 20, lsa=[{"budget": 1.0}] * 3)
        return [*said, ask(server, together + questions[0], 20, budget=1.0)]

    expected, seen = on_both(stock, lsa, question)
    check_all(noise, "shared", expected, seen, "together")
    cached = [[answer.cached for answer in said] for said in (expected, seen)]
    print(f"cached tokens: {cached[0]}, with LSA {cached[1]}")
    one_by_one = list(zip(*cached, strict=True))[: -3 - 1]
    assert all(with_lsa >= without for without, with_lsa in one_by_one)
    assert cached[1][1] > 0


def test_requests_share_pages_and_their_copies(lsa: ServerProcess) -> None:
    flush(lsa)
    document = random_ids(12_000, 13)
    ask(lsa, document, 1)
    one = lsa.get("/lsa/status")["host"]["pages"]
    prompts = [document + random_ids(260, 30 + number) for number in range(6)]
    ask_together(lsa, prompts, 70)
    six = lsa.get("/lsa/status")["host"]["pages"]
    print(f"\nhost pages of one document {one}, and of six requests over it {six}")
    assert one >= 12_000 // PAGE_TOKENS
    assert six - one <= 6 * 3


# -- 6: nothing is lost ------------------------------------------------------------------------------------------------


def test_2000_requests_with_aborts_leave_nothing(lsa: ServerProcess) -> None:
    rng = random.Random(0)
    before = lsa.get("/lsa/status")

    def request(number: int) -> str:
        length = rng.choice((20, 200, 255, 256, 600, 1500, 3000)) if number % 50 else 16_000
        options = rng.choice(({}, {"policy": "random"}, {"budget": 1.0}, {"enabled": False}, {"budget": 0.3}))
        prompt, tokens, rid = random_ids(length, number % 90), rng.choice((1, 2, 8, 40)), f"many-{number:04}"
        if number % 9 == 0:
            return aborted(lsa, prompt, rid, polls=number % 5)
        said = ask(lsa, prompt, tokens, rid, **options)
        assert said.finite
        return "length"

    with ThreadPoolExecutor(32) as pool:
        ends = list(pool.map(request, range(2000)))
    after = lsa.get("/lsa/status")
    print(f"\n{ends.count('length')} ended, {ends.count('abort')} aborted, {after['pressure']}")
    assert ends.count("length") >= 1700
    assert ends.count("abort") >= 100
    assert after["recalls"]["pages"] > before["recalls"]["pages"]


def test_requests_that_are_retracted_are_answered_whole(retracting: ServerProcess) -> None:
    """Their answers are prefilled with their prompts then, and what others read stays."""
    rng = random.Random(1)
    options = ({}, {"policy": "random"}, {"budget": 1.0}, {"enabled": False}, {"budget": 0.3})
    asked = [
        (rng.choice((20, 255, 256, 1500, 3000)) if number % 20 else 16_000, rng.choice((40, 300)), rng.choice(options))
        for number in range(120)
    ]

    def request(number: int) -> Said:
        length, tokens, how = asked[number]
        return ask(retracting, random_ids(length, 500 + number % 60), tokens, f"retracted-{number:03}", **how)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(request, range(len(asked))))
    retractions = [said.retractions for said in answers]
    print(f"\n{sum(retractions)} retractions of {sum(map(bool, retractions))} requests")
    assert [len(said.tokens) for said in answers] == [tokens for _, tokens, _ in asked]
    assert all(said.finite for said in answers)
    assert sum(map(bool, retractions)) >= 5
    assert "Testing retraction" in retracting.log.read_text(errors="replace"), "as one that decodes, not by a pause"
    flush(retracting)


def aborted(server: ServerProcess, prompt: list[int], rid: str, polls: int) -> str:
    """Ask for a long answer, look at the server's status a few times, then abort it by name until it ends."""
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True}, "rid": rid}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, "/generate", body)
        for _ in range(polls):
            server.get("/lsa/status")
        while not answer.done():
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request("POST", "/abort_request", json.dumps({"rid": rid}), {"Content-Type": "application/json"})
            connection.getresponse().read()
            connection.close()
        try:
            return answer.result()["meta_info"]["finish_reason"]["type"]
        except urllib.error.HTTPError:
            return "abort"  # it was still waiting


def test_a_prompt_beyond_the_device_pool_is_refused(ordered: ServerProcess) -> None:
    """All of a prompt's pages are on the device while it is computed."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(ordered, random_ids((FEW_PAGES + 4) * PAGE_TOKENS, 5), 1)
    assert refused.value.code == 400
    print("\n" + refused.value.read().decode())


# -- 7: the policies that look at the model's own index ----------------------------------------------------------------


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
