"""Arms: who chooses the pages that an answer is generated from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sglang_lsa.config import AUTO, PAGE_SIZE, LSAConfig, RequestOptions
from sglang_lsa.config.allowed import least_pages
from sglang_lsa.engine.selection import budget_pages
from sglang_lsa.evaluation.questions import Question
from sglang_lsa.memory.pages import pages_spanned

FULL, LSA, EVIDENCE = "full", "lsa", "evidence"


@dataclass(frozen=True)
class Arm:
    """A name in :data:`ARMS` and a budget: the share of a context's pages that may be resident.

    Attributes:
        apart: its requests share no pages with others: each computes its whole prompt.
        variant: name of an arm with options of its own; empty for the arm as it is.
        extra: these options, as JSON.
    """

    name: str
    budget: float
    apart: bool = False
    variant: str = ""
    extra: str = "{}"

    def options(self, question: Question, config: Mapping[str, Any]) -> dict[str, Any]:
        """``custom_params.lsa`` of the request, to a server of this configuration. The arms of a question decode at
        the same time over one prefix: in a group each would read what the others chose."""
        return ARMS[self.name](question, self.budget, config) | {"groups": False} | json.loads(self.extra)

    @property
    def title(self) -> str:
        """Name in the results."""
        return "_".join(filter(None, (self.name, self.variant, "apart" if self.apart else "")))

    def __str__(self) -> str:
        return self.title if self.name == FULL else f"{self.title} {self.budget:.1%}"


def asked_of(arms: Sequence[Arm], question: Question) -> list[Arm]:
    """The arms that can answer it: :data:`EVIDENCE` only where evidence is known."""
    return [arm for arm in arms if arm.name != EVIDENCE or question.evidence]


def _policy(name: str) -> Callable[[Question, float, Mapping[str, Any]], dict[str, Any]]:
    return lambda question, budget, config: {"policy": name, "budget": budget}


def _last_pages(question: Question, budget: float, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"sets": named_sets(question, budget, config, ())}


def _evidence(question: Question, budget: float, config: Mapping[str, Any]) -> dict[str, Any]:
    prompt = pages_spanned(len(question.ids), PAGE_SIZE)
    asked = range(max(0, prompt - config["prompt_pages"]), prompt)
    return {"sets": named_sets(question, budget, config, (0, *asked, *question.evidence))}


def named_sets(question: Question, budget: float, config: Mapping[str, Any], wanted: Sequence[int]) -> str:
    """Sets for a request to name, one a window.

    Each has as many pages as the budget allows: the last ones, as many as the server itself keeps, then the wanted
    ones, the first of them first, and more of the last ones if there is room.
    """
    sets = []
    window, stop = config["window"], len(question.ids) + question.asked.new_tokens + config["window"]
    for tokens in range(len(question.ids), stop, window):
        pages = pages_spanned(tokens, PAGE_SIZE)
        room = budget_pages(pages, budget, least_pages(config["min_pages"], config["floor_tokens"]))
        recent = max(1, min(config["recent_pages"], room // 4))
        before_tail = dict.fromkeys(page for page in wanted if page < pages - recent)
        chosen = sorted(list(before_tail)[: room - recent])
        # The tail takes what room is left; a chosen page that it covers makes room for one more.
        tail = pages - (room - len(chosen))
        while chosen and chosen[-1] >= tail:
            chosen.pop()
            tail -= 1
        tail = min(max(tail, 0), (tokens - 1) // PAGE_SIZE)
        sets.append(f"{tokens}:{tail}:{','.join(str(page) for page in chosen if page < tail)}")
    return ";".join(sets)


ARMS: dict[str, Callable[[Question, float, Mapping[str, Any]], dict[str, Any]]] = {
    FULL: lambda question, budget, config: {"enabled": False},
    LSA: _policy("indexer"),
    "quest": _policy("quest"),
    "window": _policy("recency"),
    "random": _policy("random"),
    "recency": _last_pages,
    EVIDENCE: _evidence,
}
"""``lsa`` is the trained indexer, ``window`` the last pages and the first ones (StreamingLLM), ``recency`` the last
pages only, ``evidence`` the first page, the question's, pages that the answer is in, and the last ones."""


def parse_arms(names: list[str], budgets: list[float], apart: bool = False, variants: Sequence[str] = ()) -> list[Arm]:
    """Full attention first, whose prompts bring the context into the radix tree; then every arm at every budget.

    Args:
        apart: the first arm once more at the first budget, without sharing.
        variants: ``NAME=JSON``, the arm ``lsa`` with these options of a request.

    Raises:
        ValueError: an unknown arm, an impossible budget or variant.
    """
    named = [_variant(given) for given in variants]
    if len(dict(named)) < len(named):
        raise ValueError(f"--variant {', '.join(name for name, _ in named)}: give each another name")
    for name in names:
        if name not in ARMS:
            raise ValueError(f"--arms {name}: there is no such arm: use some of {', '.join(ARMS)}")
    for budget in budgets:
        if not 0 < budget <= 1:
            raise ValueError(f"--budgets {budget} is out of range: use shares of a context's pages in (0, 1]")
    others = [Arm(name, budget) for budget in budgets for name in dict.fromkeys(names) if name != FULL]
    others += [Arm(LSA, budget, variant=name, extra=extra) for budget in budgets for name, extra in named]
    return [Arm(FULL, 1.0), *others, *([replace(others[0], apart=True)] if apart and others else [])]


def _variant(given: str) -> tuple[str, str]:
    name, found, written = given.partition("=")
    try:
        extra = json.loads(written) if found else None
    except ValueError:
        extra = None
    if not re.fullmatch("[a-z0-9]+", name) or name == "apart" or not isinstance(extra, dict) or not extra:
        raise ValueError(
            f"--variant {given}: write NAME=JSON, a name of small letters and digits and options of a request, such as "
            """first='{"dense_steps": 16}'"""
        )
    if "policy" in extra or extra.get("budget", AUTO) != AUTO:
        raise ValueError(
            f"--variant {given}: leave policy and budget to --arms and --budgets, but for a budget of auto"
        )
    try:
        RequestOptions.parse({"lsa": extra}, LSAConfig(indexer="the server's"))
    except ValueError as error:
        raise ValueError(f"--variant {given}: {error}") from None
    return name, json.dumps(extra, sort_keys=True)
