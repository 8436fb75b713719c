"""RequestOptions: what one request asked for, in ``custom_params`` or a header."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from sglang_lsa.config.allowed import (
    AUTO,
    MOST_LOOKED_UP,
    MOST_WIDENED,
    PAGE_SIZE,
    PREFILLS,
    require_choice,
    require_fraction,
)
from sglang_lsa.config.policies import FULL, looks_at_index, no_auto, offer_of, offered
from sglang_lsa.config.values import LSAConfig

MOST_WATCHED = 256
"""Pages whose scores a request may ask for."""


@dataclass(frozen=True)
class GivenSet:
    """A resident set that a request names itself, for evaluation and replay.

    Attributes:
        tokens: context, in tokens, of the first decode step that reads it; the new token counts.
        tail_start: page from which on everything is read.
        positions: pages before that, ascending.
    """

    tokens: int
    tail_start: int
    positions: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.tokens}:{self.tail_start}:{','.join(map(str, self.positions))}"


@dataclass(frozen=True)
class RequestOptions:
    """What one request asked for: ``custom_params={"lsa": {...}}``. Everything absent comes from the server.

    Attributes:
        sets: resident sets of its windows, instead of predicted ones. In JSON a string, ``tokens:tail_start:p,p,p``
            with ``;`` between sets, which is what ``/lsa/requests`` tells of a request.
        record: how many of the prompt's last tokens are recorded as if they had been generated; 0 records nothing.
        dense_steps: decode steps that read everything before the first set is predicted.
        prompt_lookup: tokens at the end of its text that must have occurred before for what followed them to stay.
        widen: how many times the budget's pages its sets may have while it repeats its prompt; 1 does not widen.
        watch: pages whose scores ``/lsa/requests`` tells of the request, for evaluation.
        target_coverage: share of attention that its sets are to cover where the budget is ``auto``.
        max_budget: the largest share of its pages that its sets have then.
        groups: whether it may read pages together with others, where the server forms groups; if not, its answer
            depends on nobody who decodes beside it.
    """

    policy: str
    budget: float | str
    enabled: bool = True
    prefill: str = "exact"
    sets: tuple[GivenSet, ...] = ()
    record: int = 0
    dense_steps: int = 0
    prompt_lookup: int = LSAConfig.prompt_lookup
    widen: float = LSAConfig.widen
    watch: tuple[int, ...] = ()
    target_coverage: float = LSAConfig.target_coverage
    max_budget: float = LSAConfig.max_budget
    groups: bool = True

    @property
    def target(self) -> float | None:
        """Share of attention that its sets are to cover; None where their size is fixed."""
        return self.target_coverage if self.budget == AUTO else None

    @property
    def largest_budget(self) -> float:
        """The largest share of its pages that a set of it has."""
        return self.max_budget if isinstance(self.budget, str) else self.budget

    @property
    def dense(self) -> bool:
        """Whether this request reads all of its pages, whatever its length."""
        full = not self.enabled or self.policy == FULL or self.largest_budget >= 1.0 or self.record > 0
        return not self.sets and full

    @classmethod
    def parse(
        cls, custom_params: Any, config: LSAConfig, page: int = PAGE_SIZE, index: bool | None = None
    ) -> RequestOptions:
        """Read ``custom_params`` of a request.

        Args:
            index: whether the model has an index of its own; None if only the server's policy can tell.

        Raises:
            ValueError: unknown key, wrong type or impossible value; becomes HTTP 400.
        """
        asked = (custom_params or {}).get("lsa") if isinstance(custom_params, dict) else None
        if asked is None:
            return cls(
                str(config.policy),
                config.budget,
                prefill=config.prefill,
                dense_steps=config.dense_steps,
                prompt_lookup=config.prompt_lookup,
                widen=config.widen,
                target_coverage=config.target_coverage,
                max_budget=config.max_budget,
            )
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(asked, dict):
            raise ValueError(f"custom_params.lsa is {asked!r}: use an object with {', '.join(known)}")
        unknown = sorted(set(asked) - set(known))
        if unknown:
            raise ValueError(f"custom_params.lsa has unknown key {unknown[0]!r}: use {', '.join(known)}")
        enabled, groups = _switch(asked, "enabled"), _switch(asked, "groups")
        budget = asked.get("budget", config.budget)
        if budget != AUTO:
            budget = _fraction("budget", budget, f", or {AUTO}")
        target = _fraction("target_coverage", asked.get("target_coverage", config.target_coverage))
        most = _fraction("max_budget", asked.get("max_budget", config.max_budget))
        policy = asked.get("policy", config.policy)
        # Whether calibration finds an indexer is known in the scheduler, which looks at every request again.
        trained = config.indexer or ("calibrated" if config.calibrates else None)
        names = offered(trained, looks_at_index(config.policy) if index is None else index)
        require_choice("custom_params.lsa.policy", policy, names)
        # What a request leaves open may have changed since this process was told of it: the scheduler looks again.
        able = any(offer_of(name).expects for name in names) if "policy" not in asked else offer_of(policy).expects
        if asked.get("budget") == AUTO and enabled and policy != FULL and not able:
            raise ValueError(no_auto("custom_params.lsa.budget", str(policy)))
        prefill = asked.get("prefill", config.prefill)
        require_choice("custom_params.lsa.prefill", prefill, PREFILLS[:1] if index else PREFILLS)
        sets = _parse_sets(asked.get("sets", ""), page)
        if sets and (not enabled or policy == FULL):
            raise ValueError("custom_params.lsa names sets and switches pruning off: leave one of the two out")
        record = _count(asked, "record", 0, "tokens")
        if record and not config.record:
            raise ValueError(f"custom_params.lsa.record is {record}: this server was not started with --lsa-record")
        if record and sets:
            raise ValueError("custom_params.lsa has both record and sets: recordings are of full attention")
        dense_steps = _count(asked, "dense_steps", config.dense_steps, "steps")
        prompt_lookup = _count(asked, "prompt_lookup", config.prompt_lookup, "tokens")
        if prompt_lookup > MOST_LOOKED_UP:
            raise ValueError(
                f"custom_params.lsa.prompt_lookup is {prompt_lookup}: use a number of tokens, {MOST_LOOKED_UP} or less"
            )
        widen = asked.get("widen", config.widen)
        if isinstance(widen, bool) or not isinstance(widen, int | float) or not 1 <= widen <= MOST_WIDENED:
            raise ValueError(f"custom_params.lsa.widen is {widen!r}: use a number from 1 to {MOST_WIDENED}")
        watch = asked.get("watch", [])
        if isinstance(watch, str) and re.fullmatch(r"(\d{1,10}(,\d{1,10})*)?", watch, re.ASCII):
            watch = [int(page) for page in watch.split(",") if page]  # as SGLang's messages can carry it
        pages = isinstance(watch, list) and all(type(page) is int and 0 <= page < 1 << 31 for page in watch)
        if not pages or len(watch) > MOST_WATCHED:
            raise ValueError(
                f"custom_params.lsa.watch is {watch!r:.80}: "
                f"use a list of at most {MOST_WATCHED} page numbers, or text as 0,3,5"
            )
        counts = (record, dense_steps, prompt_lookup)
        found = cls(str(policy), budget, enabled, prefill, sets, *counts, float(widen), tuple(watch))
        return dataclasses.replace(found, target_coverage=target, max_budget=most, groups=groups)


def _switch(asked: dict[str, Any], name: str) -> bool:
    value = asked.get(name, True)
    if not isinstance(value, bool):
        raise ValueError(f"custom_params.lsa.{name} is {value!r}: use true or false")
    return value


def _fraction(name: str, value: Any, otherwise: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"custom_params.lsa.{name} is {value!r}: use a number in (0, 1]{otherwise}")
    require_fraction(f"custom_params.lsa.{name}", value)
    return float(value)


def _count(asked: dict[str, Any], name: str, default: int, unit: str) -> int:
    value = asked.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"custom_params.lsa.{name} is {value!r}: use a number of {unit}, 0 or more")
    return value


def read_sets(text: str) -> tuple[GivenSet, ...]:
    """Resident sets from their written form, ``tokens:tail_start:p,p,p`` with ``;`` between sets; none if it is empty.

    Raises:
        ValueError: it is something else.
    """
    found = []
    for part in filter(None, text.split(";")):
        tokens, tail_start, positions = part.split(":")
        found.append(GivenSet(int(tokens), int(tail_start), tuple(int(p) for p in positions.split(",") if p)))
    return tuple(found)


def _parse_sets(text: Any, page: int) -> tuple[GivenSet, ...]:
    """Resident sets in their written form; see :class:`RequestOptions`."""
    problem = f"custom_params.lsa.sets is {text!r:.80}: write tokens:tail_start:p,p,p with ; between sets"
    if not isinstance(text, str):
        raise ValueError(problem)
    try:
        sets = read_sets(text)
    except ValueError:
        raise ValueError(problem) from None
    for before, given in zip((None, *sets), sets, strict=False):
        ordered = all(a < b for a, b in zip((-1, *given.positions), (*given.positions, given.tail_start), strict=True))
        if not ordered or given.tail_start * page >= given.tokens:
            raise ValueError(f"{problem}; positions ascend and lie before tail_start, and that before tokens")
        if before is not None and before.tokens >= given.tokens:
            raise ValueError(f"{problem}; each set begins at more tokens than the one before")
    return sets
