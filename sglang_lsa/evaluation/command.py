"""``sglang-lsa eval``: makes the questions, starts a server unless one is given, and writes the results."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import pathlib
import shlex
import tempfile
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from rich.console import Console
from tqdm import tqdm

from sglang_lsa.embedded_model import MODEL_NAME, embedded_model_path
from sglang_lsa.evaluation.analysis import write_analysis
from sglang_lsa.evaluation.arms import ARMS, Arm, parse_arms
from sglang_lsa.evaluation.plots import draw
from sglang_lsa.evaluation.quality import write
from sglang_lsa.evaluation.questions import Question, questions
from sglang_lsa.evaluation.run import run
from sglang_lsa.evaluation.store import Store
from sglang_lsa.evaluation.suites import (
    agentic,
    longbench_v2,
    longgen,
    longmemeval,
    mrcr,
    nolima,
    qmsum,
    ruler,
    scbench,
)
from sglang_lsa.evaluation.suites.ruler_qa import qa_tasks
from sglang_lsa.evaluation.suites.ruler_texts import Corpora, open_corpora
from sglang_lsa.evaluation.summary import summarise
from sglang_lsa.evaluation.task import Count, Sample, Task
from sglang_lsa.provenance import command_line, commit, hardware
from sglang_lsa.server_process import LSA, ServerFailed, ServerProcess
from sglang_lsa.texts.haystack import Haystack

GENERATED: dict[str, dict[str, Task]] = {
    "ruler": ruler.TASKS,
    "scbench": scbench.TASKS,
    "mrcr": mrcr.TASKS,
    "nolima": nolima.TASKS,
    "longgen": longgen.TASKS,
}
"""Suites that are made here, by name."""
ROWS = "rows.jsonl"


def from_arguments(args: argparse.Namespace) -> list[dict[str, Any]]:
    """``sglang-lsa eval`` with its arguments; see :func:`evaluate`."""
    model = args.model or str(embedded_model_path())
    others = {}
    for given in args.endpoint:
        name, found, url = given.partition("=")
        if not found or not name or not url.startswith("http") or name in ARMS or "_apart" in name:
            raise ValueError(f"--endpoint {given}: write NAME=http://HOST:PORT, with a name that is no arm")
        others[name] = url
    for name in ("samples", "together"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} is too small: use 1 or more")
    usual = ["quest", "window", "recency", "random"]
    arms = args.arms or (["lsa", *usual] if args.indexer or args.url else usual)
    asked_arms = parse_arms(arms, args.budgets, args.apart, args.variant)
    for name in others.keys() & {arm.title for arm in asked_arms}:
        raise ValueError(f"--endpoint {name}={others[name]}: --variant has that name: use another")
    plan = Plan(
        tuple(args.suites), tuple(args.tasks), tuple(args.lengths), args.samples, args.texts, args.qa, args.ruler_texts
    )
    return evaluate(
        plan,
        Console(width=160),
        model=model,
        name=args.name or args.model or MODEL_NAME,
        arms=asked_arms,
        output=args.output,
        command=command_line(),
        indexer=args.indexer,
        url=args.url,
        others=others,
        server_args=args.server_args,
        together=args.together,
        seconds=args.seconds,
        api_key=args.api_key,
        files=Files(args.longbench_v2, args.longmemeval, args.bfcl, args.tau2, args.qmsum),
        kl=args.kl,
    )


@dataclass(frozen=True)
class Files:
    """Published files to ask from; None for those that are not there."""

    longbench_v2: pathlib.Path | None = None
    longmemeval: pathlib.Path | None = None
    bfcl: pathlib.Path | None = None
    tau2: pathlib.Path | None = None
    qmsum: pathlib.Path | None = None

    def samples(self, count: Count, lengths: Sequence[int]) -> Iterator[Sample]:
        """All of them, whatever their length; those of ``bfcl`` and ``tau2`` filled up to every length that they
        can have.

        Raises:
            ValueError: a file is something else.
        """
        if self.longbench_v2 is not None:
            yield from longbench_v2.load(self.longbench_v2, count)
        if self.longmemeval is not None:
            yield from longmemeval.load(self.longmemeval, count)
        if self.bfcl is not None:
            for length in lengths:
                with contextlib.suppress(agentic.Unsuitable):
                    yield from agentic.bfcl_memory(self.bfcl, count, length)
        if self.tau2 is not None:
            for length in lengths:
                with contextlib.suppress(agentic.Unsuitable):
                    yield from agentic.banking(self.tau2, count, length)
        if self.qmsum is not None:
            yield from qmsum.load(self.qmsum, count)


@dataclass(frozen=True)
class Plan:
    """What is asked.

    Attributes:
        suites: of :data:`GENERATED`.
        tasks: names; empty takes all of the suites'.
        lengths: of prompt and answer, in tokens.
        samples: of each task and length.
        texts: folder of running text; None takes the speeches that come with the package.
        qa: folder of question sets for RULER's qa_1 and qa_2.
        ruler_texts: folder of RULER's own three corpora, for its essays, qa_1 and qa_2; see ``suites.ruler_texts``.
    """

    suites: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    texts: pathlib.Path | None = None
    qa: pathlib.Path | None = None
    ruler_texts: pathlib.Path | None = None

    @cached_property
    def corpora(self) -> Corpora | None:
        """RULER's own texts, where they are given."""
        return open_corpora(self.ruler_texts) if self.ruler_texts is not None else None

    def chosen(self) -> list[Task]:
        """Tasks of the suites that are asked for.

        Raises:
            ValueError: there is no such task, or texts are not what they should be.
        """
        available = {suite: dict(GENERATED[suite]) for suite in self.suites}
        if self.qa is not None and self.ruler_texts is not None:
            raise ValueError("--qa and --ruler-texts both give RULER's questions: give one of them")
        if "ruler" in available:
            available["ruler"] |= self.question_tasks
        known = [task for tasks in available.values() for task in tasks.values()]
        for name in self.tasks:
            if name not in {task.name for task in known}:
                raise ValueError(f"--tasks {name}: no suite asked for has it: use some of {_names(known)}")
        return [task for task in known if not self.tasks or task.name in self.tasks]

    @cached_property
    def question_tasks(self) -> dict[str, Task]:
        """RULER's qa_1 and qa_2, where their questions are given."""
        if self.corpora is not None:
            return self.corpora.tasks
        return qa_tasks(self.qa) if self.qa is not None else {}

    def require_samples(self, tokenizer: Any) -> None:
        """See whether the first sample of each task and length can be made.

        Raises:
            ValueError: it cannot, or there is none.
        """
        if not (first := len(self.lengths) * len(self.chosen())):
            raise ValueError("there is nothing to ask: give some --suites or files")
        for _, sample in islice(self.samples_of(counting(tokenizer)), first):
            for _ in questions(sample, tokenizer):
                pass

    def samples_of(self, count: Count) -> Iterator[tuple[int, Sample]]:
        """Samples with their numbers."""
        haystack, tasks = Haystack(self.texts), self.chosen()
        essays = Haystack(documents=[self.corpora.essays]) if self.corpora is not None else haystack
        for number in range(self.samples):
            for length in self.lengths:
                for task in tasks:
                    yield number, task.sample(length, number, essays if task.suite == "ruler" else haystack, count)


def evaluate(
    plan: Plan,
    console: Console,
    *,
    model: str,
    name: str,
    arms: Sequence[Arm],
    output: pathlib.Path,
    command: str,
    indexer: str | None = None,
    url: str | None = None,
    others: dict[str, str] | None = None,
    server_args: str = "",
    together: int = 4,
    seconds: float = float("inf"),
    api_key: str | None = None,
    files: Files | None = None,
    kl: bool = False,
) -> list[dict[str, Any]]:
    """Ask, and write ``answers.jsonl`` (what servers said), ``next.jsonl`` (what they found likely),
    ``rows.jsonl`` (judged), ``quality.json``, ``quality.md``,
    ``errors.json`` and pictures into ``output``, of this run and earlier ones.

    Args:
        model: path or hub name, for the tokenizer, and for the server if none is given.
        name: of the model, in the results; earlier answers to the same questions are replaced.
        indexer: for a server that is started here.
        url: of a running server of ours.
        others: endpoints that are arms themselves, by name.
        files: published ones, beside what is made here.
        kl: compare next-token distributions, see ``divergence``.

    Returns:
        Rows of ``quality.json`` of this run.

    Raises:
        ValueError: samples cannot be made as asked, or an arm needs an indexer.
        RuntimeError: the server or a request failed.
    """
    from transformers import AutoTokenizer

    if url is None and indexer is None and any(arm.name == "lsa" for arm in arms):
        raise ValueError("the arm lsa needs a trained indexer: add --indexer, or leave it out of --arms")
    plan.chosen()
    store = Store(output / "answers.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 1 << 40
    files = files or Files()
    if files == Files():
        plan.require_samples(tokenizer)
        asked = None
    elif not (asked := make_questions(plan, tokenizer, files)):
        raise ValueError("there is nothing to ask: give some --suites or files")
    if kl:
        server_args += " --enable-custom-logit-processor"
    with starting(url, model, indexer, server_args) as ready:
        if asked is None:  # takes about as long as a start
            asked = make_questions(plan, tokenizer, files)
        rows = run(
            asked,
            url=ready(),
            model=name,
            arms=arms,
            store=store,
            others=others,
            together=together,
            seconds=seconds,
            api_key=api_key,
            references=Store(output / "next.jsonl") if kl else None,
        )
    about = {"command": command, "hardware": _hardware(url), "commit": commit(), "date": str(datetime.date.today())}
    everything = keep(output, [row | about for row in rows])
    found = summarise(everything)
    written = write(output, found)
    write_analysis(output / "errors.json", everything)
    draw(output, found, everything, name)
    if (same := same_apart(rows)) is not None:
        console.print(f"{same[0]} of {same[1]} answers are the same with and without sharing of prefixes")
    console.print(f"{len(rows)} answers; tables in {output / 'quality.md'}")
    return [row for row in written if row["model"] == name]


def same_apart(rows: Sequence[dict[str, Any]]) -> tuple[int, int] | None:
    """How many answers are the same with and without sharing, and of how many; None when that was not asked."""
    by_question: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        by_question.setdefault((row["sample"], row["turn"]), {})[row["label"]] = row["answer"]
    pairs = [
        (answers[label.replace("_apart", "")], answers[label])
        for answers in by_question.values()
        for label in answers
        if "_apart" in label
    ]
    return (sum(one == other for one, other in pairs), len(pairs)) if pairs else None


def counting(tokenizer: Any) -> Count:
    """Counts the tokens of a text."""
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


def make_questions(plan: Plan, tokenizer: Any, files: Files) -> list[Question]:
    """Every turn of every sample: the first sample of every task and length, then the second, and so on, so that any
    part of the work is a fair one.

    Samples of files count as of the smallest length that has room for them; longer ones are left out.
    """
    count = counting(tokenizer)
    total = plan.samples * len(plan.lengths) * len(plan.chosen())
    made = tqdm(plan.samples_of(count), desc="making samples", unit="sample", total=total, leave=False)
    numbered = [(number, list(questions(sample, tokenizer))) for number, sample in made]
    seen: Counter[tuple[str, str, int]] = Counter()
    for sample in files.samples(count, plan.lengths):
        turns = list(questions(sample, tokenizer))
        needed = max(len(question.ids) + question.asked.new_tokens for question in turns)
        room = min((length for length in plan.lengths if length >= needed), default=None)
        if room is None or seen[sample.suite, sample.task, room] == plan.samples:
            continue
        fitted = dataclasses.replace(sample, length=room)
        number = seen[sample.suite, sample.task, room]
        numbered.append((number, [dataclasses.replace(question, sample=fitted) for question in turns]))
        seen[sample.suite, sample.task, room] += 1
    return [question for _, turns in sorted(numbered, key=lambda pair: pair[0]) for question in turns]


def keep(output: pathlib.Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put answers into ``rows.jsonl``, in the place of those of the same model, question and arm; all are returned."""

    def which(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("model", "suite", "task", "length", "sample", "turn", "label"))

    path = output / ROWS
    earlier = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    merged = {which(row): row for row in [*earlier, *rows]}
    everything = sorted(merged.values(), key=which)
    path.write_text("".join(json.dumps(row) + "\n" for row in everything))
    return everything


@contextlib.contextmanager
def server(url: str | None, model: str, indexer: str | None, server_args: str) -> Iterator[str]:
    """Address of a server that answers; see :func:`starting`."""
    with starting(url, model, indexer, server_args) as ready:
        yield ready()


@contextlib.contextmanager
def starting(url: str | None, model: str, indexer: str | None, server_args: str) -> Iterator[Callable[[], str]]:
    """Gives what waits for the server and tells its address: the one given, or one that is being started and runs as
    long as the questions do.

    Raises:
        RuntimeError: it did not start.
    """
    if url is not None:
        yield lambda: url
        return
    flags = [
        "--model-path",
        model,
        "--skip-server-warmup",
        "--lsa-min-context",
        "1024",
        "--enable-cache-report",
        *shlex.split(server_args),
    ]
    if indexer is not None:
        flags += ["--lsa-indexer", indexer]
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "server.log"
        with ServerProcess(LSA, flags, log) as process:
            try:
                yield lambda: process.wait_until_ready(600).url
            except ServerFailed as error:
                raise RuntimeError(str(error)) from None
            except RuntimeError as error:
                raise RuntimeError(f"{error}\nthe server's log ends with:\n{process.log_tail()}") from None


def _hardware(url: str | None) -> str | None:
    """What the server runs on; None where that is another machine, of which nothing is known here."""
    here = url is None or urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "localhost")
    return hardware() if here else None


def _names(tasks: Sequence[Task]) -> str:
    return ", ".join(task.name for task in tasks)
