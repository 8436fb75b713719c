"""LSARuntime: what one scheduler process knows; translates SGLang's requests and batches for pager and lookahead.

Imports no SGLang: requests and batches are read through the attributes named in ``patches/``.
"""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from sglang_lsa.config import PAGE_SIZE, LSAConfig, RequestOptions
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.indexer.policy import HiddenObserver, Indexer
from sglang_lsa.lookahead import Lookahead
from sglang_lsa.metrics import Metrics
from sglang_lsa.observe import PageKeys, QueryObserver, observed_layers
from sglang_lsa.pages import pages_complete, pages_spanned
from sglang_lsa.policies import Policy, Quest, Random, Recency, Request
from sglang_lsa.radix_ext.pager import Pager
from sglang_lsa.resident_table import ResidentTable
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
        rows, context = req_to_token.shape
        keys = pager.keys
        layers = observed_layers(config, len(keys))
        self.observer = QueryObserver(
            rows, config.query_tokens, layers, q_heads, keys[0].shape[2], keys[0].dtype, keys[0].device
        )
        self.page_keys = PageKeys(pager.ledger.virtual_pages, keys, layers)
        self.table = ResidentTable(rows, pages_spanned(context), keys[0].device)
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
        self.lookahead = Lookahead(config, pager, self.table, policies, self.pages_of)
        self.requests: dict[str, Request] = {}
        self.finished: deque[dict[str, Any]] = deque(maxlen=FINISHED_REMEMBERED)
        self._promised_prefixes: set[int] = set()
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
        return self._new_pages(req) + 1 + running <= self.pager.unpromised_pages

    def promise(self, req: Any) -> None:
        """This prompt was admitted: keep device pages for all of it until it is prefilled."""
        self.pager.reserved[req.rid] = self._new_pages(req)
        self._promised_prefixes.update(self._pages(req.prefix_indices[::PAGE_SIZE]).tolist())

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
        return opening <= self.pager.unpromised_pages

    # -- forward passes ------------------------------------------------------------------------------------------

    def before_forward(self, batch: Any) -> int:
        """Give every page that this forward pass reads or writes a place on the device; returns the pass's number."""
        lengths = batch.seq_lens_cpu.tolist()
        if batch.forward_mode.is_extend():
            self._promised_prefixes.clear()
            for req, tokens, prefix in zip(batch.reqs, lengths, batch.prefix_lens, strict=True):
                self._hold(req, self.virtual_pages(req, tokens))
                self._admitted(req, tokens, prefix)
                remaining = pages_spanned(len(req.full_untruncated_fill_ids)) - pages_spanned(tokens)
                if req is batch.chunked_req:
                    self.pager.reserved[req.rid] = remaining
                else:
                    self.pager.reserved.pop(req.rid, None)
        elif batch.forward_mode.is_decode():
            for req, tokens in zip(batch.reqs, lengths, strict=True):
                self.requests[req.rid].tokens = tokens
                if tokens % PAGE_SIZE == 1:
                    self._hold(req, self.virtual_pages(req, tokens)[-1:])
        return self.pager.ledger.forward_started()

    def after_forward(self, batch: Any, number: int) -> None:
        """Mirror the pages that this pass completed, then let the windows that end with it be refreshed."""
        self.pager.ledger.forward_finished(number)
        requests = [self.requests[req.rid] for req in batch.reqs if req.rid in self.requests]
        if batch.forward_mode.is_extend():
            start = 0
            for req, request, prefix in zip(batch.reqs, requests, batch.prefix_lens, strict=True):
                self._complete(request, pages_complete(prefix), start, prefix)
                start += request.tokens - prefix
                if req is not batch.chunked_req:
                    self.lookahead.begin(request)
        elif batch.forward_mode.is_decode():
            for request in requests:
                if request.tokens % PAGE_SIZE == 0:
                    self._complete(request, pages_complete(request.tokens) - 1, None, 0)
            self.lookahead.end_step(requests)
        if self.config.debug:
            self.check()
        if number % METRICS_EVERY == 0 or batch.forward_mode.is_extend():
            self._update_metrics()

    # -- radix tree ----------------------------------------------------------------------------------------------

    def virtual_pages(self, req: Any, tokens: int) -> np.ndarray:
        """Virtual pages of a request's first ``tokens`` tokens, int64 ``[pages]``."""
        return self._pages(self.req_to_token[req.req_pool_idx, :tokens:PAGE_SIZE])

    def pages_of(self, request: Request, tokens: int) -> np.ndarray:
        """Like :meth:`virtual_pages`, for a request that the lookahead knows."""
        return self._pages(self.req_to_token[request.row, :tokens:PAGE_SIZE])

    def pages_replaced(self, req: Any, tokens: int, known: torch.Tensor) -> None:
        """The tree has the first pages of this request already: from now on it uses the tree's.

        Args:
            tokens: how many tokens of the request have KV.
            known: int64 ``[n * page]`` the tree's slots of its first tokens.
        """
        before = self.virtual_pages(req, tokens)
        after = before.copy()
        shared = self._pages(known[::PAGE_SIZE])
        after[: len(shared)] = shared
        if (before == after).all():
            return
        self.pager.ledger.substitute(req.rid, before, after)
        request = self.requests.get(req.rid)
        if request is not None and request.tail_start:
            self.table.remap(request.row, self.pager.ledger.v2p[after[request.positions]], request.tail_start)

    def request_gone(self, req: Any) -> None:
        """The request finished, was aborted or retracted; its KV is about to be released."""
        self.pager.forget(req.rid)
        request = self.requests.pop(req.rid, None)
        if request is not None and not request.rid.startswith(HEALTH_CHECK):
            self.finished.append(describe(self, request) | {"history": list(request.history)})
        self._update_metrics()

    def check(self) -> None:
        """Raise LedgerError if a page was lost, or if a request that is gone still holds one."""
        self.pager.ledger.check()
        strangers = set(self.pager.ledger.holders()) - set(self.requests)
        if strangers:
            raise RuntimeError(f"LSA: requests {sorted(strangers)} are gone but hold pages")

    # -- inside --------------------------------------------------------------------------------------------------

    def _hold(self, req: Any, pages: np.ndarray) -> None:
        if not self.pager.hold(req.rid, pages):
            raise RuntimeError(
                f"LSA: the device pool ({self.pager.ledger.physical_pages} pages, {self.pager.ledger.held_pages} held) "
                f"cannot take {len(pages)} pages of {req.rid}; admission should have prevented this, please report it"
            )

    def _admitted(self, req: Any, tokens: int, prefix: int) -> None:
        request = self.requests.get(req.rid)
        if request is None:
            options = RequestOptions.parse(req.sampling_params.custom_params, self.config)
            seed = zlib.crc32(np.asarray(req.origin_input_ids[-PAGE_SIZE:], dtype=np.int64).tobytes())
            request = Request(req.rid, req.req_pool_idx, seed, options.policy, options.budget, options.dense)
            request.first_observed = prefix
            self.requests[req.rid] = request
            self.radix_hit_tokens += prefix
            self.prompt_tokens += len(req.full_untruncated_fill_ids)
        request.row, request.tokens = req.req_pool_idx, tokens
        # Until its first window is predicted a request reads all of its pages.
        self.table.remap(request.row, np.zeros(0, dtype=np.int64), 0)

    def _complete(self, request: Request, first: int, chunk_start: int | None, prefix: int) -> None:
        """Pages from position ``first`` on that are full now: mirror them and remember their keys.

        ``chunk_start`` is where the request's tokens begin in the prefill chunk just computed, None after decode;
        ``prefix`` how many tokens it had before.
        """
        pages = self.pages_of(request, request.tokens)[first : pages_complete(request.tokens)]
        self.page_keys.complete(pages, self.pager.ledger.v2p[pages])
        if self.indexer is not None:
            self.indexer.complete(request, pages, first, chunk_start, prefix)
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
