"""LSARuntime: what one scheduler process knows; translates SGLang's requests and batches for pager and lookahead.

Imports no SGLang: requests and batches are read through the attributes named in ``patches/``.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.engine.admission import Admission, key_of
from sglang_lsa.engine.lookahead import Lookahead
from sglang_lsa.engine.observe import PageKeys, QueryObserver, observed_layers, observed_positions
from sglang_lsa.engine.policies import Policy, Quest, Random, Recency
from sglang_lsa.engine.prefill import Prefill
from sglang_lsa.engine.reading import RESIDENT
from sglang_lsa.engine.request import Asked, Request
from sglang_lsa.engine.score import SCORE_LAG
from sglang_lsa.engine.sizing import graph_tokens, longest_dense, max_resident_pages
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.indexer.policy import Indexer
from sglang_lsa.indexer.recorder import Recorder
from sglang_lsa.kernels.merge_states import merge_states
from sglang_lsa.kernels.page_score import MANY_PAGES
from sglang_lsa.kernels.page_table import decode_indices, lanes_for, physical_slots
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.pages import pages_complete, pages_of, pages_spanned
from sglang_lsa.memory.resident_table import PAGES, ResidentTable
from sglang_lsa.memory.staging import Staging, sums_bytes
from sglang_lsa.serve.control import Value, changed
from sglang_lsa.serve.metrics import Metrics
from sglang_lsa.serve.one_request import Finished, finished
from sglang_lsa.serve.status import Decoding

logger = logging.getLogger(__name__)

HEALTH_CHECK = "HEALTH_CHECK"
"""SGLang's prefix for the requests that it sends to itself."""
METRICS_EVERY = 16
"""Forward passes between two updates of the Prometheus metrics, and between two looks at what decode needs."""
FINISHED_REMEMBERED = 64
"""Requests that can be asked about after they finished."""


class LSARuntime:
    """One per scheduler process, created once the KV pools exist.

    Args:
        config: the server's configuration.
        pager: over SGLang's device pool.
        req_to_token: ``[requests + 1, max_context]`` SGLang's table of virtual slots.
        q_heads, softmax_scale: of the model, for scoring.
        chunk_tokens: SGLang's chunk of prefill; None when prompts are not cut into chunks.
        vocabulary: of the model; token ids beyond it are refused.
        hidden_size: of the model, for recordings.
        metrics: Prometheus metrics to keep up to date.
    """

    def __init__(
        self,
        config: LSAConfig,
        pager: Pager,
        req_to_token: torch.Tensor,
        q_heads: int,
        softmax_scale: float,
        chunk_tokens: int | None = None,
        vocabulary: int | None = None,
        hidden_size: int = 0,
        metrics: Metrics | None = None,
    ):
        self.pager, self.req_to_token = pager, req_to_token
        pager.page_index.checked = config.debug
        rows, self.max_context = req_to_token.shape
        keys = list(pager.layout.key_buffers.values())
        layers = observed_layers(config, len(keys))
        self.observer = QueryObserver(
            rows, observed_positions(config), layers, q_heads, keys[0].shape[2], keys[0].dtype, keys[0].device
        )
        self.page_keys = PageKeys(pager.ledger.virtual_pages, pager.layout, layers)
        self.table = ResidentTable(
            rows, max_resident_pages(self.max_context, pager.ledger.physical_pages), pager.page, pager.device
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
            towers = MemoryIndexer.load(config.indexer).to(keys[0].device)
            self.indexer = policies["indexer"] = Indexer(towers, self.observer, keys, pager.ledger.virtual_pages)
        self.recorder: Recorder | None = None
        if config.record:
            self.recorder = Recorder(
                config.record,
                layers,
                config.query_tokens,
                keys,
                q_heads,
                softmax_scale,
                self.page_keys.table,
                hidden_size,
            )
        self.metrics = metrics
        longest = longest_dense(pager.ledger.physical_pages)
        if config.min_context > longest:
            logger.warning(
                "LSA: --lsa-min-context %d is more than half of the device pool; requests are pruned from %d tokens on",
                config.min_context,
                longest,
            )
            config = dataclasses.replace(config, min_context=longest)
        lead, lag = (config.prefetch_steps, SCORE_LAG) if self.on_gpu else (0, 0)
        thresholds = {"indexer": towers.config.threshold} if config.indexer else {}
        self.lookahead = Lookahead(config, pager, self.table, policies, lead, lag, thresholds)
        self.requests: dict[str, Request] = {}
        self.admission = Admission(pager, self.lookahead.rules, chunk_tokens, vocabulary)
        self.staging = Staging(pager.layout, pager.mirror.pages, config.staging_pages, lambda: pager.compute())
        self.staging_bytes = self.staging.nbytes + sums_bytes(chunk_tokens or 0, q_heads, keys[0].shape[2])
        """Device bytes that prompts need to read the host mirror; no context enters."""
        self.prefill = Prefill(pager, self.lookahead, self.admission, self.staging, self.requests, req_to_token)
        if self.on_gpu:
            self._compile_kernels()
        self.finished: deque[Finished] = deque(maxlen=FINISHED_REMEMBERED)
        self.finished_requests = 0
        self.decoding: dict[int, Decoding] = {}
        """By the number of requests that decode together."""
        self.failed_batches = 0
        """Batches whose requests were failed because memory ran out while they were computed."""
        self.integrity_failures = 0
        """Times that an idle server found its own records inconsistent."""
        self._checked = True
        """Since the last forward pass."""
        self.host_evicted_pages = 0
        """Pages that the radix tree gave up because host memory was full."""
        self.weight_updates = 0
        """How often the model's weights changed since the start."""
        self.config_changes = 0
        self.config_changed_at: float | None = None
        """When the configuration last changed, in seconds since 1970; None if it is as it was at start."""
        self._stream: torch.cuda.Stream | None = None

    @property
    def config(self) -> LSAConfig:
        """The one in force, with ``min_context`` as it applies."""
        return self.lookahead.rules.config

    def reconfigure(self, values: Mapping[str, Value]) -> None:
        """Change fields of the configuration, all of them or none; see ``sglang_lsa.serve.control``.

        Raises:
            ValueError: the configuration would be impossible; nothing was changed.
        """
        before, after = self.config, changed(self.config, values)
        self.lookahead.rules.config = after
        self.config_changes += 1
        self.config_changed_at = time.time()
        for name in values:
            logger.info("LSA: %s changed from %s to %s", name, getattr(before, name), getattr(after, name))
        self._update_metrics()

    def weights_changed(self) -> None:
        """The model has other weights now. What was computed with the old ones was flushed if SGLang was told to."""
        self.weight_updates += 1
        if self.indexer is not None:
            logger.warning(
                "LSA: the model's weights changed, but the indexer %s was trained for those before: pages that it "
                "chooses may be the wrong ones. Train it again (sglang-lsa train), or use the policy quest",
                self.config.indexer,
            )
        self._update_metrics()

    def can_decode(self, reqs: Iterable[Any]) -> bool:
        """Whether every one of ``reqs`` that is about to open a page gets one; see ``Admission.can_decode``."""

        def shrink(pages: int) -> None:
            with self.on_stream():
                self.lookahead.shrink(list(self.requests.values()), pages)

        return self.admission.can_decode(reqs, shrink)

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
        self._checked = False
        lengths = batch.seq_lens_cpu.tolist()
        if batch.forward_mode.is_extend():
            with self.on_stream():
                self.prefill.begin_pass(batch, lengths, new_pages)
        elif batch.forward_mode.is_decode():
            self._before_decode(batch, lengths, new_pages)
        if self.recorder is not None:
            self.recorder.begin_pass(batch, lengths, self.requests, self.pager.ledger.v2p)
        self.rows = np.fromiter((req.req_pool_idx for req in batch.reqs), np.int64, len(batch.reqs))
        # Most decode steps queue nothing.
        if self.lookahead.busy or self.pager.ledger.any_moved:
            with self.on_stream():
                self.lookahead.begin_step()
                if batch.forward_mode.is_decode():
                    self.lookahead.complete_first(key_of(req) for req in batch.reqs)
                self.pager.flush()
        else:
            self.lookahead.begin_step()
        if self.graph_tokens and batch.forward_mode.is_decode():
            read = sum(lengths) - int(self.table.shortening[self.rows].sum())
            self.fits_graph = read + self.table.rows <= self.graph_tokens  # padding reads one slot a row
            self.graphless_steps += not self.fits_graph
        return self.pager.ledger.forward_started()

    def _before_decode(self, batch: Any, lengths: list[int], new_pages: np.ndarray) -> None:
        taken = 0
        for req, tokens in zip(batch.reqs, lengths, strict=True):
            request = self.requests[key_of(req)]
            request.tokens = tokens
            if tokens % PAGE_SIZE == 1:
                opened = new_pages[taken : taken + 1]
                taken += 1
                request.pages = np.concatenate((request.pages, opened))
                self.prefill.hold(request.key, opened)
        if taken != len(new_pages):
            raise RuntimeError(f"LSA: SGLang allocated {len(new_pages)} pages for a batch that opens {taken}")

    def after_forward(self, batch: Any, number: int) -> None:
        """Mirror the pages that this pass completes, then let the windows that end soon be refreshed.

        On a GPU the pass is only queued; what is done here is queued behind it.
        """
        self.rows = self.rows[:0]
        if self.recorder is not None:
            with self.on_stream():
                self.recorder.end_pass()
        self.pager.forward_queued(number)
        requests = [self.requests[key] for req in batch.reqs if (key := key_of(req)) in self.requests]
        if batch.forward_mode.is_extend():
            with self.on_stream():
                for req, request, prefix in zip(batch.reqs, requests, batch.prefix_lens, strict=True):
                    self._remember(request.pages[pages_complete(prefix) : pages_complete(request.tokens)])
                    middle = req is batch.chunked_req
                    self.prefill.end_pass(req, middle)
                    if not middle:
                        self.lookahead.begin(request)
        elif batch.forward_mode.is_decode():
            filled = [request for request in requests if request.tokens % PAGE_SIZE == 0]
            ending = self.lookahead.end_step(requests)
            if filled or ending:
                with self.on_stream():
                    self._remember(np.array([request.pages[-1] for request in filled], dtype=np.int64))
                    self.lookahead.refresh(ending)
        if self.config.debug:
            self.check()
        if number % METRICS_EVERY == 0 and batch.forward_mode.is_decode() and not self.pager.reservations.total:
            seen = self.decoding.setdefault(len(batch.reqs), Decoding())
            seen.samples += 1
            seen.held_pages += self.pager.ledger.held_pages
        if number % METRICS_EVERY == 0 or batch.forward_mode.is_extend():
            self._update_metrics()

    def forward_failed(self) -> None:
        """A pass was given up, before or while it was queued, and its requests are about to be failed."""
        self.rows = self.rows[:0]
        self.failed_batches += 1
        self.pager.all_queued()
        if self.on_gpu:
            torch.cuda.empty_cache()

    # -- attention -----------------------------------------------------------------------------------------------

    def before_layer(self, layer: int) -> None:
        """A prefill pass is about to read this layer."""
        self.pager.transfer.before_layer(layer)

    @property
    def looks_first(self) -> bool:
        """Whether the prefill pass being queued is to be run once more, after :meth:`choose_resident`."""
        return bool(self.prefill.looking)

    def choose_resident(self) -> None:
        """Requests over a resident prefix have had a first look at it: choose what they read."""
        with self.on_stream():
            self.prefill.choose_resident()

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

    def pages_known(self, req: Any) -> np.ndarray | None:
        """Virtual pages of a request's tokens in SGLang's table, int64 ``[pages]``; None if it was never computed."""
        request = self.requests.get(key_of(req))
        return request.pages if request is not None and request.row == req.req_pool_idx else None

    def pages_replaced(self, req: Any, tokens: int, own: np.ndarray | None, shared: np.ndarray) -> None:
        """The tree has the first pages of this request already: from now on it uses the tree's.

        Args:
            tokens: how many tokens of the request have KV.
            own: its pages as far as they are known; under the overlap scheduler it may have opened one more since.
            shared: the tree's pages of its first tokens.
        """
        request = self.requests.get(key_of(req))
        if own is None:
            slots = self.req_to_token[req.req_pool_idx, :tokens]
            own = self.pager.page_index.pages(slots)
        before = own[: pages_spanned(tokens)]
        after = before.copy()
        after[: len(shared)] = shared
        if (before == after).all():
            return
        self.pager.substitute(key_of(req), before, after)
        if request is None:
            return
        request.pages = np.concatenate((after, own[len(before) :]))
        with self.on_stream():
            self.pager.require(after[self.pager.ledger.on_device(after)])
            self.lookahead.sets.moved(request)

    def is_exact(self, req: Any) -> bool:
        """Whether the request's prompt was computed over all of its tokens, so that others may use its KV."""
        admitted = self.admission.admitted.get(key_of(req))
        return admitted is None or admitted.how != RESIDENT

    def request_gone(self, req: Any) -> None:
        """The request finished, was aborted or retracted; its KV is about to be released."""
        key = key_of(req)
        if self.recorder is not None and key in self.requests:
            with self.on_stream():
                self.recorder.close(req, self.requests[key].pages, self.pager.ledger.v2p)
        self.pager.forget(key)
        self.admission.forget(req)
        request = self.requests.pop(key, None)
        if request is not None:
            self.lookahead.forget(request)
        if request is not None and not request.rid.startswith(HEALTH_CHECK):
            self.finished_requests += 1
            self.finished.append(finished(self, request))
        self._update_metrics()

    def on_idle(self) -> None:
        """No request is there, and what the last one had is freed: the time to look whether everything is in order.

        What is found ends a server only with ``--lsa-debug``, as SGLang's own check for leaks does only when it is told
        to be strict.

        Raises:
            LedgerError, RuntimeError: with ``--lsa-debug``, naming what is inconsistent.
        """
        if not self._checked:
            self._checked = True
            try:
                self.check()
            except RuntimeError as error:
                self.integrity_failures += 1
                logger.error("LSA: the idle server's records are inconsistent, please report it: %s", error)
                if self.config.debug:
                    raise
        self._update_metrics()

    def release(self) -> None:
        """The server is going down: nothing is copied any more, and host memory is no longer locked."""
        self.pager.release()

    def check(self) -> None:
        """See whether any page was lost.

        Raises:
            RuntimeError: one was (LedgerError), or a request that is gone still holds one, or a request does not read
                what it holds and what the resident table says.
        """
        self.pager.ledger.check()
        strangers = set(self.pager.ledger.holders()) - set(self.requests)
        if strangers:
            raise RuntimeError(f"LSA: requests {sorted(strangers)} are gone but hold pages")
        for request in self.requests.values():
            slots = self.req_to_token[request.row, : request.tokens : PAGE_SIZE]
            if not np.array_equal(pages_of(slots), request.pages):
                raise RuntimeError(f"LSA: the pages of {request.rid} are not those in SGLang's table")
            if request.story.windows and not self.pager.ledger.held_by(request.key).issuperset(request.read_pages()):
                raise RuntimeError(f"LSA: {request.rid} reads pages that it does not hold")
            self._check_table(request)

    def _check_table(self, request: Request) -> None:
        count = len(request.resident.positions)
        with self.on_stream():
            row = self.table.table[request.row, : PAGES + count].cpu().numpy()
        physical = self.pager.ledger.v2p[request.pages[request.resident.positions]]
        shortening = (request.resident.tail_start - count) * PAGE_SIZE
        expected = (count, request.resident.tail_start, *physical.tolist())
        if tuple(row.tolist()) != expected or self.table.shortening[request.row] != shortening:
            raise RuntimeError(f"LSA: the resident table has another set for {request.rid} than it reads")

    def _compile_kernels(self) -> None:
        """Run every kernel once, on padding pages and rows, so that no request waits for the compiler."""
        padding, rows = np.zeros(1, dtype=np.int64), torch.zeros(1, dtype=torch.int64, device=self.pager.device)
        self.page_keys.complete(padding, padding)
        queries = self.observer.buffer[0, :, 0].clone()
        for layer in self.observer.slot_of_layer:
            self.observer.observe(layer, queries[:1], rows, rows)
        scorers: list[Policy] = [Quest(self.observer, self.page_keys, 1.0)]
        if self.indexer is not None:
            self.indexer.complete(padding, padding)
            scorers.append(self.indexer)
        request = Request("", 0, Asked("quest", 1.0), tokens=self.observer.positions)
        for pages in (1, MANY_PAGES + 1):
            for scorer in scorers:
                scorer.score(request, np.zeros(pages, dtype=np.int64))
        physical_slots(rows, self.pager.v2p, PAGE_SIZE)
        for batch in sorted({lanes_for(requests) for requests in range(1, self.table.rows)}):
            many, indices = (torch.zeros(batch, dtype=kind, device=rows.device) for kind in (torch.int64, torch.int32))
            indptr = torch.zeros(batch + 1, dtype=torch.int32, device=rows.device)
            tables = self.table.table, self.req_to_token, self.pager.v2p
            for lengths in (many, many.int()):  # of requests in decode, of their prefixes in prefill
                decode_indices(*tables, many, lengths, PAGE_SIZE, indptr, indices)
        self.pager.transfer.store(padding, padding, lambda: None)
        self.pager.transfer.wait()
        for layer_by_layer in (False, True):
            self.pager.transfer.recall(padding, padding, lambda: None, layer_by_layer)
        self.pager.transfer.wait()
        for keys, _ in self.staging.read(padding).layer(0):
            states = torch.zeros((1, *queries.shape[1:]), device=keys.device)
            merge_states(states, states[..., 0].contiguous(), queries[:1], states[..., 0].contiguous())
        self.staging.staged_pages = 0
        self.pager.transfer.recalled_pages, self.pager.transfer.recall_seconds = 0, 0.0

    # -- inside --------------------------------------------------------------------------------------------------

    def _remember(self, pages: np.ndarray) -> None:
        """These virtual pages are full now: mirror them and remember their keys."""
        if len(pages):
            physical = self.pager.ledger.v2p[pages]
            self.page_keys.complete(pages, physical)
            if self.indexer is not None:
                self.indexer.complete(pages, physical)
            self.pager.store(pages)

    def _update_metrics(self) -> None:
        if self.metrics is not None:
            self.metrics.update(self)
