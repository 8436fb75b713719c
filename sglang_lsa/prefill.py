"""Prefill: gives the prompts of a pass their device pages, and says what each of them reads."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sglang_lsa.admission import Admission, Admitted
from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.lookahead import Lookahead
from sglang_lsa.pages import pages_complete, pages_spanned
from sglang_lsa.policies import Request
from sglang_lsa.radix_ext.pager import Pager
from sglang_lsa.reading import IN_PLACE, RESIDENT, STREAMED, Reading
from sglang_lsa.staging import StagedPages, Staging

logger = logging.getLogger(__name__)

FIRST_LOOK_PAGES = 32
"""Hot pages that the first look at a resident prefix reads."""


class DevicePoolFull(RuntimeError):
    """A page that must be on the device cannot be; admission and retraction should have prevented that."""


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
        staging: Staging,
        requests: dict[str, Request],
        req_to_token: torch.Tensor,
    ):
        self.pager, self.lookahead, self.admission = pager, lookahead, admission
        self.staging, self.requests, self.req_to_token = staging, requests, req_to_token
        self.readings: list[Reading] | None = None
        """What each request of the pass being queued reads before its own tokens; None when that is all, in place."""
        self.staged: StagedPages | None = None
        """Pages that this pass reads from the host."""
        self.looking: list[int] = []
        """Requests of this pass, by their place in it, whose resident prefix is chosen after a first look."""
        self.batch: list[Request] = []
        self.streamed_passes = 0
        self.resident_prompts = 0
        self.radix_hit_tokens = 0
        self.prompt_tokens = 0

    @property
    def config(self) -> LSAConfig:
        """The one in force."""
        return self.lookahead.config

    def begin_pass(self, batch: Any, lengths: Sequence[int], new_pages: np.ndarray) -> None:
        """Every page that this pass reads in place or writes gets a place on the device.

        Args:
            lengths: tokens of each request after this pass.
            new_pages: virtual pages that SGLang allocated for this batch, in the order of its requests.
        """
        self.admission.batch_formed()
        self.readings, self.staged, self.looking = None, None, []
        readings, taken = [], 0
        for index, (req, tokens, prefix) in enumerate(zip(batch.reqs, lengths, batch.prefix_lens, strict=True)):
            admitted = self.admission.admitted[req.rid]
            known = self._known_pages(req, admitted, prefix)
            wanted = pages_spanned(tokens) - len(known)
            pages = np.concatenate((known, new_pages[taken : taken + wanted]))
            taken += wanted
            request = self._enter(req, admitted, tokens, prefix, pages)
            self.pager.reserved.pop(req.rid, None)
            readings.append(self._bring(request, admitted))
            if admitted.how == RESIDENT:
                self.looking.append(index)
        self.batch = [self.requests[req.rid] for req in batch.reqs]
        if taken != len(new_pages):
            raise RuntimeError(f"LSA: SGLang allocated {len(new_pages)} pages for a batch that needs {taken}")
        if self.looking or not all(reading.whole for reading in readings):
            self.readings = readings
        if any(len(reading.streamed) for reading in readings):
            (reading,) = readings  # admission computes it alone
            self.staged = self.staging.read(reading.streamed)
            self.streamed_passes += 1

    def end_pass(self, req: Any, middle: bool) -> None:
        """The pass is queued, and so are the copies to the mirror of what it completes: let go of what is not needed.

        Args:
            middle: more chunks of this prompt follow.
        """
        request, admitted = self.requests[req.rid], self.admission.admitted[req.rid]
        if admitted.how == STREAMED:
            self.pager.ledger.retain(req.rid, request.pages[pages_complete(request.tokens) :])
            self.pager.reserved[req.rid] = admitted.demand  # until its first resident set is held
            if not middle:
                self.lookahead.await_first(request)
        elif middle and admitted.how == IN_PLACE:
            self.pager.reserved[req.rid] = pages_spanned(len(req.full_untruncated_fill_ids)) - len(request.pages)
        elif middle:
            self.pager.reserved[req.rid] = max(0, admitted.demand - len(self.pager.ledger.held_by(req.rid)))
        elif admitted.how == RESIDENT:  # until its first window is predicted it reads what its prompt read
            self.lookahead.remap(request, request.prefix_positions, request.cached_pages, request.prefix_ranks)

    # -- a prompt's pages ----------------------------------------------------------------------------------------

    def _known_pages(self, req: Any, admitted: Admitted, prefix: int) -> np.ndarray:
        """Virtual pages of what the request has already, or the radix tree."""
        request = self.requests.get(req.rid)
        if request is not None:
            return request.pages[: pages_spanned(prefix)]
        if len(admitted.prefix) == pages_spanned(prefix):
            return admitted.prefix
        return self.pager.page_index.pages(self.req_to_token[req.req_pool_idx, :prefix])

    def _enter(self, req: Any, admitted: Admitted, tokens: int, prefix: int, pages: np.ndarray) -> Request:
        request = self.requests.get(req.rid)
        if request is None:
            options = self.admission.options(req)
            ids = req.full_untruncated_fill_ids
            seed = zlib.crc32(np.asarray(ids[-PAGE_SIZE:], dtype=np.int64).tobytes())
            request = Request(req.rid, req.req_pool_idx, seed, options.policy, options.budget, options.dense)
            request.first_observed, request.cached_tokens, request.prompt_tokens = prefix, prefix, len(ids)
            request.prefill, request.cached_pages = admitted.how, len(admitted.prefix)
            request.name_sets(options.sets)
            request.record, request.dense_steps = options.record, options.dense_steps
            request.prompt_lookup, request.watch = options.prompt_lookup, options.watch
            request.text = lambda tokens: text_of(req, tokens)
            self.requests[req.rid] = request
            self.radix_hit_tokens += prefix
            self.prompt_tokens += len(ids)
            self.resident_prompts += admitted.how == RESIDENT
            # Until its first window is predicted a request reads all of its pages.
            self.lookahead.table.remap(request.row, np.zeros(0, dtype=np.int64), 0)
        request.tokens, request.computed, request.pages = tokens, prefix, pages
        return request

    def _bring(self, request: Request, admitted: Admitted) -> Reading:
        """Hold what the pass reads in place and writes; returns what it reads of the tokens before."""
        before = request.pages[: pages_spanned(request.computed)]
        if admitted.how == IN_PLACE:
            self.hold(request.rid, request.pages)
            self.pager.require(request.pages, layer_by_layer=True)
            return Reading.all_of(before, request.computed)
        if admitted.how == RESIDENT:
            self.hold(request.rid, request.pages[request.cached_pages :])
            return self._read(request, self._first_look(request))
        self.hold(request.rid, request.pages[pages_complete(request.computed) :])
        return self._read(request, self.pager.ledger.on_device(before), stream=True)

    def _read(self, request: Request, here: np.ndarray, stream: bool = False) -> Reading:
        """Read the pages ``here`` (bool, over those before this pass) in place; stream or leave out the others."""
        before = request.pages[: len(here)]
        self.hold(request.rid, before[here])
        self.pager.require(before[here], layer_by_layer=True)
        return Reading.of(before, request.computed, here, ~here & stream)

    def hold(self, rid: str, pages: np.ndarray) -> None:
        """Hold ``pages`` now, whatever that waits for.

        Raises:
            DevicePoolFull: the device pool cannot take them.
        """
        if self.pager.hold(rid, pages, layer_by_layer=True):
            return
        self.pager.settle()
        if not self.pager.hold(rid, pages, layer_by_layer=True):
            raise DevicePoolFull(
                f"LSA: the device pool ({self.pager.ledger.physical_pages} pages, {self.pager.ledger.held_pages} held) "
                f"cannot take {len(pages)} pages of {rid}; admission should have prevented this, please report it"
            )

    # -- a resident prefix ---------------------------------------------------------------------------------------

    def _first_look(self, request: Request) -> np.ndarray:
        """Pages that a prompt reads to find out which ones it needs: what its last pass read, or else the first, the
        last, and hot ones that are on the device. Few, so that the first look costs little.

        Returns:
            bool, over the pages before this pass; those that are not of the cached prefix are all among them.
        """
        cached, ledger = request.cached_pages, self.pager.ledger
        prefix = request.pages[:cached]
        look = np.zeros(pages_spanned(request.computed), dtype=bool)
        look[request.prefix_positions] = True
        look[: self.config.sink_pages] = True
        look[max(0, cached - self.config.recent_pages) :] = True
        room = self.lookahead.set_pages(cached, request.budget) - int(look[:cached].sum())
        hot = np.isin(prefix, ledger.heat.hottest(prefix, min(FIRST_LOOK_PAGES, max(0, room))))
        look[:cached] |= hot & ledger.on_device(prefix) & ~ledger.arriving(prefix)
        request.prefix_positions, request.prefix_ranks = np.flatnonzero(look[:cached]), None
        return look

    def choose_resident(self) -> None:
        """The first look is queued: choose what its requests read of their prefixes, and send for it.

        A choice that fails leaves a request with what it looked at.
        """
        assert self.readings is not None
        for index in self.looking:
            request = self.batch[index]
            try:
                here = self._chosen(request)
                self.pager.ledger.retain(
                    request.rid, np.concatenate((request.pages[: len(here)][here], request.pages[len(here) :]))
                )
                self.readings[index] = self._read(request, here)
            except Exception:
                self.lookahead.failures += 1
                request.failures += 1
                logger.exception("LSA: choosing a prefix for %s failed; it reads what it looked at", request.rid)
        self.looking = []

    def _chosen(self, request: Request) -> np.ndarray:
        """Like :meth:`_first_look`, but the best pages by the queries of the first look and by the heat of the prefix.

        Heat at most doubles a score: it decides between pages of which the queries say little.
        """
        cached = request.cached_pages
        scores = self.lookahead.score(request, cached).values()
        heat = self.pager.ledger.heat.values[request.pages[:cached]]
        if heat.any():
            scores = scores * (1 + heat / heat.max())
        found = self.lookahead.choose(scores, cached, request.budget)
        request.prefix_positions, request.prefix_ranks = found.positions, found.ranks
        here = np.zeros(pages_spanned(request.computed), dtype=bool)
        here[request.prefix_positions] = True
        here[cached:] = True
        return here


def text_of(req: Any, tokens: int) -> np.ndarray:
    """The first ``tokens`` token ids of a request, or those of them that the scheduler knows, int64 ``[n]``."""
    prompt, generated = (np.asarray(ids, dtype=np.int64) for ids in (req.origin_input_ids, req.output_ids))
    return np.concatenate((prompt, generated))[:tokens]
