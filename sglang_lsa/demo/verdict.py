"""What the demo concludes: whether LSA kept what full attention knew; and ``demo.json``."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

import sglang_lsa
from sglang_lsa.config import LSAConfig
from sglang_lsa.demo.client import MODEL, Answer
from sglang_lsa.demo.measure import Phase, Speed
from sglang_lsa.provenance import commit, hardware
from sglang_lsa.texts.document import Question


def lost_answers(questions: Sequence[Question], references: Sequence[Answer], phases: Sequence[Phase]) -> list[str]:
    """Answers of policies that choose by content that are wrong although full attention's are right, one line each."""
    return [
        f"{phase.name}: {question.text} Full attention: {reference.text!r}, LSA: {answer.text!r}"
        for phase in phases
        if phase.name != "recency"
        for question, reference, answer in zip(questions, references, phase.answers, strict=True)
        if reference.right and not answer.right
    ]


def print_verdict(console: Console, references: Sequence[Answer], phases: Sequence[Phase], lost: Sequence[str]) -> bool:
    """Say how many answers are right, and which were lost. Returns whether LSA kept all that full attention knew."""
    known = sum(answer.right for answer in references)
    scores = [("full attention", known), *((phase.name, phase.right) for phase in phases)]
    console.print("Right answers: " + "; ".join(f"{name} {right} of {len(references)}" for name, right in scores))
    for line in lost:
        console.print(f"[red]Lost with LSA:[/] {escape(line)}")
    if not known:
        console.print("[red]Full attention itself found none of the numbers: there is nothing to compare with.[/]")
        return False
    if not lost:
        console.print("[bold green]LSA is right wherever full attention is.[/]")
    return not lost


def results_json(
    config: LSAConfig,
    questions: Sequence[Question],
    fact_pages: Sequence[Sequence[int]],
    references: Sequence[Answer],
    by_stock: Sequence[Question],
    phases: Sequence[Phase],
    speeds: Sequence[Speed],
) -> dict[str, Any]:
    """Everything measured, as plain JSON values: bytes, pages, seconds. ``by_stock``: whose reference is stock's."""
    return {
        "command": "make demo",
        "commit": commit(),
        "hardware": hardware(),
        "sglang_lsa": sglang_lsa.__version__,
        "sglang": importlib.metadata.version("sglang"),
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count()},
        "model": MODEL,
        "config": dataclasses.asdict(config),
        "questions": [
            dataclasses.asdict(question.document.fact)
            | {"document_tokens": question.document.tokens, "question": question.text, "fact_pages": list(pages)}
            for question, pages in zip(questions, fact_pages, strict=True)
        ],
        "full_attention": [
            {"server": "stock" if question in by_stock else "LSA, switched off"} | dataclasses.asdict(answer)
            for question, answer in zip(questions, references, strict=True)
        ],
        "phases": [dataclasses.asdict(phase) for phase in phases],
        "speed": [dataclasses.asdict(speed) for speed in speeds],
    }
