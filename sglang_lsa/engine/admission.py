"""Admission: which prompts the device pool takes, when, and how each of them will be prefilled."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_lsa.config import LSAConfig, RequestOptions
from sglang_lsa.engine.arrival import Arrival, Prompt, Verdict
from sglang_lsa.engine.choose import Rules
from sglang_lsa.engine.reading import IN_PLACE, RESIDENT, STREAMED
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.pages import pages_spanned

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,199}")
"""What the names of recorded requests are made of."""


@dataclass(frozen=True)
class Admitted:
    """How a prompt is prefilled.

    Attributes:
        how: one of the three ways of ``sglang_lsa.engine.reading``.
        prefix: virtual pages that the radix tree has of it.
        demand: device pages promised to it until it decodes.
        chunk_tokens: the most that one pass may compute of it; None when that is up to SGLang.
    """

    how: str
    prefix: np.ndarray
    demand: int
    chunk_tokens: int | None = None


class Admission:
    """Counts device pages: SGLang counts tokens of the host mirror, of which there are more.

    A prompt that fits beside everything else is prefilled in place. One that does not is streamed: it needs device
    pages for one chunk, and then for its resident set. Either has what it needs promised to it before it starts, so
    that nothing can overtake it, and an idle server takes any prompt that SGLang takes.

    Args:
        rules: with the configuration in force, since that may change (``sglang_lsa.serve.control``).
        chunk_tokens: SGLang's chunk of prefill; None when prompts are not cut into chunks.
        vocabulary: token ids from this on do not exist; None if that is not known.
    """

    def __init__(
        self,
        pager: Pager,
        rules: Rules,
        chunk_tokens: int | None,
        vocabulary: int | None = None,
    ):
        self.pager, self.rules, self.vocabulary = pager, rules, vocabulary
        self.pages = pager.ledger.physical_pages
        self.whole_prompts = pager.layout.whole_prompts
        self.chunk_tokens = chunk_tokens
        self.admitted: dict[str, Admitted] = {}
        """By request, from admission until its KV is released."""
        self.waits = 0
        """Scheduling passes in which a prompt had to wait for device pages."""
        self.pressed = 0
        """Decode steps for which SGLang was asked to retract a request, because there was no page to grow into."""
        self._promised_prefixes: set[int] = set()

    @property
    def config(self) -> LSAConfig:
        """The one in force."""
        return self.rules.config

    # -- prompts -------------------------------------------------------------------------------------------------

    def options(self, custom_params: Mapping[str, Any] | None) -> RequestOptions:
        """What a request asked for; what it left open is as the server's configuration is now that it comes.

        It keeps that until it ends, retractions included: it was refused or admitted by these numbers, so a later
        change of the configuration must not make a set larger than was promised, or a prompt impossible that waits.

        One whose options are refused has those of a request that asked for nothing: SGLang still computes a token of
        what it aborts.
        """
        return self._read_options(custom_params)[0]

    def _read_options(self, custom_params: Mapping[str, Any] | None) -> tuple[RequestOptions, str | None]:
        problem: str | None
        try:
            index = not self.pager.layout.shows_keys
            options = RequestOptions.parse(custom_params, self.config, self.pager.page, index)
            problem = self.rules.no_auto(options.policy) if options.target is not None and not options.dense else None
        except ValueError as error:
            problem = str(error)
        return (options, None) if problem is None else (RequestOptions.parse(None, self.config), problem)

    def longest(self, options: RequestOptions) -> int | None:
        """Tokens that a prompt may have at most because it must be whole on the device; None if it need not be."""
        whole = self.chunk_tokens is None or options.dense or self.whole_prompts
        return (self.pages - 1) * self.pager.page - 1 if whole else None

    def judge(self, arrival: Arrival) -> Verdict:
        """Whether a request that has just come can ever run, and what bounds it."""
        options, problem = self._read_options(arrival.custom_params)
        if problem is not None:
            return Verdict(options, problem)
        if options.record and not NAME.fullmatch(arrival.rid):
            return Verdict(
                options,
                f"custom_params.lsa.record: the rid {arrival.rid!r:.80} becomes a file name: "
                "use letters, digits, - and _",
            )
        # One that is recorded must compute all of its pages itself: the radix tree has none under its name.
        cache_key = arrival.rid if options.record else None
        tokens, room = len(arrival.ids), (self.pages - 1) * self.pager.page
        # A request may be retracted at any time, and what it generated is then prefilled like a prompt.
        longest_answer = room - tokens if options.dense or self.whole_prompts else None
        refusal = self._refusal(np.asarray(arrival.ids, dtype=np.int64), room, options)
        return Verdict(options, refusal, longest_answer if refusal is None else None, cache_key)

    def _refusal(self, ids: np.ndarray, room: int, options: RequestOptions) -> str | None:
        tokens, pages = len(ids), pages_spanned(len(ids), self.pager.page)
        if not tokens:  # an empty text, where SGLang lets it pass
            return "The prompt has no tokens: send at least one."
        if self.vocabulary is not None and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            wrong = ids[(ids < 0) | (ids >= self.vocabulary)][0]  # the model would read past its embeddings
            return f"The prompt has the token id {wrong}: use ids from 0 to {self.vocabulary - 1}."
        if options.dense and tokens >= room:
            return (
                f"The prompt has {tokens} tokens ({pages} pages of KV) and asks to read all of them in "
                f"decode; the device pool takes fewer than {room}. Ask for a budget below 1 and a policy other than "
                "full, shorten the prompt, or start the server with a larger --lsa-device-tokens."
            )
        if self.whole_prompts and tokens >= room:
            return (
                f"The prompt has {tokens} tokens ({pages} pages of KV); prompts of this model are whole on the device "
                f"while they are computed, and the device pool takes fewer than {room}. Shorten the prompt, or start "
                "the server with a larger --lsa-device-tokens."
            )
        if self.chunk_tokens is None and tokens >= room:
            return (
                f"The prompt has {tokens} tokens ({pages} pages of KV); without chunked prefill the "
                f"device pool takes prompts of fewer than {room}. Start the server with --chunked-prefill-size "
                f"{room // 2} or so, or with a larger --lsa-device-tokens, or shorten the prompt."
            )
        return None

    def choose(self, prompt: Prompt, running: int, batch: Sequence[str], chunk_tokens: int | None) -> Admitted | None:
        """How this prompt can be prefilled now, next to one growing page per running request; None if it must wait.

        Args:
            running: requests that decode, or were admitted in this pass.
            batch: how the prompts admitted in this pass are prefilled. A streamed one is computed alone, and so are
                prompts over a resident prefix, apart from others of their kind.
            chunk_tokens: what SGLang would compute of it at most; None without chunks.
        """
        self.pager.poll()
        return self.possible(prompt, running, batch, chunk_tokens)

    def possible(self, prompt: Prompt, running: int, batch: Sequence[str], chunk_tokens: int | None) -> Admitted | None:
        """The same by what is known to be done already; changes nothing."""
        options, prefix, tokens = prompt.options, prompt.prefix, prompt.tokens
        pages, room = pages_spanned(tokens, self.pager.page), self.pager.unpromised_later - running - 1
        prunable = not options.dense and tokens >= self.config.min_context
        least = pages_spanned(min(tokens - len(prefix) * self.pager.page, chunk_tokens or tokens), self.pager.page)
        chunk = min(least, self.pages // 2)
        resident = self._expected(pages, options)

        def admit(how: str, demand: int, company: bool, chunk_pages: int | None = None) -> Admitted | None:
            if demand > room or not company:
                return None
            return Admitted(how, prefix, demand, chunk_pages and chunk_pages * self.pager.page)

        if self.whole_prompts:
            return admit(IN_PLACE, self._new_pages(prefix, pages), True)
        if prunable and options.prefill == "resident" and self._worth_it(len(prefix), resident):
            own = pages - len(prefix)
            # What the prompt reads of its prefix, and then its first set: neither is larger.
            largest = max(resident, self._expected(len(prefix), options))
            if (demand := largest + own + 1) < self.pages:
                return admit(RESIDENT, demand, all(other == RESIDENT for other in batch), chunk)
        in_place, one_pass = self._new_pages(prefix, pages), chunk_tokens is None and least > chunk
        if in_place <= room or one_pass or not prunable:
            return admit(IN_PLACE, in_place, all(other == IN_PLACE for other in batch))
        return admit(STREAMED, max(chunk + 1, resident), not batch, chunk)

    def _expected(self, pages: int, options: RequestOptions) -> int:
        """Pages of a set over so many pages that are promised: those that it is expected to take. A set that turns out
        larger takes what can be had beside that, and is cut to it."""
        return self.rules.expected_pages(pages, options.policy, options.largest_budget, options.target)

    def _worth_it(self, prefix: int, resident: int) -> bool:
        """Whether a resident set is less than the cached prefix, and that long enough to be pruned at all."""
        return prefix * self.pager.page >= self.config.min_context and resident < prefix

    def postpone(self, prompt: Prompt) -> None:
        """This prompt is the first of its pass and must wait: bring in what past requests over its prefix selected,
        once for each request."""
        self.waits += 1
        if not prompt.warmed:
            self._warm(prompt.prefix)

    def promise(self, rid: str, admitted: Admitted, warmed: bool = False) -> str:
        """A prompt was admitted: keep device pages for it until it decodes. Returns the name by which everything on
        this side knows the request from now on.

        Args:
            warmed: as in :class:`Prompt`.
        """
        key, uses = rid, 1
        while key in self.admitted:
            uses += 1
            key = f"{rid} ({uses})"
        self.admitted[key] = admitted
        self.pager.reservations.promise(key, admitted.demand)
        self._promised_prefixes.update(admitted.prefix.tolist() if admitted.how == IN_PLACE else ())
        if admitted.how != IN_PLACE and not warmed:
            self._warm(admitted.prefix)
        return key

    def batch_formed(self) -> None:
        """The prompts admitted in this pass are about to be computed."""
        self._promised_prefixes.clear()

    def forget(self, key: str) -> None:
        """The request is gone."""
        self.admitted.pop(key, None)

    def _warm(self, prefix: np.ndarray) -> None:
        hot = self.pager.ledger.heat.hottest(prefix, int(self.rules.largest_set))
        self.pager.prefetch(hot[: max(0, self.pager.unpromised_pages)])

    def _new_pages(self, prefix: np.ndarray, pages: int) -> int:
        """Device pages that a prompt of ``pages`` pages takes in place from those that can be had.

        Prefix pages that another request holds, or was promised in this pass, cost nothing; all others do, even those
        on the device, which are then no longer there to give up.
        """
        promised = np.fromiter((page in self._promised_prefixes for page in prefix.tolist()), bool, len(prefix))
        return pages - int((self.pager.ledger.is_held(prefix) | promised).sum())

    # -- decode --------------------------------------------------------------------------------------------------

    def can_decode(self, computed: Iterable[int], shrink: Callable[[int], None]) -> bool:
        """Whether every request that is about to open a page gets one; if not, SGLang is asked to retract a request.
        See :meth:`make_room`."""
        found = self.make_room(computed, shrink)
        self.pressed += not found
        return found

    def make_room(self, computed: Iterable[int], shrink: Callable[[int], None]) -> bool:
        """Whether every request that is about to open a page gets one.

        Unheld pages are given up first, coldest first; then resident sets are made smaller.

        Args:
            computed: tokens that each of them has KV of.
            shrink: makes resident sets of running requests smaller until so many device pages are let go.
        """
        page = self.pager.page
        opening = sum([tokens % page == 0 for tokens in computed])
        if opening == 0 or opening <= self.pager.unpromised_pages:
            return True
        self.pager.settle()  # before a request loses anything, count what is only on its way
        if opening <= self.pager.unpromised_pages:
            return True
        shrink(opening - self.pager.unpromised_pages)
        self.pager.settle()
        return opening <= self.pager.unpromised_pages
