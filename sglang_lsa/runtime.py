"""LSARuntime: what one scheduler process knows; translates SGLang's requests and batches for pager and lookahead.

Imports no SGLang: requests and batches are read through the attributes named in ``patches/``.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from sglang_lsa.config import PAGE_SIZE, LSAConfig, RequestOptions
from sglang_lsa.lookahead import Lookahead
from sglang_lsa.observe import PageKeys, QueryObserver, default_layers
from sglang_lsa.pages import pages_complete, pages_spanned
from sglang_lsa.policies import Policy, Quest, Random, Recency, Request
from sglang_lsa.radix_ext.pager import Pager
from sglang_lsa.resident_table import ResidentTable
from sglang_lsa.selection import budget_pages

FINISHED_REMEMBERED = 64
"""Requests whose residency stays visible in the status after they finished."""


class LSARuntime:
    """One per scheduler process, created once the KV pools exist.

    Args:
        config: the server's configuration.
        pager: over SGLang's device pool.
        req_to_token: ``[requests + 1, max_context]`` SGLang's table of virtual slots.
        q_heads, softmax_scale: of the model, for scoring.
    """

    def __init__(
        self,
        config: LSAConfig,
        pager: Pager,
        req_to_token: torch.Tensor,
        q_heads: int,
        softmax_scale: float,
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
        self.lookahead = Lookahead(config, pager, self.table, policies, self._pages_of)
        self.requests: dict[str, Request] = {}
        self.finished: deque[dict[str, Any]] = deque(maxlen=FINISHED_REMEMBERED)
        self.radix_hit_tokens = 0
        self.prompt_tokens = 0

    # -- admission -----------------------------------------------------------------------------------------------

    def validate(self, req: Any) -> str | None:
        """Why this request can never run, or None. ``req`` has just arrived."""
        try:
            options = RequestOptions.parse(req.sampling_params.custom_params, self.config)
        except ValueError as error:
            return str(error)
        tokens, pool = len(req.origin_input_ids), self.pager.ledger.physical_pages
        if pages_spanned(tokens) + 1 > pool:
            return (
                f"The prompt has {tokens} tokens, {pages_spanned(tokens)} pages of KV; the device pool holds "
                f"{pool - 1} and one to grow ({(pool - 1) * PAGE_SIZE} tokens). Shorten the prompt, or start the "
                "server with a larger --lsa-device-tokens."
            )
        if options.dense:
            room = pool * PAGE_SIZE - tokens
            req.sampling_params.max_new_tokens = min(req.sampling_params.max_new_tokens, room)
        return None

    def can_prefill(self, req: Any, running: int) -> bool:
        """Whether the device pool can take this prompt now, next to one growing page per running request."""
        prefix = self._pages(req.prefix_indices[::PAGE_SIZE])
        total = pages_spanned(len(req.full_untruncated_fill_ids))
        ledger = self.pager.ledger
        # Prefix pages that a request holds already cost nothing; unheld ones are no longer there to give up.
        new = total - int(ledger.is_held(prefix).sum())
        return new + 1 + running <= self.pager.unpromised_pages

    def promise(self, req: Any) -> None:
        """This prompt was admitted: keep device pages for all of it until it is prefilled."""
        prefix = self._pages(req.prefix_indices[::PAGE_SIZE])
        held = int(self.pager.ledger.is_held(prefix).sum())
        self.pager.reserved[req.rid] = pages_spanned(len(req.full_untruncated_fill_ids)) - held

    def can_decode(self, reqs: Iterable[Any]) -> bool:
        """Whether every one of ``reqs`` that is about to open a page gets one."""
        opening = sum(req.kv_committed_len % PAGE_SIZE == 0 for req in reqs)
        return opening <= self.pager.unpromised_pages

    # -- forward passes ------------------------------------------------------------------------------------------

    def before_forward(self, batch: Any) -> int:
        """Give every page that this forward pass reads or writes a place on the device; returns the pass's number."""
        lengths = batch.seq_lens_cpu.tolist()
        if batch.forward_mode.is_extend():
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
            for req, request, prefix in zip(batch.reqs, requests, batch.prefix_lens, strict=True):
                self._complete(request, pages_complete(prefix))
                if req is not batch.chunked_req:
                    self.lookahead.begin(request)
        elif batch.forward_mode.is_decode():
            for request in requests:
                if request.tokens % PAGE_SIZE == 0:
                    self._complete(request, pages_complete(request.tokens) - 1)
            self.lookahead.end_step(requests)
        if self.config.debug:
            self.pager.ledger.check()

    # -- radix tree ----------------------------------------------------------------------------------------------

    def virtual_pages(self, req: Any, tokens: int) -> np.ndarray:
        """Virtual pages of a request's first ``tokens`` tokens, int64 ``[pages]``."""
        return self._pages(self.req_to_token[req.req_pool_idx, :tokens:PAGE_SIZE])

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
        if request is not None:
            self.finished.append(self._describe(request) | {"history": request.history})

    # -- status --------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Everything ``/lsa/status`` shows, as plain JSON values. Bytes are bytes, pages are pages."""
        pager, ledger = self.pager, self.pager.ledger
        overhead = {
            "page_keys": self.page_keys.nbytes,
            "queries": self.observer.nbytes,
            "tables": self.table.nbytes + ledger.v2p.nbytes,
        }
        return {
            "policy": self.config.policy,
            "budget": self.config.budget,
            "window": self.config.window,
            "page_size": PAGE_SIZE,
            "page_bytes": pager.page_bytes,
            "virtual": {"pages": ledger.virtual_pages, "allocated": ledger.allocated_pages},
            "physical": {
                "pages": ledger.physical_pages,
                "held": ledger.held_pages,
                "cached": ledger.device_pages - ledger.held_pages,
                "free": ledger.physical_pages - ledger.device_pages,
                "promised": sum(pager.reserved.values()),
                "kv_bytes": (ledger.physical_pages + 1) * pager.page_bytes,
                "overhead_bytes": overhead,
            },
            "host": {
                "pages": ledger.host_pages,
                "bytes": ledger.host_pages * pager.page_bytes,
                "mirror_bytes": pager.mirror.nbytes,
            },
            "recalls": {"pages": ledger.recalls, "bytes": ledger.recalls * pager.page_bytes},
            "stores": {"pages": pager.stored_pages, "bytes": pager.stored_pages * pager.page_bytes},
            "evictions": ledger.evictions,
            "refreshes": self.lookahead.refreshes,
            "stalls": self.lookahead.stalls,
            "fallbacks": self.lookahead.fallbacks,
            "radix": {"hit_tokens": self.radix_hit_tokens, "prompt_tokens": self.prompt_tokens},
            "requests": [self._describe(request) for request in self.requests.values()],
            "finished": list(self.finished),
        }

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

    def _complete(self, request: Request, first: int) -> None:
        """Pages from position ``first`` on that are full now: mirror them and remember their keys."""
        pages = self._pages_of(request, request.tokens)[first : pages_complete(request.tokens)]
        self.page_keys.complete(pages, self.pager.ledger.v2p[pages])
        self.pager.store(pages)

    def _pages_of(self, request: Request, tokens: int) -> np.ndarray:
        return self._pages(self.req_to_token[request.row, :tokens:PAGE_SIZE])

    @staticmethod
    def _pages(slots: torch.Tensor) -> np.ndarray:
        return (slots.cpu().numpy() // PAGE_SIZE).astype(np.int64)

    def _describe(self, request: Request) -> dict[str, Any]:
        context = pages_spanned(request.tokens)
        dense = request.tail_start == 0
        resident = context if dense else len(request.positions) + context - request.tail_start
        return {
            "rid": request.rid,
            "context_tokens": request.tokens,
            "context_pages": context,
            "resident_pages": resident,
            "budget_pages": context if dense else budget_pages(context, request.budget, self.config.min_pages),
            "window": request.window,
            "policy": "full" if dense else request.policy,
            "stalls": request.stalls,
        }


def observed_layers(config: LSAConfig, layer_count: int) -> Sequence[int]:
    """Layers to observe.

    Raises:
        ValueError: a configured layer does not exist in this model.
    """
    layers = config.observe_layers or default_layers(layer_count)
    wrong = [layer for layer in layers if not 0 <= layer < layer_count]
    if wrong:
        raise ValueError(f"--lsa-observe-layers names layer {wrong[0]}: the model has layers 0 to {layer_count - 1}")
    return layers
