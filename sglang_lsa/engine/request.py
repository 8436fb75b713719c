"""A request, from its first prefill chunk until its KV is released: what it asked for, what it reads, its story."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sglang_lsa.config import GivenSet, RequestOptions
from sglang_lsa.engine.deferred_scores import Fetch
from sglang_lsa.engine.reading import IN_PLACE
from sglang_lsa.engine.selection import Watched

HISTORY_WINDOWS = 32
"""Windows whose resident positions are remembered per request."""


def _none() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


class State(enum.Enum):
    """How far a refresh has come."""

    QUEUED = "queued"
    """What predicts it is queued, and read in the step in which it is due."""
    CHOSEN = "chosen"
    """Its positions are known; there is no room for its pages yet."""
    LOADING = "loading"
    """Its pages are held beside those of the set before it, and sent for."""


@dataclass
class Refresh:
    """A resident set on its way: first its scores, then its positions, then its pages."""

    computed: int
    """Tokens of the request whose KV was computed when it was predicted, or would be by the passes queued before."""
    complete: int
    """Complete pages of the request when it was predicted; later ones belong to the tail."""
    context: int
    """Pages of the request then, a partly filled last one included."""
    due: int
    """Number of the step before which its scores are read."""
    scores: Fetch | None = None
    """None for a set that is not predicted: everything, or what the request names itself."""
    state: State = State.QUEUED
    positions: np.ndarray = field(default_factory=_none)
    tail_start: int = 0
    values: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Scores of all complete pages."""
    ranks: np.ndarray | None = None
    """Scores of ``positions``; pages that must stay have infinite ones."""
    watched: Watched | None = None
    urgent: bool = False
    """The request cannot decode without it."""
    written: bool = False
    """The resident table has it already."""
    asked: int = 0
    """Forward passes that had started when it was predicted."""

    @property
    def held(self) -> bool:
        """Whether its pages are held beside those of the set before it."""
        return self.state is State.LOADING

    def needed(self, pages: np.ndarray) -> np.ndarray:
        """Those of the request's ``pages`` that decode would read."""
        return np.concatenate((pages[self.positions], pages[self.tail_start :]))


@dataclass
class Window:
    """A resident set that a request read, or reads."""

    tail_start: int
    positions: np.ndarray
    tokens: int = 0
    """Context of the first decode step that read it, in tokens; 0 before that step."""
    watched: Watched | None = None

    def as_given(self) -> GivenSet:
        return GivenSet(self.tokens, self.tail_start, tuple(self.positions.tolist()))


@dataclass(frozen=True)
class Asked:
    """What a request asked for; it stays so until the request ends.

    Attributes:
        dense: it reads all of its pages, whatever their number.
        seed: a number made of its prompt: equal prompts get equal random pages and equal window phases.
        record: tokens at the end of its prompt that are recorded as if they had been generated; 0 for none.
        dense_steps: decode steps after its prompt before its first set is predicted; until then it reads everything.
        prompt_lookup: tokens at the end of its text that must have occurred before for what followed them to stay;
            0 does not look.
        widen: how many times the budget's pages its sets may have while it repeats its prompt.
        watch: pages whose scores it asked for.
        target: share of attention that its sets are to cover, in as few pages as that takes; ``budget`` is then the
            most that they may have. None takes all that the budget allows.
        groups: whether it may be in one.
    """

    policy: str
    budget: float
    dense: bool = False
    seed: int = 0
    record: int = 0
    dense_steps: int = 0
    prompt_lookup: int = 0
    widen: float = 1.0
    watch: tuple[int, ...] = ()
    target: float | None = None
    groups: bool = True

    @classmethod
    def of(cls, options: RequestOptions, seed: int) -> Asked:
        """From the options of a request."""
        return cls(
            options.policy,
            options.largest_budget,
            options.dense,
            seed,
            options.record,
            options.dense_steps,
            options.prompt_lookup,
            options.widen,
            options.watch,
            options.target,
            options.groups,
        )


@dataclass
class Residency:
    """Which of its pages a request reads, by their positions, and which it will read next."""

    positions: np.ndarray = field(default_factory=_none)
    """Below the tail, ascending."""
    tail_start: int = 0
    """Pages from here on are all read; 0 for a request that reads everything."""
    ranks: np.ndarray | None = None
    """Scores of ``positions``, by which the worst are given up under pressure; pages that must stay are infinite."""
    set_asked: int = 0
    """Forward passes that had started when the set that it reads was predicted; pages recalled since came for it."""
    next: Refresh | None = None
    incomplete: bool = False
    """Some of its pages are only in host memory and it has no resident set yet: it cannot decode without one."""
    prefix_positions: np.ndarray = field(default_factory=_none)
    """What its prompt reads of the pages that the radix tree had of it, when it does not read all."""
    prefix_ranks: np.ndarray | None = None


@dataclass
class Story:
    """What happened to a request, for the status alone."""

    prefill: str = IN_PLACE
    cached_tokens: int = 0
    """Tokens of its prompt that were not computed, because the radix tree had them."""
    windows: deque[Window] = field(default_factory=lambda: deque(maxlen=HISTORY_WINDOWS))
    stalls: int = 0
    shrunk: int = 0
    """How often its set was made smaller than its budget because the device pool was full."""
    coverage: float | None = None
    """Share of attention that its newest set is expected to cover; None where its policy cannot tell."""
    expected: float | None = None
    """Share of all attention that its newest set is expected to cover, as measured; None where that is not known."""
    widened: int = 0
    """How often its set was made larger than its budget: expected to cover too little, or it repeats its prompt."""
    collapsed: int = 0
    """How often only its first and last pages were worth keeping."""
    failures: int = 0

    @property
    def history(self) -> list[list[int]]:
        """Positions of each window's set below its tail."""
        return [window.positions.tolist() for window in self.windows]


def _unknown(tokens: int) -> np.ndarray:
    return _none()


@dataclass
class Request:
    """A request as this side sees it, from its first prefill chunk until its KV is released."""

    rid: str
    row: int
    """Its row in SGLang's ``req_to_token`` and in the static tables."""
    asked: Asked
    key: str = ""
    """By which everything on this side knows it: ``rid``, unless an earlier request with that one is still here."""
    text: Callable[[int], np.ndarray] = _unknown
    """Its first tokens, at most as many as asked for and as far as they are known on the host, integers ``[n]``; good
    until it is asked again."""
    prompt_tokens: int = 0
    """What was prefilled when it was admitted: the prompt, and after a retraction what it had generated."""
    new_tokens: int = 0
    """The most that it generates."""
    cached_pages: int = 0
    """Pages that the radix tree had when it was admitted."""
    first_observed: int = 0
    """First position whose query was seen since it was admitted."""
    tokens: int = 0
    """Context, the tokens included that the forward pass being queued computes."""
    computed: int = 0
    """Tokens whose KV the passes queued before have computed."""
    pages: np.ndarray = field(default_factory=_none)
    """Virtual ids of its pages, int64 ``[n]``, the last one perhaps partly filled."""
    given: deque[GivenSet] | None = None
    """Resident sets that it named itself and has not read yet."""
    window: int = -1
    """Number of the window whose set was predicted last; -1 before the first."""
    steps_left: int = 0
    """Decode steps before the next set is to be read."""
    lead: int = 0
    """Steps before the end of its window at which it looks for the next set."""
    resident: Residency = field(default_factory=Residency)
    unread: Window | None = None
    """The newest set, if no decode step has read it yet."""
    story: Story = field(default_factory=Story)

    def __post_init__(self) -> None:
        self.key = self.key or self.rid

    def name_sets(self, sets: Sequence[GivenSet]) -> None:
        """The request says itself what its windows read."""
        self.given = deque(sets) if sets else None

    def read_pages(self) -> np.ndarray:
        """Virtual pages that its decode steps read now."""
        return np.concatenate((self.pages[self.resident.positions], self.pages[self.resident.tail_start :]))

    def sizes(self) -> tuple[int, int]:
        """Pages of the request, and how many of them its decode steps read."""
        context = len(self.pages)
        return context, len(self.resident.positions) + context - self.resident.tail_start
