"""Puts every question to every arm, and keeps what came back."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from sglang_lsa import streaming
from sglang_lsa.config import MOST_WATCHED
from sglang_lsa.evaluation.analysis import evidence_kept
from sglang_lsa.evaluation.arms import FULL, Arm, asked_of
from sglang_lsa.evaluation.client import Endpoint, EndpointFailed
from sglang_lsa.evaluation.divergence import TOP, along, reference_of
from sglang_lsa.evaluation.footprint import footprint
from sglang_lsa.evaluation.metrics import METRICS
from sglang_lsa.evaluation.questions import Question
from sglang_lsa.evaluation.store import Store, key
from sglang_lsa.indexer.checkpoint import checkpoint_folder

UNSEEN = ("debug", "record", "host_memory_gb")
"""Parts of a server's LSA configuration that change no answer."""
IN_FLIGHT = 24
"""Requests to our server at a time: it remembers few that finished, and each is looked at after it did."""
SERVER = ("dtype", "quantization", "attention_backend", "kv_cache_dtype")
"""Arguments of SGLang's that do."""


class Evaluation:
    """One server of ours, whose arms are options of a request, and any others to compare it with.

    Args:
        model: its name in the results.
        others: endpoints that are arms themselves, by name; they get the prompt and nothing else.
        references: answers of full attention that others are compared along, see ``divergence``; None compares none.
        together: samples at a time. Of one sample, one turn follows the other. Of one question, full attention goes
            first and brings the context into the radix tree; the other arms follow at the same time.
    """

    def __init__(
        self,
        model: str,
        server: Endpoint,
        arms: Sequence[Arm],
        store: Store,
        others: dict[str, Endpoint] | None = None,
        together: int = 1,
        references: Store | None = None,
    ):
        self.model, self.server, self.arms, self.store = model, server, arms, store
        self.others = others or {}
        self.references = references
        self.together = together
        self.settings: dict[str, Any] = {}
        self.slots = asyncio.Semaphore(IN_FLIGHT)

    async def run(self, asked: Sequence[Question], seconds: float = float("inf")) -> list[dict[str, Any]]:
        """Rows of all questions, this time or before answered.

        Args:
            seconds: no sample is begun after that time.

        Raises:
            EndpointFailed: a request failed; what was answered before is kept.
        """
        self.settings = await settings_of(self.server)
        processors = self.settings.pop("processors")
        shortest = min(len(question.ids) for question in asked)
        if shortest < self.settings["lsa"]["min_context"]:
            raise EndpointFailed(
                f"{self.server.url} prunes nothing below --lsa-min-context {self.settings['lsa']['min_context']}, and "
                f"a prompt has {shortest} tokens: start it with a smaller one, or ask for longer --lengths"
            )
        if self.references is not None and not processors:
            raise EndpointFailed(
                f"{self.server.url} was started without --enable-custom-logit-processor, which comparing next-token "
                "distributions needs: start it with that flag, or leave --kl out"
            )
        deadline = time.monotonic() + seconds
        limit = asyncio.Semaphore(self.together)
        samples: dict[str, list[Question]] = {}
        for question in asked:
            samples.setdefault(question.sample.name, []).append(question)
        answered: list[dict[str, Any]] = []
        with tqdm(total=len(asked), desc="questions", unit="question") as progress:

            async def one(turns: Sequence[Question]) -> None:
                async with limit:
                    if time.monotonic() >= deadline:
                        return
                    for question in turns:
                        answered.extend(await self.ask(question))
                        progress.update()

            await asyncio.gather(*(one(turns) for turns in samples.values()))
        return answered

    async def ask(self, question: Question) -> list[dict[str, Any]]:
        """One row an arm; only what is not in the store is asked."""
        arms: list[tuple[str, Arm | None]] = [(str(arm), arm) for arm in asked_of(self.arms, question)]
        arms += [(name, None) for name in self.others]
        missing = [(name, arm) for name, arm in arms if self.key(question, name, arm) not in self.store.rows]
        if missing:
            first, *rest = missing
            await self.ask_one(question, *first)
            await asyncio.gather(*(self.ask_one(question, *other) for other in rest))
        compared = [(name, arm) for name, arm in arms if arm is not None and not arm.apart]
        told = (
            {name: await self.compare(question, name, arm) for name, arm in compared}
            if self.references is not None
            else {}
        )
        return [
            about(question, self.model, name, arm)
            | judged(question, self.store.rows[self.key(question, name, arm)])
            | told.get(name, {})
            for name, arm in arms
        ]

    async def compare(self, question: Question, name: str, arm: Arm) -> dict[str, Any]:
        """The arm's next-token distributions against full attention's; only what is not in the store is asked.

        One arm after the other, and full attention against itself like the others, which says what is rounding: so
        every pass of a question finds the same prefix, and alone on the server all of them have the same shapes.
        """
        assert self.references is not None
        new_tokens = question.asked.new_tokens
        full = key("next", TOP, self.model, self.without_selection(), question.ids, new_tokens)
        about_arm = key("kl", full, self.key(question, name, arm))
        if about_arm not in self.references.rows:
            async with self.slots:
                rid = f"{question.name}-{name.replace(' ', '-')}-kl-{time.monotonic_ns()}"
                if full not in self.references.rows:
                    dense = {"enabled": False}
                    found = await reference_of(self.server, question.ids, new_tokens, f"{rid}-reference", dense)
                    self.references.add({"key": full, **found})
                options = arm.options(question, self.settings["lsa"])
                seen = await along(self.server, question.ids, self.references.rows[full], rid, options)
            self.references.add({"key": about_arm, **seen})
        return {column: value for column, value in self.references.rows[about_arm].items() if column != "key"}

    def without_selection(self) -> dict[str, Any]:
        """What answers of full attention depend on: it reads everything, however the server chooses pages."""
        return {name: value for name, value in self.settings.items() if name not in ("lsa", "indexer")}

    def key(self, question: Question, name: str, arm: Arm | None) -> str:
        if arm is None:
            return key(self.model, self.others[name].url, question.ids, question.asked.new_tokens)
        options = arm.options(question, self.settings["lsa"])
        settings = self.settings
        if arm.name == FULL:
            settings = self.without_selection()
        return key(self.model, settings, question.ids, question.asked.new_tokens, options, arm.apart)

    async def ask_one(self, question: Question, name: str, arm: Arm | None) -> None:
        """Ask, and put into the store what the server said: nothing that is known without it."""
        new_tokens = question.asked.new_tokens
        if arm is None:
            answer, seen = await self.others[name].complete(question.ids, new_tokens), dict[str, Any]()
        else:
            async with self.slots:
                rid = f"{question.name}-{name.replace(' ', '-')}-{time.monotonic_ns()}"
                options = arm.options(question, self.settings["lsa"])
                if question.evidence and "policy" in options:  # changes no answer, so that the key is without it
                    options = options | {"watch": list(question.evidence)[:MOST_WATCHED]}
                answer = await self.server.complete(question.ids, new_tokens, rid, options, rid if arm.apart else None)
                seen = await self.look_at(rid, arm, len(question.ids), answer.tokens)
        first, last = answer.seconds
        self.store.add(
            {
                "key": self.key(question, name, arm),
                "answer": answer.text,
                "new_tokens": answer.tokens,
                "cached_tokens": answer.cached,
                "ttft": first,
                "tpot": (last - first) / (answer.tokens - 1) if answer.tokens > 1 else None,
                **seen,
            }
        )

    async def look_at(self, rid: str, arm: Arm, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """What the server says of a request that just finished."""
        status, entry = await self.server.status(), await self.server.finished(rid)
        if status is None or entry is None:
            raise EndpointFailed(f"{self.server.url} does not know {rid}, which just finished: see its log")
        return {
            **footprint(arm.name, entry["sets"], prompt_tokens, new_tokens, status),
            "sets": entry["sets"],
            "watched": entry["watched"],
            "stalls": entry["stalls"],
            "shrunk": entry["shrunk"],
        }


def about(question: Question, model: str, name: str, arm: Arm | None) -> dict[str, Any]:
    """What is known of an answer before it is given."""
    sample, turn = question.sample, question.asked
    return {
        "model": model,
        "suite": sample.suite,
        "task": sample.task,
        "length": sample.length,
        "averaged": sample.averaged,
        "sample": sample.name,
        "turn": question.turn,
        "label": name,
        "arm": arm.title if arm else name,
        "budget": arm.budget if arm else 1.0,
        "depth": sample.depth,
        "prompt_tokens": len(question.ids),
        "evidence": list(question.evidence),
        "references": list(turn.references),
    }


def judged(question: Question, stored: dict[str, Any]) -> dict[str, Any]:
    """What the server said, the score, and the share of the evidence that was resident; None where there is nothing to
    judge, or no evidence."""
    turn = question.asked
    score = METRICS[turn.metric](stored["answer"], turn.references) if turn.references else None
    kept = evidence_kept(stored.get("sets") or "", question.evidence)
    return stored | {"score": score, "evidence_kept": kept}


async def settings_of(server: Endpoint) -> dict[str, Any]:
    """What answers of this server depend on, besides the request.

    Raises:
        EndpointFailed: it is none of ours.
    """
    status = await server.status()
    if status is None:
        raise EndpointFailed(
            f"{server.url} has no /lsa/status: start it with python -m sglang_lsa.launch_server, "
            "and give other servers as --endpoint NAME=URL"
        )
    info = await server.get("/server_info")
    config = {name: value for name, value in status["config"].items() if name not in UNSEEN}
    return {
        "lsa": config,
        "indexer": fingerprint(config["indexer"]),
        "model": (await server.get("/v1/models"))["data"][0]["id"],
        "pages": status["physical"]["pages"],
        "processors": bool(info.get("enable_custom_logit_processor")),
        **{name: info.get(name) for name in SERVER},
    }


def fingerprint(indexer: str | None) -> str | None:
    """Of an indexer's weights, where they are on this machine."""
    weights = checkpoint_folder(indexer) / "model.safetensors" if indexer else None
    return hashlib.sha256(weights.read_bytes()).hexdigest() if weights is not None and weights.is_file() else None


def run(
    asked: Sequence[Question],
    *,
    url: str,
    model: str,
    arms: Sequence[Arm],
    store: Store,
    others: dict[str, str] | None = None,
    together: int = 1,
    seconds: float = float("inf"),
    api_key: str | None = None,
    references: Store | None = None,
) -> list[dict[str, Any]]:
    """See :class:`Evaluation`; ``url`` is of our server, ``others`` of the others."""

    async def ask() -> list[dict[str, Any]]:
        async with streaming.session(silence=3600) as http:
            endpoints = {name: Endpoint(http, other, api_key=api_key) for name, other in (others or {}).items()}
            server = Endpoint(http, url, api_key=api_key)
            evaluation = Evaluation(model, server, arms, store, endpoints, together, references)
            return await evaluation.run(asked, seconds)

    return asyncio.run(ask())
