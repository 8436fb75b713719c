"""Pager: the ledger's decisions carried out on real memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from sglang_lsa.memory.layout.base import KVLayout
from sglang_lsa.memory.ledger import Ledger
from sglang_lsa.memory.mirror import HostMirror
from sglang_lsa.memory.page_index import PageIndex
from sglang_lsa.memory.progress import Done, Progress
from sglang_lsa.memory.ranks import Ranks
from sglang_lsa.memory.reservations import Reservations
from sglang_lsa.memory.transfer import HostTransfer, StreamTransfer, Transfer, upload
from sglang_lsa.memory.unheld import forget_unheld, undo_recall

logger = logging.getLogger(__name__)

PASSES_UNNOTICED = 8
"""Forward passes that several ranks let end before they agree on that, while nothing waits for it."""
PREFETCHER = "(prefetch)"
"""Holder of pages while they are being sent for ahead of any request."""


class Pager:
    """Device pool, host mirror and the ledger between them.

    Args:
        layout: of SGLang's device pool.
        virtual_pages: capacity of the host mirror.
        progress: through which it becomes known what is finished; the ranks' own by default.
        ranks: that share the model's heads.
    """

    def __init__(
        self, layout: KVLayout, virtual_pages: int, progress: Progress | None = None, ranks: Ranks | None = None
    ):
        self.layout, self.page = layout, layout.page_tokens
        self.device = layout.device
        on_gpu = self.device.type == "cuda"
        self.ranks = ranks or Ranks()
        self.progress = progress or self.ranks.progress
        self.ledger = Ledger(virtual_pages, layout.physical_pages)
        self.page_index = PageIndex(self.page)
        self.mirror = HostMirror(virtual_pages, layout.page_bytes, pinned=on_gpu)
        self.v2p = torch.from_numpy(self.ledger.v2p)
        """``[virtual_pages + 1]`` for kernels. On a CPU it shares memory with the ledger; on a GPU :meth:`flush` brings
        it up to date."""
        self.transfer: Transfer = HostTransfer(layout, self.mirror.pages)
        self.asynchronous = on_gpu
        """Forward passes and copies are queued, and done some time later."""
        self.new_event: Callable[[], Any] = torch.cuda.Event
        """Makes what tells that everything queued so far on a stream is done."""
        self.compute: Callable[[], Any] = lambda: torch.cuda.current_stream(self.device)
        """The stream on which the model runs (GPU)."""
        if on_gpu:
            self.v2p = torch.zeros(virtual_pages + 1, dtype=torch.int32, device=self.device)
            self.transfer = StreamTransfer(layout, self.mirror.pages, lambda: self.compute())
        self.reservations = Reservations()
        """Device pages promised to prompts that are still being prefilled."""
        self.stored_pages = 0
        self.prefetched_pages = 0
        """Pages recalled for a coming window; other recalls are prefixes, which prefill waits for."""
        self.warmed_pages = 0
        """Pages recalled because past requests over the same prefix selected them."""
        self.late_pages = 0
        """Of these, pages that were not known to be there when their window began; the device waited for them."""
        self._gathered: list[tuple[np.ndarray, np.ndarray]] = []
        """Pages to be recalled with the next :meth:`send`, virtual and physical."""
        self._recall_of = np.zeros(layout.physical_pages + 1, dtype=np.int64)
        """By device page: the last recall that brought its content, as :meth:`Transfer.recall` numbers them."""
        self._passes: list[tuple[int, Any]] = []
        self._passes_noticed = 0
        self._idle_events: list[Any] = []

    # -- forward passes ------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Let kernels queued from now on, on the current stream, see the ledger's page map."""
        moved = self.ledger.take_moved()
        if self.device.type == "cuda" and len(moved):
            pairs = upload(np.stack((moved, self.ledger.v2p[moved])), self.device)
            self.v2p[pairs[0]] = pairs[1].int()

    def forward_queued(self, number: int) -> None:
        """Forward pass ``number`` of the ledger is done, or (GPU) is the last thing queued on the compute stream."""
        if not self.asynchronous:
            self.ledger.forward_finished(number)
            return
        event = self._idle_events.pop() if self._idle_events else self.new_event()
        event.record(self.compute())
        self._passes.append((number, event))

    def all_queued(self) -> None:
        """Whatever the ledger calls started is done, or is all that will ever be queued: its pass was given up."""
        self.forward_queued(self.ledger.passes)

    def poll(self) -> None:
        """Take notice of forward passes and copies that are done. Never waits, but for other ranks."""
        if self.ranks.size == 1 or self._waited_for:
            self._notice(self.progress.agreed(self._seen()))

    @property
    def _waited_for(self) -> bool:
        """Whether it matters what is finished; the same on all ranks."""
        return self.transfer.busy or self.ledger.in_limbo or len(self._passes) >= PASSES_UNNOTICED

    def _seen(self) -> Done:
        """What this rank sees finished."""
        passes = 0
        for number, event in self._passes:
            if not event.query():
                break
            passes = number
        return Done(passes or self._passes_noticed, *self.transfer.ended())

    def _notice(self, done: Done) -> None:
        self.transfer.notice(done.stores, done.recalls)
        while self._passes and self._passes[0][0] <= done.passes:
            number, event = self._passes.pop(0)
            self._idle_events.append(event)
            self._passes_noticed = number
            self.ledger.forward_finished(number)

    def settle(self) -> None:
        """Wait until nothing is in flight. For the rare cases where pages in flight are all that is left."""
        for _, event in self._passes:
            event.synchronize()
        self.transfer.wait()
        self._notice(self._seen())  # every rank that comes here has waited for all

    def make_equal(self) -> None:
        """A batch was given up before it ran, and ranks may have come differently far with it: let every rank have on
        the device what is held, and nothing else."""
        if self.ranks.size == 1:
            return
        self.settle()
        self.progress.restart(self._seen())
        forget_unheld(self.ledger)

    # -- residency -----------------------------------------------------------------------------------------------

    def hold(
        self,
        holder: str,
        pages: Iterable[int],
        for_later: bool = False,
        layer_by_layer: bool = False,
        together: bool = False,
    ) -> bool:
        """Make ``pages`` resident for ``holder`` and bring in the content of those that were not.

        The content may arrive later: see :meth:`arrived` and :meth:`require`. Returns False, with nothing changed,
        when the device pool cannot take the pages now.

        Args:
            for_later: they are for a window that has not begun.
            layer_by_layer: the next forward pass can begin before all layers are there, see :meth:`require`.
            together: they are sent for by :meth:`send`, with those of others.
        """
        plan = self.ledger.hold(holder, pages)
        if plan is None:
            return False
        self.reservations.spend(holder, plan.claimed)
        virtual, physical = plan.recall
        if len(virtual):
            self.prefetched_pages += for_later * len(virtual)
            self.ledger.copy_started(physical, arriving=True)
            if together:
                self._gathered.append((virtual, physical))
            else:
                self._recall([holder], virtual, physical, layer_by_layer)
        return True

    def send(self, holders: Iterable[str]) -> None:
        """Send for all pages that were held to be sent for together, in one copy.

        Args:
            holders: all who did so.

        Raises:
            Exception: whatever queueing raised. Then none of them holds any page of those any more.
        """
        if self._gathered:
            virtual, physical = (np.concatenate(pages) for pages in zip(*self._gathered, strict=True))
            self._gathered = []
            self._recall(holders, virtual, physical)

    def _recall(
        self, holders: Iterable[str], virtual: np.ndarray, physical: np.ndarray, layer_by_layer: bool = False
    ) -> None:
        try:
            self._recall_of[physical] = self.transfer.recall(
                physical, virtual, lambda: self.ledger.copy_finished(physical, arriving=True), layer_by_layer
            )
        except Exception:
            undo_recall(self.ledger, holders, virtual, physical)
            raise

    def hold_if_spare(self, holder: str, pages: np.ndarray, spare: int, together: bool = False) -> bool:
        """Like :meth:`hold`, but never takes pages promised to others, nor the last ``spare`` ones.

        For what can wait: a resident set that is not brought in costs a window, a page to write to costs a request.
        """
        wanted = int((~self.ledger.is_held(pages)).sum())
        if wanted and wanted + spare > self.room_for(holder):
            return False
        return self.hold(holder, pages, for_later=True, together=together)

    def fits_later(self, holder: str, pages: np.ndarray, spare: int) -> bool:
        """Whether :meth:`hold_if_spare` would take them if everything in flight were done; does not depend on how fast
        that is."""
        return int((~self.ledger.is_held(pages)).sum()) + spare <= self.room_later(holder)

    def retain(self, holder: str, pages: Iterable[int]) -> None:
        """``holder`` needs none of its pages but these."""
        self.reservations.spend(holder, -self.ledger.retain(holder, pages))

    def substitute(self, holder: str, old: Iterable[int], new: Iterable[int]) -> None:
        """The same tokens of ``holder`` now live in other virtual pages, see :meth:`Ledger.substitute`."""
        self.reservations.spend(holder, -self.ledger.substitute(holder, old, new))

    def inherit(self, old: np.ndarray, new: np.ndarray) -> None:
        """The same tokens now live in ``new`` for the radix tree; nobody holds ``old``, which are about to go."""
        for before, after in zip(old.tolist(), new.tolist(), strict=True):
            self.ledger.heat.move(before, after)

    def arrived(self, pages: np.ndarray) -> bool:
        """Whether the content of all of these pages is on the device."""
        return self.ledger.arrived(pages)

    def require(self, pages: np.ndarray, layer_by_layer: bool = False) -> None:
        """What is queued for the device from now on may read these held pages.

        ``layer_by_layer``: that is one forward pass, which calls ``Prefill.before_layer`` before each layer.
        """
        if self.arrived(pages):
            return
        if layer_by_layer:
            self.transfer.gate_layers()
        else:
            self.transfer.before_next_kernel(int(self._recall_of[self.ledger.v2p[pages]].max()))

    def prefetch(self, pages: np.ndarray) -> None:
        """Bring in those of ``pages``, given hottest first, that are worth more than what they displace.

        Nobody holds them: they are a cache, and give way like any other.
        """
        wanted = self.ledger.worth_fetching(pages)
        if len(wanted) and self.hold(PREFETCHER, wanted):
            self.ledger.drop(PREFETCHER)
            self.warmed_pages += len(wanted)

    def count_late(self, pages: np.ndarray) -> None:
        """A window begins, and the device waits for those of these pages that are not known to be there."""
        self.late_pages += int(self.ledger.arriving(pages).sum())

    def store(self, pages: np.ndarray) -> None:
        """Copy complete pages to the host mirror; once that is done their device copies may be given up."""
        if not len(pages):
            return
        pages = np.array(pages)
        physical, generation = self.ledger.v2p[pages], self.ledger.generation(pages)

        def finished() -> None:
            self.ledger.copy_finished(physical, arriving=False)
            same = (self.ledger.generation(pages) == generation) & (self.ledger.v2p[pages] == physical)
            self.ledger.mirrored(pages[same])

        self.ledger.copy_started(physical, arriving=False)
        self.transfer.store(physical, pages, finished)
        self.stored_pages += len(pages)

    def forget(self, holder: str) -> None:
        """``holder`` is gone (finished, aborted, retracted): it needs nothing any more."""
        self.ledger.drop(holder)
        self.reservations.settle(holder)

    def reset(self) -> None:
        """Forget every page. Raises LedgerError, with nothing changed, while one is held or read."""
        self.settle()
        self.ledger.reset()
        for holder in self.reservations.holders():
            self.reservations.settle(holder)

    def release(self) -> None:
        """Wait for what is in flight and unlock the mirror; nothing is copied any more."""
        self.settle()
        self.mirror.unlock()
        logger.info("LSA: host mirror released")

    @property
    def unpromised_pages(self) -> int:
        """Device pages that can be had now and that no prompt in prefill is waiting for."""
        return self.ledger.obtainable_pages - self.reservations.total

    def room_for(self, holder: str) -> int:
        """Device pages that ``holder`` can have now: those that are promised to nobody, and those that are to it."""
        return self.unpromised_pages + self.reservations.owed(holder)

    def room_later(self, holder: str) -> int:
        """The same once everything in flight is done; does not depend on how fast that is."""
        return self.unpromised_later + self.reservations.owed(holder)

    @property
    def unpromised_later(self) -> int:
        """The same once everything in flight is done; does not depend on how fast that is."""
        return self.ledger.obtainable_later - self.reservations.total

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of KV, all layers."""
        return self.mirror.page_bytes
