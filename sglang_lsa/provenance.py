"""Where a number comes from: the command, the commit and the machine."""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import subprocess
import sys


def commit() -> str:
    """The commit of the working tree this package lies in; empty when it is not in one."""
    folder = pathlib.Path(__file__).resolve().parents[1]
    if shutil.which("git") is None or not (folder / ".git").exists():
        return ""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    return found.stdout.strip()


def command_line() -> str:
    return shlex.join(["sglang-lsa", *sys.argv[1:]])


def hardware() -> str:
    """The GPU of this machine, or how many CPU cores it has."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
