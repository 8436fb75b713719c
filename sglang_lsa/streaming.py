"""The streaming HTTP client: one answer of an SGLang or OpenAI-compatible server, and when each piece of it came."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp


class RequestFailed(RuntimeError):
    """The server refused a request, dropped it, or ended its answer too early."""


@dataclass
class Stream:
    """One request: when it was sent, and what had come when. It is filled while the answer comes.

    All times are seconds of ``time.perf_counter``.
    """

    sent: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)
    """Of every chunk."""
    tokens: list[int] = field(default_factory=list)
    """Tokens received up to and including that chunk; OpenAI's protocols tell their number in the last one only."""
    done: bool = False
    pieces: list[str] = field(default_factory=list)
    """Text of every chunk."""
    usage: dict[str, Any] = field(default_factory=dict)
    """What the server counted, by its own names; empty until it says."""

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def count(self) -> int:
        """Tokens of the answer so far."""
        return self.tokens[-1] if self.tokens else 0

    @property
    def prompt_tokens(self) -> int:
        return int(self.usage.get("prompt_tokens", 0))

    @property
    def cached(self) -> int | None:
        """Prompt tokens that the server's radix tree already had; None: it does not say."""
        details = self.usage.get("prompt_tokens_details") or {}
        return self.usage.get("cached_tokens", details.get("cached_tokens"))

    @property
    def text_times(self) -> list[float]:
        """Of the chunks that have text."""
        return [time for time, piece in zip(self.times, self.pieces, strict=True) if piece]

    def take(self, chunk: dict[str, Any], now: float) -> None:
        """Add what came at ``now``: of ``/generate``, ``/v1/completions`` or ``/v1/chat/completions``.

        Raises:
            RequestFailed: it is an error.
        """
        if "error" in chunk:
            raise RequestFailed(str(chunk["error"]))
        if "meta_info" in chunk:
            self.usage = chunk["meta_info"]
            whole = chunk.get("text")  # from the beginning of the answer; none from a server without a tokenizer
            piece = whole[len(self.text) :] if whole else ""
        else:
            self.usage = chunk.get("usage") or self.usage
            piece = "".join(_text_of(choice) for choice in chunk["choices"])
        self.times.append(now)
        self.tokens.append(self.usage.get("completion_tokens", 0))
        self.pieces.append(piece)


def _text_of(choice: dict[str, Any]) -> str:
    return (choice["text"] if "text" in choice else choice["delta"].get("content")) or ""


def median_gap(times: list[float]) -> float:
    """Median seconds between two of them."""
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(times))


def event_of(line: bytes) -> dict[str, Any] | None:
    """The object in a line of a stream of server-sent events; None: there is none in it."""
    return json.loads(line[6:]) if line.startswith(b"data: {") else None


def session(silence: float | None = None) -> aiohttp.ClientSession:
    """For any number of requests at a time.

    Args:
        silence: seconds that a server may say nothing while it answers; None: it may take its time.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_read=silence)
    # The server closes connections that were idle for some seconds, perhaps just when the next request is sent.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=1 << 20)


def encoded(body: dict[str, Any]) -> bytes:
    """A request's body as it is sent; to be made before the clock starts, for a prompt of 256K numbers takes tens of
    milliseconds to write."""
    return json.dumps(body).encode()


async def follow(
    http: aiohttp.ClientSession, url: str, body: bytes, stream: Stream, headers: dict[str, str] | None = None
) -> Stream:
    """Send a request for a stream, and read the answer to its end into ``stream``, which is returned.

    Args:
        body: see :func:`encoded`; it has ``"stream": true``.

    Raises:
        RequestFailed: the server refused it, or there is an error in the stream.
        aiohttp.ClientError: there is no server, or it dropped the request.
    """
    async with http.post(url, data=body, headers={"Content-Type": "application/json", **(headers or {})}) as answer:
        if answer.status != 200:
            raise RequestFailed(f"HTTP {answer.status}: {(await answer.text())[:500]}")
        async for line in answer.content:
            now = time.perf_counter()
            if (chunk := event_of(line)) is not None:
                stream.take(chunk, now)
    return stream
