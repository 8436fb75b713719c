"""A lookahead over a real pager, and what the tests of its windows do to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import harness
import numpy as np
import pytest
import torch
from harness import Wanted

from sglang_lsa.config import PAGE_SIZE, GivenSet, LSAConfig, RequestOptions
from sglang_lsa.engine.lookahead import Lookahead
from sglang_lsa.engine.policies import Policy, Random, Recency
from sglang_lsa.engine.request import Asked, Request
from sglang_lsa.memory.pages import pages_complete, pages_spanned
from sglang_lsa.memory.resident_table import ResidentTable

PHYSICAL, VIRTUAL = 24, 160
WINDOW = 4
LONG, LEAD, LAG = 8, 5, 2
"""Decode steps of a window; steps before it at which a refresh starts; steps after which its scores are read."""
OLD, NEW = [0, 1, 2, 3, 11], [0, 5, 6, 7]
"""What an ``Overlapped`` server's request reads in its first window, and in its second."""


class Queued(Wanted):
    """The same, but its scores are computed when the test says so, as those of a GPU are."""

    def score(self, request: Request, pages: np.ndarray) -> torch.Tensor:
        self.result = torch.from_numpy(super().score(request, pages))
        self.scores = torch.full_like(self.result, float("nan"))
        return self.scores

    def compute(self) -> None:
        self.scores.copy_(self.result)


class Server(harness.Server):
    """A lookahead over a real pager. Requests own runs of virtual pages."""

    def __init__(self, lead: int = 0, lag: int = 0, page: int = PAGE_SIZE, **options: object) -> None:
        super().__init__(PHYSICAL, VIRTUAL, page)
        defaults = {"budget": 0.5, "min_pages": 1, "floor_tokens": 0, "window": WINDOW}
        defaults |= {"sink_pages": 1, "recent_pages": 1, "prompt_pages": 0}
        self.config = LSAConfig(**{**defaults, "min_context": 4 * self.pager.page, **options})
        self.table = ResidentTable(16, 32, self.pager.page)
        self.wanted = Wanted()
        self.queued = Queued()
        policies: dict[str, Policy] = {
            "wanted": self.wanted,
            "trusted": self.wanted,
            "queued": self.queued,
            "recency": Recency(),
            "random": Random(),
        }
        self.lookahead = Lookahead(self.config, self.pager, self.table, policies, lead, lag, {"trusted": 0.25})
        self.requests = 0

    def prefill(
        self,
        rid: str,
        tokens: int,
        *,
        policy: str = "wanted",
        seed: int = 0,
        dense: bool = False,
        sets: Sequence[GivenSet] = (),
        promised: int | None = None,
        dense_steps: int = 0,
        prompt_lookup: int = 0,
        widen: float = 1.0,
        text: Sequence[int] = (),
        watch: tuple[int, ...] = (),
    ) -> Request:
        """
        Args:
            promised: the prompt was streamed: only its last pages are sure to be there, and so many are kept for it.
        """
        self.requests += 1
        asked = Asked(
            policy,
            self.config.budget,
            dense,
            seed,
            dense_steps=dense_steps,
            prompt_lookup=prompt_lookup,
            widen=widen,
            watch=watch,
        )
        request = Request(rid, self.requests, asked, tokens=tokens, prompt_tokens=tokens)
        request.text = lambda known: np.array(text[:known], dtype=np.int64)
        request.name_sets(sets)
        request.pages = self.allocate(pages_spanned(tokens, self.pager.page))
        self.hold(rid, request.pages)
        self.write(self.slots_of(request.pages))
        self.pager.store(request.pages[: pages_complete(tokens, self.pager.page)])
        if promised is not None:
            self.pager.ledger.retain(rid, request.pages[pages_complete(tokens, self.pager.page) :])
            self.pager.reservations.promise(rid, promised)
            self.lookahead.sets.await_first(request)
            self.push_off()
        self.lookahead.begin(request)
        return request

    def decode(self, request: Request) -> None:
        """One token more, without a forward pass; the page that it opens is held, as the runtime does."""
        self.before_decode(request)
        self.after_decode(request)

    def before_decode(self, request: Request) -> None:
        request.tokens += 1
        if request.tokens % self.pager.page == 1:
            request.pages = np.append(request.pages, self.allocate(1))
            self.hold(request.rid, request.pages[-1:])
            self.write(self.slots_of(request.pages[-1:]))
        self.lookahead.begin_step()

    def after_decode(self, request: Request) -> None:
        if request.tokens % self.pager.page == 0:
            self.pager.store(request.pages[-1:])
        self.lookahead.refresh(self.lookahead.end_step([request]))

    def read(self, request: Request) -> list[int]:
        """Positions of the complete pages that attention reads before the tail, found by their content."""
        places = self.table.pages[request.row, : int(self.table.count[request.row])].long() * self.pager.page
        slots = self.found_at((places[:, None] + torch.arange(self.pager.page)).flatten())
        pages = [slot // self.pager.page for slot in slots[:: self.pager.page]]
        assert slots == self.slots_of(pages).tolist(), "whole pages"
        return [request.pages.tolist().index(page) for page in pages]

    def held_positions(self, request: Request) -> list[int]:
        held = self.pager.ledger.held_by(request.rid)
        return [position for position, page in enumerate(request.pages.tolist()) if page in held]


def given_sets(text: str) -> tuple[GivenSet, ...]:
    return RequestOptions.parse({"lsa": {"sets": text}}, LSAConfig()).sets


def reads(server: Server, request: Request, steps: int) -> dict[int, tuple[int, list[int]]]:
    """What each decode step reads: where the tail starts, and the positions before it, by tokens of the request."""
    seen = {}
    for _ in range(steps):
        server.before_decode(request)
        seen[request.tokens] = (int(server.table.tail_start[request.row]), server.read(request))
        assert set(server.held_positions(request)) >= {
            *server.read(request),
            *range(seen[request.tokens][0], len(request.pages)),
        }
        server.after_decode(request)
        server.pager.ledger.check()
    return seen


SERVERS = [pytest.param((0, 0, WINDOW), id="cpu"), pytest.param((5, 2, 8), id="gpu")]
"""Lead, lag and window."""


def two_requests(**options: object) -> tuple[Server, Request, Request]:
    """One reads 0, 2, 4, 6, 8 and 11, of falling scores but for both ends; the other 0, 1, 2 and 7."""
    server = Server(**options)
    server.wanted.values = {2: 5.0, 4: 4.0, 6: 3.0, 8: 2.0}
    large = server.prefill("large", 12 * PAGE_SIZE)
    server.wanted.values = {1: 2.0, 2: 1.0}
    small = server.prefill("small", 8 * PAGE_SIZE)
    assert (server.read(large), server.read(small)) == ([0, 2, 4, 6, 8, 11], [0, 1, 2, 7])
    return server, large, small


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("injected")


STAGES: dict[str, Callable[[Server, pytest.MonkeyPatch], None]] = {
    "choose": lambda server, patch: patch.setattr("sglang_lsa.engine.chooser.Ask.alone", fail),
    "recall": lambda server, patch: patch.setattr(server.pager, "hold_if_spare", fail),
    "table": lambda server, patch: patch.setattr(server.table, "remap", fail),
}
"""What a broken stage of a refresh calls."""


class Overlapped(Server):
    """Request ``a`` of 12 pages, in its first window, which began with its first decode step; step 2 is next to end.

    The pages that :data:`NEW` adds to :data:`OLD` have only their copy in the mirror.
    """

    def __init__(self, policy: str = "wanted", tokens: int = 12 * PAGE_SIZE) -> None:
        super().__init__(LEAD, LAG, window=LONG)
        self.wanted.positions = self.queued.positions = [1, 2, 3]
        self.a = self.prefill("a", tokens, policy=policy)
        self.steps = 0
        self.begin_next()
        self.end()
        if policy == "queued":
            self.queued.compute()
        self.begin_next()
        assert self.read(self.a) == [position for position in OLD if position < self.a.resident.tail_start]
        other = self.prefill("b", 17 * PAGE_SIZE, dense=True)
        self.gone(other)
        assert not self.pager.v2p[self.a.pages[[5, 6, 7]]].any()
        self.late(stores=False)
        self.wanted.positions = self.queued.positions = [5, 6, 7]

    def begin_next(self) -> None:
        self.steps += 1
        self.before_decode(self.a)

    def end(self) -> None:
        self.after_decode(self.a)

    def begin(self, step: int) -> None:
        """Go on until decode step ``step`` has begun."""
        while self.steps < step:
            self.end()
            self.begin_next()

    def gone(self, request: Request) -> None:
        self.pager.forget(request.rid)
        self.lookahead.forget(request)
