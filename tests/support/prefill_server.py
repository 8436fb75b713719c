"""A server that prefills prompts over a real pager, and checks all that a pass reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import harness
import numpy as np
import torch
from harness import NONE, Wanted, request
from simulated_gpu import LAYERS

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.engine.reading import Reading
from sglang_lsa.engine.request import Asked, Request
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.engine.step import IDLE
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.patches.batch import batch_of
from sglang_lsa.patches.requests import choose, promise

PHYSICAL, VIRTUAL = 24, 250
CHUNK = 4 * PAGE_SIZE


@dataclass
class Read:
    """What one request's pass read before its own tokens, by what was found there: virtual slots."""

    here: list[int]
    streamed: list[int] = field(default_factory=list)
    look: list[int] | None = None
    """What a first look read, for a resident prefix."""

    @property
    def pages(self) -> list[int]:
        return sorted({slot // PAGE_SIZE for slot in (*self.here, *self.streamed)})


class Server(harness.Server):
    """A runtime, and as much of SGLang as it takes: allocation of pages, batches, and a model that writes its KV."""

    def __init__(
        self, chunk: int | None = CHUNK, physical: int = PHYSICAL, page: int = PAGE_SIZE, **options: object
    ) -> None:
        super().__init__(physical, VIRTUAL, page)
        defaults = {"budget": 0.5, "min_pages": 1, "floor_tokens": 0, "min_context": CHUNK, "window": 8}
        defaults |= {"staging_pages": 3, "recent_pages": 1, "prompt_pages": 0}
        config = LSAConfig(**{**defaults, "debug": True, **options})
        table = torch.zeros((9, VIRTUAL * self.pager.page), dtype=torch.int32)
        self.runtime = LSARuntime(config, self.pager, table, 1, 1.0, chunk)
        self.lookahead, self.prefill, self.admission = (
            self.runtime.lookahead,
            self.runtime.prefill,
            self.runtime.admission,
        )
        self.wanted = Wanted()
        self.lookahead.scorer.policies["quest"] = self.wanted  # type: ignore[index]
        self.chunk = chunk
        self.step = IDLE
        """The last prefill pass, as it was run in the end."""

    @property
    def readings(self) -> tuple[Reading, ...]:
        """Of the pass being queued."""
        assert self.runtime.step.readings is not None
        return self.runtime.step.readings

    def neighbour(self, pages: int | np.ndarray) -> None:
        """Somebody else needs these pages, or so many new ones, on the device."""
        self.hold("neighbour", pages)
        self.runtime.requests["neighbour"] = Request("neighbour", 8, Asked("quest", 1.0, True))

    def look_at(self, reading: Reading) -> Read:
        here = self.found_at(reading.slots(self.ledger.v2p), prefill=True)
        return Read(here, self.found_in_mirror(reading.streamed))

    def slots(self, req: Any, start: int, end: int) -> list[int]:
        return self.prefill.req_to_token[req.req_pool_idx, start:end].tolist()

    # -- batches

    def request(self, tokens: int, prefix: np.ndarray = NONE, rid: str = "a", row: int = 1, **lsa: object) -> Any:
        """A prompt of which the radix tree has the pages ``prefix``."""
        req = request(tokens, prefix, rid, self.pager.page, **lsa)
        req.req_pool_idx, req.computed = row, len(prefix) * self.pager.page
        self.prefill.req_to_token[row, : req.computed] = req.prefix_indices
        return req

    def admit(self, *reqs: Any) -> list[str]:
        batch: list[str] = []
        for req in reqs:
            admitted = choose(self.admission, req, len(batch), batch, self.chunk)
            assert admitted is not None
            promise(self.admission, req, admitted)
            batch.append(admitted.how)
        return batch

    def batch(self, ends: dict[str, int], *reqs: Any) -> tuple[Any, np.ndarray]:
        """A prefill batch, up to so many tokens of each request (by default all), and its new pages."""
        lengths = [ends.get(req.rid, len(req.full_untruncated_fill_ids)) for req in reqs]
        taken = []
        for req, end in zip(reqs, lengths, strict=True):
            first, pages = pages_spanned(req.computed, self.pager.page), pages_spanned(end, self.pager.page)
            new = self.allocate(pages - first)
            taken.append(new)
            row = self.prefill.req_to_token[req.req_pool_idx]
            row[first * self.pager.page : pages * self.pager.page] = self.slots_of(new)
        middle = [req for req, end in zip(reqs, lengths, strict=True) if end < len(req.full_untruncated_fill_ids)]
        batch = SimpleNamespace(
            reqs=list(reqs),
            prefix_lens=[req.computed for req in reqs],
            seq_lens_cpu=torch.tensor(lengths),
            forward_mode=SimpleNamespace(is_extend=lambda: True, is_decode=lambda: False),
            chunked_req=middle[-1] if middle else None,
        )
        return batch, np.concatenate((NONE, *taken))

    def extend(self, *reqs: Any, **ends: int) -> list[Read]:
        """One prefill pass; returns what each request read before its own tokens."""
        return self.run(*self.batch(ends, *reqs))

    def run(self, batch: Any, new_pages: np.ndarray) -> list[Read]:
        number = self.runtime.before_forward(batch_of(batch), new_pages)
        looks: dict[int, list[int]] = {}
        if self.runtime.step.looks:
            looks = {index: self.look_at(self.readings[index]).here for index in self.runtime.step.looks}
            self.runtime.choose_resident()
        reads, self.step = [], self.runtime.step
        for index, (req, end) in enumerate(zip(batch.reqs, batch.seq_lens_cpu.tolist(), strict=True)):
            reading = (
                self.step.readings[index]
                if self.step.readings is not None
                else Reading.all_of(
                    self.runtime.requests[req.rid].pages[: pages_spanned(req.computed, self.pager.page)],
                    req.computed,
                    self.pager.page,
                )
            )
            reads.append(self.look_at(reading))
            reads[-1].look = looks.get(index)
            self.write(self.slots(req, req.computed, end))
            req.computed = end
        staged = self.step.staged
        assert (staged is not None) == any(read.streamed for read in reads)
        if staged is not None:  # as attention does
            assert sum(staged.sizes) == len(reads[0].streamed)
            layers = [torch.cat([torch.stack(block) for block in staged.layer(layer)], 1) for layer in range(LAYERS)]
            assert self.recognized(torch.stack(layers)) == reads[0].streamed
        self.runtime.after_forward(number)
        return reads

    def decode(self, req: Any) -> list[int]:
        """One decode step; returns the virtual slots that it reads."""
        assert self.runtime.can_decode([req.computed])
        tokens = req.computed + 1
        new = self.allocate(int(tokens % self.pager.page == 1))
        row = self.prefill.req_to_token[req.req_pool_idx]
        row[req.computed : req.computed + len(new) * self.pager.page] = self.slots_of(new)
        batch = SimpleNamespace(
            reqs=[req],
            seq_lens_cpu=torch.tensor([tokens]),
            forward_mode=SimpleNamespace(is_extend=lambda: False, is_decode=lambda: True),
        )
        number = self.runtime.before_forward(batch_of(batch), new)
        self.write(self.slots(req, req.computed, tokens))
        table, index = self.lookahead.sets.table, req.req_pool_idx
        places = table.pages[index, : int(table.count[index])] * self.pager.page
        read = (places[:, None] + torch.arange(self.pager.page)).flatten().long()
        tail = torch.tensor(self.slots(req, int(table.tail_start[index]) * self.pager.page, tokens), dtype=torch.int64)
        found = self.found_at(torch.cat((read, self.places(tail))))
        req.computed = tokens
        self.runtime.after_forward(number)
        return found

    # -- what tests look at

    def held(self, req: Any) -> list[int]:
        """Positions of the request's pages that it holds."""
        held = self.ledger.held_by(req.rid)
        return [place for place, page in enumerate(self.runtime.requests[req.rid].pages.tolist()) if page in held]
