"""SGLang's other ways to run, with LSA on: several HTTP workers, no radix tree, no chunks, no overlap, truncation.

One server has all of these flags, and an indexer. Its answers are compared with those of the server that the other
tests share, which has none of them. Then both get other weights.
"""

from __future__ import annotations

import http.client
import json
import pathlib
import re
import shutil
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prompts import random_ids
from release import RELEASE
from safetensors.torch import load_file, save_file
from serving import assert_idle, finished_request, flush, is_busy, refused, wait_until_idle
from soak import FLAGS, LSA_CONFIG

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.reading import IN_PLACE
from sglang_lsa.indexer.checkpoint import IndexerConfig, ModelShape
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.server_process import LSA, ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]

WORKERS = 1 if RELEASE.resolves_late else 2
several = pytest.mark.skipif(WORKERS == 1, reason="several HTTP workers are refused with this SGLang")
LAYERS = 6
LONGEST = (LSA_CONFIG["device_tokens"] // 64 - 1) * 64 - 1
"""Tokens of the longest prompt that fits the device pool whole."""


@pytest.fixture(scope="module")
def workers(
    small: ServerProcess, model_path: str, logs: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("workers")
    MemoryIndexer(IndexerConfig(ModelShape(576, LAYERS, 9, 3, 64), ((1, 0), (3, 4)))).save(folder / "indexer")
    config = folder / "lsa.json"
    config.write_text(json.dumps({**LSA_CONFIG, "indexer": str(folder / "indexer"), "debug": True}))
    flags = ["--model-path", model_path, *FLAGS, "--lsa-config", str(config), "--chunked-prefill-size", "-1"]
    flags += ["--tokenizer-worker-num", str(WORKERS), "--allow-auto-truncate"]
    flags += ["--disable-overlap-schedule", "--disable-radix-cache", "--mem-fraction-static", "0.5"]
    with ServerProcess(LSA, flags, logs / "workers.log", {"OMP_NUM_THREADS": "1"}) as server:
        yield server.wait_until_ready()


@pytest.fixture(autouse=True)
def nothing_is_left_of_a_feature(workers: ServerProcess) -> Iterator[None]:
    yield
    assert_idle(workers)


def ask(server: ServerProcess, ids: list[int], tokens: int, **lsa: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, "custom_params": {"lsa": lsa or None}}
    return server.post("/generate", {"input_ids": ids, "sampling_params": sampling})


def many(call: Any, *args: Any, times: int = 24) -> list[Any]:
    """Answers to requests that come at once, each over a connection of its own, so that every worker gets some."""
    with ThreadPoolExecutor(8) as pool:
        return [each.result() for each in [pool.submit(call, *args) for _ in range(times)]]


# --- several HTTP workers --------------------------------------------------------------------------------------------


@several
def test_every_worker_has_our_routes(workers: ServerProcess) -> None:
    """``/lsa/status`` and the view answer whoever asks, and every worker tells of the same scheduler."""
    started = re.findall(r"multi-tokenizer worker process (\d+)", workers.log.read_text(errors="replace"))
    assert len(set(started)) == WORKERS
    states = many(workers.get, "/lsa/status")
    assert {state["physical"]["pages"] for state in states} == {32}
    assert all("<!doctype html" in page.lower() for page in many(read, workers, "/lsa", times=12))
    for snapshot in many(first_event, workers, times=6):
        assert snapshot["values"]["device_pages"] == 32


@several
def test_every_worker_checks_options(workers: ServerProcess) -> None:
    """HTTP 400 from the worker itself, before the scheduler hears of it."""
    wrong = {"text": "Hello", "sampling_params": {"max_new_tokens": 4, "custom_params": {"lsa": {"budget": 7}}}}
    for status, text in many(refused, workers, "/generate", wrong):
        assert status == 400
        assert "budget 7 is out of range" in text


@several
def test_every_worker_changes_the_configuration(workers: ServerProcess) -> None:
    before = workers.get("/lsa/status")["config_changes"]
    answers = many(workers.post, "/lsa/config", {"budget": 0.25}, times=12)
    assert {answer["config"]["budget"] for answer in answers} == {0.25}
    assert {answer["config_changes"] for answer in answers} == {before + 1}, "the others change nothing"
    assert {state["config"]["budget"] for state in many(workers.get, "/lsa/status", times=12)} == {0.25}
    assert refused(workers, "/lsa/config", {"budget": 7})[0] == 400
    workers.post("/lsa/config", {"budget": LSAConfig.budget})


def test_answers_come_back_to_the_worker_that_was_asked(workers: ServerProcess) -> None:
    """Pruned and dense requests by all workers at once equal the same requests one by one."""
    asked = [(random_ids(600 + 90 * i, 30 + i), 40, {} if i % 2 else {"policy": "quest"}) for i in range(4)]
    alone = [ask(workers, ids, tokens, **lsa)["output_ids"] for ids, tokens, lsa in asked]
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(ask, workers, ids, tokens, **lsa) for ids, tokens, lsa in asked * 3]
        assert [each.result()["output_ids"] for each in running] == alone * 3


# --- --disable-radix-cache, --chunked-prefill-size -1, --disable-overlap-schedule, --allow-auto-truncate -------------


def test_without_tree_chunks_and_overlap_answers_are_the_same(workers: ServerProcess, small: ServerProcess) -> None:
    """As on a server with all three that reads the same pages. Its own choice is another: it observes other layers."""
    prompt = random_ids(1500, 40)
    first, again = (ask(workers, prompt, 60, policy="quest") for _ in range(2))
    record = finished_request(workers, first["meta_info"]["id"])
    assert record["prefill"] == IN_PLACE
    assert record["resident_pages"] < record["context_pages"]
    expected = ask(small, prompt, 60, sets=record["sets"])["output_ids"]
    assert [first["output_ids"], again["output_ids"]] == [expected, expected]
    assert again["meta_info"]["cached_tokens"] == 0, "nothing is kept"
    assert wait_until_idle(workers)["virtual"]["allocated"] == 0
    dense = [ask(server, prompt, 60, enabled=False)["output_ids"] for server in (workers, small)]
    assert dense[0] == dense[1]


@pytest.mark.parametrize("tokens", [LONGEST + 1, 5000], ids=["by_one", "by_more_than_half"])
@pytest.mark.parametrize(
    ("options", "answered"), [({"policy": "quest"}, 8), ({"enabled": False}, 1)], ids=["pruned", "dense"]
)
def test_a_prompt_that_must_be_whole_is_truncated_to_the_pool(
    workers: ServerProcess, tokens: int, options: dict[str, Any], answered: int
) -> None:
    """As stock SGLang truncates to its own; the answer is that of the shorter prompt."""
    prompt = random_ids(tokens, 41)
    answer = ask(workers, prompt, 8, **options)
    assert len(answer["output_ids"]) == answered, "a dense answer must fit the pool, too"
    assert answer["output_ids"] == ask(workers, prompt[:LONGEST], 8, **options)["output_ids"]
    assert finished_request(workers, answer["meta_info"]["id"])["prompt_tokens"] == LONGEST


# --- new weights -----------------------------------------------------------------------------------------------------


def other_weights(model_path: str, folder: pathlib.Path) -> pathlib.Path:
    """The layers in use, with the keys of the first ones turned around."""
    shutil.copytree(model_path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(pathlib.Path(model_path) / "model.safetensors")
    kept = {n: w for n, w in weights.items() if (at := re.search(r"layers\.(\d+)\.", n)) is None or int(at[1]) < LAYERS}
    for layer in range(3):
        kept[f"model.layers.{layer}.self_attn.k_proj.weight"] *= -1
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def update(server: ServerProcess, path: str | pathlib.Path) -> dict[str, Any]:
    """Status after the server took these weights."""
    told = server.post("/update_weights_from_disk", {"model_path": str(path)})
    assert told["success"], told
    return wait_until_idle(server)


@pytest.fixture(scope="module")
def turned(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return other_weights(model_path, tmp_path_factory.mktemp("weights") / "turned")


def test_weights_are_updated_under_load(small: ServerProcess, model_path: str, turned: pathlib.Path) -> None:
    """KV, host copies and page keys of the old weights are gone: answers are those of a server that never had them."""
    flush(small)
    before = small.get("/lsa/status")["weights"]["updates"]
    prompts = [random_ids(900, 50), random_ids(1200, 51)]

    def answers() -> list[list[int]]:
        return [ask(small, prompt, 40)["output_ids"] for prompt in prompts]

    def update_under_load(path: str | pathlib.Path) -> None:
        with ThreadPoolExecutor(4) as pool:
            load = [pool.submit(ask, small, prompt, 60) for prompt in prompts]
            while not is_busy(small) and not load[0].done():
                pass
            update(small, path)
            assert [len(each.result()["output_ids"]) for each in load] == [60, 60], "nobody lost an answer"

    fresh = answers()
    update_under_load(turned)
    changed = answers()
    assert all(new != old for new, old in zip(changed, fresh, strict=True)), "these weights would not show a mistake"
    update_under_load(model_path)
    assert answers() == fresh
    assert small.get("/lsa/status")["weights"] == {"updates": before + 2, "indexer_is_stale": False}


def test_an_update_leaves_nothing_of_the_old_weights(small: ServerProcess, model_path: str) -> None:
    """Host mirror, device pool and allocator are empty."""
    ask(small, random_ids(900, 52), 8)
    assert wait_until_idle(small)["host"]["pages"] > 0
    status = update(small, model_path)
    assert (status["host"]["pages"], status["virtual"]["allocated"]) == (0, 0)
    assert status["physical"]["free"] == status["physical"]["pages"]


def test_new_weights_make_an_indexer_stale(workers: ServerProcess, turned: pathlib.Path) -> None:
    """Last: nothing makes it fresh again. The log, the status and a metric say so, and it goes on choosing pages."""
    assert workers.get("/lsa/status")["weights"] == {"updates": 0, "indexer_is_stale": False}
    assert update(workers, turned)["weights"] == {"updates": 1, "indexer_is_stale": True}
    assert "was trained for those before" in workers.log.read_text(errors="replace")
    metrics = read(workers, "/metrics")
    for name in ("lsa_indexer_stale", "lsa_weight_updates_total"):
        assert re.search(rf"^sglang:{name}\{{.*\}} 1\.0$", metrics, re.MULTILINE), name
    answer = ask(workers, random_ids(900, 53), 20)
    assert finished_request(workers, answer["meta_info"]["id"])["policy"] == "indexer"


# --- inside ----------------------------------------------------------------------------------------------------------


def read(server: ServerProcess, path: str) -> str:
    with urllib.request.urlopen(server.url + path, timeout=60) as answer:
        return answer.read().decode()


def first_event(server: ServerProcess) -> dict[str, Any]:
    """The first snapshot that the live view's stream brings."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/lsa/events")
    answer = connection.getresponse()
    while not (line := answer.readline()).startswith(b"data:"):
        assert line, "the stream ended"
    connection.close()
    return json.loads(line[5:])
