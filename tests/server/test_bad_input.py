"""Bad input: what was wrong, the value seen, what to do; and nothing else changes. One row, one test."""

from __future__ import annotations

import http.client
import json
import pathlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prompts import prose
from serving import generate, is_busy, wait_until_idle

from sglang_lsa.server_process import ServerProcess

pytestmark = pytest.mark.server

# --- requests --------------------------------------------------------------------------------------------------------


def post(server: ServerProcess, path: str, content: bytes) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    connection.request("POST", path, content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    return answer.status, text


def asking(**parameters: Any) -> dict[str, Any]:
    return {"text": "Hello", "sampling_params": {"max_new_tokens": 4, **parameters}}


def options(**lsa: Any) -> dict[str, Any]:
    return asking(custom_params={"lsa": lsa})


REFUSED: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "not_json": (b'{"text": "Hello"', ""),
    "an_array": (b"[1, 2]", ""),
    "no_prompt": ({"sampling_params": {"max_new_tokens": 4}}, ""),
    "unknown_option": (options(buget=0.3), "unknown key 'buget': use policy, budget, enabled, prefill, sets"),
    "options_no_object": (asking(custom_params={"lsa": 0.3}), "custom_params.lsa is 0.3: use an object"),
    "budget_zero": (options(budget=0), "budget 0 is out of range: use a number in (0, 1]"),
    "budget_negative": (options(budget=-0.5), "budget -0.5 is out of range"),
    "budget_text": (options(budget="small"), "budget is 'small': use a number in (0, 1]"),
    "budget_true": (options(budget=True), "budget is True: use a number"),
    "enabled_number": (options(enabled=1), "enabled is 1: use true or false"),
    "unknown_policy": (options(policy="oracle"), "policy is 'oracle': use one of quest, recency, random, full"),
    "indexer_without_one": (options(policy="indexer"), "policy is 'indexer': use one of quest"),
    "unknown_prefill": (options(prefill="lazy"), "prefill is 'lazy': use one of exact, resident"),
    "sets_malformed": (options(sets="1:2"), "sets is '1:2': write tokens:tail_start:p,p,p"),
    "sets_unordered": (options(sets="999:9:3,2"), "positions ascend and lie before tail_start"),
    "sets_number": (options(sets=5), "sets is 5: write tokens:tail_start:p,p,p"),
    "sets_and_disabled": (options(sets="999:9:1,2", enabled=False), "leave one of the two out"),
    "negative_max_tokens": (asking(max_new_tokens=-5), "max_new_tokens"),
    "temperature_below_zero": (asking(temperature=-1.0), "temperature"),
    "prompt_beyond_the_context": ({"input_ids": [100] * 9000, "sampling_params": {"max_new_tokens": 4}}, "9000"),
    "dense_prompt_beyond_the_pool": (
        {"input_ids": [100] * 2500, "sampling_params": {"max_new_tokens": 4, "custom_params": {"lsa": {"budget": 1}}}},
        "takes fewer than 1984. Ask for a budget below 1",
    ),
    "huge_max_tokens": (asking(max_new_tokens=10**9), "maximum context length of 8192 tokens"),
    "token_id_beyond_the_vocabulary": ({"input_ids": [9, 49152], "sampling_params": {"max_new_tokens": 4}}, "id 49152"),
    "token_id_below_zero": (
        {"input_ids": [-1, 9], "sampling_params": {"max_new_tokens": 4}},
        "use ids from 0 to 49151",
    ),
}


@pytest.mark.parametrize(("content", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_and_harmless(small: ServerProcess, content: dict[str, Any] | bytes, words: str) -> None:
    """HTTP 400 or 422 with words that help; nothing is allocated for it, and the next request is answered."""
    before = wait_until_idle(small)
    status, text = post(small, "/generate", content if isinstance(content, bytes) else json.dumps(content).encode())
    assert status in (400, 422), text
    assert words in text
    after = wait_until_idle(small)
    assert after["virtual"]["allocated"] == before["virtual"]["allocated"]
    assert after["failures"] == before["failures"]
    assert generate(small, "Hello", tokens=2)["meta_info"]["completion_tokens"] == 2


ANSWERED: dict[str, tuple[dict[str, Any], int]] = {
    "one_token": ({"input_ids": [100], "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}}, 3),
    "unicode": (
        {"text": "naïve 数学 🙂 \u202e\u0000 ﷽" * 40, "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}},
        3,
    ),
    "no_new_tokens": ({"text": "Hello", "sampling_params": {"max_new_tokens": 0}}, 0),
    "null_options": (asking(custom_params={"lsa": None}, ignore_eos=True), 4),
    "other_custom_params": (asking(custom_params={"mine": 1}, ignore_eos=True), 4),
}


@pytest.mark.parametrize(("content", "tokens"), ANSWERED.values(), ids=ANSWERED.keys())
def test_odd_but_answered(small: ServerProcess, content: dict[str, Any], tokens: int) -> None:
    status, text = post(small, "/generate", json.dumps(content).encode())
    assert status == 200, text
    if tokens >= 0:
        assert json.loads(text)["meta_info"]["completion_tokens"] == tokens
    wait_until_idle(small)


@pytest.mark.parametrize("text", ["", ["", "Hello"]], ids=["alone", "in_a_batch"])
def test_an_empty_prompt_is_refused(small: ServerProcess, text: str | list[str]) -> None:
    """By SGLang or by us, whoever sees it first; the server goes on."""
    body = {"text": text, "sampling_params": {"max_new_tokens": 2}}
    status, said = post(small, "/generate", json.dumps(body).encode())
    assert status == 400, said
    assert "texts cannot be empty" in said or "The prompt has no tokens: send at least one." in said
    assert generate(small, "Hello", tokens=2)["meta_info"]["completion_tokens"] == 2


def test_flushes_while_busy_lose_nothing(small: ServerProcess) -> None:
    prompt = prose(700, 5)
    generate(small, prompt, tokens=1)
    alone = generate(small, prompt, tokens=80)["text"]
    with ThreadPoolExecutor(5) as pool:
        running = pool.submit(generate, small, prompt, 80)
        while not is_busy(small) and not running.done():
            pass
        flushes = [pool.submit(post, small, "/flush_cache", b"{}") for _ in range(4)]
        assert {flush.result()[0] for flush in flushes} <= {200, 400}
        assert running.result()["text"] == alone


# --- command lines ---------------------------------------------------------------------------------------------------

FLAGS: dict[str, tuple[list[str], str]] = {
    "budget_text": (
        ["--lsa-budget", "much"],
        "argument --lsa-budget: 'much' is no budget: use a number in (0, 1], or auto",
    ),
    "budget_above_one": (["--lsa-budget", "2"], "budget 2.0 is out of range: use a number in (0, 1]"),
    "unknown_policy": (["--lsa-policy", "best"], "argument --lsa-policy: invalid choice: 'best'"),
    "unknown_prefill": (["--lsa-prefill", "half"], "argument --lsa-prefill: invalid choice: 'half'"),
    "a_flag_that_is_gone": (["--lsa-staging-pages", "4"], "--lsa-staging-pages is gone: a prompt is read through"),
    "indexer_missing": (["--lsa-indexer", "/nowhere"], "--lsa-indexer /nowhere: has no config.json"),
    "unknown_flag": (["--lsa-bugdet", "0.1"], "--lsa-bugdet"),
    "no_config": (["--lsa-config", "/nowhere.json"], "cannot be read (No such file or directory): give an existing"),
    "speculation": (["--lsa-budget", "0.1", "--page-size", "32"], "--page-size 32: not supported with LSA yet"),
    "too_much_host": (["--lsa-host-memory-gb", "99999"], "GB are free: lower it"),
    "two_pool_sizes": (["--lsa-device-tokens", "4096", "--lsa-device-memory-gb", "1"], "give one of them"),
    "no_model": (["--lsa-budget", "0.1", "--model-path", "/nowhere/at/all"], "/nowhere/at/all"),
}


CHECK = """
import json, sys
from sglang.srt.plugins import load_plugins
sys.argv.append("--lsa-budget=0.1")
load_plugins()
from sglang.srt.server_args import prepare_server_args
for name, flags in json.loads(sys.argv[1]).items():
    try:
        server_args = prepare_server_args(flags)
        getattr(server_args, "resolve_once", lambda: None)()  # of a release that judges them later
        print("ACCEPTED", name, file=sys.stderr, flush=True)
    except BaseException as error:
        print("REFUSED", name, repr(error), file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def verdicts(model_path: str) -> dict[str, str]:
    """What is said of each command line by what the server does first, up to the next one's verdict."""
    lines = {
        name: [*flags, *([] if "--model-path" in flags else ["--model-path", model_path])]
        for name, (flags, _) in FLAGS.items()
    }
    done = subprocess.run([sys.executable, "-c", CHECK, json.dumps(lines)], capture_output=True, text=True, timeout=600)
    found, said = {}, ""
    for line in done.stderr.splitlines(keepends=True):
        said += line
        if line.startswith(("ACCEPTED", "REFUSED")):
            found[line.split()[1]], said = said, ""
    return found


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, (_, words) in FLAGS.items()], ids=FLAGS.keys())
def test_flags_are_refused_before_anything_is_loaded(verdicts: dict[str, str], name: str, words: str) -> None:
    assert f"REFUSED {name}" in verdicts[name]
    assert words in verdicts[name]


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_truncated_model_ends_the_server(model_path: str, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_path, folder)
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    flags = ["--model-path", str(folder), "--skip-server-warmup", "--lsa-device-tokens", "1024", "--lsa-host-memory-gb"]
    with ServerProcess("sglang_lsa.launch_server", [*flags, "0.1"], tmp_path / "server.log") as server:
        assert server.process.wait(300) != 0
        assert "SafetensorError" in server.log.read_text(errors="replace")
