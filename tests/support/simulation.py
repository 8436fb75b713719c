"""The whole runtime under a simulated SGLang and a simulated GPU, both driven by a seed: every read is checked when it
runs.

    python tests/support/simulation.py --seeds 2000 [--first 0] [--jobs 2] [--steps 150]

What is real: the runtime with ledger, pager, lookahead, admission and prefill. What is a model: SGLang's loop with one
result of delay, its radix tree, its allocator (``simulated_cache``), and the streams of a GPU (``simulated_gpu``). KV
is the number of a (text, position), so that a read of anything else is seen by the pass that reads it.
"""

from __future__ import annotations

import argparse
import collections
import logging
import multiprocessing
import random
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from simulated_cache import NONE, Allocator, Node, Tree
from simulated_gpu import LAYERS, SimulatedGPU

from sglang_lsa.admission import key_of
from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.pages import pages_complete, pages_spanned
from sglang_lsa.policies import Request
from sglang_lsa.radix_ext.pager import Pager
from sglang_lsa.reading import RESIDENT
from sglang_lsa.runtime import LSARuntime

ROWS = 8
"""Requests that run at the same time."""
CHANGES: tuple[tuple[str, list[Any]], ...] = (
    ("policy", ["full", "quest", "recency"]),
    ("budget", [0.05, 0.3]),
    ("prefill", ["resident", "exact"]),
    ("dense_steps", [0, 9]),
    ("threshold", [None, 0.5]),
)
"""What an administrator changes while the server runs."""
IDLE_STEPS = 200
"""Steps in which nothing runs although requests wait, before that counts as stuck."""


class Scores:
    """Random scores; sometimes none, sometimes no numbers, sometimes an error."""

    def __init__(self, chance: random.Random):
        self.chance = chance

    def score(self, request: Request, pages: np.ndarray) -> np.ndarray:
        numbers = np.random.default_rng(self.chance.randrange(1 << 30))
        scores = numbers.random(len(pages))
        scores[numbers.random(len(pages)) < 0.3] = 0.0
        what = self.chance.random()
        if what < 0.02:
            raise RuntimeError("injected: no scores")
        if what < 0.05:
            scores[:] = np.nan
        elif what < 0.08:
            scores[::2] = -np.inf
        return scores


@dataclass(eq=False)
class Req:
    """SGLang's request, as far as our code reads it, and what the simulated scheduler remembers of it."""

    rid: str
    number: int
    prompt: np.ndarray
    """Content of its prompt, one number a token."""
    sampling_params: SimpleNamespace
    priority: int = 0
    origin_input_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    full_untruncated_fill_ids: list[int] = field(default_factory=list)
    prefix_indices: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    req_pool_idx: int = 0
    extra_key: str | None = None
    kv_committed_len: int = 0
    pages: list[int] = field(default_factory=list)
    matched: list[Node] = field(default_factory=list)
    locked: Node | None = None
    protected: int = 0
    """Its first pages that are the tree's."""
    gone: bool = False
    """Finished, aborted or retracted: what is in flight of it does not count."""
    aborted: bool = False
    between_chunks: bool = False

    def content(self, tokens: int) -> np.ndarray:
        """Of its first tokens, generated ones included."""
        generated = 1e12 + self.number * 1e6 + np.arange(len(self.prompt), tokens)
        return np.concatenate((self.prompt, generated))[:tokens]


@dataclass
class Entry:
    """A prompt's part of a pass."""

    req: Req
    start: int
    end: int


class Simulation:
    """One server from its start until everything that was asked is answered."""

    def __init__(self, seed: int, resident: float = 0.4):
        self.seed, self.chance = seed, random.Random(seed)
        chance = self.chance
        physical, virtual = chance.choice([16, 24, 40]), chance.choice([120, 250])
        self.chunk: int = chance.choice([2, 4, 8]) * PAGE_SIZE
        self.resident = resident
        self.config = {
            "budget": chance.choice([0.1, 0.2, 0.5]),
            "min_pages": chance.choice([1, 4]),
            "min_context": chance.choice([4, 8]) * PAGE_SIZE,
            "window": 8,
            "prefetch_steps": 3,
            "recent_pages": chance.choice([1, 4]),
            "prompt_pages": chance.choice([0, 2]),
            "staging_pages": 3,
            "dense_steps": chance.choice([0, 0, 5]),
            "cache_outputs": chance.random() < 0.2,
            "prompt_lookup": 0,
        }
        keys, values = (
            [torch.zeros(((physical + 1) * PAGE_SIZE, 1, 1), dtype=torch.float64) for _ in range(LAYERS)]
            for _ in range(2)
        )
        self.pager = Pager(keys, values, virtual, PAGE_SIZE)
        self.req_to_token = torch.zeros((ROWS + 1, virtual * PAGE_SIZE), dtype=torch.int32)
        config = LSAConfig.from_mapping(self.config)
        self.runtime = LSARuntime(config, self.pager, self.req_to_token, 1, 1.0, self.chunk)
        self.gpu = SimulatedGPU(self.pager, chance)
        self.overlap = chance.random() < 0.7
        lookahead = self.runtime.lookahead
        lookahead.lag, lookahead.lead = chance.choice([(2, 3), (2, 3), (0, 0)]) if self.overlap else (0, 0)
        lookahead.policies = {**lookahead.policies, "quest": Scores(chance)}
        self.allocator = Allocator(self.pager)
        self.tree = Tree(self.allocator)
        self.free_rows = list(range(1, ROWS + 1))
        self.waiting: list[Req] = []
        self.running: list[Req] = []
        self.prefilled: list[Req] = []
        """Prompts of the pass before, which decode from now on."""
        self.chunked: Req | None = None
        self.results: list[tuple[list[Entry] | list[Req], int]] = []
        self.arrivals = 40
        self.arrived = self.step_number = 0
        self.counts: collections.Counter[str] = collections.Counter()

    def __str__(self) -> str:
        sizes = f"{self.pager.ledger.physical_pages} device pages, {self.pager.ledger.virtual_pages} host pages"
        timing = f"lag {self.runtime.lookahead.lag}, overlap {self.overlap}, chunks of {self.chunk // PAGE_SIZE}"
        return f"seed {self.seed} at step {self.step_number}: {sizes}, {timing}, {self.config}"

    def run(self, steps: int = 150) -> None:
        """``steps`` rounds of the scheduler with new requests, then as many as it takes without.

        Raises:
            AssertionError, or what the runtime raises: something is wrong.
        """
        for _ in range(steps):
            self.step()
        self.arrivals = idle = 0
        while self.waiting or self.running or self.prefilled or self.chunked or self.results:
            idle = 0 if self.step() else idle + 1
            assert idle < IDLE_STEPS, f"stuck: {[req.rid for req in self.waiting]} wait, promised: {self._promised()}"
        self.pager.settle()
        self.runtime.on_idle()
        self.check()
        assert not self.runtime.requests and not self.runtime.admission.admitted, "requests are left"
        assert not self._promised() and not self.pager.ledger.held_pages, "pages are left"
        assert self.runtime.failed_batches == self.runtime.integrity_failures == 0
        self.pager.reset()
        lookahead, ledger = self.runtime.lookahead, self.pager.ledger
        self.counts.update(
            recalled=ledger.recalls,
            evicted=ledger.evictions,
            stalls=lookahead.stalls,
            shrunk=lookahead.shrunk,
            failures=lookahead.failures,
        )

    # -- one round of the scheduler ------------------------------------------------------------------------------

    def step(self) -> bool:
        """As SGLang: choose a batch, run it, then look at the result of the one before. Returns whether one ran."""
        self.step_number += 1
        self._surroundings()
        self.gpu.progress(self.chance.choice([0, 0, 1, 3, 8]))
        if self.chunked is not None and self.chunked.between_chunks:
            self._cache_unfinished(self.chunked, self.chunked.kv_committed_len)
            self.chunked.between_chunks = False
        self.running += [req for req in self.prefilled if not req.gone]
        self.prefilled = []
        if entries := self._prompts():
            self._prefill(entries)
            self.prefilled = [entry.req for entry in entries if entry.req is not self.chunked]
        else:
            self.running = [req for req in self.running if not req.gone]
            if self.running:
                self._make_room()
            if self.running:
                self._decode(list(self.running))
        ran = bool(entries or self.running)
        self.gpu.progress(self.chance.choice([0, 0, 1, 3, 8]))
        while len(self.results) > (self.overlap and ran):
            self._take_result(*self.results.pop(0))
        if not ran and not self.waiting and self.chunked is None:
            self.runtime.on_idle()
            self.counts["idle"] += 1
        if self.chance.random() < 0.3:
            self.check()
        return ran

    def check(self) -> None:
        """What must hold between two rounds."""
        self.runtime.check()
        assert self.pager.unpromised_later >= 0, f"more is promised than can be had: {self._promised()}"

    def _promised(self) -> dict[str, int]:
        reservations = self.pager.reservations
        return {holder: reservations.owed(holder) for holder in reservations.holders()}

    # -- what clients and administrators do ----------------------------------------------------------------------

    def _surroundings(self) -> None:
        chance = self.chance
        if chance.random() < 0.25 and len(self.waiting) < 6 and self.arrivals:
            self.arrivals -= 1
            self._arrive()
        if chance.random() < 0.02 and self.running:
            chance.choice(self.running).aborted = True
        if chance.random() < 0.02 and self.waiting:
            self._leave_queue(self.waiting.pop(chance.randrange(len(self.waiting))))
        if chance.random() < 0.03 and self.chunked is not None:
            self._end(self.chunked, insert=False)
            self.chunked = None
            self.counts["aborted in a prompt"] += 1
        if chance.random() < 0.02:
            name, values = chance.choice(CHANGES)
            self.runtime.reconfigure({name: chance.choice(values)})
            self.counts["reconfigured"] += 1

    def _leave_queue(self, req: Req) -> None:
        """SGLang drops an aborted request from its queue without a word to the cache."""
        self.counts["aborted in the queue"] += 1

    def _arrive(self) -> None:
        chance = self.chance
        self.arrived += 1
        document = chance.randrange(3)
        shared = chance.choice([0, 3, 10, 13, 20, 30]) * PAGE_SIZE
        own = chance.randrange(1, 6 * PAGE_SIZE)
        if chance.random() < 0.1:  # one that fills the device pool, and grows
            own = max(1, (self.pager.ledger.physical_pages - 2) * PAGE_SIZE - shared)
        prompt = np.concatenate((1 + document * 1e6 + np.arange(shared), 1e9 + self.arrived * 1e6 + np.arange(own)))[
            : self.pager.ledger.virtual_pages // 3 * PAGE_SIZE
        ]
        rid = f"r{self.arrived}"
        alive = [*self.running, *self.prefilled, *([self.chunked] if self.chunked else [])]
        if alive and chance.random() < 0.1:
            rid = chance.choice(alive).rid  # its client hung up and asks again
            self.counts["rid again"] += 1
        params = SimpleNamespace(custom_params=self._options(), max_new_tokens=chance.choice([1, 5, 40, 150, 300]))
        req = Req(rid, self.arrived, prompt, params, chance.randrange(2), [int(token) for token in prompt])
        if (reason := self.runtime.admission.refusal(req)) is not None:
            # SGLang computes one token of a request that it aborts.
            assert "budget" in reason or "tokens" in reason or "sets" in reason, reason
            self.counts["refused"] += 1
            req.prompt, req.origin_input_ids, params.max_new_tokens = np.zeros(1), [0], 1
        self.waiting.append(req)

    def _options(self) -> dict[str, Any] | None:
        chance, options = self.chance, dict[str, Any]()
        if chance.random() < 0.15:
            options["policy"] = "full"
        elif chance.random() < 0.3:
            options["budget"] = chance.choice([0.05, 0.3, 0.8])
        if chance.random() < self.resident:
            options["prefill"] = "resident"
        if chance.random() < 0.15:
            options["dense_steps"] = chance.choice([6, 1000])
        elif chance.random() < 0.05:
            options["sets"] = "1900:20:0,1,2;1950:22:0,3"
        if chance.random() < 0.03:
            options["budget"] = -1
        return {"lsa": options} if options else None

    # -- admission -----------------------------------------------------------------------------------------------

    def _prompts(self) -> list[Entry]:
        """The prompts of the next pass, admitted as ``PrefillAdder`` and its hooks do."""
        entries: list[Entry] = []
        hows: list[str] = []
        left = self.chunk
        admission = self.runtime.admission
        if (req := self.chunked) is not None:
            how = admission.admitted_as(req)
            left = min(left, how.chunk_tokens or left)
            start = req.kv_committed_len
            end = min(len(req.full_untruncated_fill_ids), start + left)
            if not self._make_virtual_room(pages_spanned(end) - pages_spanned(start)):
                self._end(req, insert=False)
                self.chunked = None
            else:
                entries.append(Entry(req, start, end))
                hows.append(how.how)
                left -= pages_spanned(end - start) * PAGE_SIZE
                self._continue(req, end)
        middle = self.chunked
        for req in list(self.waiting):
            if left <= 0 or len(entries) >= len(self.free_rows):
                break
            self._begin_round(req)
            how = admission.choose(req, len(self.running) + len(entries), hows, left)
            lower = [other for other in self.running if not other.gone and other.priority < req.priority]
            if how is None and not entries and lower and self.chance.random() < 0.3:
                self._retract(lower[0], "preempted")
                self._begin_round(req)
                how = admission.choose(req, len(self.running), hows, left)
            if how is None:
                break
            left = min(left, how.chunk_tokens or left)
            tokens, start = len(req.full_untruncated_fill_ids), len(req.matched) * PAGE_SIZE
            end = tokens if tokens - start <= left else (start + left) // PAGE_SIZE * PAGE_SIZE
            growing = 2 * (len(self.running) + len(entries)) + pages_spanned(tokens) - pages_spanned(start)
            growing += sum(pages_spanned(entry.end) - pages_spanned(entry.start) for entry in entries)
            if end <= start or (end < tokens and middle is not None):
                break
            self._lock(req, req.matched)
            if not self._make_virtual_room(growing):
                self._lock(req, [])
                break
            req.pages, req.protected, req.gone = [node.page for node in req.matched], len(req.matched), False
            admission.promise(req, how)
            hows.append(how.how)
            self.waiting.remove(req)
            entries.append(Entry(req, start, end))
            left -= pages_spanned(end - start) * PAGE_SIZE
            if end < tokens:
                middle = req
                self._continue(req, end)
        return entries

    def _continue(self, req: Req, end: int) -> None:
        middle = end < len(req.full_untruncated_fill_ids)
        self.chunked, req.between_chunks = (req if middle else None), middle

    def _begin_round(self, req: Req) -> None:
        """As SGLang: the last tokens are computed even on a full hit."""
        req.full_untruncated_fill_ids = req.origin_input_ids + req.output_ids
        tokens = len(req.full_untruncated_fill_ids)
        req.matched = self.tree.match(req.content(tokens)[: max(0, tokens - 32)])
        req.prefix_indices = _slots([node.page for node in req.matched])

    def _make_virtual_room(self, pages: int) -> bool:
        if pages > len(self.allocator.free):
            self.tree.evict(pages - len(self.allocator.free))
        return pages <= len(self.allocator.free)

    def _make_room(self) -> None:
        """SGLang's ``check_decode_mem``, and retraction."""

        def enough(reqs: Sequence[Req]) -> bool:
            opening = sum(req.kv_committed_len % PAGE_SIZE == 0 for req in reqs)
            return self._make_virtual_room(opening) and self.runtime.can_decode(reqs)

        if not enough(self.running) or self.chance.random() < 0.004:
            while len(self.running) > 1:
                self._retract(self.chance.choice(self.running), "retracted")
                if enough(self.running):
                    break
            assert enough(self.running), f"{self.running[0].rid} finds no page although it is alone"

    def _retract(self, req: Req, why: str) -> None:
        self.running.remove(req)
        self._end(req, insert=False)
        self.waiting.append(req)
        self.counts[why] += 1

    # -- passes --------------------------------------------------------------------------------------------------

    def _prefill(self, entries: list[Entry]) -> None:
        for entry in entries:
            req = entry.req
            if not req.req_pool_idx:
                req.req_pool_idx = self.free_rows.pop(0)
                self._write_row(req)
            req.pages = req.pages + self.allocator.allocate(pages_spanned(entry.end) - len(req.pages))
            req.kv_committed_len = entry.end
            self._write_row(req)
        batch = SimpleNamespace(
            reqs=[entry.req for entry in entries],
            prefix_lens=[entry.start for entry in entries],
            seq_lens_cpu=torch.tensor([entry.end for entry in entries]),
            chunked_req=self.chunked,
            forward_mode=SimpleNamespace(is_extend=lambda: True, is_decode=lambda: False),
        )
        number = self.runtime.before_forward(batch, self.allocator.take_new_pages())
        if self.runtime.looks_first:
            self._queue_prefill(entries)
            if self.chance.random() < 0.5:  # scores that the device computes
                self.gpu.compute_to(len(self.gpu.compute))
            self.runtime.choose_resident()
        self._queue_prefill(entries)
        for entry in entries:
            self.counts[self.runtime.admission.admitted_as(entry.req).how] += 1
        self.runtime.after_forward(batch, number)
        self.results.append((entries, len(self.gpu.compute)))

    def _queue_prefill(self, entries: list[Entry]) -> None:
        reads, writes = [], []
        for index, entry in enumerate(entries):
            req, prefill = entry.req, self.runtime.prefill
            known = req.content(entry.start)
            reading = prefill.readings[index] if prefill.readings is not None else None
            if reading is None:
                here, streamed = np.arange(pages_spanned(entry.start)), NONE
            else:
                place = {page: position for position, page in enumerate(req.pages)}
                here = np.array([place[page] for page in reading.here.tolist()], dtype=np.int64)
                streamed = np.array([place[page] for page in reading.streamed.tolist()], dtype=np.int64)
                if self.runtime.admission.admitted_as(req).how != RESIDENT:
                    assert reading.tokens_here + len(streamed) * PAGE_SIZE == entry.start, "a prompt reads everything"
            reads.append(_Read(req.rid, self._physical(req, here, entry.start), _of(known, here)))
            if len(streamed):
                reads.append(_Read(req.rid, NONE, _of(known, streamed), np.array(req.pages)[streamed]))
            writes.append(self._written(req, entry.start, entry.end))
        self.gpu.queue(lambda layer: self._compute(layer, reads, writes), prefill=True)

    def _decode(self, reqs: list[Req]) -> None:
        for req in reqs:
            req.kv_committed_len += 1
            if opened := self.allocator.allocate(pages_spanned(req.kv_committed_len) - len(req.pages)):
                req.pages = req.pages + opened
                self._write_row(req)
        batch = SimpleNamespace(
            reqs=reqs,
            seq_lens_cpu=torch.tensor([req.kv_committed_len for req in reqs]),
            forward_mode=SimpleNamespace(is_extend=lambda: False, is_decode=lambda: True),
        )
        number = self.runtime.before_forward(batch, self.allocator.take_new_pages())
        table = self.runtime.lookahead.table
        reads, writes = [], []
        for req in reqs:
            request, row = self.runtime.requests[key_of(req)], req.req_pool_idx
            count, tail_start = int(table.count[row]), int(table.tail_start[row])
            assert (count, tail_start) == (len(request.positions), request.tail_start), "the table has another set"
            assert int(table.shortening[row]) == (tail_start - count) * PAGE_SIZE
            before = req.kv_committed_len - 1
            known = req.content(before)
            physical = table.pages[row, :count].numpy().astype(np.int64)
            resident = (physical[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).flatten()
            tail = self._physical(req, np.arange(tail_start, pages_spanned(before)), before)
            content = np.concatenate((_of(known, request.positions), known[tail_start * PAGE_SIZE :]))
            reads.append(_Read(req.rid, np.concatenate((resident, tail)), content))
            writes.append(self._written(req, before, before + 1))
        self.gpu.queue(lambda layer: self._compute(layer, reads, writes), prefill=False)
        self.counts["decoded"] += len(reqs)
        self.runtime.after_forward(batch, number)
        self.results.append((reqs, len(self.gpu.compute)))

    def _written(self, req: Req, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots and content of the tokens that a pass computes."""
        first = pages_complete(start)
        slots = self._physical(req, np.arange(first, pages_spanned(end)), end)
        return slots[start - first * PAGE_SIZE :], req.content(end)[start:]

    def _physical(self, req: Req, positions: np.ndarray, tokens: int) -> np.ndarray:
        """Slots of the device pool of these pages of a request, of which it has ``tokens`` tokens."""
        pages = self.pager.ledger.v2p[np.array(req.pages, dtype=np.int64)[positions]]
        slots = pages[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)
        return slots.flatten()[(positions[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).flatten() < tokens]

    def _compute(self, layer: int, reads: list[_Read], writes: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """One layer of a pass runs now."""
        for which, pool in enumerate((self.pager.keys[layer], self.pager.values[layer])):
            memory = pool.view(-1).numpy()
            for read in reads:
                assert (read.slots >= PAGE_SIZE).all(), f"{read.rid} reads a page that is not on the device"
                found = memory[read.slots]
                if len(read.mirrored):
                    found = self.pager.mirror.pages[read.mirrored, layer, which].flatten().numpy()
                wrong = np.flatnonzero(found != read.content)
                assert not len(wrong), (
                    f"{read.rid} reads {len(wrong)} of {len(found)} wrong tokens in layer {layer}, "
                    f"{found[wrong[0]]:.0f} for {read.content[wrong[0]]:.0f}"
                )
            for slots, content in writes:
                assert (slots >= PAGE_SIZE).all(), "a pass writes to a page that is not on the device"
                memory[slots] = content

    # -- results, and the cache ----------------------------------------------------------------------------------

    def _take_result(self, batch: list[Entry] | list[Req], place: int) -> None:
        self.gpu.compute_to(place)
        for item in batch:
            req = item.req if isinstance(item, Entry) else item
            if req.gone or (isinstance(item, Entry) and item.end < len(req.full_untruncated_fill_ids)):
                continue
            req.output_ids.append(1)
            most = req.sampling_params.max_new_tokens
            ended = len(req.output_ids) >= most or (most < 300 and self.chance.random() < 0.01)
            if ended or req.aborted:
                self._end(req, insert=True)
                self.counts["finished"] += 1
            elif isinstance(item, Entry):
                self._cache_unfinished(req, item.end)

    def _cache_unfinished(self, req: Req, tokens: int) -> None:
        """As ``LSARadixCache.cache_unfinished_req``."""
        if not (self.runtime.config.cache_outputs or self.runtime.is_exact(req)):
            return
        content = req.content(tokens)
        known = [node.page for node in self.tree.match(content)]
        own = self.runtime.pages_known(req)
        self.runtime.pages_replaced(req, tokens, own, np.array(known, dtype=np.int64))
        nodes, duplicates = self.tree.insert(content, req.pages)
        req.pages[: len(nodes)] = [node.page for node in nodes]
        self._write_row(req)
        self.allocator.release(duplicates)
        req.protected = len(nodes)
        self._lock(req, nodes)

    def _end(self, req: Req, insert: bool) -> None:
        """As ``LSARadixCache.cache_finished_req``."""
        outputs = self.runtime.config.cache_outputs
        insert = insert and (outputs or self.runtime.is_exact(req))
        self.runtime.request_gone(req)
        keep = req.kv_committed_len
        if insert and not outputs:
            keep = min(keep, max(len(req.origin_input_ids), req.protected * PAGE_SIZE))
        kept = req.protected
        if insert:
            nodes, duplicates = self.tree.insert(req.content(keep), req.pages)
            self.allocator.release(duplicates)
            kept = max(kept, len(nodes))
        self.allocator.release(req.pages[kept:])
        self._lock(req, [])
        self.free_rows.append(req.req_pool_idx)
        req.pages, req.req_pool_idx, req.protected, req.kv_committed_len, req.gone = [], 0, 0, 0, True

    def _lock(self, req: Req, nodes: list[Node]) -> None:
        for node in req.locked.line() if req.locked is not None else ():
            node.locks -= 1
        req.locked = nodes[-1] if nodes else None
        for node in req.locked.line() if req.locked is not None else ():
            node.locks += 1

    def _write_row(self, req: Req) -> None:
        slots = _slots(req.pages)
        self.req_to_token[req.req_pool_idx, : len(slots)] = slots.int()


@dataclass(frozen=True)
class _Read:
    """What a pass reads of one request, and what it must find: slots of the device pool, or pages of the mirror."""

    rid: str
    slots: np.ndarray
    content: np.ndarray
    mirrored: np.ndarray = field(default_factory=lambda: NONE)


def _slots(pages: Sequence[int]) -> torch.Tensor:
    return (torch.tensor(pages, dtype=torch.int64)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()


def _of(content: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Content of the pages at ``positions``, the last of which may be partly filled."""
    places = (positions[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).flatten()
    return content[places[places < len(content)]]


def failure_of(seed: int, steps: int = 150) -> tuple[str | None, collections.Counter[str]]:
    """Run one seed: what went wrong (None: nothing), and what happened how often."""
    simulation = Simulation(seed)
    try:
        simulation.run(steps)
    except Exception:
        return f"{simulation}\n{traceback.format_exc(limit=-6)}", simulation.counts
    return None, simulation.counts


def _quiet() -> None:
    logging.disable(logging.CRITICAL)  # injected failures are logged with their tracebacks
    torch.set_num_threads(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when every seed ended well, 1 when one did not."""
    parser = argparse.ArgumentParser(description="Run the simulation for many seeds.")
    parser.add_argument("--seeds", type=int, default=200, help="how many (200)")
    parser.add_argument("--first", type=int, default=0, help="the first one (0)")
    parser.add_argument("--steps", type=int, default=150, help="scheduler rounds in which requests arrive (150)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (1)")
    args = parser.parse_args(argv)
    began, total, failed = time.monotonic(), collections.Counter[str](), 0
    work = [(seed, args.steps) for seed in range(args.first, args.first + args.seeds)]
    with multiprocessing.Pool(args.jobs, initializer=_quiet) as pool:
        for done, (failure, counts) in enumerate(pool.imap(_run, work), 1):
            total += counts
            if failure is not None:
                failed += 1
                print(failure)
            if done % 100 == 0:
                seconds = time.monotonic() - began
                print(f"{done} of {args.seeds} seeds, {failed} failed, {seconds:.0f} s", file=sys.stderr)
    print(f"{args.seeds} seeds, {failed} failed: " + ", ".join(f"{what} {n}" for what, n in sorted(total.items())))
    return int(failed > 0)


def _run(work: tuple[int, int]) -> tuple[str | None, collections.Counter[str]]:
    return failure_of(*work)


if __name__ == "__main__":
    sys.exit(main())
