"""Servers that need not import SGLang again: copies of a process that has.

That import takes about ten seconds of CPU, in each of a server's three processes, and tests start some forty servers.
Here a process does it once, and loads no plugin: as with ``sgl.Engine``, SGLang is there before the hooks are. A server
is a fork of it, which goes on as ``python -m`` would. What it then spawns runs in forks that were made before that, and
is told what ``multiprocessing`` would tell a new interpreter: what is pickled and unpickled is the same.

Used for LSA's and the stock server. Others are started as users start them (SGLang's own launcher, HTTP workers, and
servers with faults), and so are those of commands that tests run, all with ``pytest --new-processes``, and all where
there is a GPU, whose driver does not outlive a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from sglang_lsa import child_process
from sglang_lsa.server_process import LSA, STOCK

MODULES = (LSA, STOCK)
WORKERS = "--tokenizer-worker-num"
"""HTTP workers are watched, and begun again, by uvicorn."""
SPARES = 3
"""Most processes that a server spawns here: two schedulers and a detokenizer."""
MESSAGE = 1 << 18
begin_anew = child_process.begin


class Copy:
    """A server, as ``subprocess.Popen`` would show it."""

    def __init__(self, pid: int, status: int):
        self.pid, self.returncode = pid, None
        self._status = status

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        if (status := self._ended(timeout)) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return status

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it may end, and be seen to, just now
                os.kill(self.pid, signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            said = os.read(self._status, 4)
            self.returncode = struct.unpack("i", said)[0] if said else -signal.SIGKILL
            os.close(self._status)
        return self.returncode


class Ready:
    """A process that has imported SGLang, in one environment and this folder."""

    def __init__(self, environment: dict[str, str]):
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # With -c, what lies in this folder is imported before what is installed, as with the -m of a server.
        code = f"import runpy; runpy.run_path({str(pathlib.Path(__file__).resolve())!r}, run_name='__main__')"
        self.process = begin_anew(
            (sys.executable, "-c", code, str(theirs.fileno())),
            signal.SIGKILL,
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt from the keyboard is for the tests, which then stop their servers
        )
        theirs.close()
        self.servers: list[Copy] = []

    def begin(self, arguments: Sequence[str], out: int) -> Copy:
        """
        Raises:
            RuntimeError: the process ended, as it does where SGLang cannot be imported.
        """
        status, told = os.pipe()
        try:
            socket.send_fds(self.connection, [json.dumps(arguments).encode()], [out, told])
            said = self.connection.recv(4)
        except ConnectionError:
            said = b""
        os.close(told)
        if not said:
            os.close(status)
            raise RuntimeError(
                f"the process that imports SGLang for servers ended with status {self.process.wait()}: "
                "see what it printed, or start servers without it, by --new-processes"
            )
        self.servers.append(Copy(struct.unpack("i", said)[0], status))
        return self.servers[-1]

    def is_idle(self) -> bool:
        return all(server.poll() is not None for server in self.servers)

    def stop(self) -> None:
        """Its servers end with it."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


class ReadyServers:
    """Begins servers in the place of :func:`sglang_lsa.child_process.begin`."""

    def __init__(self) -> None:
        self.ready: dict[str, Ready] = {}
        """By their folders and environments; only the first is kept when it has no server, since many have those."""

    def begin(self, command: Sequence[str], ends_by: signal.Signals, **options: Any) -> Any:
        if command[1] != "-m" or command[2] not in MODULES or WORKERS in command:
            return begin_anew(command, ends_by, **options)
        environment = {name: value for name, value in options["env"].items() if not name.startswith("PYTEST_")}
        key = json.dumps([os.getcwd(), environment], sort_keys=True)
        if key in self.ready and self.ready[key].process.poll() is not None:
            self.ready.pop(key).stop()  # it was killed, and its servers with it
        if key not in self.ready:
            for other in list(self.ready)[1:]:
                if self.ready[other].is_idle():
                    self.ready.pop(other).stop()
            self.ready[key] = Ready(environment)
        return self.ready[key].begin(command[2:], options["stdout"].fileno())

    def stop(self) -> None:
        for ready in self.ready.values():
            ready.stop()


# --- the process that has imported SGLang ----------------------------------------------------------------------------


def serve(connection: socket.socket) -> None:
    """Fork a server for every request, and tell how each ended."""
    running: dict[int, int] = {}
    while True:
        if select.select([connection], [], [], 0.05)[0]:
            request, fds, *_ = socket.recv_fds(connection, MESSAGE, 2)
            if not request:
                return
            out, told = fds
            parent = os.getpid()
            if not (pid := os.fork()):
                connection.close()
                for held in (told, *running.values()):
                    os.close(held)
                become_server(parent, out, *json.loads(request))
                return
            os.close(out)
            running[pid] = told
            connection.send(struct.pack("i", pid))
        for pid, told in list(running.items()):
            if (ended := os.waitpid(pid, os.WNOHANG))[0]:
                os.write(running.pop(pid), struct.pack("i", os.waitstatus_to_exitcode(ended[1])))
                os.close(told)


def become_server(parent: int, out: int, module: str, *arguments: str) -> None:
    """As ``python -m module arguments`` in a session of its own, which prints to ``out``; ends with ``parent``."""
    os.setsid()
    ctypes.CDLL(None).prctl(child_process.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that was asked for
        return
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    spares: list[tuple[int, socket.socket]] = []
    for _ in range(SPARES):
        spares.append(make_spare([waits for _, waits in spares]))
    from multiprocessing import util

    spawn = util.spawnv_passfds

    def spawned(path: str, command: Sequence[Any], passed: Sequence[int]) -> int:
        if not spares or "--multiprocessing-fork" not in map(os.fsdecode, command):
            return spawn(path, command, passed)
        pid, waits = spares.pop(0)
        words = [os.fsdecode(word) for word in command]
        told = {"code": words[words.index("-c") + 1], "fds": list(passed), "environment": dict(os.environ)}
        socket.send_fds(waits, [json.dumps(told).encode()], list(passed))
        waits.close()
        return pid

    util.spawnv_passfds = spawned  # type: ignore[assignment]
    sys.path[0] = os.getcwd()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def make_spare(others: Sequence[socket.socket]) -> tuple[int, socket.socket]:
    """A process that waits for what to run, and where it is told; the process itself ends with what it runs. Where
    ``others`` are told is closed there: their numbers may be those of what it is given."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if pid := os.fork():
        theirs.close()
        return pid, ours
    for held in (ours, *others):
        held.close()
    told, fds, *_ = socket.recv_fds(theirs, MESSAGE, 32)
    if not told:
        os._exit(0)
    theirs.close()
    work = json.loads(told)
    # Their numbers are part of what was pickled; first they are moved out of each other's way.
    for fd, number in zip([moved(fd, 1000) for fd in fds], work["fds"], strict=True):
        os.dup2(fd, number)
        os.close(fd)
    # What is the same is left alone: a process finds the place of its title by its first variable.
    for name in os.environ.keys() - work["environment"]:
        del os.environ[name]
    os.environ.update(dict(work["environment"].items() - os.environ.items()))
    sys.path[0] = os.getcwd()
    sys.argv = ["-c", "--multiprocessing-fork"]
    exec(work["code"], {"__name__": "__main__"})
    raise SystemExit


def moved(fd: int, least: int) -> int:
    """The same file under another number, which is at least this."""
    other = fcntl.fcntl(fd, fcntl.F_DUPFD, least)
    os.close(fd)
    return other


def main() -> None:
    gc.disable()
    import sglang.srt.entrypoints.http_server  # noqa: F401

    gc.freeze()
    gc.enable()
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
