"""The screen's table: complete for the installed SGLang, refuses what it says, and nothing that is legal."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Iterator
from typing import Any

import pytest
from release import HERE

from sglang_lsa.config import LSAConfig, RequestOptions
from sglang_lsa.serve.screen import harmless, header, rids
from sglang_lsa.serve.screen.request import refusing, row_of, screen, screen_samples
from sglang_lsa.serve.screen.rules import Refused, Server
from sglang_lsa.serve.screen.sampling_rules import MOST_SAMPLES
from sglang_lsa.serve.screen.table import ROWS

SERVER = Server(vocabulary=49152, hidden_size=4, dtype="bfloat16")


def request(sampling_params: Any = None, **fields: Any) -> Any:
    """What SGLang has made of a request for one prompt when it is screened."""
    defaults = {"rid": "a", "input_ids": [5, 6, 7], "return_logprob": False, "logprob_start_len": -1}
    defaults |= {"top_logprobs_num": 0, "token_ids_logprob": None, "session_params": None, "input_embeds": None}
    return types.SimpleNamespace(**(defaults | fields), sampling_params=sampling_params or {})


def screened(sampling_params: Any = None, server: Server = SERVER, **fields: Any) -> Any:
    made = request(sampling_params, **fields)
    screen(made, server)
    return made


# --- complete --------------------------------------------------------------------------------------------------------


def models() -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Each kind of request of the installed SGLang: its fields, and those that need no row."""
    from sglang.srt.entrypoints.openai import protocol
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    yield "/generate", [field.name for field in dataclasses.fields(GenerateReqInput)], harmless.REQUEST
    yield "sampling_params", list(SamplingParams.__struct_fields__), {}
    for route, name in (
        ("/v1/completions", "CompletionRequest"),
        ("/v1/chat/completions", "ChatCompletionRequest"),
        ("/v1/responses", "ResponsesRequest"),
    ):
        yield route, list(getattr(protocol, name).model_fields), harmless.REQUEST | harmless.PROTOCOLS


NOT_IN = {
    "0.5.17": {
        *("beam_width", "ebnf_full_assistant", "kv_hints", "mm_content_hashes", "mm_processor_kwargs", "watermark"),
        *("return_flat_raw_output_top_logprobs", "return_input_ids_in_sglext", "return_output_ids_in_sglext"),
        *("return_spec_tokens_details", "sampling_logprobs_mode", "thinking", "token_indices_to_pool", "video_config"),
    },
    "0.5.23": {"mm_data_mooncake"},
}
"""Release -> what only another has."""


def test_every_field_has_a_row_or_a_reason() -> None:
    known: set[str] = set()
    for route, fields, reasons in models():
        missing = [name for name in fields if row_of(name) is None and name not in reasons]
        assert not missing, f"{route}: {missing} have neither a row in sglang_lsa/serve/screen/table.py nor a reason"
        known |= set(fields)
    named = [row.sampling or row.field for row in ROWS] + [*harmless.REQUEST, *harmless.PROTOCOLS]
    stale = {name for name in named if name not in known} - NOT_IN[HERE]
    assert not stale, f"SGLang has no {stale}"
    assert not [name for name in harmless.REQUEST if any(name == row.field for row in ROWS)], "both a row and a reason"


def test_keys_are_those_of_this_release() -> None:
    server = dataclasses.replace(SERVER, sampling=frozenset({"top_p", "watermark"}))
    assert screened({"top_p": 0.5, "watermark": None}, server).sampling_params == {"top_p": 0.5, "watermark": None}
    with pytest.raises(Refused, match=r"beam_width.*use top_p, watermark"):
        screened({"beam_width": 1}, server)


# --- refused ---------------------------------------------------------------------------------------------------------

EXAMPLES = [(row, row.example) for row in ROWS if row.example]


@pytest.mark.parametrize(("row", "example"), EXAMPLES, ids=[row.field for row, _ in EXAMPLES])
def test_the_example_of_a_row_is_refused(row: Any, example: str) -> None:
    """With words that name the field, the value, and what to do."""
    wrong = json.loads(example)
    made = request({row.sampling: wrong}) if row.sampling else request(return_logprob=True)
    if row.sampling is None:
        setattr(made, row.field, wrong)
    with pytest.raises(ValueError) as refusal:
        screen_samples(made)
        screen(made, SERVER)
    words = str(refusal.value)
    assert row.field.split(".")[-1] in words and ": " in words and len(words) < 400


NAN, INF = math.nan, math.inf
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nan": ({"temperature": NAN}, {}),
    "infinite": ({"top_p": INF}, {}),
    "an_integer_that_no_float_holds": ({"temperature": 10**400}, {}),
    "bias_infinite": ({"logit_bias": {"5": INF}}, {}),
    "bias_nan": ({"logit_bias": {"5": NAN}}, {}),
    "bias_beyond_float32": ({"logit_bias": {"5": 1e39}}, {}),
    "bias_beyond_the_vocabulary": ({"logit_bias": {"49152": 1}}, {}),
    "bias_a_list": ({"logit_bias": [5]}, {}),
    "penalty_that_makes_logits_infinite": ({"repetition_penalty": 1e-300}, {}),
    "penalty_with_a_temperature_that_does": ({"repetition_penalty": 1e-34, "temperature": 0.01}, {}),
    "half_a_surrogate_pair": ({"stop": ["\ud800"]}, {}),
    "unknown_parameter": ({"temprature": 1}, {}),
    "stop_ids_infinite": ({"stop_token_ids": [INF]}, {}),
    "two_values_for_one_prompt": ({}, {"top_logprobs_num": [1, 2], "return_logprob": True}),
    "embeddings_of_another_width": ({}, {"input_embeds": [[0.5, 0.5]]}),
    "embeddings_ragged": ({}, {"input_embeds": [[0.5] * 4, [0.5] * 3]}),
    "embeddings_nan": ({}, {"input_embeds": [[NAN] * 4]}),
    "embeddings_in_a_session": ({}, {"input_embeds": [[0.5] * 4], "session_params": {"id": "x"}}),
    "session_unknown_key": ({}, {"session_params": {"ids": "x"}}),
    "session_offset_text": ({}, {"session_params": {"id": "x", "offset": "1"}}),
}


@pytest.mark.parametrize(("parameters", "fields"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(parameters: dict[str, Any], fields: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=": "):
        screened(parameters, **fields)


def test_delimiters() -> None:
    """Dropped, but for a server that scores several items in a prompt."""
    assert screened(multi_item_delimiter_indices=[900]).multi_item_delimiter_indices is None
    scoring = dataclasses.replace(SERVER, delimiters=True)
    assert screened(multi_item_delimiter_indices=[0, 2], server=scoring).multi_item_delimiter_indices == [0, 2]
    for wrong in ([3], [1, 1], [-1], []):
        with pytest.raises(Refused, match="ascending positions"):
            screened(multi_item_delimiter_indices=wrong, server=scoring)


def test_embeddings_need_bfloat16() -> None:
    with pytest.raises(Refused, match="--dtype bfloat16"):
        screened(input_embeds=[[0.5] * 4], server=dataclasses.replace(SERVER, dtype="float32"))
    assert screened(input_embeds=[[0.5] * 4]).input_embeds == [[0.5] * 4]


@pytest.mark.parametrize("samples", [MOST_SAMPLES + 1, 1.5, "2", [1]])
def test_samples(samples: Any) -> None:
    with pytest.raises(Refused, match=r"sampling_params\.n is"):
        screen_samples(request([{"n": samples}]))


# --- passed on -------------------------------------------------------------------------------------------------------

LEGAL: dict[str, dict[str, Any]] = {
    "nothing": {},
    "nulls": {
        name: None for name in ("max_new_tokens", "temperature", "top_k", "stop", "regex", "logit_bias", "stop_regex")
    },
    "no_new_tokens": {"max_new_tokens": 0},
    "tiny_temperature": {"temperature": 1e-300},
    "temperature_beyond_float32": {"temperature": 1e39},
    "whole_numbers": {"temperature": 1, "top_p": 1, "min_p": 0, "frequency_penalty": -2, "repetition_penalty": 2},
    "true_as_one": {"temperature": True},
    "all_of_the_vocabulary": {"top_k": -1},
    "largest_top_k": {"top_k": 2**31 - 1},
    "fraction_of_a_token": {"min_new_tokens": 1.5, "top_k": 3.5},
    "stop_texts": {"stop": ["", "é", "\x00", "🙂"]},
    "stop_patterns": {"stop_regex": [r"\d+", "a|b", ""]},
    "banned_token": {"logit_bias": {"5": -INF, " 6 ": 1e38, "0": -100}},
    "small_penalty": {"repetition_penalty": 1e-34},
    "text_that_is_no_grammar": {"regex": "(", "json_schema": None, "ebnf": "root ::="},
    "custom": {"custom_params": {"mine": [1, {"a": None}], "lsa": None}},
    "custom_of_another_type": {"custom_params": "x"},
    "seed": {"sampling_seed": -5},
    "stop_nothing": {"stop": [], "stop_token_ids": None},
    "stream_interval_negative": {"stream_interval": -1},
}


@pytest.mark.parametrize("parameters", LEGAL.values(), ids=LEGAL.keys())
def test_what_stock_answers_passes_unchanged(parameters: dict[str, Any]) -> None:
    given = json.loads(json.dumps(parameters))
    assert screened(parameters).sampling_params == given == parameters


@pytest.mark.parametrize(("temperature", "most"), [(None, 1e38), (2.0, 1e38), (0.5, 5e37), (1e-7, 1e38)])
def test_a_bias_stays_finite_when_it_is_divided_by_the_temperature(temperature: float | None, most: float) -> None:
    """An infinite logit is no probability, over which a GPU ends the server."""
    given = {"logit_bias": {"5": 3e38, "6": -3e38, "7": -INF, "8": 4}} | (
        {"temperature": temperature} if temperature else {}
    )
    assert screened(given).sampling_params["logit_bias"] == {"5": most, "6": -most, "7": -INF, "8": 4}


def test_what_means_the_same_is_put_in_a_form_that_works() -> None:
    sampling = {
        "stop_token_ids": [7, "8", -1, 10**9, None],
        "skip_special_tokens": 0,
        "ignore_eos": [],
        "no_stop_trim": None,
        "structural_tag": {},
    }
    sampling |= {"is_normalized": True, "stop_strs": ["x"], "custom_params": {"lsa": {"watch": [0, 3, 5]}, "b": 1}}
    made = screened(
        sampling, bootstrap_host="2.2.2.2", http_worker_ipc="x", top_logprobs_num=10**6, token_ids_logprob=[5]
    )
    assert made.sampling_params == {
        "stop_token_ids": [7, 8],
        "skip_special_tokens": False,
        "ignore_eos": False,
        "no_stop_trim": None,
        "structural_tag": None,
        "custom_params": {"lsa": {"watch": "0,3,5"}, "b": 1},
    }
    assert made.bootstrap_host is None and made.http_worker_ipc is None
    assert made.top_logprobs_num == 0 and made.token_ids_logprob is None, "nobody asked for logprobs"
    made = screened(return_logprob=[True], logprob_start_len=[0], top_logprobs_num=[49152], extra_key=["k"])
    assert (made.return_logprob, made.logprob_start_len, made.top_logprobs_num, made.extra_key) == (True, 0, 49152, "k")


def test_one_batch_shares_its_parameters() -> None:
    """What is passed on for one prompt is a copy."""
    given = {"skip_special_tokens": 0}
    screened(given)
    assert given == {"skip_special_tokens": 0}


def test_only_mistakes_of_the_client_become_refusals() -> None:
    with pytest.raises(ValueError, match="the request cannot be read: KeyError: 'x'"), refusing("the request"):
        {}["x"]
    with pytest.raises(OSError), refusing("the request"):
        raise OSError("disk")


# --- the header ------------------------------------------------------------------------------------------------------


def test_header() -> None:
    parse = header.parse
    assert parse([]) is None and parse([b" "]) is None
    assert parse([b"budget=0.3, policy = quest", b"enabled=true"]) == {
        "budget": 0.3,
        "policy": "quest",
        "enabled": True,
    }
    assert parse([b"sets=999:9:1,2;1999:9:1,3,watch=0,3,5,record=5"]) == {
        "sets": "999:9:1,2;1999:9:1,3",
        "watch": "0,3,5",
        "record": 5,
    }
    assert parse([b"watch=7"]) == {"watch": "7"}, "text, whatever it looks like"


@pytest.mark.parametrize(
    ("written", "words"),
    [("buget=1", "'buget'"), ("budget", "'budget'"), ("=", "''"), ("budget=1,budget=1", "twice"), ("x" * 9000, "9000")],
)
def test_header_refused(written: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        header.parse([written.encode()])


def test_header_beside_a_body() -> None:
    merged = header.merged
    assert merged({"a": 1}, None) == {"a": 1}
    assert merged({}, {"budget": 0.3}) == {"custom_params": {"lsa": {"budget": 0.3}}}
    body = {"custom_params": {"mine": 1, "lsa": {"budget": 0.3}}}
    assert merged(body, {"policy": "quest", "budget": 0.3}) == {
        "custom_params": {"mine": 1, "lsa": {"policy": "quest", "budget": 0.3}}
    }
    assert body == {"custom_params": {"mine": 1, "lsa": {"budget": 0.3}}}
    with pytest.raises(ValueError, match=r"budget is 0\.3 in custom_params\.lsa and 0\.5 in X-LSA"):
        merged(body, {"budget": 0.5})
    for custom in ("x", {"lsa": 5}):
        with pytest.raises(ValueError, match="no object"):
            merged({"custom_params": custom}, {"budget": 0.5})


def test_watched_pages_as_text() -> None:
    def pages(watch: Any) -> tuple[int, ...]:
        return RequestOptions.parse({"lsa": {"watch": watch}}, LSAConfig()).watch

    assert pages("0,3,5") == pages([0, 3, 5]) == (0, 3, 5)
    assert pages("") == pages([]) == ()
    for wrong in ("a", "0,", "-1", "0;3", "٣", "99999999999"):
        with pytest.raises(ValueError, match="watch is"):
            pages(wrong)


# --- names of requests -----------------------------------------------------------------------------------------------


def named(*names: str) -> list[Any]:
    return [types.SimpleNamespace(rid=name) for name in names]


def ended(asked: str, requests: list[Any]) -> list[str]:
    """Which of them SGLang ends, by the comparison that it makes."""
    with rids.only(asked, requests):
        chosen = [request for request in requests if request.rid.startswith(asked)]
    return [request.rid for request in chosen]


def test_an_abort_means_one_request_and_its_samples() -> None:
    sample = "job-1_" + "0a" * 16
    requests = named("job-1", "job-10", "job-1_0", sample, sample + "0", "other", "a", "ab")
    assert ended("job-1", requests) == ["job-1", sample]
    assert ended("a", requests) == ["a"]
    assert ended("job", requests) == []
    assert [request.rid for request in requests][1] == "job-10", "names are put back"


def test_names_are_put_back_after_an_error() -> None:
    requests = named("x", "xy")
    with pytest.raises(RuntimeError), rids.only("x", requests):
        raise RuntimeError
    assert [request.rid for request in requests] == ["x", "xy"]


def test_a_task_ends_only_its_own_request() -> None:
    mine, other = object(), object()
    states = {"a": types.SimpleNamespace(lifecycle_id=other), "b_1": types.SimpleNamespace(lifecycle_id=mine)}
    assert rids.owned({"a": other}, states, {}) == ["a"]
    assert rids.owned({"a": mine, "gone": mine}, states, {}) == []
    assert rids.owned({"b": mine}, states, {"b": {"b_1"}}) == ["b"], "samples live on when their request is gone"


def test_intake_refuses_what_it_cannot_take() -> None:
    """An exception on arrival becomes the answer HTTP 400 of that request."""
    from sglang_lsa.patches.scheduler_handle_generate_request import handle

    sent: list[tuple[Any, Any]] = []
    channel = types.SimpleNamespace(send_output=lambda *what: sent.append(what))
    scheduler = types.SimpleNamespace(ipc_channels=types.SimpleNamespace(send_to_tokenizer=channel))
    arrived = types.SimpleNamespace(rid="a", http_worker_ipc=None)

    def fails(scheduler: Any, request: Any) -> None:
        raise TypeError("unhashable type: 'list'")

    handle(fails, scheduler, arrived)
    [(answer, to)] = sent
    assert to is arrived and answer.rid == "a"
    assert answer.finished_reason["status_code"] == 400 and "unhashable" in answer.finished_reason["message"]
    assert handle(lambda scheduler, request: "taken", scheduler, arrived) == "taken"


def test_typed_messages_carry_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """With SGLANG_USE_PICKLE_IPC=0, what passes can be read by the scheduler, and the rest is refused before."""
    from sglang.srt.managers import io_struct
    from sglang.srt.sampling.sampling_params import SamplingParams

    from sglang_lsa.patches.tokenizer_manager_create_tokenized_object import carried

    def made(custom_params: Any, **parameters: Any) -> Any:
        sampling = screened({"custom_params": custom_params, **parameters}).sampling_params
        return types.SimpleNamespace(sampling_params=SamplingParams(**sampling))

    every = {"policy": "quest", "budget": 0.3, "enabled": True, "prefill": "exact", "sets": "999:9:1,2", "record": 0}
    every |= {"dense_steps": 1, "prompt_lookup": 2, "widen": 2.0, "watch": [0, 3, 5], "target_coverage": 0.6}
    every |= {"max_budget": 0.2, "groups": False}
    assert set(every) == {field.name for field in dataclasses.fields(RequestOptions)}
    deep = made({"mine": {"a": [1]}})
    carried(deep)  # SGLang pickles: anything passes
    monkeypatch.setattr(io_struct, "_USE_PICKLE_IPC", False)
    carried(made({"lsa": every}, temperature=0.5, stop_token_ids=[5], logit_bias={"5": 1}))
    for wrong in (deep, made({"mine": 2**70}), made("text")):
        with pytest.raises(ValueError, match="cannot be passed on"):
            carried(wrong)
