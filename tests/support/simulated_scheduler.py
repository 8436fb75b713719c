"""SGLang's scheduler, as the runtime sees it: chunks, retraction, preemption, and results that come one pass late."""

from __future__ import annotations

import collections
import random
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from simulated_cache import NONE, Allocator, Node, Tree
from simulated_gpu import SimulatedGPU
from simulated_work import Entry, ForwardPass, Memory, Req, slots_of

from sglang_lsa.engine.reading import RESIDENT
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.memory.resident_table import COUNT, PAGES, TAIL_START
from sglang_lsa.patches.batch import batch_of
from sglang_lsa.patches.requests import can_decode, choose, key_of, leaves_room, promise, request_gone


class Scheduler:
    """One round of it is :meth:`step`.

    Args:
        gpu: on which its passes run.
        chance: decides what SGLang decides by load and time.
        chunk: tokens of prefill in one pass.
        overlap: the next pass is queued before the result of the last one is looked at.
    """

    def __init__(self, runtime: LSARuntime, gpu: SimulatedGPU, chance: random.Random, chunk: int, overlap: bool):
        self.runtime, self.gpu, self.chance, self.chunk, self.overlap = runtime, gpu, chance, chunk, overlap
        self.pager, self.slots, self.page = runtime.pager, runtime.req_to_token.numpy(), runtime.pager.page
        self.allocator = Allocator(self.pager)
        self.tree = Tree(self.allocator)
        self.memory = Memory(self.pager)
        self.free_rows = list(range(1, len(self.slots)))
        self.waiting: list[Req] = []
        self.running: list[Req] = []
        self.prefilled: list[Req] = []
        """Prompts of the pass before, which decode from now on."""
        self.chunked: Req | None = None
        self.results: list[tuple[list[Entry] | list[Req], int]] = []
        self.members: set[str] = set()
        """Requests that were in a group in the last decode step, in the middle of their windows."""
        self.counts: collections.Counter[str] = collections.Counter()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self.prefilled or self.chunked or self.results)

    @property
    def alive(self) -> list[Req]:
        """Requests that have KV."""
        return [*self.running, *self.prefilled, *([self.chunked] if self.chunked else [])]

    def step(self) -> bool:
        """As SGLang: choose a batch, run it, then look at the result of the one before. Returns whether one ran."""
        self.gpu.progress(self.chance.choice([0, 0, 1, 3, 8]))
        if self.chunked is not None and self.chunked.between_chunks:
            self._cache_unfinished(self.chunked, self.chunked.kv_committed_len)
            self.chunked.between_chunks = False
        self.running += [req for req in self.prefilled if not req.gone]
        self.prefilled = []
        decoding = [req for req in self.running if not req.gone]
        waits = self.runtime.pace.prompts_wait(
            len(decoding), step_fits=lambda: self._step_fits(decoding), chunked=self.chunked is not None
        )
        if not waits and (entries := self._prompts()):
            part = all(entry.req is self.chunked for entry in entries)
            self.runtime.pace.computed(sum(entry.end - entry.start for entry in entries), part)
            self._prefill(entries)
            self.prefilled = [entry.req for entry in entries if entry.req is not self.chunked]
        else:
            entries = []
            self.running = [req for req in self.running if not req.gone]
            if self.running:
                self._make_room()
            if self.running:
                self.counts["decoded between chunks"] += self.chunked is not None
                self._decode(list(self.running))
        ran = bool(entries or self.running)
        self.gpu.progress(self.chance.choice([0, 0, 1, 3, 8]))
        while len(self.results) > (self.overlap and ran):
            self._take_result(*self.results.pop(0))
        if not ran and not self.waiting and self.chunked is None:
            self.runtime.on_idle()
            self.counts["idle"] += 1
        return ran

    def abort_chunked(self) -> None:
        """The client of the prompt that is being computed in chunks has gone."""
        if self.chunked is not None:
            self._end(self.chunked, insert=False)
            self.chunked = None

    # -- admission -----------------------------------------------------------------------------------------------

    def _prompts(self) -> list[Entry]:
        """The prompts of the next pass, admitted as ``PrefillAdder`` and its hooks do."""
        entries: list[Entry] = []
        hows: list[str] = []
        left = self.chunk
        admission = self.runtime.admission
        if (req := self.chunked) is not None:
            chunked = admission.admitted[key_of(req)]
            left = min(left, chunked.chunk_tokens or left)
            start = req.kv_committed_len
            end = min(len(req.full_untruncated_fill_ids), start + left)
            assert self._make_virtual_room(self._pages_between(start, end)), f"{req.rid} has no memory for its chunk"
            entries.append(Entry(req, start, end))
            hows.append(chunked.how)
            left -= pages_spanned(end - start, self.page) * self.page
            self._continue(req, end)
        middle = self.chunked
        for req in list(self.waiting):
            if left <= 0 or len(entries) >= len(self.free_rows):
                break
            self._begin_round(req)
            how = choose(admission, req, len(self.running) + len(entries), hows, left)
            lower = [other for other in self.running if not other.gone and other.priority < req.priority]
            if how is None and not entries and lower and self.chance.random() < 0.3:
                self._retract(lower[0], "preempted")
                self._begin_round(req)
                how = choose(admission, req, len(self.running), hows, left)
            if how is None:
                break
            left = min(left, how.chunk_tokens or left)
            tokens, start = len(req.full_untruncated_fill_ids), len(req.matched) * self.page
            end = tokens if tokens - start <= left else (start + left) // self.page * self.page
            growing = 2 * (len(self.running) + len(entries)) + self._pages_between(start, tokens)
            growing += sum(self._pages_between(entry.start, entry.end) for entry in entries)
            if end <= start or (end < tokens and middle is not None):
                break
            self._lock(req, req.matched)
            if not self._make_virtual_room(growing):
                self._lock(req, [])
                break
            req.pages, req.protected, req.gone = [node.page for node in req.matched], len(req.matched), False
            promise(admission, req, how)
            hows.append(how.how)
            self.waiting.remove(req)
            entries.append(Entry(req, start, end))
            left -= pages_spanned(end - start, self.page) * self.page
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
        req.matched = self.tree.match(req.keys(max(0, tokens - 32)))
        req.prefix_indices = torch.from_numpy(slots_of([node.page for node in req.matched], self.page))

    def _pages_between(self, start: int, end: int) -> int:
        return pages_spanned(end, self.page) - pages_spanned(start, self.page)

    def _make_virtual_room(self, pages: int) -> bool:
        if pages > len(self.allocator.free):
            self.tree.evict(pages - len(self.allocator.free))
        return pages <= len(self.allocator.free)

    def _step_fits(self, decoding: Sequence[Req]) -> bool:
        if self.chunked is None:
            return True
        pages = len(self.allocator.free) + sum(not node.locks for node in self.tree.nodes)
        fits = leaves_room(self.runtime, decoding, self.chunked, pages * self.page)
        self.counts["computed without delay, for want of memory"] += not fits
        return fits

    def _make_room(self) -> None:
        """SGLang's ``check_decode_mem``, and retraction."""

        def enough(reqs: Sequence[Req]) -> bool:
            opening = sum(req.kv_committed_len % self.page == 0 for req in reqs)
            return self._make_virtual_room(opening) and can_decode(self.runtime, reqs)

        if not enough(self.running) or self.chance.random() < 0.004:
            while len(self.running) > 1:
                self._retract(self.chance.choice(self.running), "retracted")
                if enough(self.running):
                    break
            assert enough(self.running), f"{self.running[0].rid} finds no page although it is alone"

    def _retract(self, req: Req, why: str) -> None:
        self.counts[f"member {why}"] += key_of(req) in self.members
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
            self._grow(req, entry.end)
        batch = SimpleNamespace(
            reqs=[entry.req for entry in entries],
            prefix_lens=[entry.start for entry in entries],
            seq_lens_cpu=torch.tensor([entry.end for entry in entries]),
            chunked_req=self.chunked,
            forward_mode=SimpleNamespace(is_extend=lambda: True, is_decode=lambda: False),
        )
        number = self.runtime.before_forward(batch_of(batch), self.allocator.take_new_pages())
        if self.runtime.step.looks:
            self._queue_prefill(entries)
            if self.chance.random() < 0.5:  # scores that the device computes
                self.gpu.compute_to(len(self.gpu.compute))
            self.runtime.choose_resident()
        self._queue_prefill(entries)
        for entry in entries:
            self.counts[self.runtime.admission.admitted[key_of(entry.req)].how] += 1
        self.runtime.after_forward(number)
        self.results.append((entries, len(self.gpu.compute)))

    def _grow(self, req: Req, tokens: int) -> None:
        """The next pass computes the request up to so many tokens."""
        if opened := self.allocator.allocate(pages_spanned(tokens, self.page) - len(req.pages)):
            req.pages = req.pages + opened
            self._write_row(req)
        req.kv_committed_len = tokens

    def _queue_prefill(self, entries: list[Entry]) -> None:
        queued = ForwardPass(self.memory)
        step = self.runtime.step
        for index, entry in enumerate(entries):
            req, pages = entry.req, entry.req.page_array
            reading = step.readings[index] if step.readings is not None else None
            if reading is None:
                here, streamed = np.arange(pages_spanned(entry.start, self.page)), NONE
            else:
                place = {page: position for position, page in enumerate(req.pages)}
                here, streamed = (
                    np.array([place[page] for page in part.tolist()], dtype=np.int64)
                    for part in (reading.here, reading.streamed)
                )
                if self.runtime.admission.admitted[key_of(req)].how != RESIDENT:
                    assert reading.tokens_here + len(streamed) * self.page == entry.start, "a prompt reads everything"
            queued.read(req.rid, queued.v2p[pages[here]], req.known(here, entry.start))
            if len(streamed):
                queued.stream(req.rid, pages[streamed], req.known(streamed, entry.start))
            queued.write(req, entry.start, entry.end)
        self.gpu.queue(queued.run, prefill=True)

    def _decode(self, reqs: list[Req]) -> None:
        for req in reqs:
            self._grow(req, req.kv_committed_len + 1)
        batch = SimpleNamespace(
            reqs=reqs,
            seq_lens_cpu=torch.tensor([req.kv_committed_len for req in reqs]),
            forward_mode=SimpleNamespace(is_extend=lambda: False, is_decode=lambda: True),
        )
        number = self.runtime.before_forward(batch_of(batch), self.allocator.take_new_pages())
        table, queued = self.runtime.lookahead.sets.table, ForwardPass(self.memory)
        rows, shortening = table.table.numpy(), table.shortening
        self._read_in_groups(reqs, queued)
        for req in reqs:
            request, row, before = self.runtime.requests[key_of(req)], req.req_pool_idx, req.kv_committed_len - 1
            count, tail_start = rows[row, COUNT], rows[row, TAIL_START]
            assert (count, tail_start) == (len(request.resident.positions), request.resident.tail_start), (
                "the table has another set"
            )
            assert shortening[row] == (tail_start - count) * self.page
            tail = np.arange(tail_start, pages_spanned(before, self.page))
            if self.runtime.step.grouping is not None:
                queued.write(req, before, before + 1)
                continue
            places = np.concatenate((rows[row, PAGES : PAGES + count], queued.v2p[req.page_array[tail]]))
            queued.read(req.rid, places, req.known(np.concatenate((request.resident.positions, tail)), before))
            queued.write(req, before, before + 1)
        self.gpu.queue(queued.run, prefill=False)
        self.counts["decoded"] += len(reqs)
        self.runtime.after_forward(number)
        self.results.append((reqs, len(self.gpu.compute)))

    def _read_in_groups(self, reqs: list[Req], queued: ForwardPass) -> None:
        """What the requests of a decode step in groups read, which must be all that they chose, and nothing twice."""
        grouping, table = self.runtime.step.grouping, self.runtime.table
        assert self.runtime.step.own_table(table) is (table if grouping is None else grouping.own)
        self.members = set()
        if grouping is None:
            return
        assert sorted(grouping.order) == np.flatnonzero(grouping.places >= 0).tolist()
        rows, groups, virtual = (
            grouping.own.table.numpy(),
            np.repeat(np.arange(len(grouping.sizes)), grouping.sizes),
            {},
        )
        for page, place in enumerate(queued.v2p.tolist()):
            virtual[place] = page
        for index, req in enumerate(reqs):
            request, row, before = self.runtime.requests[key_of(req)], rows[req.req_pool_idx], req.kv_committed_len - 1
            count, tail_start, place = row[COUNT], row[TAIL_START], grouping.places[index]
            assert tail_start == request.resident.tail_start
            assert grouping.own.shortening[req.req_pool_idx] == (tail_start - count) * self.page
            own, shared = row[PAGES : PAGES + count], NONE
            if place >= 0:
                assert grouping.order[place] == index
                shared = grouping.pages[groups[place]]
                self.counts["read in groups"] += len(shared)
                if request.steps_left > 0:
                    self.members.add(request.key)
            elif request.asked.dense:
                self.counts["full attention beside groups"] += 1
            assert place < 0 or not request.asked.dense, f"{req.rid} asked for full attention and is in a group"
            position = {page: position for position, page in enumerate(req.pages)}
            read = [position[virtual[physical]] for physical in (*own.tolist(), *shared.tolist())]
            assert len(read) == len(set(read)), f"{req.rid} reads a page twice"
            chosen = set(request.resident.positions.tolist())
            assert chosen.issubset(read), f"{req.rid} does not read all that it chose"
            assert place >= 0 or len(read) == len(chosen)
            self.counts["read unasked"] += len(read) - len(chosen)
            tail = np.arange(tail_start, pages_spanned(before, self.page))
            assert not len(read) or max(read) < tail_start, f"{req.rid} reads a page of its tail twice"
            for some, places in ((read, np.concatenate((own, shared))), (tail, queued.v2p[req.page_array[tail]])):
                by_position = np.argsort(some)
                queued.read(
                    req.rid, places[by_position], req.known(np.array(some, dtype=np.int64)[by_position], before)
                )

    # -- results, and the cache ----------------------------------------------------------------------------------

    def _take_result(self, batch: list[Entry] | list[Req], place: int) -> None:
        self.gpu.compute_to(place)
        for item in batch:
            req = item.req if isinstance(item, Entry) else item
            if req.gone or (isinstance(item, Entry) and item.end < len(req.full_untruncated_fill_ids)):
                continue
            req.output_ids.append(self._token(req))
            most = req.sampling_params.max_new_tokens
            ended = len(req.output_ids) >= most or (most < 300 and self.chance.random() < 0.01)
            if ended or req.aborted:
                self.counts["member finished" if ended else "member aborted"] += key_of(req) in self.members
                self._end(req, insert=True)
                self.counts["finished"] += 1
            elif isinstance(item, Entry):
                self._cache_unfinished(req, item.end)

    def _token(self, req: Req) -> int:
        """What it generated."""
        return 1

    def _cache_unfinished(self, req: Req, tokens: int) -> None:
        """As ``LSARadixCache.cache_unfinished_req``."""
        if not (self.runtime.config.cache_outputs or self.runtime.shared.is_exact(key_of(req))):
            return
        keys = req.keys(tokens)
        known = [node.page for node in self.tree.match(keys)]
        own = self.runtime.shared.known(key_of(req), req.req_pool_idx)
        self.runtime.shared.replaced(key_of(req), req.req_pool_idx, tokens, own, np.array(known, dtype=np.int64))
        nodes, duplicates = self.tree.insert(keys, req.pages)
        req.pages[: len(nodes)] = [node.page for node in nodes]
        self._write_row(req)
        self.allocator.release(duplicates)
        req.protected = len(nodes)
        self._lock(req, nodes)

    def _end(self, req: Req, insert: bool) -> None:
        """As ``LSARadixCache.cache_finished_req``."""
        outputs = self.runtime.config.cache_outputs
        insert = insert and (outputs or self.runtime.shared.is_exact(key_of(req)))
        request_gone(self.runtime, req)
        keep = req.kv_committed_len
        if insert and not outputs:
            keep = min(keep, max(len(req.origin_input_ids), req.protected * self.page))
        kept = req.protected
        if insert:
            nodes, duplicates = self.tree.insert(req.keys(keep), req.pages)
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
        slots = slots_of(req.pages, self.page)
        self.slots[req.req_pool_idx, : len(slots)] = slots
