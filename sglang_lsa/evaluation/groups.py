"""``sglang-lsa bench groups``: many questions about one document at the same time, answered from sets that requests
have for themselves, and from sets that groups of them read together."""

from __future__ import annotations

import asyncio
import datetime
import json
import pathlib
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from tqdm import tqdm

from sglang_lsa import streaming
from sglang_lsa.evaluation import groups_report
from sglang_lsa.evaluation.client import Endpoint, EndpointFailed
from sglang_lsa.evaluation.command import server
from sglang_lsa.evaluation.groups_documents import Document, make_documents
from sglang_lsa.evaluation.groups_report import FULL, SEPARATE
from sglang_lsa.evaluation.questions import Question
from sglang_lsa.evaluation.run import fingerprint
from sglang_lsa.evaluation.store import Store, key
from sglang_lsa.evaluation.union import what_was_read
from sglang_lsa.provenance import commit, hardware

ANSWERS = "group-answers.jsonl"
MOST_QUESTIONS = 60
"""About one document: the server remembers 64 requests that finished, and each is looked at when all have."""


@dataclass(frozen=True)
class Arm:
    """How the questions about a document are answered.

    Attributes:
        name: in the results.
        margin: ``group_margin`` of the server; None for one without groups.
    """

    name: str
    margin: float | None = None

    @property
    def server_config(self) -> str:
        """``--lsa-config`` of its server."""
        return json.dumps({"groups": self.margin is not None} | ({"group_margin": self.margin} if self.margin else {}))


def arms_of(margins: Sequence[float]) -> list[Arm]:
    """Full attention and separate sets, which one server can answer with, and grouped ones, each with a server.

    Raises:
        ValueError: a margin is out of range.
    """
    for margin in margins:
        if not 0 <= margin < 1:
            raise ValueError(f"--margins {margin} is out of range: use shares of a score in [0, 1)")
    grouped = [Arm(f"grouped {margin:g}" if margin else "grouped", margin) for margin in dict.fromkeys(margins)]
    return [Arm(FULL), Arm(SEPARATE), *grouped]


@dataclass(frozen=True)
class Asking:
    """What answers depend on, beside the questions and the arm.

    Attributes:
        model: its name in the results.
        policy, budget: of separate and grouped sets.
    """

    model: str
    policy: str
    budget: float
    indexer: str | None
    server_args: str

    def about(self, document: Document, arm: Arm) -> dict[str, Any]:
        """What is known of a round before it is asked."""
        full = arm.name == FULL
        return {
            "model": self.model,
            "kind": document.kind,
            "length": document.length,
            "document": document.number,
            "questions": len(document.questions),
            "arm": arm.name,
            "policy": FULL if full else self.policy,
            "budget": 1.0 if full else self.budget,
            "indexer": None if full else self.indexer,
            "server_args": self.server_args,
        }

    def key(self, document: Document, arm: Arm) -> str:
        indexer = None if arm.name == FULL else fingerprint(self.indexer)
        return key("groups", self.about(document, arm), arm.server_config, indexer, self.server_args, document.digest)

    def options(self, arm: Arm) -> dict[str, Any]:
        """``custom_params.lsa`` of the requests."""
        return {"enabled": False} if arm.name == FULL else {"policy": self.policy, "budget": self.budget}


def run(
    output: pathlib.Path,
    console: Console,
    *,
    model: str,
    name: str,
    indexer: str | None,
    kinds: Sequence[str],
    lengths: Sequence[int],
    documents: int,
    questions: int,
    budget: float,
    margins: Sequence[float],
    texts: pathlib.Path | None,
    server_args: str,
    command: str,
) -> list[dict[str, Any]]:
    """Ask what ``group-answers.jsonl`` in ``output`` has not, and write ``group-quality.json`` and ``.md``.

    Args:
        model: path or hub name.
        name: of the model, in the results.
        indexer: whose sets are read; None takes Quest's.
        kinds: of ``suites.together``.
        documents: of each kind and length.
        questions: about each document, all at the same time.
        texts: folder of running text; None takes the speeches that come with the package.

    Returns:
        Rows of ``group-quality.json``.

    Raises:
        ValueError: documents cannot be made as asked.
        RuntimeError: a server or a request failed; what was answered before is kept.
    """
    if not 2 <= questions <= MOST_QUESTIONS:
        raise ValueError(f"--questions {questions} is out of range: use 2 to {MOST_QUESTIONS}")
    if documents < 1:
        raise ValueError(f"--documents {documents} is too small: use 1 or more")
    if not 0 < budget <= 1:
        raise ValueError(f"--budget {budget} is out of range: use a share of a context's pages in (0, 1]")
    if "--lsa-config" in server_args:
        raise ValueError("--server-args has --lsa-config, which each arm has its own of: give flags instead")
    arms = arms_of(margins)
    asking = Asking(name, "indexer" if indexer else "quest", budget, indexer, server_args)
    store = Store(output / ANSWERS)
    tokenizer = _tokenizer(model)
    asked = make_documents(tokenizer, kinds, lengths, documents, questions, texts)
    about = {"command": command, "hardware": hardware(), "commit": commit(), "date": str(datetime.date.today())}
    for config in dict.fromkeys(arm.server_config for arm in arms):
        own = [arm for arm in arms if arm.server_config == config]
        left = [(each, arm) for each in asked for arm in own if asking.key(each, arm) not in store.rows]
        if not left:
            continue
        console.print(f"{', '.join(arm.name for arm in own)}: {len(left)} rounds of {questions} questions")
        flags = f"{server_args} --lsa-config {shlex.quote(config)}"
        with server(None, model, indexer, flags) as url:
            asyncio.run(_ask_all(url, tokenizer, asking, left, store, about))
    # Of a document that was asked about twice, say with other weights of an indexer, the round of this run counts.
    now = {asking.key(document, arm) for document in asked for arm in arms}
    found = groups_report.summarise(sorted(store.rows.values(), key=lambda row: row["key"] in now))
    written = groups_report.write(output, found)
    console.print(groups_report.table([row for row in found if row["model"] == name]))
    return written


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 1 << 40
    return tokenizer


async def _ask_all(
    url: str,
    tokenizer: Any,
    asking: Asking,
    left: Sequence[tuple[Document, Arm]],
    store: Store,
    about: dict[str, Any],
) -> None:
    async with streaming.session(silence=3600) as http:
        endpoint = Endpoint(http, url)
        state, status = (await endpoint.get("/server_info"))["internal_states"][0], await _status(endpoint)
        for document in dict.fromkeys(document for document, _ in left):
            document.check(state["effective_max_running_requests_per_dp"], status["physical"]["pages"])
        for document, arm in tqdm(left, desc="rounds"):
            found = await ask(endpoint, tokenizer, document, asking.options(arm))
            known = {"key": asking.key(document, arm), **asking.about(document, arm)}
            store.add(known | found | about)


async def ask(server: Endpoint, tokenizer: Any, document: Document, options: dict[str, Any]) -> dict[str, Any]:
    """Bring a document into the radix tree, then send all questions about it at once; greedy.

    Every request decodes as long as the others, so that what is read is that of all of them in every step. Its answer
    is what it says before it would have ended. No other round finds this document's pages in the tree.

    Returns:
        ``answers``, one a question, and what they read.

    Raises:
        EndpointFailed: the server refused, or does not know what it answered.
    """
    this = f"{document.questions[0].sample.name}-{time.monotonic_ns()}"
    body: dict[str, Any] = {"extra_key": this, "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
    await server.post("/generate", body | {"input_ids": list(document.common), "rid": f"{this}-document"})
    before = await _status(server)
    rids = [f"{this}-{question.turn}" for question in document.questions]
    parameters = {"temperature": 0, "ignore_eos": True, "custom_params": {"lsa": options}}
    body |= {
        "rid": rids,
        "input_ids": [list(question.ids) for question in document.questions],
        "sampling_params": [parameters | {"max_new_tokens": q.asked.new_tokens} for q in document.questions],
    }
    began = time.perf_counter()
    given = await server.post("/generate", body)
    seconds = time.perf_counter() - began
    after = await _status(server)
    answers = []
    for question, rid, answer in zip(document.questions, rids, given, strict=True):
        if (entry := await server.finished(rid)) is None:
            raise EndpointFailed(f"{server.url} does not know {rid}, which just finished: see its log")
        answers.append(_answer(question, tokenizer, answer, entry))
    return {"seconds": seconds, **what_was_read(answers, len(document.common), before, after), "answers": answers}


async def _status(server: Endpoint) -> dict[str, Any]:
    if (status := await server.status()) is None:
        raise EndpointFailed(f"{server.url} has no /lsa/status: see its log")
    return status


def _answer(question: Question, tokenizer: Any, given: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    ids, ends = given["output_ids"], set(tokenizer.all_special_ids)
    said = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return {
        "turn": question.turn,
        "answer": tokenizer.decode(ids[:said]),
        "said_tokens": said,
        "references": list(question.asked.references),
        "metric": question.asked.metric,
        "evidence": list(question.evidence),
        "prompt_tokens": len(question.ids),
        "cached_tokens": given["meta_info"]["cached_tokens"],
        "new_tokens": len(ids),
        **{name: entry[name] for name in ("sets", "stalls", "shrunk")},
    }
