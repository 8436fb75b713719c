"""LSARuntime: what one scheduler process knows; translates SGLang's requests and batches for pager and lookahead.

Imports no SGLang: requests and batches are read through the attributes named in ``patches/``.
"""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from sglang_lsa.config import PAGE_SIZE, LSAConfig, RequestOptions
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.indexer.policy import HiddenObserver, Indexer
from sglang_lsa.kernels.page_score import MANY_PAGES
from sglang_lsa.kernels.page_table import physical_slots
from sglang_lsa.lookahead import SCORE_LAG, Lookahead
from sglang_lsa.metrics import Metrics
from sglang_lsa.observe import PageKeys, QueryObserver, observed_layers
from sglang_lsa.pages import pages_complete, pages_spanned
from sglang_lsa.policies import Policy, Quest, Random, Recency, Request
from sglang_lsa.radix_ext.pager import Pager
from sglang_lsa.resident_table import PAGES, ResidentTable
from sglang_lsa.sizing import graph_tokens, max_resident_pages
from sglang_lsa.status import describe

logger = logging.getLogger(__name__)

HEALTH_CHECK = "HEALTH_CHECK"
"""SGLang's prefix for the requests that it sends to itself."""
METRICS_EVERY = 16
"""Decode steps between two updates of the Prometheus metrics."""
FINISHED_REMEMBERED = 64
"""Requests whose residency stays visible in the status after they finished."""


class LSARuntime:
    """One per scheduler process, created once the KV pools exist.

    Args:
        config: the server's configuration.
        pager: over SGLang's device pool.
        req_to_token: ``[requests + 1, max_context]`` SGLang's table of virtual slots.
        q_heads, softmax_scale: of the model, for scoring.
        model: SGLang's model, whose decoder layers an indexer observes.
        metrics: Prometheus metrics to keep up to date.
    """

    def __init__(
        self,
        config: LSAConfig,
        pager: Pager,
        req_to_token: torch.Tensor,
        q_heads: int,
        softmax_scale: float,
        model: torch.nn.Module,
        metrics: Metrics | None = None,
    ):
        self.config, self.pager, self.req_to_token = config, pager, req_to_token
        rows, self.max_context = req_to_token.shape
        keys = pager.keys
        layers = observed_layers(config, len(keys))
        self.observer = QueryObserver(
            rows, config.query_tokens, layers, q_heads, keys[0].shape[2], keys[0].dtype, keys[0].device
        )
        self.page_keys = PageKeys(pager.ledger.virtual_pages, keys, layers)
        self.table = ResidentTable(
            rows, max_resident_pages(self.max_context, pager.ledger.physical_pages), keys[0].device
        )
        self.on_gpu = pager.device.type == "cuda"
        self.rows = np.zeros(0, dtype=np.int64)
        """Request rows of the batch that is being queued, in its order."""
        self.everything = torch.zeros((rows, PAGES), dtype=torch.int32, device=keys[0].device)
        """A resident table in which every request is dense, for prefill."""
        self.graph_tokens = 0
        self.fits_graph = True
        """Whether the CUDA graphs' buffers can hold what the batch that is being queued reads."""
        self.graphless_steps = 0
        """Decode steps that ran without a graph because they did not fit."""
        policies: dict[str, Policy] = {
            "recency": Recency(),
            "random": Random(),
            "quest": Quest(self.observer, self.page_keys, softmax_scale),
        }
        self.indexer: Indexer | None = None
        if config.indexer:
            self.indexer = policies["indexer"] = load_indexer(config, pager, rows, model)
        self.metrics = metrics
        longest_dense = pager.ledger.physical_pages * PAGE_SIZE // 2
        if config.min_context > longest_dense:
            logger.warning(
                "LSA: --lsa-min-context %d is more than half of the device pool; requests are pruned from %d tokens on",
                config.min_context,
                longest_dense,
            )
            config = dataclasses.replace(config, min_context=longest_dense)
        lead, lag = (config.prefetch_steps, SCORE_LAG) if self.on_gpu else (0, 0)
        self.lookahead = Lookahead(config, pager, self.table, policies, lead, lag)
        if self.on_gpu:
            self._compile_kernels()
        self.requests: dict[str, Request] = {}
        self.finished: deque[dict[str, Any]] = deque(maxlen=FINISHED_REMEMBERED)
        self._promised_prefixes: set[int] = set()
        self._prefix_pages: dict[str, np.ndarray] = {}
        self._stream: torch.cuda.Stream | None = None
        self.radix_hit_tokens = 0
        self.prompt_tokens = 0

    # -- admission -----------------------------------------------------------------------------------------------

    def validate(self, req: Any) -> str | None:
        """Why this request can never run, or None. ``req`` has just arrived."""
        try:
            RequestOptions.parse(req.sampling_params.custom_params, self.config)
        except ValueError as error:
            return str(error)
        tokens, room = len(req.origin_input_ids), (self.pager.ledger.physical_pages - 1) * PAGE_SIZE
        if tokens >= room:
            return (
                f"The prompt has {tokens} tokens ({pages_spanned(tokens)} pages of KV); the device pool takes prompts "
                f"of fewer than {room}. Shorten the prompt, or start the server with a larger --lsa-device-tokens."
            )
        # A request may be retracted at any time, and what it generated is then prefilled like a prompt.
        req.sampling_params.max_new_tokens = min(req.sampling_params.max_new_tokens, room - tokens)
        return None

    def can_prefill(self, req: Any, running: int) -> bool:
        """Whether the device pool can take this prompt now, next to one growing page per running request."""
        self.pager.poll()
        return self._new_pages(req) + 1 + running <= self.pager.unpromised_pages

    def promise(self, req: Any) -> None:
        """This prompt was admitted: keep device pages for all of it until it is prefilled."""
        self.pager.reserved[req.rid] = self._new_pages(req)
        prefix = self._pages(req.prefix_indices[::PAGE_SIZE])
        self._promised_prefixes.update(prefix.tolist())
        self._prefix_pages[req.rid] = prefix

    def _new_pages(self, req: Any) -> int:
        """Device pages that this prompt takes from those that can be had.

        Prefix pages that another request holds, or was promised in this pass, cost nothing; all others do, even those
        on the device, which are then no longer there to give up.
        """
        prefix = self._pages(req.prefix_indices[::PAGE_SIZE])
        promised = np.fromiter((page in self._promised_prefixes for page in prefix.tolist()), bool, len(prefix))
        free_of_charge = int((self.pager.ledger.is_held(prefix) | promised).sum())
        return pages_spanned(len(req.full_untruncated_fill_ids)) - free_of_charge

    def can_decode(self, reqs: Iterable[Any]) -> bool:
        """Whether every one of ``reqs`` that is about to open a page gets one."""
        opening = sum(req.kv_committed_len % PAGE_SIZE == 0 for req in reqs)
        if opening == 0 or opening <= self.pager.unpromised_pages:
            return True
        self.pager.settle()  # before a request loses its KV, count what is only on its way
        return opening <= self.pager.unpromised_pages

    # -- forward passes ------------------------------------------------------------------------------------------

    def run_on(self, stream: torch.cuda.Stream) -> None:
        """The model runs on this stream (GPU)."""
        if self._stream is None:
            self._stream = stream
            self.pager.compute = lambda: stream

    def on_stream(self) -> AbstractContextManager[Any]:
        """Kernels are queued behind the forward passes (GPU)."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def before_forward(self, batch: Any, new_pages: np.ndarray) -> int:
        """Give every page that this forward pass reads or writes a place on the device; returns the pass's number.

        Args:
            new_pages: virtual pages that SGLang allocated for this batch, in the order of its requests.
        """
        self.pager.poll()
        lengths = batch.seq_lens_cpu.tolist()
        if batch.forward_mode.is_extend():
            with self.on_stream():
                self._before_extend(batch, lengths, new_pages)
        elif batch.forward_mode.is_decode():
            self._before_decode(batch, lengths, new_pages)
        self.rows = np.fromiter((req.req_pool_idx for req in batch.reqs), np.int64, len(batch.reqs))
        if self.lookahead.on_their_way or self.pager.ledger.any_moved:  # most decode steps queue nothing
            with self.on_stream():
                self.lookahead.begin_step()
                self.pager.flush()
        else:
            self.lookahead.begin_step()
        if self.graph_tokens and batch.forward_mode.is_decode():
            read = sum(lengths) - int(self.table.shortening[self.rows].sum())
            self.fits_graph = read + self.table.rows <= self.graph_tokens  # padding reads one slot a row
            self.graphless_steps += not self.fits_graph
        return self.pager.ledger.forward_started()

    def _before_extend(self, batch: Any, lengths: list[int], new_pages: np.ndarray) -> None:
        self._promised_prefixes.clear()
        taken = 0
        for req, tokens, prefix in zip(batch.reqs, lengths, batch.prefix_lens, strict=True):
            request = self.requests.get(req.rid)
            if request is None:
                known = self._prefix_pages.pop(req.rid, None)
                if known is None or len(known) != pages_spanned(prefix):
                    known = self.virtual_pages(req, prefix)
            else:
                known = request.pages[: pages_spanned(prefix)]
            wanted = pages_spanned(tokens) - len(known)
            pages = np.concatenate((known, new_pages[taken : taken + wanted]))
            taken += wanted
            self._hold(req, pages)
            self.pager.require(pages)
            self._admitted(req, tokens, prefix, pages)
            remaining = pages_spanned(len(req.full_untruncated_fill_ids)) - pages_spanned(tokens)
            if req is batch.chunked_req:
                self.pager.reserved[req.rid] = remaining
            else:
                self.pager.reserved.pop(req.rid, None)
        if taken != len(new_pages):
            raise RuntimeError(f"LSA: SGLang allocated {len(new_pages)} pages for a batch that needs {taken}")

    def _before_decode(self, batch: Any, lengths: list[int], new_pages: np.ndarray) -> None:
        taken = 0
        for req, tokens in zip(batch.reqs, lengths, strict=True):
            request = self.requests[req.rid]
            request.tokens = tokens
            if tokens % PAGE_SIZE == 1:
                opened = new_pages[taken : taken + 1]
                taken += 1
                request.pages = np.concatenate((request.pages, opened))
                self._hold(req, opened)
        if taken != len(new_pages):
            raise RuntimeError(f"LSA: SGLang allocated {len(new_pages)} pages for a batch that opens {taken}")

    def after_forward(self, batch: Any, number: int) -> None:
        """Mirror the pages that this pass completes, then let the windows that end soon be refreshed.

        On a GPU the pass is only queued; what is done here is queued behind it.
        """
        self.rows = self.rows[:0]
        self.pager.forward_queued(number)
        requests = [self.requests[req.rid] for req in batch.reqs if req.rid in self.requests]
        if batch.forward_mode.is_extend():
            start = 0
            with self.on_stream():
                for req, request, prefix in zip(batch.reqs, requests, batch.prefix_lens, strict=True):
                    self._complete(request, pages_complete(prefix), start, prefix)
                    start += request.tokens - prefix
                    if req is not batch.chunked_req:
                        self.lookahead.begin(request)
        elif batch.forward_mode.is_decode():
            filled = [request for request in requests if request.tokens % PAGE_SIZE == 0]
            ending = self.lookahead.end_step(requests)
            if filled or ending:
                with self.on_stream():
                    self._complete_decoded(filled)
                    self.lookahead.refresh(ending)
        if self.config.debug:
            self.check()
        if number % METRICS_EVERY == 0 or batch.forward_mode.is_extend():
            self._update_metrics()

    # -- attention -----------------------------------------------------------------------------------------------

    def reserve_graph_tokens(self, batch: int) -> int:
        """Slots that CUDA graphs for up to ``batch`` requests need room for."""
        physical = self.pager.ledger.physical_pages * PAGE_SIZE
        self.graph_tokens = graph_tokens(self.config, batch, self.max_context, physical)
        return self.graph_tokens

    def decode_indptr(self, seq_lens: torch.Tensor) -> torch.Tensor:
        """Where each request's slots start in the batch that is being queued, int32 ``[batch + 1]`` on the host.

        Args:
            seq_lens: ``[batch]`` tokens of each request, on the host; requests beyond those being queued are padding.
        """
        lengths = seq_lens.numpy().astype(np.int64)
        real = len(self.rows)
        lengths[:real] = self.table.lengths(self.rows, lengths[:real])
        indptr = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=indptr[1:])
        return torch.from_numpy(indptr)

    # -- radix tree ----------------------------------------------------------------------------------------------

    def virtual_pages(self, req: Any, tokens: int) -> np.ndarray:
        """Virtual pages of a request's first ``tokens`` tokens, int64 ``[pages]``, read from SGLang's table."""
        return self._pages(self.req_to_token[req.req_pool_idx, :tokens:PAGE_SIZE])

    def pages_replaced(self, req: Any, tokens: int, known: torch.Tensor) -> None:
        """The tree has the first pages of this request already: from now on it uses the tree's.

        Args:
            tokens: how many tokens of the request have KV.
            known: int64 ``[n * page]`` the tree's slots of its first tokens.
        """
        request = self.requests.get(req.rid)
        # What was prefilled so far; under the overlap scheduler the request may have opened another page since.
        own = request.pages if request is not None else self.virtual_pages(req, tokens)
        before = own[: pages_spanned(tokens)]
        after = before.copy()
        shared = self._pages(known[::PAGE_SIZE])
        after[: len(shared)] = shared
        if (before == after).all():
            return
        self.pager.ledger.substitute(req.rid, before, after)
        if request is None:
            return
        request.pages = np.concatenate((after, own[len(before) :]))
        with self.on_stream():
            self.pager.require(after)
        if request.tail_start:
            with self.on_stream():
                self.table.remap(
                    request.row, self.pager.ledger.v2p[request.pages[request.positions]], request.tail_start
                )

    def request_gone(self, req: Any) -> None:
        """The request finished, was aborted or retracted; its KV is about to be released."""
        self.pager.forget(req.rid)
        self._prefix_pages.pop(req.rid, None)
        request = self.requests.pop(req.rid, None)
        if request is not None:
            self.lookahead.forget(request)
        if request is not None and not request.rid.startswith(HEALTH_CHECK):
            self.finished.append(describe(self, request) | {"history": list(request.history)})
        self._update_metrics()

    def check(self) -> None:
        """Raise LedgerError if a page was lost, or if a request that is gone still holds one."""
        self.pager.ledger.check()
        strangers = set(self.pager.ledger.holders()) - set(self.requests)
        if strangers:
            raise RuntimeError(f"LSA: requests {sorted(strangers)} are gone but hold pages")
        for request in self.requests.values():
            slots = self.req_to_token[request.row, : request.tokens : PAGE_SIZE]
            if not np.array_equal(self._pages(slots), request.pages):
                raise RuntimeError(f"LSA: the pages of {request.rid} are not those in SGLang's table")

    def _compile_kernels(self) -> None:
        """Run every kernel once, on padding pages and rows, so that no request waits for the compiler."""
        padding, rows = np.zeros(1, dtype=np.int64), torch.zeros(1, dtype=torch.int64, device=self.pager.device)
        self.page_keys.complete(padding, padding)
        queries = self.observer.buffer[0, :, 0]
        for layer in self.observer.slot_of_layer:
            self.observer.observe(layer, queries[:1], rows, rows)
        quest = Quest(self.observer, self.page_keys, 1.0)
        request = Request("", 0, 0, "quest", 1.0, False, tokens=self.observer.positions)
        for pages in (1, MANY_PAGES + 1):
            quest.score(request, np.zeros(pages, dtype=np.int64))
        physical_slots(rows, self.pager.v2p, PAGE_SIZE)
        self.pager.transfer.store(padding, padding, lambda: None)
        self.pager.transfer.wait()
        self.pager.transfer.recall(padding, padding, lambda: None)
        self.pager.transfer.wait()
        self.pager.transfer.recalled_pages, self.pager.transfer.recall_seconds = 0, 0.0

    # -- inside --------------------------------------------------------------------------------------------------

    def _hold(self, req: Any, pages: np.ndarray) -> None:
        if self.pager.hold(req.rid, pages):
            return
        self.pager.settle()
        if not self.pager.hold(req.rid, pages):
            raise RuntimeError(
                f"LSA: the device pool ({self.pager.ledger.physical_pages} pages, {self.pager.ledger.held_pages} held) "
                f"cannot take {len(pages)} pages of {req.rid}; admission should have prevented this, please report it"
            )

    def _admitted(self, req: Any, tokens: int, prefix: int, pages: np.ndarray) -> None:
        request = self.requests.get(req.rid)
        if request is None:
            options = RequestOptions.parse(req.sampling_params.custom_params, self.config)
            seed = zlib.crc32(np.asarray(req.origin_input_ids[-PAGE_SIZE:], dtype=np.int64).tobytes())
            request = Request(req.rid, req.req_pool_idx, seed, options.policy, options.budget, options.dense)
            request.first_observed = prefix
            self.requests[req.rid] = request
            self.radix_hit_tokens += prefix
            self.prompt_tokens += len(req.full_untruncated_fill_ids)
            # Until its first window is predicted a request reads all of its pages.
            self.table.remap(request.row, np.zeros(0, dtype=np.int64), 0)
        request.tokens, request.pages = tokens, pages

    def _complete(self, request: Request, first: int, chunk_start: int | None, prefix: int) -> None:
        """Pages from position ``first`` on that are full now: mirror them and remember their keys.

        ``chunk_start`` is where the request's tokens begin in the prefill chunk just computed, None after decode;
        ``prefix`` how many tokens it had before.
        """
        pages = request.pages[first : pages_complete(request.tokens)]
        self.page_keys.complete(pages, self.pager.ledger.v2p[pages])
        if self.indexer is not None:
            self.indexer.complete(request, pages, first, chunk_start, prefix)
        self.pager.store(pages)

    def _complete_decoded(self, filled: list[Request]) -> None:
        """The same for the requests whose last page a decode step has filled, in one go."""
        if not filled:
            return
        pages = np.array([request.pages[-1] for request in filled])
        self.page_keys.complete(pages, self.pager.ledger.v2p[pages])
        if self.indexer is not None:
            for request in filled:
                self.indexer.complete(request, request.pages[-1:], len(request.pages) - 1, None, 0)
        self.pager.store(pages)

    @staticmethod
    def _pages(slots: torch.Tensor) -> np.ndarray:
        return (slots.cpu().numpy() // PAGE_SIZE).astype(np.int64)

    def _update_metrics(self) -> None:
        if self.metrics is not None:
            self.metrics.update(self)


def load_indexer(config: LSAConfig, pager: Pager, rows: int, model: torch.nn.Module) -> Indexer:
    """Load ``config.indexer`` and let it observe ``model``.

    Raises:
        ValueError: the checkpoint is broken, or the model's layers cannot be found.
    """
    keys = pager.keys[0]
    towers = MemoryIndexer.load(str(config.indexer)).to(keys.device)
    shape = towers.config
    observer = HiddenObserver(rows, config.query_tokens, shape.layers, shape.hidden_size, keys.dtype, keys.device)
    observer.watch(model)
    return Indexer(towers, observer, pager.ledger.virtual_pages)
