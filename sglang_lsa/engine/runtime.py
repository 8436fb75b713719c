"""LSARuntime: what one scheduler process knows; hands requests and batches to pager and lookahead.

Imports no SGLang and sees nothing of its objects: they are translated in ``patches/``.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine import build
from sglang_lsa.engine.admission import Admission
from sglang_lsa.engine.counts import Decoding, Metrics
from sglang_lsa.engine.failures import require_together
from sglang_lsa.engine.integrity import check, compare
from sglang_lsa.engine.native_index import NativeIndex
from sglang_lsa.engine.pace import Pace
from sglang_lsa.engine.prefill import Prefill
from sglang_lsa.engine.request import Request
from sglang_lsa.engine.shared_pages import SharedPages
from sglang_lsa.engine.sizing import graph_tokens
from sglang_lsa.engine.step import DECODE, EXTEND, IDLE, Batch, Step
from sglang_lsa.engine.summary import Finished, finished
from sglang_lsa.engine.warm_up import compile_kernels
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.pages import pages_complete
from sglang_lsa.memory.resident_table import PAGES
from sglang_lsa.memory.scores import Scores
from sglang_lsa.serve.control import Value, changed

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
        scores: through which ranks that share the heads agree on scores; those of the pager's ranks by default.
        index: the model's own, where the layout shows no keys.
        beside: device bytes of what SGLang keeps of all virtual pages, by name.
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
        scores: Scores | None = None,
        index: NativeIndex | None = None,
        beside: Mapping[str, int] | None = None,
    ):
        self.pager, self.req_to_token = pager, req_to_token
        pager.page_index.checked = config.debug
        rows, self.max_context = req_to_token.shape
        self.on_gpu = pager.device.type == "cuda"
        self.index, self.beside = index, dict(beside or {})
        self.observer: Any = build.observer(config, pager.layout, rows, q_heads, index)
        self.page_keys = build.page_keys(config, pager, index)
        self.table = build.resident_table(pager, rows, self.max_context)
        self.step = IDLE
        """The forward pass that is being queued."""
        self.everything = torch.zeros((rows, PAGES), dtype=torch.int32, device=pager.device)
        """A resident table in which every request is dense, for prefill."""
        self.graph_tokens = 0
        self.graphless_steps = 0
        """Decode steps that ran without a graph because they did not fit."""
        self.recorder = build.recorder(config, pager.layout, self.page_keys, q_heads, softmax_scale, hidden_size)
        self.metrics = metrics
        self.policies = build.policies(config, pager, self.observer, self.page_keys, softmax_scale, index)
        self.indexer = build.trained(self.policies)
        """The policy that was trained for the model's weights."""
        in_force = build.applicable(config, pager)
        self.lookahead = build.lookahead(in_force, pager, self.table, self.policies, scores or pager.ranks.scores)
        self.requests: dict[str, Request] = {}
        self.groups = build.groups(config, self.lookahead, self.requests)
        """Of requests that decode over one prefix, where they are formed."""
        self.admission = Admission(pager, self.lookahead.rules, chunk_tokens, vocabulary)
        self.pace = Pace(self.lookahead.rules)
        self.staging = build.staging(config, pager)
        self.staging_bytes = build.staging_bytes(self.staging, pager.layout, chunk_tokens, q_heads)
        """Device bytes that prompts need to read the host mirror; no context enters."""
        self.prefill = Prefill(pager, self.lookahead, self.admission, self.staging, self.requests, req_to_token)
        self.shared = SharedPages(
            pager, self.lookahead.sets, self.admission, self.requests, req_to_token, self.on_stream
        )
        if self.on_gpu:
            compile_kernels(pager, self.table, self.observer, self.page_keys, self.policies, self.staging, req_to_token)
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
        self._decoded: tuple[tuple[str, ...], tuple[Request, ...], np.ndarray] | None = None
        """Of the last decode step, if nobody came or went since: by which names, who, and in which rows. Most steps
        have the same requests."""

    @property
    def config(self) -> LSAConfig:
        """The one in force, with ``min_context`` as it applies."""
        return self.lookahead.rules.config

    def reconfigure(self, values: Mapping[str, Value]) -> None:
        """Change fields of the configuration, all of them or none; see ``sglang_lsa.serve.control``. Where all have
        these values already, that is no change: none is counted.

        Raises:
            ValueError: the configuration would be impossible; nothing was changed.
        """
        before, after = self.config, changed(self.config, values, self.index is not None)
        if after.auto and (problem := self.lookahead.rules.no_auto(str(after.policy))) is not None:
            raise ValueError(problem)
        if not (other := [name for name in values if getattr(before, name) != getattr(after, name)]):
            return
        self.lookahead.rules.config = after
        self.config_changes, self.config_changed_at = self.config_changes + 1, time.time()
        for name in other:
            logger.info("LSA: %s changed from %s to %s", name, getattr(before, name), getattr(after, name))
        self._update_metrics()

    def weights_changed(self) -> None:
        """The model has other weights now. What was computed with the old ones was flushed if SGLang was told to."""
        self.weight_updates += 1
        if self.indexer is not None:
            logger.warning(
                "LSA: the model's weights changed, but the indexer %s was trained for those before: pages that it "
                "chooses may be the wrong ones. Train it again (sglang-lsa train), or use one without training",
                self.config.indexer,
            )
        self._update_metrics()

    def can_decode(self, computed: Iterable[int]) -> bool:
        """Whether every request that is about to open a page gets one; see ``Admission.can_decode``."""
        return self.admission.can_decode(computed, self._shrink)

    def make_room(self, computed: Iterable[int]) -> bool:
        """The same before it is decided that there is a decode step; see ``Admission.make_room``."""
        return self.admission.make_room(computed, self._shrink)

    def _shrink(self, pages: int) -> None:
        with self.on_stream():
            self.lookahead.shrink(list(self.requests.values()), pages)

    # -- forward passes ------------------------------------------------------------------------------------------

    def run_on(self, stream: torch.cuda.Stream) -> None:
        """The model runs on this stream (GPU)."""
        if self._stream is None:
            self._stream, self.pager.compute = stream, lambda: stream

    def on_stream(self) -> AbstractContextManager[Any]:
        """Kernels are queued behind the forward passes (GPU)."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def before_forward(self, batch: Batch, new_pages: np.ndarray) -> int:
        """Give every page that this forward pass reads or writes a place on the device; returns the pass's number.

        Args:
            new_pages: virtual pages that SGLang allocated for this batch, in the order of its requests.
        """
        self.pager.poll()
        self._checked = False
        step = IDLE
        if batch.kind == EXTEND:
            self._decoded = None
            with self.on_stream():
                step = self.prefill.begin_pass(batch, new_pages)
        elif batch.kind == DECODE:
            step = self._before_decode(batch, new_pages)
        # Most decode steps queue nothing.
        if self.lookahead.busy or self.pager.ledger.any_moved:
            with self.on_stream():
                self.lookahead.begin_step()
                if step.kind == DECODE:
                    self.lookahead.complete_first(request.key for request in step.requests)
                self.pager.flush()
        else:
            self.lookahead.begin_step()
        if self.groups is not None and step.kind == DECODE:
            step = step._replace(grouping=self.groups.of(step.requests, self.config.debug, self.on_stream))
        if self.graph_tokens and step.kind == DECODE:
            step = step._replace(fits_graph=step.fits(self.table, self.graph_tokens))
            self.graphless_steps += not step.fits_graph
        if self.recorder is not None:
            self.recorder.begin_pass(step, self.pager.ledger.v2p)
        self.step = step
        return self.pager.ledger.forward_started()

    def _before_decode(self, batch: Batch, new_pages: np.ndarray) -> Step:
        if self._decoded is None or self._decoded[0] != batch.keys:
            requests = tuple([self.requests[key] for key in batch.keys])
            rows = np.array([request.row for request in requests], dtype=np.int64)
            self._decoded = batch.keys, requests, rows
        _, requests, rows = self._decoded
        taken, page = 0, self.pager.page
        for request, tokens in zip(requests, batch.lengths, strict=True):
            request.tokens = tokens
            if tokens % page == 1:
                opened = new_pages[taken : taken + 1]
                taken += 1
                request.pages = np.concatenate((request.pages, opened))
                self.prefill.hold(request.key, opened)
        if taken != len(new_pages):
            raise RuntimeError(f"LSA: SGLang allocated {len(new_pages)} pages for a batch that opens {taken}")
        return Step(batch.kind, requests, batch.lengths, batch.prefixes, batch.middle, rows)

    def after_forward(self, number: int) -> None:
        """Mirror the pages that this pass completes, then let the windows that end soon be refreshed.

        On a GPU the pass is only queued; what is done here is queued behind it.
        """
        step, self.step, page = self.step, IDLE, self.pager.page
        if self.recorder is not None:
            with self.on_stream():
                self.recorder.end_pass()
        self.pager.forward_queued(number)
        if step.kind == EXTEND:
            with self.on_stream():
                begun: list[Request] = []
                for index, (request, prefix) in enumerate(zip(step.requests, step.prefixes, strict=True)):
                    self._remember(request.pages[pages_complete(prefix, page) : pages_complete(request.tokens, page)])
                    middle = index == step.middle
                    self.prefill.end_pass(request, middle)
                    if not middle:
                        self.lookahead.begin(request, begun)
                self.lookahead.refresh(begun)
        elif step.kind == DECODE:
            requests: Sequence[Request] = step.requests
            if self._decoded is None:  # some may be gone since the step began
                requests = [request for request in requests if request.key in self.requests]
            filled = [request for request in requests if request.tokens % page == 0]
            ending = self.lookahead.end_step(requests)
            if filled or ending:
                with self.on_stream():
                    self._remember(np.array([request.pages[-1] for request in filled], dtype=np.int64))
                    self.lookahead.refresh(ending)
        if self.config.debug:
            self.check()
            compare(self.pager, self.requests)
        if number % METRICS_EVERY == 0 and step.kind == DECODE and not self.pager.reservations.total:
            seen = self.decoding.setdefault(len(step.requests), Decoding())
            seen.samples += 1
            seen.held_pages += self.pager.ledger.held_pages
        if number % METRICS_EVERY == 0 or step.kind == EXTEND:
            self._update_metrics()

    def forward_failed(self, error: BaseException) -> None:
        """A pass was given up, and its requests are about to be failed. RanksDisagree if other ranks go on with it."""
        require_together(self.pager.ranks, error, self.prefill.layer)
        self.step = Step(staged=self.step.staged)  # copies that were queued may still read its ids
        self.failed_batches += 1
        self.pager.all_queued()
        if self.on_gpu:
            torch.cuda.empty_cache()

    # -- attention -----------------------------------------------------------------------------------------------

    def choose_resident(self) -> None:
        """Requests over a resident prefix have had a first look at it: choose what they read."""
        with self.on_stream():
            self.step = self.prefill.choose_resident(self.step)

    def reserve_graph_tokens(self, batch: int) -> int:
        """Slots that CUDA graphs for up to ``batch`` requests need room for."""
        physical = self.pager.ledger.physical_pages * self.pager.page
        self.graph_tokens = graph_tokens(self.config, batch, self.max_context, physical, self.pager.page)
        return self.graph_tokens

    # -- requests that are gone, and none at all -------------------------------------------------------------------

    def request_gone(self, key: str, complete: bool) -> None:
        """The request finished, was aborted or retracted; its KV is about to be released.

        Args:
            key: its name here; "" for one that was not admitted.
            complete: it came to its end.
        """
        if self.recorder is not None and key in self.requests:
            with self.on_stream():
                self.recorder.close(self.requests[key], complete, self.pager.ledger.v2p)
        self._decoded = None
        self.pager.forget(key)
        self.admission.forget(key)
        request = self.requests.pop(key, None)
        if request is not None:
            self.lookahead.forget(request)
        if request is not None and not request.rid.startswith(HEALTH_CHECK):
            self.finished_requests += 1
            self.finished.append(finished(request, self.finished_requests, self.lookahead.rules))
        self._update_metrics()

    def on_idle(self) -> None:
        """No request is there, and what the last one had is freed: the time to look whether everything is in order.

        What is found ends a server only with ``--lsa-debug``, as SGLang's own check for leaks does only when it is told
        to be strict.

        Raises:
            LedgerError, RuntimeError: with ``--lsa-debug``, naming what is inconsistent.
        """
        if self.groups is not None:
            self.groups.forget()
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
        with self.on_stream():
            check(self.pager, self.table, self.requests, self.req_to_token)

    # -- inside --------------------------------------------------------------------------------------------------

    def _remember(self, pages: np.ndarray) -> None:
        """These virtual pages are full now: mirror them and remember their keys."""
        if len(pages):
            physical = self.pager.ledger.v2p[pages]
            self.page_keys.complete(pages, physical)
            for policy in self.policies.values():
                policy.complete(pages, physical)
            self.pager.store(pages)

    def _update_metrics(self) -> None:
        if self.metrics is not None:
            self.metrics.update(self)
