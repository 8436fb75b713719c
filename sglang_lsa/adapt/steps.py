"""Runs a command of ``sglang-lsa`` as a process of its own, and shows how far it is."""

from __future__ import annotations

import ctypes
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

TAIL = 4000
"""Bytes at the end of a log in which its last progress is looked for."""
BAR = re.compile(r"(?:([^\r\n:|]{1,40}): +)?\d+%\|[^|\r\n]*\| *(\d+)/(\d+) ")
ENDING = 60
"""Seconds that a command may take to stop its servers."""


class StepFailed(RuntimeError):
    """A command ended with another status than 0; the message holds the end of its log."""


def run_step(
    arguments: Sequence[object], log: pathlib.Path, show: Callable[[str, float], None], poll: float = 0.5
) -> None:
    """Run ``sglang-lsa`` with these arguments to its end.

    It ends, and stops its servers, when this process does, be it killed.

    Args:
        log: takes what it prints.
        show: called now and then with what it does and which share of that is done.

    Raises:
        StepFailed: it failed.
    """
    command = [sys.executable, "-m", "sglang_lsa.cli", *map(str, arguments)]
    with log.open("ab") as out:
        out.write(f"\n$ sglang-lsa {' '.join(map(str, arguments))}\n".encode())
        out.flush()
        begins = out.tell()
        parent = os.getpid()
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: _end_with(parent),
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        while process.poll() is None:
            show(*progress_in(log, begins))
            time.sleep(poll)
    finally:
        _stop(process)
    if process.returncode:
        lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
        said = "\n".join(line for line in lines[-40:] if line.strip() and not BAR.search(line))
        raise StepFailed(f"sglang-lsa {arguments[0]} ended with status {process.returncode}:\n{said}")


def progress_in(log: pathlib.Path, begins: int = 0) -> tuple[str, float]:
    """What the last bar in a log says: what is done, and which share of it; "" and 0 before there is one."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(begins, size - TAIL))
        text = file.read().decode(errors="replace")
    bars = list(BAR.finditer(text))
    if not bars:
        return "", 0.0
    found = bars[-1]
    return (found.group(1) or "").strip(), min(1.0, int(found.group(2)) / max(1, int(found.group(3))))


def _end_with(parent: int) -> None:
    """In the new process: be told to end when the parent ends, however it does (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(ENDING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
