"""One request: its options, its refusals, and what can be seen of it."""

from __future__ import annotations

import json
import urllib.error

import openai
import pytest
from prompts import needle, prose
from serving import finished_request, generate

from sglang_lsa.client import get_requests
from sglang_lsa.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.release]

BAD_OPTIONS = {
    "unknown_key": ({"buget": 0.3}, "use policy, budget, enabled, prefill, sets"),
    "not_an_object": (0.3, "use an object"),
    "budget_zero": ({"budget": 0}, "(0, 1]"),
    "budget_above_one": ({"budget": 1.5}, "(0, 1]"),
    "budget_text": ({"budget": "small"}, "(0, 1]"),
    "unknown_policy": ({"policy": "oracle"}, "quest, recency, random, full"),
    "policy_without_checkpoint": ({"policy": "indexer"}, "quest, recency, random, full"),
    "enabled_text": ({"enabled": "no"}, "true or false"),
}


@pytest.fixture(scope="module")
def client(lsa: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=lsa.url + "/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_custom_params_are_refused(client: openai.OpenAI, options, words: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=4,
            stream=stream,
            extra_body={"custom_params": {"lsa": options}},
        )
    assert refused.value.status_code == 400
    assert words in str(refused.value)


def test_bad_custom_params_are_refused_on_the_native_endpoint(lsa: ServerProcess) -> None:
    body = {"text": "Hello", "sampling_params": {"max_new_tokens": 4, "custom_params": {"lsa": {"budget": 7}}}}
    with pytest.raises(urllib.error.HTTPError) as refused:
        lsa.post("/generate", body)
    assert refused.value.code == 400


def test_prompt_beyond_the_device_pool_is_refused(model_path: str, lsa: ServerProcess) -> None:
    """150 device pages take no prompt that the model's 8K context allows but the pool does not: use one larger."""
    physical = lsa.get("/lsa/status")["physical"]["pages"] * 64
    assert physical > 8192, "on this server the model's context is the tighter bound"
    with pytest.raises(urllib.error.HTTPError) as refused:
        lsa.post("/generate", {"text": prose(9000, 1), "sampling_params": {"max_new_tokens": 4}})
    assert refused.value.code == 400


@pytest.mark.parametrize(
    ("options", "policy"),
    [({}, "quest"), ({"enabled": False}, "full"), ({"policy": "full"}, "full"), ({"policy": "recency"}, "recency")],
    ids=["default", "disabled", "full", "recency"],
)
def test_options_choose_the_policy(client: openai.OpenAI, lsa: ServerProcess, options: dict, policy: str) -> None:
    rid = f"policy-{policy}-{len(options)}"
    client.chat.completions.create(
        model="smollm2",
        messages=needle(1500, 0.5, 3).messages(),
        max_tokens=8,
        temperature=0,
        extra_body={"rid": rid, "custom_params": {"lsa": options}},
    )
    seen = finished_request(lsa, rid)
    assert seen["policy"] == policy
    assert (seen["resident_pages"] == seen["context_pages"]) == (policy == "full")


def test_short_requests_are_dense(client: openai.OpenAI, lsa: ServerProcess) -> None:
    client.completions.create(model="smollm2", prompt=prose(500, 4), max_tokens=8, extra_body={"rid": "short"})
    seen = finished_request(lsa, "short")
    assert seen["policy"] == "full"


def test_a_request_that_grows_long_is_pruned(lsa: ServerProcess) -> None:
    """Below min_context (1,024) it reads everything; past it, and at its next window, no longer."""
    lsa.post(
        "/generate",
        {
            "text": prose(960, 8),
            "rid": "growing",
            "sampling_params": {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True},
        },
    )
    seen = finished_request(lsa, "growing")
    assert seen["history"][0] == []
    assert seen["policy"] == "quest"
    assert seen["resident_pages"] < seen["context_pages"]


def test_status_and_server_info(lsa: ServerProcess) -> None:
    status = lsa.get("/lsa/status")
    inside = lsa.get("/server_info")["internal_states"][0]["lsa"]
    assert {k: type(v) for k, v in inside.items()} == {k: type(v) for k, v in status.items()}
    parts = {"virtual", "physical", "host", "recalls", "stores", "radix", "running", "finished_requests", "evictions"}
    assert parts <= set(status)
    assert not [name for name, value in status.items() if isinstance(value, list)], "counters only"
    assert status["physical"]["pages"] == 150
    assert status["virtual"]["pages"] > 2 * status["physical"]["pages"]
    assert status["host"]["mirror_bytes"] <= 0.44 * 2**30
    json.dumps(status)


def test_one_request_is_told_by_its_name(lsa: ServerProcess) -> None:
    """The newest last, with everything that it read; of all others a few numbers, whatever their names are."""
    for rid, tokens in (("told &/?#", 70), ("another", 2), ("told &/?#", 3)):
        generate(lsa, prose(1200, 17), tokens, rid)
    first, last = get_requests(lsa.url, "told &/?#")["finished"]
    assert (first["context_tokens"] - last["context_tokens"], last["number"] - first["number"]) == (67, 2)
    assert first["sets"].count(";") + 1 == len(first["history"]) == 2
    assert all(0 in positions for positions in first["history"])
    assert get_requests(lsa.url, "nobody") == {"finished": [], "running": [], "more_running": 0}
    shown = get_requests(lsa.url)
    assert [entry["rid"] for entry in shown["finished"][-3:]] == ["told &/?#", "another", "told &/?#"]
    assert shown["finished"][-1] == {name: last[name] for name in shown["finished"][-1]}
    assert not {"sets", "history", "watched"} & set(shown["finished"][-1])
