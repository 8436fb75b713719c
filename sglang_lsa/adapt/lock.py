"""One run at a time in a folder: a lock of the operating system, which is gone when its process is, be it killed."""

from __future__ import annotations

import datetime
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from sglang_lsa.adapt.state import FILE

LOCK = f"{FILE}.lock"
"""Its content is for people: whoever is refused is told it. That the file exists means nothing."""


@contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """The body is alone in ``folder``, which exists.

    Raises:
        ValueError: another process is in it; the message says which.
    """
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 500, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise ValueError(
                f"--output {folder} is in use by {holder or 'another process'}: wait for it, end it, or use another "
                "folder"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise ValueError(
                f"--output {folder} cannot be locked ({error.strerror}): use a folder of a file system with flock"
            ) from None
        if _is_at(path, descriptor):
            break
        os.close(descriptor)  # of a run that has just ended, and took its file with it
    try:
        about = f"process {os.getpid()} on {socket.gethostname()}, since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}\n"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, about.encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _is_at(path: pathlib.Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
