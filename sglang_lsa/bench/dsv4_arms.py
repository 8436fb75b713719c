"""What ``sglang-lsa bench dsv4`` measures: requests over prefixes that are there already, as many as the KV holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_lsa.bench.dsv4_shapes import Dsv4Shape
from sglang_lsa.bench.systems import STOCK
from sglang_lsa.memory.layout.dsv4 import PAGE_TOKENS
from sglang_lsa.memory.mirror import GB, available_host_memory
from sglang_lsa.server_process import LSA

QUESTION = 64
"""Tokens of a prompt behind its prefix: more than SGLang and LSA want to compute anew, less than a page."""
HOST_SPARE_GB = 20
"""Host memory that is left for servers and prompts."""
WINDOW_PAGES, WINDOW_SPARE = 3, 64
"""Pages of the window that a running request has at most, and that a batch of prompts has beside."""
MOST = 128
"""Requests that are measured together at most."""
C128_STATE_BYTES = 524_288
"""Compression state that a request has in a layer with an entry for 128 tokens."""
FILLED = 0.75
"""Part of LSA's device pages that planned resident sets take; new pages of a set are there beside those that go."""


@dataclass(frozen=True)
class Dsv4System:
    """A server that is measured.

    Attributes:
        name: for ``--systems``, and in the results.
        module: what ``python -m`` runs.
        tuned: its pool of windows is as large as these requests need; else as SGLang chooses.
    """

    name: str
    module: str
    tuned: bool = True

    @property
    def lsa(self) -> bool:
        return self.module == LSA


DSV4_SYSTEMS = {
    system.name: system
    for system in (
        Dsv4System("stock", STOCK, tuned=False),
        Dsv4System("stock-tuned", STOCK),
        Dsv4System("lsa", LSA),
    )
}


@dataclass(frozen=True)
class Dsv4Arm:
    """Requests of one context, a whole number of pages, and QUESTION tokens behind it.

    Attributes:
        requests: that are sent; None for as many as fit.
    """

    name: str
    context: int
    requests: int | None = None

    @property
    def pages(self) -> int:
        """Of the prefix."""
        return self.context // PAGE_TOKENS

    def own_pages(self, tokens: int) -> int:
        """Pages that a request has beside its prefix when it has generated so many tokens."""
        return -(-(QUESTION + tokens) // PAGE_TOKENS)

    def prefix(self, number: int, vocabulary: int) -> np.ndarray:
        """Random token ids, int32 ``[context]``; the same in every process."""
        return np.random.default_rng((4, number)).integers(10, vocabulary, self.context, dtype=np.int32)

    def prompt(self, number: int, distinct: int, vocabulary: int) -> Prompt:
        """Of a request: requests take turns with the ``distinct`` prefixes, each with a question of its own."""
        return Prompt(self, number, number % distinct, vocabulary)


@dataclass(frozen=True)
class Prompt(Sequence[int]):
    """Token ids, drawn when they are needed: all of them together would take gigabytes."""

    arm: Dsv4Arm
    number: int
    prefix: int
    vocabulary: int

    def __len__(self) -> int:
        return self.arm.context + QUESTION

    def __getitem__(self, index: Any) -> Any:
        return self.ids()[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids())

    def ids(self) -> list[int]:
        question = np.random.default_rng((5, self.number)).integers(10, self.vocabulary, QUESTION, dtype=np.int32)
        return np.concatenate((self.arm.prefix(self.prefix, self.vocabulary), question)).tolist()


DSV4_ARMS = {
    arm.name: arm
    for arm in (
        Dsv4Arm("256k", 262_144),
        Dsv4Arm("512k", 524_288),
        Dsv4Arm("1m", 1_048_576),
        Dsv4Arm("1x1m", 1_048_576, requests=1),
    )
}
"""``1x1m`` is one request alone."""


@dataclass(frozen=True)
class Plan:
    """How a server is started.

    Attributes:
        distinct: prefixes that should fit; the server says how many did.
        requests: it has room for so many.
        window_ratio: ``--swa-full-tokens-ratio``; None for SGLang's own.
        host_gb: of the mirror; 0 without LSA.
    """

    distinct: int
    requests: int
    window_ratio: float | None
    host_gb: float


def plan(
    arm: Dsv4Arm, system: Dsv4System, shape: Dsv4Shape, *, kv_bytes: int, tokens: int, share: int, budget: float
) -> Plan:
    """As many prefixes as the KV of a system holds, with all that their requests generate.

    Args:
        kv_bytes: device bytes for KV of every kind.
        tokens: that each request generates.
        share: requests over each prefix.
        budget: of LSA.

    Raises:
        ValueError: not one fits.
    """
    pages = arm.pages + share * arm.own_pages(tokens)
    host_pages = (available_host_memory() - HOST_SPARE_GB * GB) // shape.page_bytes - 2
    most = 1 if arm.requests else MOST // share
    found: Plan | None = None
    for distinct in range(1, most + 1):
        requests = arm.requests or distinct * share
        ratio, full = window(shape, system, distinct, requests, kv_bytes)
        if system.lsa:
            # What the plan of LSA takes for virtual pages comes out of the same bytes.
            needed = distinct * pages + PAGES_SPARE
            virtual = min(
                max(needed, int(full * shape.token_bytes / (shape.page_bytes + shape.virtual_bytes))), host_pages
            )
            physical = min(virtual, (full * shape.token_bytes - virtual * shape.virtual_bytes) / shape.page_bytes)
            each = budget * arm.pages + arm.own_pages(tokens) + 2
            fits = needed <= host_pages and requests * each <= min(FILLED * physical, physical - arm.pages)
            host_gb = math.ceil((virtual + 2) * shape.page_bytes / GB * 100) / 100
        else:
            fits, host_gb = distinct * pages + PAGES_SPARE <= full // PAGE_TOKENS, 0.0
        if not fits:
            break
        found = Plan(distinct, requests, ratio, host_gb)
    if found is None:
        raise ValueError(
            f"{system.name}: not one prefix of {arm.context:,} tokens fits {kv_bytes / 1e9:g} GB of KV"
            + (f" and {host_pages * shape.page_bytes / GB:.0f} GB of host memory" if system.lsa else "")
            + ": give more with --kv-gb, or choose shorter --arms"
        )
    return found


PAGES_SPARE = 64
"""For prompts that warm the server up."""


def window(
    shape: Dsv4Shape, system: Dsv4System, distinct: int, requests: int, kv_bytes: int
) -> tuple[float | None, int]:
    """``--swa-full-tokens-ratio`` of a system, and the tokens that SGLang then has room for.

    The least that these requests need: one page of the window at the end of each prefix, which is how SGLang finds it,
    and those that a running request has.
    """
    states = (requests + 2) * C128_STATE_BYTES * shape.c128_layers
    left = kv_bytes - states
    if not system.tuned:
        return None, max(0, int(left / (shape.token_bytes + 0.1 * shape.window_token_bytes)))
    tokens = PAGE_TOKENS * (distinct + WINDOW_PAGES * requests + WINDOW_SPARE)
    full = max(0, int((left - tokens * shape.window_token_bytes) / shape.token_bytes))
    return (min(1.0, math.ceil(1e5 * tokens / full) / 1e5) if full else 1.0), full
