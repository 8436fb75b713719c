"""What ends stock SGLang is refused or made to work, nothing that it answers is, and a name means one request."""

from __future__ import annotations

import http.client
import json
import pathlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fuzz import Fuzz
from release import HERE
from serving import assert_idle, finished_request, generate
from soak import FLAGS, LSA_CONFIG

from sglang_lsa.server_process import LSA, ServerProcess
from sglang_lsa.streaming import event_of

pytestmark = pytest.mark.server

Body = dict[str, Any] | list[Any]
HI = [{"role": "user", "content": "Hello"}]


def ask(
    server: ServerProcess, path: str, body: Body, headers: dict[str, str] | None = None, text: bytes | None = None
) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    content = json.dumps(body).encode() if text is None else text
    connection.request("POST", path, content, {"Content-Type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    status, said = answer.status, answer.read().decode(errors="replace")
    connection.close()
    return status, said


def plain(**fields: Any) -> dict[str, Any]:
    return {"text": "Hello", "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}} | fields


def sampling(**parameters: Any) -> dict[str, Any]:
    return {"text": "Hello", "sampling_params": {"max_new_tokens": 3, **parameters}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "smollm2", "messages": HI, "max_tokens": 3} | fields


G, CHAT, COMPLETION, RESPONSES = "/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses"
REFUSED: dict[str, tuple[str, Body, str]] = {
    "top_logprobs_beyond_the_vocabulary": (G, plain(return_logprob=True, top_logprobs_num=60_000), "49152 tokens"),
    "top_logprobs_of_a_chat": (CHAT, chat(logprobs=True, top_logprobs=10**6), "49152 tokens"),
    "logprobs_of_a_completion": (COMPLETION, {"model": "m", "prompt": "Hi", "logprobs": 10**6}, "49152 tokens"),
    "logprobs_before_the_start": (G, plain(return_logprob=True, logprob_start_len=-2), "use -1"),
    "embeddings_in_float32": (G, {"input_embeds": [[0.1] * 576] * 3}, "--dtype bfloat16"),
    "stop_regex": (G, sampling(stop_regex="("), "use a regular expression that compiles"),
    "regex": (G, sampling(regex="("), "regex"),
    "top_k": (G, sampling(top_k=2**31), "use -1 for all"),
    "logit_bias_beyond_float32": (G, sampling(logit_bias={"5": 1e39}), "float32"),
    "penalty_of_nothing": (G, sampling(repetition_penalty=1e-300), "use a number from 1e-35 on"),
    "logit_bias_text": (G, sampling(logit_bias={"5": "a"}), "float32"),
    "schema_as_an_object": (G, sampling(json_schema={"type": "object"}), "use a text"),
    "stream_interval": (G, sampling(stream_interval="a") | {"stream": True}, "use a finite number"),
    "fraction_of_a_token": (G, sampling(max_new_tokens=2.5), "use a whole number of tokens"),
    "temperature_text": (G, sampling(temperature="hot"), "use a finite number"),
    "unknown_parameter": (G, sampling(temprature=1), "'temprature': use max_new_tokens"),
    "samples_text": (G, sampling(n="2"), "use a whole number"),
    "samples_beyond_memory": (G, sampling(n=10**9), "use a whole number"),
    "session": (G, plain(session_params={"id": [1]}), "session_params.id"),
    "overrides": (G, plain(positional_embed_overrides={"embeds": [1]}), "cannot be given in JSON"),
    "empty_name": (G, plain(rid=""), "at least one character"),
    "empty_row": (G, {"input_ids": [[], [5]], "sampling_params": {"max_new_tokens": 2}}, "at least one"),
    "responses_without_input": (RESPONSES, {"model": "smollm2", "input": []}, "cannot be read"),
    "adapter": (G, plain(lora_path="x"), "LoRA"),
    "shorter_list": (G, {"text": ["a", "b"], "return_logprob": [True]}, "cannot be read"),
    "parameters_empty_list": (G, {"text": ["a", "b"], "sampling_params": []}, "cannot be read"),
    "chat_an_array": (CHAT, [1, 2], ""),
    "chat_format_a_number": (CHAT, chat(response_format=5), "cannot be read"),
    "chat_template_arguments": (CHAT, chat(chat_template_kwargs={"conversation": 5}), ""),
}
ANSWERED: dict[str, tuple[str, Body]] = {
    "bootstrap_of_another_kind_of_server": (
        G,
        {"input_ids": [100] * 1700, "bootstrap_host": "2.2.2.2", "sampling_params": {"max_new_tokens": 2}},
    ),
    "stop_ids_beyond_the_vocabulary": (G, sampling(stop_token_ids=[10**6, -1], min_new_tokens=2)),
    "numbers_as_flags": (G, sampling(skip_special_tokens=0, ignore_eos=1)),
    "internal_fields": (G, sampling(is_normalized=True, temperature=0, stop_str_max_len="x")),
    "whole_float": (G, sampling(max_new_tokens=2.0)),
    "samples_null": (G, sampling(n=None)),
    "every_token_of_the_vocabulary": (G, plain(return_logprob=True, top_logprobs_num=49_152)),
    "lists_of_one": (G, plain(return_logprob=[True], logprob_start_len=[0], top_logprobs_num=[2])),
    "key_in_a_list_of_one": (G, plain(extra_key=["a"])),
    "logprob_fields_without_logprobs": (G, plain(top_logprobs_num=10**6, logprob_start_len=-5)),
    "extremes": (G, sampling(temperature=1e39, top_p=1e-300, top_k=2**31 - 1, min_p=1, stream_interval=-1)),
    "banned_token": (G, sampling(logit_bias={"5": -3e38})),
    "huge_temperature": (G, sampling(temperature=10**30)),
    "another_way_back": (G, plain(http_worker_ipc="ipc:///nowhere")),
    "later_than_now": (G, plain(received_time=1e308)),
    "schema": (G, sampling(json_schema='{"type": "integer"}')),
    "delimiters": (
        G,
        {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 0}, "multi_item_delimiter_indices": [900]},
    ),
    "no_prompts": (G, {"text": []}),
    "stop_patterns": (CHAT, chat(stop_regex=["a+", "[0-9]"], stop=["x", ""], seed=-1)),
}
ITS_OWN_WORDS = {
    "logit_bias_text": "expected f64",
    "schema_as_an_object": "expected a string",
    "stream_interval": "expected i64",
    "fraction_of_a_token": "expected i64",
    "temperature_text": "expected f64",
    "unknown_parameter": "unknown field `temprature`",
    "samples_text": "expected i64",
    "responses_without_input": "empty conversation",
    "numbers_as_flags": "expected a boolean",
    "internal_fields": "unknown field",
    "whole_float": "expected i64",
    "key_in_a_list_of_one": "extra_key should be a string",
}
"""Of 0.5.23, which compares a body of ``/generate`` with a schema first, and so refuses what 0.5.17 takes."""
if HERE != "0.5.17":
    for name, words in ITS_OWN_WORDS.items():
        REFUSED[name] = (*(ANSWERED.pop(name, None) or REFUSED[name][:2]), words)


@pytest.mark.parametrize(("path", "body", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_and_alive(small: ServerProcess, path: str, body: Body, words: str) -> None:
    status, said = ask(small, path, body)
    if status == 200 and isinstance(body, dict) and body.get("stream"):
        assert '"code":400' in said.replace(" ", ""), said
    else:
        assert status == 400, said
    assert words in said
    assert generate(small, "Hello", tokens=2)["meta_info"]["completion_tokens"] == 2


@pytest.mark.parametrize(("path", "body"), ANSWERED.values(), ids=ANSWERED.keys())
def test_answered(small: ServerProcess, path: str, body: Body) -> None:
    status, said = ask(small, path, body)
    assert status == 200, said
    assert generate(small, "Hello", tokens=2)["meta_info"]["completion_tokens"] == 2


def test_half_a_surrogate_pair(small: ServerProcess) -> None:
    for field in (b'"rid": "\\ud800"', b'"sampling_params": {"stop": ["\\ud800"]}', b'"text": "\\ud800"'):
        status, said = ask(small, G, {}, text=b'{"text": "Hello", ' + field + b"}")
        assert status == 400, said


def test_token_ids_logprob_in_company(small: ServerProcess) -> None:
    """Tokens are decoded together, for some of which logprobs of given ids are asked."""
    bodies = [plain(input_ids=[100 + number], text=None) for number in range(4)]
    for number, body in enumerate(bodies):
        body["sampling_params"]["max_new_tokens"] = 40
        if number % 2:
            body |= {"return_logprob": True, "token_ids_logprob": [5, 6, 7]}
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(lambda body: small.post(G, body), bodies))
    for answer in answers[1::2]:
        given = answer["meta_info"]["output_token_ids_logprobs"]
        assert len(given) == 40 and [token for _, token, _ in given[-1]] == [5, 6, 7]


# --- names of requests -----------------------------------------------------------------------------------------------


class Stream:
    """A request that streams; its events are read by a thread."""

    def __init__(self, server: ServerProcess, rid: str, tokens: int = 120, **parameters: Any):
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
        body = plain(rid=rid, stream=True)
        body["sampling_params"] |= {"max_new_tokens": tokens, **parameters}
        self.connection.request("POST", G, json.dumps(body), {"Content-Type": "application/json"})
        self.answer = self.connection.getresponse()
        self.reasons: list[Any] = []
        self.started = threading.Event()
        self.thread = threading.Thread(target=self._read)
        self.thread.start()
        assert self.started.wait(60)

    def _read(self) -> None:
        try:
            while line := self.answer.readline():
                if (event := event_of(line)) is not None:
                    reason = event.get("error") or event["meta_info"]["finish_reason"]
                    self.reasons += [reason] if reason else []
                self.started.set()
        except (OSError, ValueError, AttributeError, http.client.HTTPException):
            pass  # hung up
        self.started.set()

    def hang_up(self) -> None:
        self.connection.sock.shutdown(2)
        self.thread.join(60)

    def reason(self) -> str:
        """How it ended."""
        self.thread.join(120)
        return str(self.reasons[-1]["type"])


@pytest.mark.parametrize(("how", "tokens"), [("abort", 150), ("hang_up", 250)], ids=["abort", "hang_up"])
def test_an_abort_ends_one_request(small: ServerProcess, how: str, tokens: int) -> None:
    """Stock ends every request whose name begins with the given one; of a connection that is gone it knows after two
    seconds."""
    first, *others = [Stream(small, rid, tokens=tokens) for rid in ("job-1", "job-10", "job-1_0")]
    if how == "abort":
        assert ask(small, "/abort_request", {"rid": "job-1"})[0] == 200
        assert first.reason() == "abort"
    else:
        first.hang_up()
    assert [other.reason() for other in others] == ["length", "length"]


@pytest.mark.skipif(HERE != "0.5.17", reason="an abort by name does nothing there: samples have other names")
def test_an_abort_ends_all_samples(small: ServerProcess) -> None:
    stream = Stream(small, "samples", tokens=2000, n=2)
    assert ask(small, "/abort_request", {"rid": "samples"})[0] == 200
    stream.thread.join(120)
    assert [reason["type"] for reason in stream.reasons] == ["abort", "abort"]


def test_a_refused_stream_does_not_end_the_first(small: ServerProcess) -> None:
    """Stock's task that follows every stream aborts its name, also if another request has it."""
    first = Stream(small, "mine", tokens=2000)
    _, said = ask(small, G, plain(rid="mine", stream=True))  # and two seconds later, its task runs
    assert "Duplicate request ID" in said
    time.sleep(3)
    assert not first.reasons, "the first one still runs"
    assert ask(small, "/abort_request", {"rid": "mine"})[0] == 200
    assert first.reason() == "abort"


# --- the header ------------------------------------------------------------------------------------------------------

PROTOCOLS: dict[str, dict[str, Any]] = {
    G: plain(),
    COMPLETION: {"model": "smollm2", "prompt": "Hello", "max_tokens": 3},
    CHAT: chat(),
    RESPONSES: {"model": "smollm2", "input": "Hello", "max_output_tokens": 5},
    "/v1/messages": chat(),
    "/api/generate": {"model": "smollm2", "prompt": "Hello", "stream": False, "options": {"num_predict": 3}},
}


@pytest.mark.parametrize("path", PROTOCOLS)
def test_header(small: ServerProcess, path: str) -> None:
    """Checked like the body, whatever the protocol."""
    assert ask(small, path, PROTOCOLS[path], {"X-LSA": "budget=0.3,policy=recency"})[0] == 200
    status, said = ask(small, path, PROTOCOLS[path], {"X-LSA": "budget=9"})
    assert (status, "budget 9 is out of range" in said) == (400, True), said
    status, said = ask(small, path, PROTOCOLS[path], {"X-LSA": "buget=0.3"})
    assert (status, "X-LSA has 'buget'" in said) == (400, True), said


def test_header_is_obeyed(small: ServerProcess) -> None:
    """A long prompt of a protocol without custom_params, as its finished request says."""
    body = PROTOCOLS[RESPONSES] | {
        "input": "one two three four " * 300,
        "max_output_tokens": 8,
        "request_id": "resp_obeyed",
    }
    assert ask(small, RESPONSES, body, {"X-LSA": "policy=recency,budget=0.4,watch=0,3"})[0] == 200
    entry = finished_request(small, "resp_obeyed")
    assert (entry["policy"], entry["budget"]) == ("recency", 0.4)
    assert [page for page, *_ in entry["watched"][0]["pages"]] == [0, 3]


@pytest.mark.parametrize("path", [RESPONSES, "/v1/messages", "/api/generate", "/api/chat"])
def test_options_are_never_dropped(small: ServerProcess, path: str) -> None:
    body = PROTOCOLS.get(path, {"model": "smollm2", "messages": HI})
    status, said = ask(small, path, body | {"custom_params": {"lsa": {"budget": 0.3}}})
    assert status == 400 and "send the header X-LSA" in said, said


# --- messages of declared types --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def typed(model_path: str, logs: pathlib.Path) -> Iterator[ServerProcess]:
    """With SGLang's typed messages, the default of a later SGLang."""
    config = logs / "typed.json"
    config.write_text(json.dumps({**LSA_CONFIG, "debug": True}))
    flags = ["--model-path", model_path, *FLAGS, "--lsa-config", str(config)]
    with ServerProcess(LSA, flags, logs / "typed.log", {"SGLANG_USE_PICKLE_IPC": "0"}) as server:
        yield server.wait_until_ready()


@pytest.mark.slow
def test_typed_messages(typed: ServerProcess) -> None:
    """Every option passes, what no message can carry is refused, and the fuzz finds no end of it either."""
    options = {"watch": [0, 3], "budget": 0.4, "policy": "recency", "dense_steps": 0, "enabled": True}
    body = plain(input_ids=[100] * 900, text=None, rid="typed")
    body["sampling_params"]["custom_params"] = {"lsa": options, "mine": [1, "a", None]}
    assert ask(typed, G, body)[0] == 200
    entry = finished_request(typed, "typed")
    assert [page for page, *_ in entry["watched"][0]["pages"]] == [0, 3]
    status, said = ask(typed, G, sampling(custom_params={"mine": {"deep": [1]}}))
    assert status == 400 and "cannot be passed on" in said, said
    Fuzz(typed, seed=1).run(range(100))
    assert_idle(typed)


def test_fuzz(small: ServerProcess) -> None:
    """A slice of what ``python tests/support/fuzz.py`` sends; the configuration stays as other tests want it."""
    Fuzz(small, seed=2, settings=False).run(range(250))
