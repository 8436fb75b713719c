"""The demonstration: full attention, then LSA with two policies, on the same hidden facts."""

from __future__ import annotations

import json
import pathlib
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from sglang_lsa.config import LSAConfig
from sglang_lsa.demo import report
from sglang_lsa.demo.client import MODEL, Answer, Request, ask_at_once, ask_in_sequence
from sglang_lsa.demo.measure import SPEED_TOKENS, Phase, Speed, measure_phase, measure_speed
from sglang_lsa.demo.picture import PICTURE, draw_results
from sglang_lsa.demo.servers import DemoFailed, server, talking_to, wait_for
from sglang_lsa.demo.verdict import lost_answers, print_verdict, results_json
from sglang_lsa.embedded_model import INDEXER_NAME, embedded_model_path
from sglang_lsa.server_process import LSA, STOCK, ServerProcess
from sglang_lsa.texts.document import FACTS, Question, build_document, fact_pages, load_tokenizer, prompt_tokens

CONFIG = LSAConfig(device_tokens=6400, host_memory_gb=1, indexer=INDEXER_NAME, floor_tokens=0)
"""The device pool holds one document and a half, and documents of 4K stand for long ones: the budget alone bounds their
sets. Everything else is a default."""
LSA_FLAGS = [
    f"--lsa-{name}={getattr(CONFIG, name.replace('-', '_'))}" for name in ("device-tokens", "host-memory-gb", "indexer")
]
LSA_FLAGS += ["--lsa-config", json.dumps({"floor_tokens": CONFIG.floor_tokens})]
STOCK_FLAGS = ["--max-total-tokens=16384", "--chunked-prefill-size=8192"]
"""A prompt is one chunk: for each, SGLang's attention for CPUs does the work of the whole prompt; ours does not."""
WORDINGS = (
    "What is the special magic number for {word} mentioned in the text?",
    "Please tell me the special magic number for {word}.",
    "What number is the special magic number for {word}?",
)
FULL: dict[str, Any] = {"enabled": False}
INDEXER: dict[str, Any] = {"policy": "indexer"}
QUEST: dict[str, Any] = {"policy": "quest"}
RECENCY: dict[str, Any] = {"policy": "recency"}
PICTURE_TOKENS = 132
"""Enough for three windows or more."""


@dataclass(frozen=True)
class Plan:
    """What is asked.

    ``firsts`` is the first question on each document. The stock server is asked the very first alone: prompts take long
    on a CPU.
    """

    tokenizer: Any
    questions: list[Question]

    @property
    def firsts(self) -> list[Question]:
        return self.questions[:: len(WORDINGS)]


def run(output: pathlib.Path, console: Console) -> bool:
    """Run the demonstration; leaves logs, ``residency.png`` and ``demo.json`` in ``output``.

    Returns:
        Whether LSA's answers are right wherever full attention's are.

    Raises:
        DemoFailed: a server failed.
        EmbeddedModelError: the model could not be prepared.
    """
    begun = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    model = embedded_model_path()
    with server(LSA, model, LSA_FLAGS, output / "lsa.log") as lsa:
        # The stock server is gone before the LSA server gets its first question.
        with server(STOCK, model, STOCK_FLAGS, output / "stock.log") as stock:
            with report.step(console, f"Starting stock SGLang and SGLang with LSA on the CPU, model {MODEL}"):
                plan = _plan(model)
                wait_for(stock)
                wait_for(lsa)
            _print_plan(console, plan)
            stock_answer, stock_speed = _ask_stock(console, stock, plan)
        references, off_speed = _ask_switched_off(console, lsa, plan, stock_answer)
        with report.step(console, f"LSA, indexer: decode speed over {SPEED_TOKENS} tokens"), talking_to(lsa):
            _, lsa_speed = measure_speed(lsa, "LSA, indexer", plan.firsts[0], INDEXER)
        phases = _ask_lsa(console, lsa, plan, references)
        pictured = _ask_for_picture(console, lsa, plan)
    speeds = [stock_speed, off_speed, lsa_speed]
    _print_numbers(console, plan, phases, speeds)
    kept = print_verdict(console, references, phases, lost_answers(plan.questions, references, phases))
    pages = [fact_pages(plan.tokenizer, question) for question in plan.questions]
    seconds = time.perf_counter() - begun
    results = {"kept": kept, "seconds": seconds} | results_json(
        CONFIG, plan.questions, pages, references, plan.questions[:1], [*phases, pictured], speeds
    )
    (output / "demo.json").write_text(json.dumps(results, indent=1) + "\n")
    draw_results(results, output / "residency.png")
    console.print(f"In {output}: residency.png, demo.json, stock.log, lsa.log [dim]({seconds:.0f} s in all)[/]")
    return kept


def _plan(model: pathlib.Path) -> Plan:
    tokenizer = load_tokenizer(model)
    documents = [build_document(tokenizer, fact) for fact in FACTS]
    return Plan(tokenizer, [Question(document, wording) for document in documents for wording in WORDINGS])


def _print_plan(console: Console, plan: Plan) -> None:
    hidden = ["running text" if fact.speech is not None else "repeated sentences" for fact in FACTS]
    lengths = [prompt_tokens(plan.tokenizer, question) for question in plan.questions]
    pool = CONFIG.device_tokens or 0
    asked = f"{len(lengths)} prompts of {min(lengths):,} to {max(lengths):,} tokens, {sum(lengths):,} in all"
    console.print(
        f"  {len(FACTS)} documents hide a number each, in {', '.join(hidden)};\n"
        f"  {len(WORDINGS)} questions about each: {asked}.\n"
        f"  The LSA server's device pool holds {pool:,} tokens, {sum(lengths) / pool:.1f} times fewer.\n"
        f"  The questions: {' '.join(wording.format(word='...') for wording in WORDINGS)}"
    )


def _ask_stock(console: Console, stock: ServerProcess, plan: Plan) -> tuple[Answer, Speed]:
    question = plan.firsts[0]
    with report.step(console, f"Stock: a reference answer, decode speed over {SPEED_TOKENS} tokens"), talking_to(stock):
        answer, speed = measure_speed(stock, "stock SGLang", question)
    expected = prompt_tokens(plan.tokenizer, question)
    if answer.prompt_tokens != expected:
        raise DemoFailed(
            f"the server counts {answer.prompt_tokens} tokens in a prompt of {expected}: its chat template is not the "
            "model's, and the marks in the picture would be wrong; install sglang-lsa again"
        )
    return answer, speed


def _ask_switched_off(
    console: Console, lsa: ServerProcess, plan: Plan, stock_answer: Answer
) -> tuple[list[Answer], Speed]:
    """The rest of the references: in the order of ``plan.questions``. What is asked about a document that is cached is
    asked together."""
    text = "LSA server, LSA switched off in the request"
    with report.step(console, f"{text}: decode speed over {SPEED_TOKENS} tokens"), talking_to(lsa):
        _, speed = measure_speed(lsa, "LSA, switched off in the request", plan.firsts[0], FULL)
    requests = [Request(question, FULL) for question in plan.questions]
    references = [stock_answer]
    with report.step(console, f"{text}: other reference answers", len(requests) - 1) as done, talking_to(lsa):
        for begin in range(0, len(requests), len(WORDINGS)):
            first, *others = requests[begin : begin + len(WORDINGS)]
            if begin:
                references += ask_in_sequence(lsa.url, [first], done)
            references += ask_at_once(lsa.url, others, done)
    alone = "the first on a document alone, the others together"
    title = f"Full attention (stock server: 1; LSA server with LSA switched off: {len(requests) - 1}, {alone})"
    console.print(report.answers_table(title, plan.questions, references))
    return references, speed


def _ask_lsa(console: Console, lsa: ServerProcess, plan: Plan, references: list[Answer]) -> list[Phase]:
    phases = []
    for policy in (INDEXER, QUEST, RECENCY):
        name = policy["policy"]
        requests = [Request(question, policy) for question in plan.questions]
        with report.step(console, f"LSA, {name}: all at once", len(requests)) as done, talking_to(lsa):
            phases.append(measure_phase(lsa, name, requests, done=done))
        title = f"LSA, {name}, budget {CONFIG.budget:.1%}"
        console.print(report.answers_table(title, plan.questions, phases[-1].answers, references))
    return phases


def _ask_for_picture(console: Console, lsa: ServerProcess, plan: Plan) -> Phase:
    """Let a few requests generate through several windows: the first question on each document, and again the first of
    all by recency."""
    drawn = [*((question, INDEXER) for question in plan.firsts), (plan.firsts[0], RECENCY)]
    requests = [Request(question, policy, PICTURE_TOKENS, ignore_eos=True) for question, policy in drawn]
    text = f"LSA: {PICTURE_TOKENS} tokens each for the picture"
    with report.step(console, text, len(drawn)) as done, talking_to(lsa):
        return measure_phase(lsa, PICTURE, requests, done=done)


def _print_numbers(console: Console, plan: Plan, phases: list[Phase], speeds: list[Speed]) -> None:
    first = phases[0]
    title = f"Residency of each request when it ended (LSA, {first.name})"
    console.print(report.residency_table(title, plan.questions, first.requests, first.page_bytes))
    console.print("[dim]  Until its window ends, a request also keeps the pages that it fills meanwhile.[/]")
    console.print(report.phases_table(phases))
    console.print(
        "[dim]  All their pages: without LSA and without sharing. "
        "The host mirror holds all cached pages, shared ones once.[/]"
    )
    console.print(report.speed_table(speeds))
    stock, off = speeds[:2]
    console.print(
        f"  LSA switched off and stock wrote the same {SPEED_TOKENS} tokens: "
        f"{report.yes_or_no(stock.text == off.text, 'red')} [dim](TPOT: mean time per output token)[/]"
    )
    if not torch.cuda.is_available():
        console.print(
            "[dim]  A part of the gain is torch's: on a CPU, attention to a set is computed in float32, "
            "which it does faster than stock's bfloat16.[/]"
        )
