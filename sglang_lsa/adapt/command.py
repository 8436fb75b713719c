"""``sglang-lsa adapt``: the steps, one after the other, each of which can be run by itself, too."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sglang_lsa.adapt import checks
from sglang_lsa.adapt.lock import locked
from sglang_lsa.adapt.result import write_result
from sglang_lsa.adapt.settings import Settings
from sglang_lsa.adapt.state import State
from sglang_lsa.adapt.steps import run_step
from sglang_lsa.texts.haystack import Texts
from sglang_lsa.training.pool import names_pool, pool_flags

WORK = "work"
"""Recordings, logs and half-done things, in the output folder."""
ARMS = ("lsa", "recency", "random")
TOGETHER, ANSWERS = 8, 1024
"""Samples that are compared at a time, and tokens of their answers at most."""
SHARES = {"record": 0.5, "train": 0.2, "compare": 0.25, "write": 0.05}
"""About which share of the time each step takes."""


def adapt(
    model: str,
    output: pathlib.Path,
    settings: Settings,
    console: Console,
    *,
    texts: pathlib.Path | None = None,
    server_args: str = "",
    keep_recordings: bool = False,
    servers: int | None = None,
) -> None:
    """Make an indexer for ``model`` in ``output``: ``config.json``, ``model.safetensors``, ``README.md``,
    ``adapt.png``, ``recall.json``, and ``evaluation/``.

    Steps that are done are not done again; recordings and answers that are there are kept, and training begins anew.

    Args:
        model: path or hub name.
        texts: files to record over; None takes Python's library.
        server_args: more arguments for every server; others may be given when a run goes on.
        servers: that record side by side; None takes as many as the device has memory for, four at most, and one where
            ``server_args``, or a file that they name, name a pool.

    Raises:
        ValueError: something asked for cannot be done, or another run is in the folder; before any work.
        RuntimeError: a step failed.
    """
    shape = checks.require_model(model, settings)
    Texts("train", texts), Texts("held-out", texts)
    about = {
        "model": str(pathlib.Path(model).resolve()) if pathlib.Path(model).is_dir() else model,
        "weights": checks.fingerprint(model),
        "texts": str(texts.resolve()) if texts else None,
        **dataclasses.asdict(settings),
    }
    state = State.open(output, about)
    if "write" in state.done:
        console.print(f"{output} is done: serve with --lsa-indexer {output}")
        return
    needed = 0 if "record" in state.done else checks.recorded_bytes(shape, settings)
    work = output / WORK
    recorded = sum(path.stat().st_size for path in work.glob("recordings/**/*.safetensors"))
    checks.require_disk(output, max(0, needed - recorded))
    if servers is None:
        servers = 1 if names_pool(server_args) else checks.servers_that_fit(model, server_args)
    with locked(output):
        state = State.open(output, about)  # as another run has left it meanwhile
        state.save()
        _run_steps(state, model, settings, console, texts, server_args, servers)
        if not keep_recordings:
            shutil.rmtree(work / "recordings", ignore_errors=True)
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in state.done.items())
    console.print(
        f"{output} is done ({seconds}): serve with --lsa-indexer {output}; what it does is in README.md there"
    )


def _run_steps(
    state: State,
    model: str,
    settings: Settings,
    console: Console,
    texts: pathlib.Path | None,
    server_args: str,
    servers: int,
) -> None:
    """All that are not done, in their order."""
    output, work = state.folder, state.folder / WORK
    work.mkdir(exist_ok=True)
    recordings, indexer = work / "recordings", work / "indexer"
    flags = (f"--server-args={server_args}",)
    source = ("--model", model, *flags)
    over = ("--texts", texts) if texts else ()

    def record(run: Run) -> None:
        # Held-out prompts first: they are few, and what is wrong shows early.
        run(
            *("record", *source, "--output", recordings, "--splits", "held-out", "train"),
            *("--families", *settings.families, "--lengths", *settings.lengths, "--each", settings.each),
            *("--held-out", settings.held_out, "--last", checks.LAST, "--new-tokens", checks.NEW_TOKENS),
            *("--layers", checks.LAYERS, "--servers", servers, *over),
        )

    def train(run: Run) -> None:
        partial = work / "indexer.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(indexer, ignore_errors=True)
        run("train", recordings, "--output", partial, "--steps", settings.steps)
        os.replace(partial, indexer)

    def compare(run: Run) -> None:
        pool = pool_flags(model, max(settings.eval_lengths) + ANSWERS, TOGETHER, server_args)
        asked = " ".join((*pool, server_args))
        run(
            *("eval", "--model", model, f"--server-args={asked}", "--indexer", indexer, "--suites", "ruler"),
            *("--tasks", *settings.tasks, "--lengths", *settings.eval_lengths, "--samples", settings.samples),
            *("--arms", *ARMS, "--budgets", settings.budget, "--output", output / "evaluation", "--kl"),
            *("--together", TOGETHER),
        )

    def write(run: Run) -> None:
        write_result(output, indexer, model, settings, state.done)

    steps: dict[str, Callable[[Run], None]] = {"record": record, "train": train, "compare": compare, "write": write}
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("begins", total=1.0)
        before = 0.0
        for name, step in steps.items():
            if name not in state.done:
                runner = _runner(progress, bar, name, before, work / f"{name}.log")
                began = time.monotonic()
                step(runner)
                state.finish(name, time.monotonic() - began)
            before += SHARES[name]
            progress.update(bar, completed=before, description=f"{name}: done")


Run = Callable[..., None]
"""Runs a command of ``sglang-lsa`` with these arguments."""


def _runner(progress: Progress, bar: int, name: str, before: float, log: pathlib.Path) -> Run:
    def show(what: str, share: float) -> None:
        description = f"{name}: {what}" if what else name
        # Of several bars in one step each begins at 0: what is shown never goes back.
        known = max(progress.tasks[bar].completed, before + SHARES[name] * share)
        progress.update(bar, completed=known, description=description[:34])  # type: ignore[arg-type]

    def run(*arguments: object) -> None:
        run_step(arguments, log, show)

    return run
