"""Reservations: how many device pages every prompt that was admitted may still take. Pure counting; the only owner."""

from __future__ import annotations


class Reservations:
    """Device pages promised to prompts, by holder.

    A promise is made when a prompt is admitted. Pages that its holder takes from those that can be had are spent, pages
    that go back to them are owed to it again, until the promise is settled: so there is no moment at which others could
    take what it still needs. As long as everybody else takes only what is owed to nobody, what is owed can be had.
    """

    def __init__(self) -> None:
        self._promised: dict[str, int] = {}
        self._left: dict[str, int] = {}
        """Of what was promised; negative for who took more."""
        self._total = 0

    def promise(self, holder: str, pages: int) -> None:
        """``holder`` may take ``pages`` device pages. A promise made before is replaced.

        Raises:
            ValueError: a negative number.
        """
        if pages < 0:
            raise ValueError(f"a promise of {pages} pages to {holder}: use 0 or more")
        self.settle(holder)
        self._promised[holder] = self._left[holder] = pages
        self._total += pages

    def spend(self, holder: str, pages: int) -> None:
        """``holder`` took ``pages`` that nobody held; negative: so many of its pages are held by nobody any more.

        A holder without a promise is ignored.
        """
        if holder in self._promised:
            before = self.owed(holder)
            self._left[holder] = min(self._promised[holder], self._left[holder] - pages)
            self._total += self.owed(holder) - before

    def owed(self, holder: str) -> int:
        """Pages that ``holder`` may still take; 0 without a promise."""
        return max(0, self._left.get(holder, 0))

    def settle(self, holder: str) -> None:
        """``holder`` needs no promise any more. One that is not known is ignored."""
        self._total -= self.owed(holder)
        self._promised.pop(holder, None)
        self._left.pop(holder, None)

    @property
    def total(self) -> int:
        """Pages owed to all holders together."""
        return self._total

    def holders(self) -> list[str]:
        """Who has a promise, whether anything of it is owed or not."""
        return sorted(self._promised)
