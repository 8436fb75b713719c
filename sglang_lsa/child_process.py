"""Child processes that end when the process that began them does, even if that one is killed (Linux).

The kernel sends a child a signal when its parent ends (``prctl(PR_SET_PDEATHSIG)``). It means the *thread* that began
the child, so one thread, which lasts as long as this process, begins all of them. The child asks for the signal itself,
in a small program that then becomes the command: nothing of ours runs between fork and exec, where locks of other
threads may be held.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PR_SET_PDEATHSIG = 1
PYTHON = sys.executable
_beginner: ThreadPoolExecutor


def _renew() -> None:
    global _beginner
    _beginner = ThreadPoolExecutor(1, thread_name_prefix="child-processes")


_renew()
os.register_at_fork(after_in_child=_renew)


def begin(command: Sequence[str], ends_by: signal.Signals, **options: Any) -> subprocess.Popen[bytes]:
    """Start a command.

    Args:
        command: program, by its path or found on ``PATH``, and its arguments.
        ends_by: sent to it, and to nothing that it started, when this process has ended.
        options: of ``subprocess.Popen``.
    """
    if sys.platform != "linux":
        return subprocess.Popen(command, **options)
    small = (PYTHON, "-I", __file__, str(int(ends_by)), str(os.getpid()))
    return _beginner.submit(lambda: subprocess.Popen((*small, *command), **options)).result()


def _become(ends_by: int, parent: int, command: list[str]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ends_by)
    if os.getppid() == parent:  # else it ended before it was asked for
        os.execvp(command[0], command)


if __name__ == "__main__":
    _become(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
