"""What the demo prints: steps with their time, and tables."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from sglang_lsa.demo.client import Answer
from sglang_lsa.demo.measure import Phase, Speed
from sglang_lsa.texts.document import Question

COLUMNS = 136
"""Width of what is printed where the output is no terminal."""


def make_console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else COLUMNS)


@contextlib.contextmanager
def step(console: Console, text: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Show ``text`` with a running clock while the block works, and one line with its duration afterwards.

    Yields:
        A function to call after each of ``total`` parts.
    """
    begun = time.perf_counter()
    columns: list[Any] = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    if total is not None:
        columns.insert(2, MofNCompleteColumn())
    if not console.is_terminal:
        console.print(f"[dim]...[/] {text}")
    mark = "[red]✗[/]"
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(text, total=total)
            yield lambda: progress.advance(task)
        mark = "[green]✓[/]"
    finally:
        console.print(f"{mark} {text} [dim]({time.perf_counter() - begun:.1f} s)[/]")


def answers_table(
    title: str, questions: Sequence[Question], answers: Sequence[Answer], references: Sequence[Answer] | None = None
) -> Table:
    """One row per question; with ``references``, whether the text equals full attention's."""
    table = _table(title)
    table.add_column("hidden number", no_wrap=True)
    table.add_column("answer", ratio=1)
    names = ["right", "same\ntext", "cached\ntokens", "of", "first\ntoken s", "ms per\ntoken"]
    _add_numbers(table, names if references is not None else [name for name in names if name != "same\ntext"])
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        fact = question.document.fact
        same = [] if references is None else [yes_or_no(answer.text == references[row].text, "dim")]
        table.add_row(
            f"{fact.word} {fact.number}",
            escape(" ".join(answer.text.split())),
            yes_or_no(answer.right, "red"),
            *same,
            f"{answer.cached_tokens:,}",
            f"{answer.prompt_tokens:,}",
            f"{answer.ttft:.1f}",
            f"{answer.tpot * 1e3:.0f}",
        )
    return table


def residency_table(
    title: str, questions: Sequence[Question], requests: Sequence[dict[str, Any]], page_bytes: int
) -> Table:
    """Pages that each request's decode read, against all of its pages. ``requests`` are those of ``/lsa/requests``."""
    table = _table(title)
    table.add_column("question", ratio=1)
    names = (
        "context\npages",
        "budget\npages",
        "resident\npages",
        "of its\npages",
        "device KV\nMB",
        "in full\nMB",
        "stalls",
    )
    _add_numbers(table, names)
    for question, request in zip(questions, requests, strict=True):
        context, resident = request["context_pages"], request["resident_pages"]
        table.add_row(
            f"{question.document.fact.word}: {escape(question.text)}",
            f"{context}",
            f"{request['budget_pages']}",
            f"{resident}",
            f"{resident / context:.1%}",
            megabytes(resident * page_bytes),
            megabytes(context * page_bytes),
            f"{request['stalls']}",
        )
    return table


def phases_table(phases: Sequence[Phase]) -> Table:
    """What each phase cost the server, one column each."""
    table = _table("What the LSA server did in each phase")
    table.add_column("", no_wrap=True)
    _add_numbers(table, [phase.name.replace(", ", "\n") for phase in phases])
    rows: dict[str, Callable[[Phase], str]] = {
        "right answers": lambda phase: f"{phase.right} of {len(phase.answers)}",
        "prompt tokens": lambda phase: f"{phase.server['prompt_tokens']:,}",
        "  from the prefix cache": lambda phase: f"{phase.server['prefix_hit_tokens']:,}",
        "most decoding at once": lambda phase: f"{phase.busiest['requests']}" if phase.busiest else "-",
        "  device KV held, MB": lambda phase: megabytes(phase.busiest["held_bytes"]) if phase.busiest else "-",
        "  all their pages, MB": lambda phase: megabytes(phase.busiest["full_bytes"]) if phase.busiest else "-",
        "host mirror used, MB": lambda phase: megabytes(phase.host_bytes),
        "pages recalled": lambda phase: f"{phase.server['recalled_pages']:,}",
        "pages evicted": lambda phase: f"{phase.server['evicted_pages']:,}",
        "seconds": lambda phase: f"{phase.seconds:.1f}",
    }
    for name, cell in rows.items():
        table.add_row(name, *map(cell, phases))
    return table


def speed_table(speeds: Sequence[Speed]) -> Table:
    """Decode speed, one request at a time; the first row is the yardstick."""
    table = _table("Decode speed, one request at a time")
    table.add_column("server", no_wrap=True)
    _add_numbers(
        table, ["context\ntokens", "pages\nread", "output\ntokens", "TPOT\nms", "median\nms", "against\nstock"]
    )
    for speed in speeds:
        table.add_row(
            speed.name,
            f"{speed.prompt_tokens:,}",
            f"{speed.pages_read}",
            f"{speed.completion_tokens}",
            f"{speed.tpot * 1e3:.1f}",
            f"{speed.itl * 1e3:.1f}",
            f"{speeds[0].tpot / speed.tpot:.2f}x",
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _add_numbers(table: Table, names: Sequence[str]) -> None:
    """Columns that are never cut, however narrow the terminal is."""
    for name in names:
        table.add_column(name, justify="right", no_wrap=True, min_width=max(map(len, name.split("\n"))))


def yes_or_no(value: bool, style_of_no: str) -> str:
    return "[green]yes[/]" if value else f"[{style_of_no}]no[/]"


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f}"
