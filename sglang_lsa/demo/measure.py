"""Asks one server in one way and keeps what client and server saw."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from sglang_lsa.client import get_finished, get_requests
from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.demo.client import Answer, Request, ask_at_once, ask_in_sequence, nothing
from sglang_lsa.demo.watch import StatusWatch, busiest, gained
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.server_process import ServerProcess
from sglang_lsa.texts.document import Question

SPEED_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Phase:
    """Requests to the LSA server, asked in one way.

    ``requests`` are their entries of ``/lsa/requests``; ``server`` is what its counters gained.
    """

    name: str
    answers: list[Answer]
    requests: list[dict[str, Any]]
    server: dict[str, int]
    busiest: dict[str, int] | None
    host_bytes: int
    page_bytes: int
    seconds: float

    @property
    def right(self) -> int:
        return sum(answer.right for answer in self.answers)


@dataclasses.dataclass(frozen=True)
class Speed:
    """Decode speed of one request, on a machine that did nothing else. Times in seconds."""

    name: str
    pages_read: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft: float
    tpot: float
    itl: float
    text: str


def measure_phase(
    lsa: ServerProcess,
    name: str,
    requests: Sequence[Request],
    *,
    done: Callable[[], None] = nothing,
) -> Phase:
    """Ask ``requests`` at once."""
    begun = time.perf_counter()
    with StatusWatch(lsa, 0.2) as watch:
        answers = ask_at_once(lsa.url, requests, done)
        seconds = time.perf_counter() - begun
    rids = [answer.rid for answer in answers]
    return Phase(
        name=name,
        answers=answers,
        requests=[get_requests(lsa.url, rid)["finished"][-1] for rid in rids],
        server=gained(watch.before, watch.after),
        busiest=busiest(watch.samples),
        host_bytes=watch.after["host"]["bytes"],
        page_bytes=watch.after["page_bytes"],
        seconds=seconds,
    )


def measure_speed(
    server: ServerProcess, name: str, question: Question, lsa: dict[str, Any] | None = None
) -> tuple[Answer, Speed]:
    """Time ``SPEED_TOKENS`` tokens of an answer; ``lsa`` as in :class:`Request`."""
    [answer] = ask_in_sequence(server.url, [Request(question, lsa, SPEED_TOKENS, ignore_eos=True)])
    pages = pages_spanned(answer.prompt_tokens + answer.completion_tokens, PAGE_SIZE)
    if lsa is not None:
        (entry,) = get_finished(server.url, [answer.rid])
        pages = entry["resident_pages"]
    seen = dataclasses.asdict(answer)
    times = {field: seen[field] for field in Speed.__dataclass_fields__ if field in seen}
    return answer, Speed(name, pages, **times)
