"""Which pages of each request stay on the device: observe -> score -> select -> plan -> recall -> remap -> attend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.choose import Rules
from sglang_lsa.engine.counts import Counts
from sglang_lsa.engine.policies import Policy
from sglang_lsa.engine.pressure import Pressure
from sglang_lsa.engine.refresh import Refresher
from sglang_lsa.engine.remap import ResidentSets
from sglang_lsa.engine.request import Request
from sglang_lsa.engine.score import Scorer
from sglang_lsa.engine.sizing import largest_set
from sglang_lsa.engine.window import Clock
from sglang_lsa.indexer.expectation import Expectation
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.resident_table import ResidentTable
from sglang_lsa.memory.scores import Scores


class Lookahead:
    """Decides, once a window, which pages of each request stay on the device.

    On a CPU a refresh happens at once, between two windows. On a GPU it starts ``lead`` steps before its window begins:
    its scores are queued behind a forward pass, its pages arrive while decode goes on, and the table changes where the
    window begins; the device waits for pages that are late. Which pages are chosen depends on steps, never on timing.

    Args:
        policies: by name; ``full`` needs none.
        lead: decode steps from the start of a refresh to the window that it is for.
        lag: forward passes after which scores are read.
        thresholds: of the policies whose scores are shares of attention.
        expectations: of those that know what their sets cover.
        scores: what they pass through before anything is chosen by them; by default they stay what they are.
    """

    def __init__(
        self,
        config: LSAConfig,
        pager: Pager,
        table: ResidentTable,
        policies: Mapping[str, Policy],
        lead: int = 0,
        lag: int = 0,
        thresholds: Mapping[str, float] | None = None,
        scores: Scores | None = None,
        expectations: Mapping[str, Expectation] | None = None,
    ):
        self.counts = Counts()
        largest = largest_set(pager.ledger.physical_pages, table.max_pages)
        self.rules = Rules(config, largest, thresholds or {}, expectations or {}, pager.page)
        self.clock = Clock(config.window, lead, lag)
        self.scorer = Scorer(policies, pager.device, self.counts, scores)
        self.sets = ResidentSets(table, pager.ledger)
        self.refresher = Refresher(self.rules, self.clock, pager, self.sets, self.scorer, self.counts)
        self.pressure = Pressure(self.rules, pager, self.sets, self.refresher, self.counts)

    @property
    def busy(self) -> bool:
        """Whether the next step takes a refresh further, or one is to be begun before its request decodes."""
        return bool(self.sets.incomplete) or self.refresher.can_advance(self.clock.step + 1)

    def begin(self, request: Request, later: list[Request] | None = None) -> None:
        """The prompt is prefilled: the first decode window is predicted from it, as soon as possible, or from the
        first ``dense_steps`` tokens of the answer.

        Args:
            later: whose windows are predicted in one go after all prompts of the pass have begun, by :meth:`refresh`.
                This one is added where scores come later anyway (GPU), so that nothing is decided before that.
        """
        if not self.clock.begin(request):
            return
        if later is not None and self.clock.lag and request.given is None:
            later.append(request)
        else:
            self.refresh([request])

    def begin_step(self) -> None:
        """A forward pass is about to be queued: take every refresh as far as it can go now."""
        self.clock.step += 1
        if self.refresher.on_their_way:
            with self.counts.timed():
                self.refresher.advance()

    def complete_first(self, decoding: Iterable[str]) -> None:
        """These requests are about to decode: those that cannot be read whole get their first set now."""
        if self.sets.incomplete:
            with self.counts.timed():
                found = [self.sets.incomplete[key] for key in decoding if key in self.sets.incomplete]
                self.refresher.complete_first(found)

    def end_step(self, requests: Sequence[Request]) -> list[Request]:
        """A decode step is done, or (GPU) queued: returns the requests whose window ends soon, for :meth:`refresh`."""
        self.clock.running = len(requests)
        return self.clock.end_step(requests)

    def refresh(self, requests: Sequence[Request]) -> None:
        """Predict the next resident sets of these, of all in one go."""
        if requests:
            with self.counts.timed():
                self.refresher.start(requests)

    def shrink(self, requests: Sequence[Request], wanted: int) -> None:
        """Make resident sets smaller until ``wanted`` device pages are let go; see :class:`Pressure`."""
        self.pressure.shrink(requests, wanted)

    def forget(self, request: Request) -> None:
        """The request is gone."""
        self.refresher.forget(request)
        self.sets.forget(request)
