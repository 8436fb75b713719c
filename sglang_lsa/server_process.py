"""ServerProcess: a real server in a child process, for the demo, the benchmarks and the tests."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import psutil

from sglang_lsa import child_process

LSA = "sglang_lsa.launch_server"
STOCK = "sglang_lsa.stock_server"


class ServerFailed(RuntimeError):
    """The server ended, or did not come up in time; the message holds the end of its log."""


class ServerProcess:
    """Starts ``python -m <module> <arguments>`` on a free port of this machine; a context manager.

    The server ends with this process at the latest, even if that is killed (Linux).

    Args:
        module: :data:`LSA` or :data:`STOCK`.
        arguments: flags of that server, without host and port.
        log: file that takes everything the server prints.
        environment: variables added to this process's own.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], log: pathlib.Path, environment: dict[str, str] | None = None
    ):
        self.module, self.log = module, log
        # The second is where the ranks of the model meet: SGLang looks one up long before it uses it.
        self.held = {"--port": held_port(), "--nccl-port": held_port()}
        self.port = int(self.held["--port"].getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        ports = [word for flag, held in self.held.items() for word in (flag, str(held.getsockname()[1]))]
        command = [sys.executable, "-m", module, "--host", "127.0.0.1", *ports, *arguments]
        with log.open("wb") as out:
            # SGLang's own processes end with the one that began them.
            self.process = child_process.begin(
                command,
                signal.SIGKILL,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **(environment or {})},
            )

    def wait_until_ready(self, seconds: float = 300) -> ServerProcess:
        """Return once the server answers ``/health``.

        Raises:
            ServerFailed: it ended, or took longer than ``seconds``.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerFailed(f"{self.module} ended with status {self.process.returncode}:\n{self.log_tail()}")
            try:
                urllib.request.urlopen(self.url + "/health", timeout=5).close()
                return self
            except (OSError, urllib.error.URLError):
                time.sleep(0.2)
        self.stop()
        raise ServerFailed(f"{self.module} was not ready after {seconds:.0f} s:\n{self.log_tail()}")

    def get(self, path: str) -> Any:
        """JSON answer of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=600) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any], timeout: float = 600, parse: bool = True) -> Any:
        """JSON answer of a POST request; None if it is not to be parsed."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer) if parse else None

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End the server and everything it started.

        SGLang's main process would take the end of its children for a crash, sleep for five seconds and then kill
        itself: that is not waited for. What it started is, since its memory is free only then.
        """
        started = self._started()
        for how, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 30)):
            self._signal(how, started)
            self.process.kill()
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and any(map(_runs, started)):
                time.sleep(0.05)
        self.process.wait()
        for held in self.held.values():
            held.close()

    def _started(self) -> list[psutil.Process]:
        """What the server started, and whatever that did, also where the server itself has ended."""
        found = {process.pid: process for process in psutil.process_iter() if _session(process) == self.process.pid}
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)  # some in sessions of their own
            found |= {process.pid: process for process in children}
        found.pop(self.process.pid, None)
        return list(found.values())

    def _signal(self, how: signal.Signals, started: Sequence[psutil.Process]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, how)
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                if _session(process) != self.process.pid:
                    process.send_signal(how)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def _session(process: psutil.Process) -> int:
    with contextlib.suppress(OSError):
        return os.getsid(process.pid)
    return 0


def _runs(process: psutil.Process) -> bool:
    """Whether it has not ended; one that has may wait for its parent as a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def held_port() -> socket.socket:
    """A socket that keeps a port of this machine for a server which listens on it later, until the socket is closed.

    A server of ours takes half a minute to listen. A port that is only looked up is given away meanwhile: to outgoing
    connections, which include those that ask whether the server is up, or to the next server that looks one up. So the
    port stays bound, and lies below those that the kernel hands out by itself.

    Raises:
        OSError: no port could be bound.
    """
    first, last = 10_000, _first_ephemeral_port() - 1
    for _ in range(100):
        held = socket.socket()
        try:
            # Without SO_REUSEADDR: ports that others hold in this way are not taken.
            held.bind(("127.0.0.1", random.randint(first, last)))
        except OSError:
            held.close()
            continue
        # With it from now on: a server that sets it, as SGLang's does, may listen beside a socket that does not listen.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return held
    raise OSError(f"no free port of 127.0.0.1 from {first} to {last} in 100 tries")


def _first_ephemeral_port() -> int:
    try:
        return int(pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768
