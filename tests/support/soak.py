"""A soak: many clients, tiny pools, aborts, disconnects, flushes, priorities, retractions, several answers to one
prompt, ids that are used again, other configurations, wrong options; then every answer is checked on the idle server.

    python tests/support/soak.py --requests 3000            # starts its own server; `make test` runs a short one

Each finished request left in the server's status which pages its decode steps read, and when. An idle server that is
told to read the same pages must say the same, token for token, whatever was going on around the request: evictions,
recalls, streamed prompts, shrunk sets, retractions. Weights are float32, so that the company in which a request was
computed does not decide between two tokens.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import pathlib
import random
import sys
import tempfile
import threading
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from soak_more import WrongOptions, change_configuration, retract_all, several_answers, use_an_id_again
from tqdm import tqdm

from sglang_lsa.client import get_requests
from sglang_lsa.serve.control import CHANGEABLE
from sglang_lsa.server_process import LSA, ServerProcess

VOCABULARY = (1000, 40_000)
CLIENTS = 16
TOLERANCE = 2e-3
"""Of a token's logarithmic probability, in float32."""
FLAGS = ["--dtype", "float32", "--skip-server-warmup", "--enable-metrics", "--chunked-prefill-size", "512"]
FLAGS += ["--json-model-override-args", '{"num_hidden_layers": 6}', "--enable-priority-scheduling"]
"""The first six layers of the embedded model."""
KINDS = {"ask": 66, "abort": 7, "disconnect": 7, "flush": 3, "bad": 3, "many": 6, "again": 4, "config": 4}
"""What a client does, by how often."""
RETRACT_EVERY = 40
"""Requests, at one of which all that run lose their places."""
PRIORITIES = (0, 0, 100)
LSA_CONFIG = {"device_tokens": 2048, "host_memory_gb": 0.12, "min_context": 512, "window": 16, "floor_tokens": 512}
"""32 pages on the device, 221 on the host; a chunk takes 8."""
NARROW = ["--lsa-config", '{"floor_tokens": 512}']
"""Sets of 8 pages where the budget is no more: contexts of tests are short, and are to be pruned all the same."""

Tokens = list[tuple[int, float]]
"""An answer: tokens and their logarithmic probabilities."""


@dataclass(frozen=True)
class Question:
    """A prompt, what it asks for, and how many tokens it wants."""

    prompt: tuple[int, ...]
    options: tuple[tuple[str, object], ...]
    tokens: int
    priority: int = 0


@dataclass
class Admission:
    """One stay of a request on the server; a retracted one has several."""

    prompt_tokens: int
    sets: str
    shrunk: int
    stalls: int
    prefill: str


@dataclass
class Outcome:
    question: Question
    rid: str
    kind: str
    answer: Tokens = field(default_factory=list)
    stays: list[Admission] = field(default_factory=list)
    ended: str = ""


def questions(rng: random.Random, count: int) -> list[Question]:
    """Short and long prompts, most of them over one of three shared texts, with options of all kinds."""

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(*VOCABULARY) for _ in range(length))

    shared = [ids(200), ids(700), ids(1500)]
    made = []
    for number in range(count):
        own = ids(rng.choice((20, 60, 150)))
        alone = number % 5 == 0
        prompt = (ids(rng.choice((0, 0, 100, 600, 2500))) if alone else rng.choice(shared)) + own
        choices: list[dict[str, object]] = [{}, {}, {"budget": 0.4}, {"policy": "random"}, {"policy": "recency"}]
        if len(prompt) < 1000:
            choices += [{"enabled": False}] * 3
        tokens = rng.choice((8, 24, 80, 300 if len(prompt) < 400 else 150))
        options = tuple(rng.choice(choices).items())
        made.append(Question(prompt, options, tokens, priority=rng.choice(PRIORITIES)))
    return made


def body(question: Question, rid: str | None = None, **more: object) -> dict:
    options = dict(question.options) | more
    parameters: dict[str, object] = {"temperature": 0, "max_new_tokens": question.tokens, "ignore_eos": True}
    if options:
        parameters["custom_params"] = {"lsa": options}
    named = {"rid": rid} if rid else {}
    return {
        "input_ids": list(question.prompt),
        "sampling_params": parameters,
        "return_logprob": True,
        "priority": question.priority,
        **named,
    }


def tokens_of(answer: dict) -> Tokens:
    return [(token, chance) for chance, token, _ in answer["meta_info"]["output_token_logprobs"]]


class Soak:
    """Sends requests, gathers what became of them, and checks them.

    Args:
        server: started with :data:`FLAGS` and :data:`LSA_CONFIG`.
        seed: everything random comes from it, but for the order in which clients are served.
    """

    def __init__(self, server: ServerProcess, seed: int = 0, distinct: int = 40):
        self.server, self.rng = server, random.Random(seed)
        self.questions = questions(self.rng, distinct)
        self.finished: dict[str, dict[int, Admission]] = collections.defaultdict(dict)
        self.lock = threading.Lock()
        self.siblings: list[Outcome] = []
        """Answers beside the first, of requests that wanted several."""

    def run(self, count: int) -> list[Outcome]:
        """Ask ``count`` questions with :data:`CLIENTS` clients at a time."""
        kinds, weights = list(KINDS), list(KINDS.values())
        plan = [
            (i, self.rng.choice(self.questions), self.rng.choices(kinds, weights)[0], self.rng.random())
            for i in range(count)
        ]
        before = self.server.get("/lsa/status")["config"]
        with ThreadPoolExecutor(CLIENTS) as clients, WrongOptions(self.server, self.rng.randrange(2**32)) as wrong:
            outcomes = list(tqdm(clients.map(lambda work: self._one(*work), plan), total=count, desc="soak"))
        assert set(wrong.answers) <= {400, 422}, wrong.answers
        self.server.post("/lsa/config", {name: before[name] for name in CHANGEABLE})
        outcomes += self.siblings
        self._remember()
        for outcome in outcomes:
            outcome.stays = list(self.finished[outcome.rid].values())
        return outcomes

    def _one(self, number: int, question: Question, kind: str, chance: float) -> Outcome:
        outcome = Outcome(question, f"soak-{number:05}-{kind}", kind)
        if number % RETRACT_EVERY == RETRACT_EVERY // 2:
            retract_all(self)
        if kind == "flush":
            outcome.ended = self._post_quietly("/flush_cache", {})
        elif kind == "bad":
            try:
                self.server.post("/generate", body(question, outcome.rid, budget=1 + chance))
                outcome.ended = "accepted"
            except urllib.error.HTTPError as error:
                outcome.ended = f"refused {error.code}"
        elif kind == "disconnect":
            outcome.ended = self._hang_up(question, outcome.rid, int(chance * 3000))
        elif kind == "config":
            outcome.ended = change_configuration(self, chance)
        elif kind == "again":
            other = self.questions[number % len(self.questions)]
            outcome.ended = use_an_id_again(
                self, number, chance, lambda rid, size: self._hang_up(question, rid, size), lambda rid: body(other, rid)
            )
        elif kind == "many":
            self._many(outcome)
        else:
            outcome.ended = "answered"
            aborter = threading.Timer(chance * 2, self._post_quietly, ("/abort_request", {"rid": outcome.rid}))
            if kind == "abort":
                aborter.start()
            try:
                answer = self.server.post("/generate", body(question, outcome.rid))
                outcome.answer = tokens_of(answer)
                if answer["meta_info"]["finish_reason"]["type"] == "abort":
                    outcome.ended = "aborted"
            except urllib.error.HTTPError as error:
                outcome.ended = "aborted" if kind == "abort" else f"HTTP {error.code}: {error.read()[:300]!r}"
            aborter.cancel()
        if number % 8 == 0:
            self._remember()
        return outcome

    def _many(self, outcome: Outcome) -> None:
        """The children of a request that wants several answers are outcomes of their own."""
        children = several_answers(self, body(outcome.question))
        for place, child in enumerate(children):
            found = Outcome(outcome.question, child["meta_info"]["id"], "many", tokens_of(child), ended="answered")
            if place:
                with self.lock:
                    self.siblings.append(found)
            else:
                vars(outcome).update(vars(found))

    def _remember(self) -> None:
        """The server shows its last 64 finished requests: take note of them before others take their place."""
        for entry in get_requests(self.server.url)["finished"]:
            with self.lock:
                known = entry["number"] in self.finished[entry["rid"]]
            if not known:
                self._remember_one(entry["rid"])

    def _remember_one(self, rid: str) -> None:
        for entry in get_requests(self.server.url, rid)["finished"]:
            stay = Admission(*(entry[name] for name in ("prompt_tokens", "sets", "shrunk", "stalls", "prefill")))
            with self.lock:
                self.finished[rid][entry["number"]] = stay

    def _post_quietly(self, path: str, content: dict) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=600)
        connection.request("POST", path, json.dumps(content), {"Content-Type": "application/json"})
        status = connection.getresponse().status
        connection.close()
        return f"HTTP {status}"

    def _hang_up(self, question: Question, rid: str, after_bytes: int) -> str:
        """Read a little of a stream and close the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=600)
        content = body(question, rid) | {"stream": True}
        connection.request("POST", "/generate", json.dumps(content), {"Content-Type": "application/json"})
        connection.getresponse().read(after_bytes)
        connection.close()
        return "cut"

    # -- afterwards, on the idle server --------------------------------------------------------------------------

    def check(self, outcomes: list[Outcome]) -> dict[str, int]:
        """Every answer equals the one of the idle server that reads the same pages.

        Returns:
            Counts of what was seen.

        Raises:
            AssertionError: an answer is missing, or another.
        """
        expected = {
            "bad": {"refused 400"},
            "flush": {"HTTP 200", "HTTP 400"},
            "disconnect": {"cut"},
            "ask": {"answered"},
            "abort": {"answered", "aborted"},
            "config": {"changed"},
            "many": {"answered"},
            "again": {"again answered", "again aborted", "again refused"},
        }
        replays: dict[tuple, Tokens] = {}
        seen: collections.Counter[str] = collections.Counter()
        for outcome in tqdm(outcomes, desc="replay"):
            assert outcome.ended in expected[outcome.kind], f"{outcome.rid}: {outcome.ended}"
            seen[outcome.ended] += 1
            if outcome.ended == "answered":
                assert len(outcome.answer) == outcome.question.tokens, f"{outcome.rid}: {len(outcome.answer)} tokens"
                self._check_one(outcome, replays, seen)
        seen["replays"] = len(replays)
        return dict(seen)

    def _check_one(self, outcome: Outcome, replays: dict[tuple, Tokens], seen: collections.Counter[str]) -> None:
        question, stays = outcome.question, outcome.stays
        assert stays, f"{outcome.rid} is not among the finished requests"
        assert stays[0].prompt_tokens == len(question.prompt)
        seen["retracted"] += len(stays) > 1
        seen["shrunk"] += any(stay.shrunk for stay in stays)
        seen["stalled"] += any(stay.stalls for stay in stays)
        seen["streamed"] += any(stay.prefill == "streamed" for stay in stays)
        generated = [token for token, _ in outcome.answer]
        starts = [stay.prompt_tokens - len(question.prompt) for stay in stays]
        for start, end, stay in zip(starts, [*starts[1:], question.tokens], stays, strict=True):
            if end > start:
                again = Question((*question.prompt, *generated[:start]), (), end - start)
                key = (again.prompt, stay.sets)
                if key not in replays or len(replays[key]) < again.tokens:
                    options = {"sets": stay.sets} if stay.sets else read_all(again)
                    replays[key] = tokens_of(self.server.post("/generate", body(again, **options)))
                same(replays[key][: end - start], outcome.answer[start:end], f"{outcome.rid} from token {start} on")


def read_all(question: Question) -> dict[str, object]:
    """Options of a stay in which no set was read; where the prompt is too long for that, it was all that was read."""
    return {"enabled": False} if len(question.prompt) < 1900 else {}


def same(expected: Tokens, seen: Tokens, what: str) -> None:
    """Raise AssertionError unless both are the same tokens with the same probabilities."""
    assert [token for token, _ in seen] == [token for token, _ in expected], f"{what}: other tokens"
    apart = np.abs(np.array([chance for _, chance in seen]) - np.array([chance for _, chance in expected]))
    assert apart.max() < TOLERANCE, f"{what}: probabilities differ by {apart.max():.5f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Soak a server of its own and check every answer.")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from serving import assert_idle, flush

    from sglang_lsa.embedded_model import embedded_model_path

    with tempfile.TemporaryDirectory() as folder:
        log, config = pathlib.Path(folder) / "server.log", pathlib.Path(folder) / "lsa.json"
        config.write_text(json.dumps({**LSA_CONFIG, "debug": True}))
        flags = ["--model-path", str(embedded_model_path()), *FLAGS, "--lsa-config", str(config)]
        with ServerProcess(LSA, flags, log) as server:
            server.wait_until_ready()
            soak = Soak(server, args.seed)
            try:
                outcomes = soak.run(args.requests)
                assert_idle(server)
                status = server.get("/lsa/status")
                print(json.dumps({name: status[name] for name in ("prefill", "pressure", "failures", "evictions")}))
                print(json.dumps(soak.check(outcomes)))
                flush(server)
            except BaseException:
                print(server.log_tail(60), file=sys.stderr)
                raise


if __name__ == "__main__":
    main()
