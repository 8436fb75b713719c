"""SGLang's features with LSA on, one test each; ``docs/features.md`` is a table of them.

One server answers all of it: float32, six layers, 32 pages on the device, so that prompts of 500 tokens are pruned and
those of 1,500 fill the pool. Where a feature must not change an answer, the answer is compared with a plain request's,
token for token.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from prompts import random_ids
from safetensors.torch import save_file
from serving import assert_idle, finished_request, flush, refused, running_requests, wait_until_idle
from soak import FLAGS, LSA_CONFIG

from sglang_lsa.client import get_requests
from sglang_lsa.server_process import ServerProcess

pytestmark = pytest.mark.server

LAYERS, HIDDEN, RANK = 6, 576, 4
OUT = {"q_proj": 576, "k_proj": 192, "v_proj": 192}
ADAPTERS = ("red", "blue")
TOLERANCE = 2e-3
DENSE = {"enabled": False}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Threads wait for each other after every small product of six layers, for long on a busy machine."""


@pytest.fixture(scope="module")
def features(model_path: str, logs: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("features")
    config = folder / "lsa.json"
    config.write_text(json.dumps({**LSA_CONFIG, "debug": True, "disable_view": True, "widen": 1}))
    flags = ["--model-path", model_path, *FLAGS, "--lsa-config", str(config), "--grammar-backend", "llguidance"]
    flags += ["--constrained-json-disable-any-whitespace"]
    flags += ["--enable-return-hidden-states", "--enable-priority-scheduling", "--lora-backend", "torch_native"]
    flags += ["--lora-paths", *(f"{name}={write_adapter(folder / name, seed)}" for seed, name in enumerate(ADAPTERS))]
    support = str(pathlib.Path(__file__).resolve().parents[1] / "support")
    path = os.pathsep.join([support, os.environ.get("PYTHONPATH", "")])
    with ServerProcess("unpinned_server", flags, logs / "features.log", {"PYTHONPATH": path, **ONE_THREAD}) as server:
        yield server.wait_until_ready()


@pytest.fixture(autouse=True)
def nothing_is_left_of_a_feature(features: ServerProcess) -> Iterator[None]:
    yield
    assert_idle(features)


def write_adapter(folder: pathlib.Path, seed: int) -> pathlib.Path:
    """A random LoRA adapter, strong enough that every answer under it is another."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(LAYERS):
        for name, out in OUT.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{place}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=draw) / HIDDEN**0.5
            weights[f"{place}.lora_B.weight"] = torch.randn(out, RANK, generator=draw)
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(OUT), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def body(ids: list[int], tokens: int, lsa: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A greedy request; what is in ``sampling`` is added to its sampling parameters."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, **more.pop("sampling", {})}
    if lsa:
        sampling["custom_params"] = {"lsa": lsa}
    return {"input_ids": ids, "sampling_params": sampling, **more}


def ask(server: ServerProcess, *args: Any, **more: Any) -> dict[str, Any]:
    return server.post("/generate", body(*args, **more))


def pages_read(record: dict[str, Any]) -> tuple[int, int]:
    return record["resident_pages"], record["context_pages"]


# --- several answers to one prompt -----------------------------------------------------------------------------------


def test_parallel_samples_share_their_prompt(features: ServerProcess) -> None:
    """Three children read one prompt; each of them has resident sets of its own, over the same pages."""
    flush(features)
    prompt = random_ids(1000, 1)
    with ThreadPoolExecutor(1) as pool:
        sampling = {"n": 3, "temperature": 1.0, "sampling_seed": 5}
        running = pool.submit(ask, features, prompt, 120, sampling=sampling)
        children = watch(features, running, lambda children: len(children) == 3)
        first_pages = [pages_read_now(features, child["rid"]) for child in children]
        held = features.get("/lsa/status")["physical"]["held"]
        answers = running.result()
    assert len(answers) == 3
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [120] * 3
    # Each child computes what comes after the prompt's last full page, and nothing else.
    assert all(answer["meta_info"]["cached_tokens"] >= 896 for answer in answers)
    assert held < sum(len(pages) for pages in first_pages)
    records = [finished_request(features, answer["meta_info"]["id"]) for answer in answers]
    assert len({record["rid"] for record in records}) == 3
    for record in records:
        resident, context = pages_read(record)
        assert resident < context, "a child is pruned like any other request"
        assert len(record["history"]) > 1
    assert len({record["sets"] for record in records}) > 1, "sampled answers part, and so do their sets"


def test_greedy_parallel_samples_equal_a_plain_request(features: ServerProcess) -> None:
    prompt = random_ids(1000, 2)
    plain = ask(features, prompt, 60)["output_ids"]
    assert [answer["output_ids"] for answer in ask(features, prompt, 60, sampling={"n": 2})] == [plain, plain]


# --- structured output -----------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Grace"]}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMARS: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "regex": ({"regex": "[0-9]{4}-[0-9]{2}-[0-9]{2}"}, lambda said: bool(re.fullmatch(r"\d{4}-\d\d-\d\d", said))),
    "json_schema": (
        {"json_schema": json.dumps(SCHEMA)},
        lambda said: set(json.loads(said)) == {"name", "age"} and isinstance(json.loads(said)["age"], int),
    ),
    "ebnf": (
        {"ebnf": 'root ::= ("yes" | "no") " " [a-f]{3}'},
        lambda said: bool(re.fullmatch("(yes|no) [a-f]{3}", said)),
    ),
}


@pytest.mark.parametrize(("grammar", "holds"), GRAMMARS.values(), ids=GRAMMARS.keys())
def test_a_grammar_holds_over_a_pruned_prompt(features: ServerProcess, grammar: dict, holds: Callable) -> None:
    answer = ask(features, random_ids(900, 3), 64, sampling={**grammar, "ignore_eos": False})
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    assert holds(answer["text"]), answer["text"]
    resident, context = pages_read(finished_request(features, answer["meta_info"]["id"]))
    assert resident < context


def test_a_grammar_beside_plain_requests_changes_none_of_them(features: ServerProcess) -> None:
    prompt = random_ids(700, 4)
    alone = ask(features, prompt, 60)["output_ids"]
    with ThreadPoolExecutor(2) as pool:
        regex = pool.submit(ask, features, prompt, 40, sampling={"regex": "[0-9]{30}", "ignore_eos": False})
        assert pool.submit(ask, features, prompt, 60).result()["output_ids"] == alone
    assert re.fullmatch(r"\d{30}", regex.result()["text"])


# --- LoRA ------------------------------------------------------------------------------------------------------------


def test_two_adapters_over_one_prompt_share_no_page(features: ServerProcess) -> None:
    """A prompt's KV depends on the adapter: nobody reads another's, whether it is cached or being computed."""
    prompt = random_ids(800, 5)
    names = (None, *ADAPTERS)

    def with_adapter(name: str | None) -> dict[str, Any]:
        return ask(features, prompt, 40, **({"lora_path": name} if name else {}))

    alone = {}
    for name in names:
        flush(features)
        alone[name] = with_adapter(name)["output_ids"]
    assert len({tuple(said) for said in alone.values()}) == 3, "these adapters would not show a mistake"
    flush(features)
    for name in names:  # one after the other: each finds what the others cached, and must not take it
        answer = with_adapter(name)
        assert (answer["output_ids"], answer["meta_info"]["cached_tokens"]) == (alone[name], 0)
    with ThreadPoolExecutor(6) as pool:  # at once, and each of them cached by now
        for name, answer in zip(names * 2, pool.map(with_adapter, names * 2), strict=True):
            assert answer["output_ids"] == alone[name]
            assert answer["meta_info"]["cached_tokens"] >= 704


# --- logarithmic probabilities, hidden states ------------------------------------------------------------------------


def logprobs(pairs: list) -> np.ndarray:
    return np.array([chance for chance, *_ in pairs if chance is not None])


def test_logprobs_of_prompt_and_answer(features: ServerProcess) -> None:
    """Those of the prompt are exact, however it is read; those of the answer belong to the pages that it read."""
    prompt, ids = random_ids(900, 6), [11, 222, 3333]
    wanted = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 3, "token_ids_logprob": ids}
    pruned, dense = (ask(features, prompt, 40, lsa, **wanted)["meta_info"] for lsa in (None, DENSE))
    for name in ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"):
        assert len(pruned[name]) == len(prompt)
    assert np.abs(logprobs(pruned["input_token_logprobs"]) - logprobs(dense["input_token_logprobs"])).max() < TOLERANCE
    assert [token for _, token, _ in pruned["input_token_logprobs"]] == prompt
    assert len(pruned["output_token_logprobs"]) == 40
    for (chance, token, _), top, asked in zip(
        pruned["output_token_logprobs"], pruned["output_top_logprobs"], pruned["output_token_ids_logprobs"], strict=True
    ):
        assert (chance, token) == tuple(top[0][:2]), "greedy"
        assert [token for _, token, _ in asked] == ids
    answer = [token for _, token, _ in pruned["output_token_logprobs"]]
    sets = finished_request(features, pruned["id"])["sets"]
    again = ask(features, prompt, 40, {"sets": sets}, return_logprob=True)["meta_info"]["output_token_logprobs"]
    assert [token for _, token, _ in again] == answer
    assert np.abs(logprobs(again) - logprobs(pruned["output_token_logprobs"])).max() < TOLERANCE


def test_hidden_states_of_prompt_and_answer(features: ServerProcess) -> None:
    flush(features)
    prompt = random_ids(400, 7) + random_ids(500, 8)
    states = {}
    for name, lsa in (("pruned", None), ("dense", DENSE)):
        flush(features)  # SGLang returns those of what it computes: a cached prefix has none
        states[name] = ask(features, prompt, 20, lsa, return_hidden_states=True)["meta_info"]["hidden_states"]
    (pruned, *steps), (dense, *dense_steps) = (
        [np.array(entry, dtype=np.float32) for entry in states[name]] for name in ("pruned", "dense")
    )
    assert pruned.shape[-1] == HIDDEN
    assert pruned.shape == dense.shape
    assert np.abs(pruned - dense).max() < 1e-2 * np.abs(dense).max(), "the prompt is exact"
    assert len(steps) == len(dense_steps) == 19
    assert np.abs(steps[-1] - dense_steps[-1]).max() > 1e-2, "decode read a part of the pages"


# --- sessions --------------------------------------------------------------------------------------------------------


def test_a_session_equals_plain_requests(features: ServerProcess) -> None:
    first, second = random_ids(700, 9), random_ids(80, 10)
    session = features.post("/open_session", {"capacity_of_str_len": 100_000})
    told = ask(features, first, 30, session_params={"id": session, "rid": None})
    turn = {"id": session, "rid": told["meta_info"]["id"]}
    # SGLang appends to what it has read, which the last token of an answer is not.
    answer = ask(features, second, 30, session_params=turn)
    again = ask(features, [*first, *told["output_ids"], *second], 30)
    record, plain = (finished_request(features, each["meta_info"]["id"]) for each in (answer, again))
    assert answer["output_ids"] == again["output_ids"]
    assert record["prompt_tokens"] == plain["prompt_tokens"] == 810
    assert record["resident_pages"] < record["context_pages"]
    features.post("/close_session", {"session_id": session}, parse=False)


# --- priorities ------------------------------------------------------------------------------------------------------


def test_a_high_priority_does_not_wait_for_device_pages(features: ServerProcess) -> None:
    """A request of low priority that fills the device pool gives way, and says the same in the end."""
    flush(features)
    low, high = random_ids(1300, 11), random_ids(900, 12)
    plain = {
        name: ask(features, ids, count, DENSE)["output_ids"]
        for name, ids, count in (("low", low, 100), ("high", high, 8))
    }
    flush(features)
    done: dict[str, float] = {}

    def timed(name: str, *args: Any, **more: Any) -> dict[str, Any]:
        answer = ask(features, *args, **more)
        done[name] = time.monotonic()
        return answer

    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(timed, "low", low, 100, DENSE, priority=0, rid="low")
        watch(features, slow, lambda running: running and running[0]["context_tokens"] > 1310)
        asked = time.monotonic()
        quick = pool.submit(timed, "high", high, 8, DENSE, priority=100, rid="high").result()
        assert not slow.done(), "it waited for the request of low priority"
    print(f"high: {done['high'] - asked:.2f} s, low: {done['low'] - asked:.2f} s after the high one was asked")
    assert quick["output_ids"] == plain["high"]
    assert slow.result()["output_ids"] == plain["low"]
    assert len(get_requests(features.url, "low")["finished"]) >= 2, "it came back"


def test_equal_priorities_wait(features: ServerProcess) -> None:
    """Nobody is preempted for a request of the same priority, nor where it would not help."""
    flush(features)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, features, random_ids(1300, 13), 80, DENSE, priority=50, rid="first")
        watch(features, first, bool)
        second = pool.submit(ask, features, random_ids(900, 14), 8, DENSE, priority=50)
        second.result()
        assert first.done()
    assert len(get_requests(features.url, "first")["finished"]) == 1


# --- pause and continue ----------------------------------------------------------------------------------------------


def post(server: ServerProcess, path: str, **content: Any) -> None:
    server.post(path, content, parse=False)


def test_a_pause_in_place_keeps_pages_and_answer(features: ServerProcess) -> None:
    prompt = random_ids(900, 15)
    alone = ask(features, prompt, 150)["output_ids"]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, features, prompt, 150)
        watch(features, running, lambda running: running and running[0]["context_tokens"] > 910)
        post(features, "/pause_generation", mode="in_place")
        paused = [(features.get("/lsa/status"), running_requests(features)) for _ in range(10)]
        post(features, "/continue_generation")
        assert running.result()["output_ids"] == alone
    tokens = {running[0]["context_tokens"] for _, running in paused[1:]}
    assert len(tokens) == 1, "it stands still"
    assert all(status["physical"]["held"] > 0 for status, _ in paused)


def test_a_pause_that_retracts_gives_every_page_back(features: ServerProcess) -> None:
    prompts = [random_ids(500, 16), random_ids(500, 17)]
    alone = [ask(features, prompt, 120, DENSE)["output_ids"] for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(ask, features, prompt, 120, DENSE) for prompt in prompts]
        watch(features, running[0], lambda running: len(running) == 2)
        post(features, "/pause_generation", mode="retract")
        paused = wait_until_idle(features)
        post(features, "/continue_generation")
        assert [each.result()["output_ids"] for each in running] == alone
    assert (paused["physical"]["held"], paused["physical"]["promised"]) == (0, 0)


def test_a_pause_that_aborts_ends_every_request(features: ServerProcess) -> None:
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(ask, features, random_ids(500, 18 + i), 1500) for i in range(2)]
        watch(features, running[0], lambda running: len(running) == 2)
        post(features, "/pause_generation", mode="abort")
        assert [each.result()["meta_info"]["finish_reason"]["type"] for each in running] == ["abort"] * 2
        paused = features.get("/lsa/status")
        later = pool.submit(ask, features, random_ids(500, 20), 4)
        post(features, "/continue_generation")
        assert later.result()["meta_info"]["completion_tokens"] == 4
    assert (paused["physical"]["held"], paused["running"]["requests"]) == (0, 0)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 5], ids=lambda start: f"from_{start}")
@pytest.mark.parametrize(
    ("ids", "words"),
    [(random_ids(3000, 21), "takes fewer than 1984. Ask for a budget"), ([9, 9, 9, 9, 9, 9, 70_000], "token id 70000")],
    ids=["too_long", "no_token"],
)
def test_a_refusal_says_why_whatever_logprobs_are_asked_for(
    features: ServerProcess, ids: list[int], words: str, start: int
) -> None:
    status, text = refused(features, "/generate", body(ids, 4, DENSE, return_logprob=True, logprob_start_len=start))
    assert status == 400
    assert words in text


# --- inside ----------------------------------------------------------------------------------------------------------


def pages_read_now(server: ServerProcess, rid: str) -> set[int]:
    """Pages that a running request reads."""
    return set(get_requests(server.url, rid)["running"][0]["resident"])


def watch(server: ServerProcess, running: Future, seen: Callable[[list[dict]], Any]) -> list[dict[str, Any]]:
    """The running requests as soon as ``seen`` holds of them, while ``running`` runs."""
    while not running.done():
        found = running_requests(server)
        if seen(found):
            return found
    raise AssertionError(f"it ended before that was seen: {running.result()}")
