"""The demonstration: full attention, then LSA with two policies, on the same hidden facts."""

from __future__ import annotations

import json
import pathlib
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from sglang_lsa.config import LSAConfig
from sglang_lsa.demo import report
from sglang_lsa.demo.client import MODEL, Answer, Request, ask_in_sequence
from sglang_lsa.demo.measure import SPEED_TOKENS, Phase, Speed, measure_phase, measure_speed
from sglang_lsa.demo.picture import Panel, draw
from sglang_lsa.demo.servers import DemoFailed, server, talking_to, wait_for
from sglang_lsa.demo.verdict import lost_answers, print_verdict, results_json
from sglang_lsa.embedded_model import embedded_model_path
from sglang_lsa.server_process import LSA, STOCK, ServerProcess
from sglang_lsa.texts.document import FACTS, Question, build_document, fact_pages, load_tokenizer, prompt_tokens

CONFIG = LSAConfig(device_tokens=9600, host_memory_gb=2)
"""The device pool holds one document and a half; everything else is a default."""
LSA_FLAGS = [f"--lsa-device-tokens={CONFIG.device_tokens}", f"--lsa-host-memory-gb={CONFIG.host_memory_gb}"]
STOCK_FLAGS = ["--max-total-tokens=32768"]
WORDINGS = (
    "What is the special magic number for {word} mentioned in the text?",
    "Please tell me the special magic number for {word}.",
    "What number is the special magic number for {word}?",
)
STOCK_QUESTIONS = 1
"""Documents whose first question goes to the stock server, which needs half a minute for each on two CPU cores."""
FULL: dict[str, Any] = {"enabled": False}
QUEST: dict[str, Any] = {"policy": "quest"}
RECENCY: dict[str, Any] = {"policy": "recency"}
PICTURE_TOKENS = 200
"""Enough for four windows or more."""


@dataclass(frozen=True)
class Plan:
    """What is asked.

    ``firsts`` is the first question on each document, ``by_stock`` those whose reference the stock server gives.
    """

    tokenizer: Any
    questions: list[Question]

    @property
    def firsts(self) -> list[Question]:
        return self.questions[:: len(WORDINGS)]

    @property
    def by_stock(self) -> list[Question]:
        return self.firsts[:STOCK_QUESTIONS]

    @property
    def by_lsa(self) -> list[Question]:
        return [question for question in self.questions if question not in self.by_stock]


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
            stock_answers, stock_speed = _ask_stock(console, stock, plan)
        references, off_speed = _ask_switched_off(console, lsa, plan, stock_answers)
        with report.step(console, f"LSA, quest: decode speed over {SPEED_TOKENS} tokens"), talking_to(lsa):
            quest_speed = measure_speed(lsa, "LSA, quest", plan.firsts[0], QUEST)
        phases = _ask_lsa(console, lsa, plan, references)
        pictured = _draw(console, lsa, plan, output / "residency.png")
    speeds = [stock_speed, off_speed, quest_speed]
    _print_numbers(console, plan, phases, speeds)
    kept = print_verdict(console, references, phases, lost_answers(plan.questions, references, phases))
    pages = [fact_pages(plan.tokenizer, question) for question in plan.questions]
    seconds = time.perf_counter() - begun
    results = {"kept": kept, "seconds": seconds} | results_json(
        CONFIG, plan.questions, pages, references, plan.by_stock, [*phases, pictured], speeds
    )
    (output / "demo.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"In {output}: residency.png, demo.json, stock.log, lsa.log [dim]({seconds:.0f} s in all)[/]")
    return kept


def _plan(model: pathlib.Path) -> Plan:
    tokenizer = load_tokenizer(model)
    documents = [build_document(tokenizer, fact) for fact in FACTS]
    return Plan(tokenizer, [Question(document, wording) for document in documents for wording in WORDINGS])


def _print_plan(console: Console, plan: Plan) -> None:
    lengths = [prompt_tokens(plan.tokenizer, question) for question in plan.questions]
    pool = CONFIG.device_tokens or 0
    console.print(
        f"  {len(FACTS)} documents hide a number each; {len(WORDINGS)} questions about each: {len(lengths)} prompts of "
        f"{min(lengths):,} to {max(lengths):,} tokens, {sum(lengths):,} in all.\n"
        f"  The LSA server's device pool holds {pool:,} tokens, {sum(lengths) / pool:.1f} times fewer.\n"
        f"  The questions: {' '.join(wording.format(word='...') for wording in WORDINGS)}"
    )


def _ask_stock(console: Console, stock: ServerProcess, plan: Plan) -> tuple[list[Answer], Speed]:
    with report.step(console, "Stock: reference answer", len(plan.by_stock)) as done, talking_to(stock):
        answers = ask_in_sequence(stock.url, [Request(question) for question in plan.by_stock], done)
    for question, answer in zip(plan.by_stock, answers, strict=True):
        expected = prompt_tokens(plan.tokenizer, question)
        if answer.prompt_tokens != expected:
            raise DemoFailed(
                f"the server counts {answer.prompt_tokens} tokens in a prompt of {expected}: its chat template is not "
                "the model's, and the marks in the picture would be wrong; install sglang-lsa again"
            )
    with report.step(console, f"Stock: decode speed over {SPEED_TOKENS} tokens"), talking_to(stock):
        return answers, measure_speed(stock, "stock SGLang", plan.firsts[0])


def _ask_switched_off(
    console: Console, lsa: ServerProcess, plan: Plan, stock_answers: list[Answer]
) -> tuple[list[Answer], Speed]:
    """The rest of the references: in the order of ``plan.questions``."""
    requests = [Request(question, FULL) for question in plan.by_lsa]
    text = "LSA server, LSA switched off in the request"
    with report.step(console, f"{text}: other reference answers", len(requests)) as done, talking_to(lsa):
        answers = ask_in_sequence(lsa.url, requests, done)
    with report.step(console, f"{text}: decode speed over {SPEED_TOKENS} tokens"), talking_to(lsa):
        speed = measure_speed(lsa, "LSA, switched off in the request", plan.firsts[0], FULL)
    by_question = dict(zip([*plan.by_stock, *plan.by_lsa], [*stock_answers, *answers], strict=True))
    references = [by_question[question] for question in plan.questions]
    title = f"Full attention (stock server: {len(stock_answers)}; LSA server with LSA switched off: {len(answers)})"
    console.print(report.answers_table(title, plan.questions, references))
    return references, speed


def _ask_lsa(console: Console, lsa: ServerProcess, plan: Plan, references: list[Answer]) -> list[Phase]:
    phases = []
    for policy in (QUEST, RECENCY):
        for at_once in (True, False):
            name = f"{policy['policy']}, {'all at once' if at_once else 'in sequence'}"
            requests = [Request(question, policy) for question in plan.questions]
            with report.step(console, f"LSA, {name}", len(requests)) as done, talking_to(lsa):
                phases.append(measure_phase(lsa, name, requests, at_once=at_once, done=done))
            title = f"LSA, {name}, budget {CONFIG.budget:.1%}"
            console.print(report.answers_table(title, plan.questions, phases[-1].answers, references))
    return phases


def _draw(console: Console, lsa: ServerProcess, plan: Plan, path: pathlib.Path) -> Phase:
    """Let a few requests generate through several windows, and draw what they kept."""
    drawn = [*((question, QUEST) for question in plan.firsts), (plan.firsts[0], RECENCY)]
    requests = [Request(question, policy, PICTURE_TOKENS, ignore_eos=True) for question, policy in drawn]
    with report.step(console, f"LSA: {PICTURE_TOKENS} tokens each for the picture", len(drawn)) as done:
        with talking_to(lsa):
            phase = measure_phase(lsa, "picture", requests, at_once=True, done=done)
        panels = [
            _panel(question, policy["policy"], answer, request, fact_pages(plan.tokenizer, question))
            for (question, policy), answer, request in zip(drawn, phase.answers, phase.requests, strict=True)
        ]
        draw(panels, f"Pages that decode reads at a budget of {CONFIG.budget:.1%}: {MODEL}", path)
    return phase


def _panel(question: Question, policy: str, answer: Answer, request: dict[str, Any], pages: list[int]) -> Panel:
    bound = request["budget_pages"]
    return Panel(
        title=(
            f"{question.document.fact.word}, {policy}: reads {request['resident_pages']} of "
            f"{request['context_pages']} pages; its answer is {'right' if answer.right else 'wrong'}"
        ),
        history=request["history"],
        context_tokens=request["context_tokens"],
        # As in sglang_lsa.engine.selection.
        sink_pages=min(CONFIG.sink_pages, bound // 2),
        recent_pages=max(1, min(CONFIG.recent_pages, bound // 4)),
        fact_pages=pages,
    )


def _print_numbers(console: Console, plan: Plan, phases: list[Phase], speeds: list[Speed]) -> None:
    quest = phases[0]
    title = f"Residency of each request when it ended (LSA, {quest.name})"
    console.print(report.residency_table(title, plan.questions, quest.requests, quest.page_bytes))
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
