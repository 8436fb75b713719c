"""The demo's servers: always stopped at the end, and never without saying where their log is."""

from __future__ import annotations

import contextlib
import pathlib
import signal
from collections.abc import Iterator, Sequence

import aiohttp

from sglang_lsa.demo.client import MODEL
from sglang_lsa.server_process import ServerFailed, ServerProcess
from sglang_lsa.streaming import RequestFailed

START_SECONDS = 600.0
"""Two servers import SGLang at the same time, perhaps on a machine that others use too."""


class DemoFailed(RuntimeError):
    """A server failed; the message says which, how, and where its log is."""


@contextlib.contextmanager
def server(module: str, model: pathlib.Path, flags: Sequence[str], log: pathlib.Path) -> Iterator[ServerProcess]:
    """A server that is stopped at the end, however often somebody presses Ctrl-C meanwhile."""
    common = ["--model-path", str(model), "--served-model-name", MODEL, "--skip-server-warmup", "--enable-cache-report"]
    process = ServerProcess(module, [*common, *flags], log)
    try:
        yield process
    finally:
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = [signal.signal(number, signal.SIG_IGN) for number in signals]
        process.stop()
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)


def wait_for(process: ServerProcess) -> None:
    """Return when the server answers. Raises DemoFailed when it does not come up."""
    try:
        process.wait_until_ready(START_SECONDS)
    except ServerFailed as error:
        raise DemoFailed(f"{error}\nThe whole log: {process.log}") from error


@contextlib.contextmanager
def talking_to(process: ServerProcess) -> Iterator[None]:
    """Turn what goes wrong in the block into a DemoFailed that names this server's log."""
    try:
        yield
    except (aiohttp.ClientError, RequestFailed, OSError) as error:
        status = process.process.poll()
        state = "still runs" if status is None else f"ended with status {status}"
        raise DemoFailed(
            f"{process.module} {state}, and a request to it failed: {type(error).__name__}: {error}\n"
            f"{process.log_tail(15)}\nThe whole log: {process.log}"
        ) from error
