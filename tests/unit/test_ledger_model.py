"""The ledger: a state machine against an independent model with bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from ledgers import on_device, pairs, state

from sglang_lsa.memory.heat import HALF_LIFE
from sglang_lsa.memory.ledger import Ledger, LedgerError

# --- random operations against a model -------------------------------------------------------------------------------

VIRTUAL, PHYSICAL = 10, 5
HOLDERS = st.sampled_from("abc")
ANY = st.sets(st.integers(1, VIRTUAL), min_size=1)
FEW = st.sets(st.integers(1, VIRTUAL), min_size=1, max_size=3)
TOKENS = st.lists(st.integers(0, VIRTUAL), min_size=PHYSICAL, max_size=PHYSICAL)


class LedgerMachine(RuleBasedStateMachine):
    """Requests, forward passes and copies at random, on simulated memory.

    The model keeps the words of the documentation: who holds what, which page was used when, which passes are in
    flight and what they read. Content is a number; a new device page holds garbage (None) until it is written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(VIRTUAL, PHYSICAL)
        self.content: dict[int, int | None] = {}  # allocated page -> what it must hold (None: not written yet)
        self.device: dict[int, int] = {}  # page -> physical page
        self.mirrored: set[int] = set()
        self.holders: dict[str, set[int]] = {}
        self.used: dict[int, int] = {}
        self.busy: dict[int, int] = {}  # page -> number of the last pass that may read it
        self.given_up: dict[int, int] = {}  # physical page -> number of the last pass that may read it
        self.reads: dict[int, dict[int, int]] = {}  # pass in flight -> physical page -> content it must find
        self.started = self.finished = self.clock = self.written = 0
        self.device_bytes: dict[int, int | None] = {}
        self.host_bytes: dict[int, int] = {}
        self.recalls: list[dict[int, int]] = []  # copies in flight: physical page -> content on its way
        self.stores: list[list[tuple[int, int, int, int]]] = []  # page, its generation, physical page, content
        self.generations: dict[int, int] = {}
        self.map = np.zeros(VIRTUAL + 1, dtype=np.int64)  # a copy of the page map, as a GPU has one
        self.heat: dict[int, float] = {}
        self.selection = 1.0  # what one selection adds to a page's heat now

    # -- the model's own answers

    def held(self) -> set[int]:
        return set().union(*self.holders.values()) if self.holders else set()

    def evictable(self) -> set[int]:
        return {
            page
            for page in self.device
            if page in self.mirrored
            and page not in self.held()
            and self.busy.get(page, 0) <= self.finished
            and self.device[page] not in self.copied()
        }

    def arriving(self) -> set[int]:
        """Physical pages whose content is on its way."""
        return {place for recall in self.recalls for place in recall}

    def copied(self) -> set[int]:
        """Physical pages that a copy in flight reads or writes."""
        return self.arriving() | {place for store in self.stores for _, _, place, _ in store}

    def readable(self) -> set[int]:
        """Pages with content on the device."""
        arriving = self.arriving()
        return {page for page, place in self.device.items() if self.content[page] is not None and place not in arriving}

    def obtainable_later(self) -> int:
        """Device pages that are free, or can be given up once all passes and copies are done."""
        stored = {
            page for store in self.stores for page, generation, _, _ in store if self.generations[page] == generation
        }
        return PHYSICAL - len(set(self.device) - ((self.mirrored | stored) - self.held()))

    def take_back(self) -> None:
        """Physical pages that nothing in flight touches are free."""
        copied = self.copied()
        self.given_up = {
            place: reader for place, reader in self.given_up.items() if reader > self.finished or place in copied
        }

    def free(self) -> int:
        return PHYSICAL - len(self.device) - len(self.given_up)

    def model_drop(self, holder: str, pages: set[int]) -> None:
        for page in pages & self.holders.get(holder, set()):
            self.holders[holder].discard(page)
            self.busy[page] = self.started
        if not self.holders.get(holder, {0}):
            del self.holders[holder]

    # -- the allocator

    def allocate(self, pages: set[int]) -> None:
        new = sorted(pages - set(self.content))
        self.ledger.allocate(new)
        self.content |= dict.fromkeys(new)
        for page in new:
            self.generations[page] = self.generations.get(page, 0) + 1
            self.heat.pop(page, None)

    @rule(pages=FEW)
    def release(self, pages: set[int]) -> None:
        gone = sorted((pages & set(self.content)) - self.held())
        self.ledger.release(gone)
        for page in gone:
            del self.content[page]
            self.mirrored.discard(page)
            self.used.pop(page, None)
            self.busy.pop(page, None)
            if page in self.device and (self.started > self.finished or self.device[page] in self.copied()):
                self.given_up[self.device.pop(page)] = self.started
            self.device.pop(page, None)

    # -- requests

    @rule(holder=HOLDERS, pages=FEW, late=st.booleans())
    def hold(self, holder: str, pages: set[int], late: bool = False) -> None:
        """``late``: what must be recalled arrives later."""
        self.allocate(pages)
        absent = pages - set(self.device)
        short = len(absent) - self.free()
        possible = self.evictable() - pages
        before = state(self.ledger)
        plan = self.ledger.hold(holder, sorted(pages))
        if plan is None:
            assert short > len(possible), "refused although there was room"
            assert state(self.ledger) == before
            return
        assert short <= len(possible), "granted although there was no room"
        evicted = set(self.device) - on_device(self.ledger)
        assert len(evicted) == max(0, short)
        assert evicted <= possible
        if evicted and possible - evicted:
            spared = possible - evicted
            assert max(self.worth(page) for page in evicted) <= min(self.worth(page) for page in spared)
        for page in evicted:
            del self.device[page]
        recall, fresh = pairs(plan.recall), pairs(plan.fresh)
        assert set(recall) == absent & self.mirrored
        assert set(fresh) == absent - self.mirrored
        for page, place in (recall | fresh).items():
            assert place not in self.device.values(), "two virtual pages share a physical page"
            assert place not in self.given_up, "reused while a forward pass reads it"
            assert place not in self.copied(), "reused while it is being copied"
            assert 1 <= place <= PHYSICAL
            self.device[page] = place
            self.device_bytes[place] = self.host_bytes[page] if page in recall and not late else None
        if recall and late:
            self.recalls.append({place: self.host_bytes[page] for page, place in recall.items()})
            self.ledger.copy_started(plan.recall[1], arriving=True)
        self.holders.setdefault(holder, set()).update(pages)
        self.clock += 1
        self.used |= dict.fromkeys(pages, self.clock)

    def worth(self, page: int) -> tuple[float, int]:
        """Pages with less of it are given up first."""
        return self.heat.get(page, 0.0), self.used[page]

    @rule(pages=FEW)
    def select(self, pages: set[int]) -> None:
        """A resident set has those of ``pages`` that exist."""
        selected = sorted(pages & set(self.content))
        self.ledger.heat.select(np.array(selected, dtype=np.int64))
        for page in selected:
            self.heat[page] = self.heat.get(page, 0.0) + self.selection
        self.selection *= 2 ** (1 / HALF_LIFE)

    @rule(pages=ANY)
    def fetch(self, pages: set[int]) -> None:
        """Somebody brings in, ahead of time, what is worth it; nobody holds it."""
        hottest = sorted(pages, key=lambda page: -self.heat.get(page, 0.0))
        worth = self.ledger.worth_fetching(np.array(hottest, dtype=np.int64)).tolist()
        possible = [page for page in hottest if page in self.mirrored and page not in self.device]
        assert worth == possible[: len(worth)]
        free, coldest = self.free(), sorted(self.heat.get(page, 0.0) for page in self.evictable())
        gains = [self.heat.get(page, 0.0) > cold for page, cold in zip(possible[free:], coldest, strict=False)]
        assert len(worth) == min(len(possible), free) + (gains.index(False) if False in gains else len(gains))
        if worth:
            self.hold("a", set(worth))
            self.drop("a", set(worth))

    @rule(holder=HOLDERS, pages=st.none() | ANY)
    def drop(self, holder: str, pages: set[int] | None = None) -> None:
        self.ledger.drop(holder, pages)
        self.model_drop(holder, set(self.content) if pages is None else pages)

    @rule(holder=HOLDERS, pages=ANY)
    def retain(self, holder: str, pages: set[int]) -> None:
        self.ledger.retain(holder, pages)
        self.model_drop(holder, self.holders.get(holder, set()) - pages)

    @precondition(lambda self: self.copies())
    @rule(choice=st.integers(0, 99), more=st.booleans())
    def substitute(self, choice: int, more: bool) -> None:
        """A page of one request turns out to be in the tree already; its copy is released afterwards."""
        known = self.copies()
        holder, old, new = known[choice % len(known)]
        old_pages, new_pages = [old], [new]
        if more:  # as in use: equal ids in front, of pages that the tree has under the same number
            same = sorted(set(self.content) - {old, new})
            old_pages, new_pages = [*same, old], [*same, new]
        self.ledger.substitute(holder, old_pages, new_pages)
        self.heat[new] = max(self.heat.get(new, 0.0), self.heat.pop(old, 0.0))
        if new not in self.device and old not in self.held_by_others(holder):
            self.device[new] = self.device.pop(old)
            self.used[new] = self.used.pop(old)
            self.busy[new] = self.started
            if old not in self.mirrored:
                self.content[old] = None
        if old in self.holders.get(holder, set()):
            self.model_drop(holder, {old})
            self.holders.setdefault(holder, set()).add(new)
            self.clock += 1
            self.used[new] = self.clock
        if old not in self.held():
            self.release({old})

    def copies(self) -> list[tuple[str, int, int]]:
        """``(holder, old, new)``: two pages with the same tokens.

        A holder that shares the old page with others is left out where the new page would have to be recalled.
        """
        return [
            (holder, old, new)
            for holder in "abc"
            for old in sorted(self.device)
            for new, content in sorted(self.content.items())
            if new != old
            and content is not None
            and content == self.content[old]
            and (
                new in self.device
                or old not in self.held_by_others(holder)
                or old not in self.holders.get(holder, set())
            )
        ]

    def held_by_others(self, holder: str) -> set[int]:
        return {page for name, pages in self.holders.items() if name != holder for page in pages}

    # -- forward passes and copies

    @rule(tokens=TOKENS)
    def start_forward(self, tokens: list[int]) -> None:
        """A pass writes the held pages that have no content yet and reads all held pages.

        A small number in ``tokens`` stands for the tokens that some other page has, too.
        """
        number = self.ledger.forward_started()
        self.started += 1
        assert number == self.started
        empty = [page for page in sorted(self.held()) if self.content[page] is None]
        for choice, page in zip(tokens, empty, strict=False):
            known = [content for content in self.content.values() if content is not None]
            self.written += 1
            self.content[page] = known[choice] if choice < len(known) else self.written
            self.device_bytes[self.device[page]] = self.content[page]
        readable = self.held() & self.readable()
        self.reads[number] = {
            self.device[page]: content for page in readable if (content := self.content[page]) is not None
        }

    @rule(choice=st.integers(0, 99), pages=ANY)
    def finish_forward(self, choice: int, pages: set[int]) -> None:
        """One of the passes in flight reports, those before it are done as well; some pages are mirrored then."""
        if self.reads:
            number = sorted(self.reads)[choice % len(self.reads)]
            self.ledger.forward_finished(number)
            self.finished = number
            self.reads = {other: reads for other, reads in self.reads.items() if other > number}
            self.take_back()
        done = sorted(pages & self.readable())
        self.ledger.mirrored(done)
        self.mirrored.update(done)
        for page in done:
            content = self.device_bytes[self.device[page]]
            assert content is not None
            self.host_bytes[page] = content

    @rule(pages=ANY)
    def start_store(self, pages: set[int]) -> None:
        """Some pages with content are copied to the mirror, while everything else goes on."""
        done = sorted(pages & self.readable())
        if not done:
            return
        self.ledger.copy_started(self.ledger.v2p[done], arriving=False)
        self.stores.append([])
        for page in done:
            content = self.device_bytes[self.device[page]]
            assert content is not None
            self.stores[-1].append((page, self.generations[page], self.device[page], content))

    @precondition(lambda self: self.stores)
    @rule()
    def finish_store(self) -> None:
        """The oldest store is done; it counts for pages that are still the same, in the same place."""
        store = self.stores.pop(0)
        pages, generations, at = (np.array(column) for column in list(zip(*store, strict=True))[:3])
        self.ledger.copy_finished(at, arriving=False)
        same = (self.ledger.generation(pages) == generations) & (self.ledger.v2p[pages] == at)
        self.ledger.mirrored(pages[same])
        for (page, generation, place, content), still in zip(store, same.tolist(), strict=True):
            assert still == (self.generations[page] == generation and self.device.get(page) == place)
            if still:
                self.mirrored.add(page)
                self.host_bytes[page] = content
        self.take_back()

    @precondition(lambda self: self.recalls)
    @rule()
    def finish_recall(self) -> None:
        recall = self.recalls.pop(0)
        self.device_bytes |= recall
        self.ledger.copy_finished(np.array(list(recall)), arriving=True)
        self.take_back()

    @rule()
    def finish_everything(self) -> None:
        """What was promised for later can be had now. Without it, nothing says what "later" means."""
        later = self.ledger.obtainable_later
        self.ledger.forward_finished(self.started)
        self.finished = self.started
        self.reads.clear()
        self.take_back()
        while self.stores:
            self.finish_store()
        while self.recalls:
            self.finish_recall()
        assert self.ledger.obtainable_pages == self.ledger.obtainable_later == later

    @rule()
    def bring_the_map_up_to_date(self) -> None:
        moved = self.ledger.take_moved()
        self.map[moved] = self.ledger.v2p[moved]
        assert (self.map == self.ledger.v2p).all()

    @rule(holder=HOLDERS, pages=FEW, tokens=TOKENS)
    def serve(self, holder: str, pages: set[int], tokens: list[int]) -> None:
        """A short request from beginning to end; its pages stay cached."""
        self.hold(holder, pages)
        self.start_forward(tokens)
        self.finish_forward(-1, pages)
        self.drop(holder)

    @precondition(lambda self: self.started == self.finished and self.clock % 16 == 15)
    @rule()
    def flush(self) -> None:
        for holder in list(self.holders):
            with pytest.raises(LedgerError, match="hold pages"):
                self.ledger.reset()
            self.drop(holder)
        if self.copied():
            with pytest.raises(LedgerError, match="being copied"):
                self.ledger.reset()
            while self.stores:
                self.finish_store()
            while self.recalls:
                self.finish_recall()
        self.ledger.reset()
        for record in (self.content, self.device, self.mirrored, self.used, self.busy, self.given_up, self.generations):
            record.clear()
        self.heat.clear()
        self.selection = 1.0

    # -- what holds after every step

    @invariant()
    def ledger_agrees_with_model(self) -> None:
        ledger = self.ledger
        ledger.check()
        assert pairs((np.flatnonzero(ledger.v2p), ledger.v2p[ledger.v2p > 0])) == self.device
        assert {page for page in range(1, VIRTUAL + 1) if ledger.is_mirrored([page])[0]} == self.mirrored
        assert {holder: set(ledger.held_by(holder)) for holder in ledger.holders()} == self.holders
        assert ledger.held_pages == len(self.held())
        assert ledger.device_pages == len(self.device) == len(set(self.device.values()))
        assert ledger.host_pages == len(self.mirrored)
        assert ledger.allocated_pages == len(self.content)
        assert ledger.obtainable_pages == self.free() + len(self.evictable())
        assert ledger.obtainable_later == self.obtainable_later()
        assert ledger.passes == self.started
        assert {
            page: heat for page, heat in enumerate(ledger.heat.values.tolist()) if heat and page in self.content
        } == {page: heat for page, heat in self.heat.items() if heat and page in self.content}
        arriving = self.arriving()
        for page in range(1, VIRTUAL + 1):
            assert ledger.arriving(np.array([page]))[0] == (self.device.get(page) in arriving)
            assert ledger.arrived(np.array([page])) == (page in self.device and self.device[page] not in arriving)

    @invariant()
    def nothing_is_lost(self) -> None:
        for page, content in self.content.items():
            if content is None:
                continue
            assert page in self.device or page in self.mirrored
            if page in self.device and self.device[page] not in self.arriving():
                assert self.device_bytes[self.device[page]] == content
            if page in self.mirrored:
                assert self.host_bytes[page] == content

    @invariant()
    def passes_in_flight_read_what_they_should(self) -> None:
        for reads in self.reads.values():
            assert all(self.device_bytes[place] == content for place, content in reads.items())


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=400,
    stateful_step_count=60,
    suppress_health_check=list(HealthCheck),
)
