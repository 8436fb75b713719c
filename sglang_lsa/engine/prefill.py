"""Prefill: gives the prompts of a pass their device pages, and says what each of them reads."""

from __future__ import annotations

import logging
import zlib

import numpy as np
import torch

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.admission import Admission, Admitted
from sglang_lsa.engine.arrival import Entry
from sglang_lsa.engine.choose import choose
from sglang_lsa.engine.failures import DevicePoolFull, begin_together, kind_and_place
from sglang_lsa.engine.lookahead import Lookahead
from sglang_lsa.engine.reading import IN_PLACE, RESIDENT, STREAMED, Reading
from sglang_lsa.engine.request import Asked, Request, Story
from sglang_lsa.engine.selection import affordable, always_kept
from sglang_lsa.engine.step import Batch, Step
from sglang_lsa.memory.ledger import LedgerError
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.pages import pages_complete, pages_spanned
from sglang_lsa.memory.staging import Staging

logger = logging.getLogger(__name__)

FIRST_LOOK_PAGES = 32
"""Hot pages that the first look at a resident prefix reads."""


class Prefill:
    """Between admission and decode, one pass after the other.

    Args:
        requests: by name; prompts are entered here with their first pass.
        req_to_token: ``[requests + 1, max_context]`` SGLang's table of virtual slots.
    """

    def __init__(
        self,
        pager: Pager,
        lookahead: Lookahead,
        admission: Admission,
        staging: Staging | None,
        requests: dict[str, Request],
        req_to_token: torch.Tensor,
    ):
        self.pager, self.admission, self.rules = pager, admission, lookahead.rules
        self.sets, self.scorer, self.counts = lookahead.sets, lookahead.scorer, lookahead.counts
        self.staging, self.requests, self.req_to_token = staging, requests, req_to_token
        self.streamed_passes = 0
        self.resident_prompts = 0
        self.radix_hit_tokens = 0
        self.prompt_tokens = 0
        self.layer = -1
        """That the last pass came to."""

    @property
    def config(self) -> LSAConfig:
        """The one in force."""
        return self.rules.config

    def begin_pass(self, batch: Batch, new_pages: np.ndarray) -> Step:
        """Every page that this pass reads in place or writes gets a place on the device, on all ranks or on none.

        Args:
            new_pages: virtual pages that SGLang allocated for this batch, in the order of its requests.
        """
        return begin_together(self.pager.ranks, lambda: self._begin_pass(batch, new_pages))

    def _begin_pass(self, batch: Batch, new_pages: np.ndarray) -> Step:
        self.admission.batch_formed()
        readings, requests, looks, taken = [], [], [], 0
        for index, (key, tokens, prefix) in enumerate(zip(batch.keys, batch.lengths, batch.prefixes, strict=True)):
            admitted = self.admission.admitted[key]
            entry = batch.entry(index) if key not in self.requests else None
            known = (
                self._cached_pages(entry, admitted, prefix)
                if entry is not None
                else self.requests[key].pages[: pages_spanned(prefix, self.pager.page)]
            )
            wanted = pages_spanned(tokens, self.pager.page) - len(known)
            pages = np.concatenate((known, new_pages[taken : taken + wanted]))
            taken += wanted
            if entry is not None:
                self._enter(key, entry, admitted, prefix)
            request = self.requests[key]
            request.tokens, request.computed, request.pages = tokens, prefix, pages
            requests.append(request)
            readings.append(self._bring(request, admitted))
            if admitted.how == RESIDENT:
                looks.append(index)
        if taken != len(new_pages):
            raise RuntimeError(f"LSA: SGLang allocated {len(new_pages)} pages for a batch that needs {taken}")
        staged = None
        if any(len(reading.streamed) for reading in readings):
            (reading,) = readings  # admission computes it alone
            assert self.staging is not None, "no prompt is streamed where all are whole on the device"
            staged = self.staging.read(reading.streamed)
            self.streamed_passes += 1
        in_parts = looks or not all(reading.whole for reading in readings)
        parts = tuple(readings) if in_parts else None
        return Step.of(batch, requests, readings=parts, staged=staged, looks=tuple(looks))

    def before_layer(self, layer: int) -> None:
        """The pass is about to read this layer."""
        self.layer = layer
        self.pager.transfer.before_layer(layer)

    def end_pass(self, request: Request, middle: bool) -> None:
        """The pass is queued, and so are the copies to the mirror of what it completes: let go of what is not needed.

        Args:
            middle: more chunks of this prompt follow.
        """
        how = self.admission.admitted[request.key].how
        if how == STREAMED:  # its promise stands until its first resident set is held
            self.pager.retain(request.key, request.pages[pages_complete(request.tokens, self.pager.page) :])
            if not middle:
                self.sets.await_first(request)
        elif not middle:
            self.pager.reservations.settle(request.key)
            if how == RESIDENT:  # until its first window is predicted it reads what its prompt read
                self.sets.remap(
                    request, request.resident.prefix_positions, request.cached_pages, request.resident.prefix_ranks
                )

    # -- a prompt's pages ----------------------------------------------------------------------------------------

    def _cached_pages(self, entry: Entry, admitted: Admitted, prefix: int) -> np.ndarray:
        """Virtual pages of what the radix tree has of a request, int64 ``[pages]``."""
        if len(admitted.prefix) == pages_spanned(prefix, self.pager.page):
            return admitted.prefix
        return self.pager.page_index.pages(self.req_to_token[entry.row, :prefix])

    def _enter(self, key: str, entry: Entry, admitted: Admitted, prefix: int) -> None:
        options, ids = entry.options, entry.ids
        seed = zlib.crc32(np.asarray(ids[-self.pager.page :], dtype=np.int64).tobytes())
        request = Request(
            entry.rid,
            entry.row,
            Asked.of(options, seed),
            key,
            text=entry.text,
            prompt_tokens=len(ids),
            new_tokens=entry.new_tokens,
            cached_pages=len(admitted.prefix),
            first_observed=prefix,
            story=Story(admitted.how, prefix),
        )
        request.name_sets(options.sets)
        self.requests[key] = request
        self.radix_hit_tokens += prefix
        self.prompt_tokens += len(ids)
        self.resident_prompts += admitted.how == RESIDENT
        self.sets.enter(request.row)

    def _bring(self, request: Request, admitted: Admitted) -> Reading:
        """Hold what the pass reads in place and writes; returns what it reads of the tokens before."""
        before = request.pages[: pages_spanned(request.computed, self.pager.page)]
        if admitted.how == IN_PLACE:
            self.hold(request.key, request.pages)
            self.pager.require(request.pages, layer_by_layer=True)
            return Reading.all_of(before, request.computed, self.pager.page)
        if admitted.how == RESIDENT:
            look = self._first_look(request)
            here = self._here(request, look)
            needed = np.concatenate((before[here], request.pages[len(here) :]))
            self.pager.retain(request.key, needed)
            self.hold(request.key, needed)
            request.resident.prefix_positions, request.resident.prefix_ranks = look, None
            return self._read(request, here)
        self.hold(request.key, request.pages[pages_complete(request.computed, self.pager.page) :])
        here = self.pager.ledger.on_device(before)
        self.pager.ledger.read_next(before[here])  # not held: that would seem to make room for whoever shares them
        return self._read(request, here, stream=True)

    def _read(self, request: Request, here: np.ndarray, stream: bool = False) -> Reading:
        """Read the pages ``here`` (bool, over those before this pass) in place; stream or leave out the others."""
        before = request.pages[: len(here)]
        self.pager.require(before[here], layer_by_layer=True)
        return Reading.of(before, request.computed, here, ~here & stream, self.pager.page)

    def hold(self, holder: str, pages: np.ndarray) -> None:
        """Hold ``pages`` now, whatever that waits for.

        Raises:
            DevicePoolFull: the device pool cannot take them.
        """
        if self.pager.hold(holder, pages, layer_by_layer=True):
            return
        self.pager.settle()
        if not self.pager.hold(holder, pages, layer_by_layer=True):
            raise DevicePoolFull(
                f"LSA: the device pool ({self.pager.ledger.physical_pages} pages, {self.pager.ledger.held_pages} held) "
                f"cannot take {len(pages)} pages of {holder}; admission should have prevented this, please report it"
            )

    # -- a resident prefix ---------------------------------------------------------------------------------------

    def _first_look(self, request: Request) -> np.ndarray:
        """Pages of the cached prefix that a prompt reads to find out which ones it needs: the best of what its last
        pass read, or else the first, the last, and hot ones that are on the device.

        Few, so that the first look costs little, and at most half of a set where not more than that stay anyway: what
        was looked at belongs to the set that is chosen, which must have room for what the look asks for.

        Returns:
            Positions, ascending.
        """
        cached, ledger = request.cached_pages, self.pager.ledger
        prefix = request.pages[:cached]
        bound = self._prefix_pages(request)
        look = always_kept(cached, bound, self.config.sink_pages, self.config.recent_pages)
        room = max(0, bound // 2 - int(look.sum()))
        before = request.resident.prefix_positions[~look[request.resident.prefix_positions]]
        if request.resident.prefix_ranks is not None:
            ranks = dict(
                zip(request.resident.prefix_positions.tolist(), request.resident.prefix_ranks.tolist(), strict=True)
            )
            before = before[np.argsort([-ranks[position] for position in before.tolist()], kind="stable")]
        look[before[:room]] = True
        room -= min(room, len(before))
        hot = np.isin(prefix, ledger.heat.hottest(prefix, min(FIRST_LOOK_PAGES, room)))
        look |= hot & ledger.on_device(prefix) & ~ledger.arriving(prefix)
        return np.flatnonzero(look)

    def _prefix_pages(self, request: Request) -> int:
        """Most that a prompt reads of its cached prefix: what was promised to it, though its own sets may be larger."""
        asked = request.asked
        return self.rules.expected_pages(request.cached_pages, asked.policy, asked.budget, asked.target)

    def _here(self, request: Request, positions: np.ndarray) -> np.ndarray:
        """What a pass reads in place that reads ``positions`` of the cached prefix: bool, over the pages before it."""
        here = np.zeros(pages_spanned(request.computed, self.pager.page), dtype=bool)
        here[positions] = True
        here[request.cached_pages :] = True
        return here

    def choose_resident(self, step: Step) -> Step:
        """The first look is queued: choose what its requests read of their prefixes, and send for it.

        Look, score, hold, commit: what a request reads changes when everything that it is to read is held. A choice
        that fails leaves a request with what it looked at.

        Returns:
            The pass as it is run the second time.
        """
        assert step.readings is not None
        readings = list(step.readings)
        for index in step.looks:
            request = step.requests[index]
            try:
                chosen, ranks = self._chosen(request)
                self.hold(request.key, request.pages[chosen])
                request.resident.prefix_positions, request.resident.prefix_ranks = chosen, ranks
                readings[index] = self._read(request, self._here(request, chosen))
            except LedgerError:
                raise
            except Exception as error:
                self.pager.ranks.failed_together(f"{request.rid}: {kind_and_place(error)}")
                self.counts.failures += 1
                request.story.failures += 1
                logger.exception("LSA: choosing a prefix for %s failed; it reads what it looked at", request.rid)
        return step._replace(readings=tuple(readings), looks=())

    def _chosen(self, request: Request) -> tuple[np.ndarray, np.ndarray]:
        """What was looked at, and the best of the other pages by the queries of the look and by the heat of the prefix.

        Together no more than a set, and no more than can be had: pages that the look reads cannot be given up while its
        pass runs, and what the rest of the prompt needs is not touched. Heat at most doubles a score: it decides
        between pages of which the queries say little.

        Returns:
            Positions, ascending, and their scores; infinite for pages that stay whatever their score.
        """
        cached = request.cached_pages
        scores = self.scorer.score(request, cached).values()
        scores = np.where(np.isnan(scores), -np.inf, scores)
        heat = self.pager.ledger.heat.values[request.pages[:cached]]
        if heat.any():
            scores = scores * (1 + heat / heat.max())
        asked = request.asked
        # As many pages as were promised: half a page more, as the share is rounded down to pages again.
        share = asked.budget if asked.target is None else (self._prefix_pages(request) + 0.5) / cached
        found = choose(self.rules, scores, cached, share, upcoming=request.resident.prefix_positions)
        costs = ~self.pager.ledger.is_held(request.pages[found.positions])
        still_to_come = pages_spanned(request.prompt_tokens, self.pager.page) - len(request.pages)
        kept = np.sort(affordable(found.ranks, costs, max(0, self.pager.room_later(request.key) - still_to_come)))
        positions, ranks = found.positions[kept], found.ranks[kept]
        return positions, np.where(np.isposinf(ranks), np.inf, scores[positions])
