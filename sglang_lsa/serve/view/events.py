"""Server-sent events: one poller of the scheduler, however many pages are open, and none while there is none."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable

logger = logging.getLogger(__name__)

SECONDS = 1.0
"""Between two snapshots."""
MOST_STREAMS = 16
"""Pages that may be open at a time."""


class TooManyStreams(RuntimeError):
    """As many streams are open as may be."""


def encode_event(text: str) -> bytes:
    """One event. ``text`` is JSON as ``json.dumps`` writes it: without line breaks, which would end the event."""
    return b"data: " + text.encode() + b"\n\n"


class Stream:
    """What one page has not read yet: the newest event, never more. A page that reads slowly misses the others."""

    def __init__(self) -> None:
        self.newest: bytes | None = None
        self.missed = 0
        self._there = asyncio.Event()

    def offer(self, event: bytes) -> None:
        """An event that takes the place of one that was not read."""
        self.missed += self.newest is not None
        self.newest = event
        self._there.set()

    async def next(self) -> bytes:
        """The newest event, once there is one that was not read."""
        await self._there.wait()
        self._there.clear()
        event, self.newest = self.newest, None
        assert event is not None
        return event


class Broadcast:
    """Asks for a snapshot every ``seconds`` while somebody listens, and gives it to everybody who does.

    Args:
        ask: returns a snapshot as JSON text. It is never cancelled.
    """

    def __init__(self, ask: Callable[[], Awaitable[str]], seconds: float = SECONDS, most: int = MOST_STREAMS):
        self.ask, self.seconds, self.most = ask, seconds, most
        self.streams: set[Stream] = set()
        self.poller: asyncio.Task[None] | None = None

    def open(self) -> Stream:
        """A new stream; :meth:`close` it.

        Raises:
            TooManyStreams: too many are open.
        """
        if len(self.streams) >= self.most:
            raise TooManyStreams(f"{len(self.streams)} pages are open, the most there may be: close one")
        stream = Stream()
        self.streams.add(stream)
        if self.poller is None:
            self.poller = asyncio.create_task(self._poll())
        return stream

    def close(self, stream: Stream) -> None:
        """Nobody listens to this stream any more. The poller ends by itself after its last one."""
        self.streams.discard(stream)

    async def events(self, stream: Stream) -> AsyncGenerator[bytes, None]:
        """What is sent over ``stream``, until the page goes away."""
        while True:
            yield await stream.next()

    async def _poll(self) -> None:
        while self.streams:
            try:
                event = encode_event(await self.ask())
            except Exception as error:
                logger.exception("LSA: asking the scheduler for the live view failed; the page shows the error")
                event = encode_event(json.dumps({"error": f"the scheduler did not answer: {error!r}"}))
            for stream in self.streams:
                stream.offer(event)
            await asyncio.sleep(self.seconds)
        self.poller = None
