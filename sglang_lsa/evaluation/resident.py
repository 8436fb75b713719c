"""``sglang-lsa bench resident``: what answers lose when a question reads only a part of a cached document."""

from __future__ import annotations

import json
import pathlib
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sglang_lsa.client import get_finished
from sglang_lsa.embedded_model import MODEL_NAME, embedded_model_path
from sglang_lsa.evaluation.paired import against_full, shown
from sglang_lsa.provenance import commit
from sglang_lsa.server_process import LSA, ServerProcess
from sglang_lsa.texts.document import Document, Fact, Question, build_document, load_tokenizer

TOKENS = 6600
ANSWER_TOKENS = 28
WORDS = ("harbor", "violin", "lantern", "meadow", "quarry", "ribbon", "saddle", "timber", "valley", "copper")
WORDING = "What is the special magic number for {word} mentioned in the text above?"
FLAGS = ["--skip-server-warmup", "--chunked-prefill-size", "1024", "--lsa-device-tokens", "4096"]
FLAGS += ["--lsa-host-memory-gb", "1", "--lsa-min-context", "1024"]
FLAGS += ["--lsa-config", '{"floor_tokens": 0}']
"""A pool of 64 pages; a document has 104. The budget alone bounds sets, or two arms would have the same."""


@dataclass(frozen=True)
class Arm:
    """How the question reads the document."""

    name: str
    prefill: str
    policy: str
    budget: float


ARMS = (
    Arm("exact", "exact", "quest", 0.135),
    Arm("resident 13.5 %", "resident", "quest", 0.135),
    Arm("resident 7 %", "resident", "quest", 0.07),
    Arm("recency 13.5 %", "resident", "recency", 0.135),
    Arm("random 13.5 %", "resident", "random", 0.135),
)
"""Decode is pruned in all of them, by the same policy and budget."""


def run(output: pathlib.Path, console: Console, *, samples: int, command: str) -> dict[str, Any]:
    """Ask about ``samples`` documents in every way; each time the tree has the document and nothing else.

    Returns:
        What is written to ``resident.json``: one row per document and arm, and the summary.

    Raises:
        RuntimeError: the server or a request failed.
    """
    model = embedded_model_path()
    tokenizer = load_tokenizer(model)
    rng = random.Random(0)
    rows = []
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "server.log"
        with ServerProcess(LSA, ["--model-path", str(model), "--served-model-name", MODEL_NAME, *FLAGS], log) as server:
            server.wait_until_ready()
            for number in tqdm(range(samples), desc="documents"):
                depth = (number + 0.5) / samples
                fact = Fact(WORDS[number % len(WORDS)], str(rng.randint(10**6, 10**7 - 1)), depth, TOKENS)
                document = build_document(tokenizer, fact)
                rows += [ask(server, tokenizer, document, arm) for arm in ARMS]
    result: dict[str, Any] = {
        "model": MODEL_NAME,
        "commit": commit(),
        "command": command,
        "summary": summary(rows),
        "rows": rows,
    }
    (output / "resident.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(table(result["summary"]))
    return result


def ask(server: ServerProcess, tokenizer: Any, document: Document, arm: Arm) -> dict[str, Any]:
    """Prefill the document exactly, then ask about it; the tree, and the heat of its pages, start from nothing."""
    server.post("/flush_cache?timeout=60", {}, parse=False)
    question = Question(document, WORDING)
    whole = tokenizer.apply_chat_template(question.messages, tokenize=False, add_generation_prompt=True)
    rid = f"{arm.name}-{document.fact.depth}".replace(" ", "")
    generate(server, whole[: whole.index(question.text)], 1, f"document-{rid}", {})
    options = {"prefill": arm.prefill, "policy": arm.policy, "budget": arm.budget}
    answer = generate(server, whole, ANSWER_TOKENS, rid, options)
    (entry,) = get_finished(server.url, [rid])
    if entry["prefill"] == "in place" or (entry["prefill"] == "resident") != (arm.prefill == "resident"):
        raise RuntimeError(f"{rid} was prefilled {entry['prefill']}: the pool does not force what is to be measured")
    return {
        "depth": document.fact.depth,
        "tokens": document.tokens,
        "arm": arm.name,
        **{name: value for name, value in asdict(arm).items() if name != "name"},
        "cached_tokens": answer["meta_info"]["cached_tokens"],
        "right": question.answered_by(answer["text"]),
        "answer": answer["text"],
    }


def generate(server: ServerProcess, prompt: str, tokens: int, rid: str, options: dict[str, Any]) -> dict[str, Any]:
    """A greedy answer."""
    parameters = {"temperature": 0, "max_new_tokens": tokens, "custom_params": {"lsa": options}}
    return server.post("/generate", {"text": prompt, "rid": rid, "sampling_params": parameters})


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy of each arm in points of 100, and its difference to exact on the same documents with 95 % intervals."""
    right = {
        arm.name: np.array([row["right"] for row in rows if row["arm"] == arm.name], dtype=float) * 100 for arm in ARMS
    }
    rng = np.random.default_rng(0)
    found = []
    for arm in ARMS:
        difference = right[arm.name] - right["exact"]
        found.append(
            {
                "arm": arm.name,
                "n": len(difference),
                "accuracy": float(right[arm.name].mean()),
                **against_full(difference, rng),
            }
        )
    return found


def table(found: Sequence[dict[str, Any]]) -> Table:
    """The summary, to read."""
    answers = Table(title="a question about a cached document")
    for name in ("how it is read", "documents", "accuracy", "against exact", "95 %"):
        answers.add_column(name)
    for row in found:
        answers.add_row(row["arm"], str(row["n"]), f"{row['accuracy']:.1f}", *shown(row))
    return answers
