"""What a port to another SGLang has to look at: ``python scripts/port_report.py OLD.whl NEW.whl``.

Prints which symbols that we rely on changed from one wheel to the other, with unified diffs, and which are gone, and
attributes that we read and the new one does not have. Wheels come from ``pip download --no-deps sglang==X``; nothing is
installed or imported of them. The symbols are those of the newest file in ``patches/fingerprints/``.
"""

from __future__ import annotations

import argparse
import difflib
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sglang_lsa.patches.releases import NEWEST, RELEASES
from sglang_lsa.patches.source import Source, missing_attributes


@dataclass(frozen=True)
class Report:
    """What became of the symbols.

    Attributes:
        same: their fingerprint is the old one.
        changed: with a unified diff each.
        gone: there only in the old one, or in neither.
        unread: attributes that are read and not there in the new one.
    """

    same: list[str]
    changed: dict[str, str]
    gone: list[str]
    unread: list[str]

    def lines(self, diffs: bool = True) -> Iterator[str]:
        for symbol, diff in self.changed.items():
            yield f"changed: {symbol}"
            if diffs:
                yield diff
        yield from (f"gone: {symbol}" for symbol in self.gone)
        yield from (f"no attribute: {symbol}" for symbol in self.unread)
        yield (
            f"{len(self.same) + len(self.changed) + len(self.gone)} symbols: {len(self.same)} same, "
            f"{len(self.changed)} changed, {len(self.gone)} gone; {len(self.unread)} attributes gone"
        )


def compare(old: Source, new: Source, symbols: Iterable[str], reads: Mapping[str, Sequence[str]]) -> Report:
    """Look for the symbols, and for the attributes that are read of classes, in two sources."""
    report = Report([], {}, [], missing_attributes(new, reads))
    for symbol in sorted(symbols):
        was, now = old.find(symbol), new.find(symbol)
        if now is None:
            report.gone.append(symbol)
        elif was is not None and was.fingerprint == now.fingerprint:
            report.same.append(symbol)
        else:
            lines = (one.text.splitlines(keepends=True) if one else [] for one in (was, now))
            names = (one.path if one else "nowhere" for one in (was, now))
            report.changed[symbol] = "".join(difflib.unified_diff(*lines, *names))
    return report


def main(argv: Sequence[str] | None = None) -> None:
    from sglang_lsa.patches.reads import READS
    from sglang_lsa.patches.relied import Fingerprints

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=pathlib.Path, help="wheel of a release that works")
    parser.add_argument("new", type=pathlib.Path, help="wheel of the one to port to")
    parser.add_argument("--names", action="store_true", help="print no diffs")
    args = parser.parse_args(argv)
    symbols = Fingerprints.load(NEWEST).symbols
    report = compare(Source.wheel(args.old), Source.wheel(args.new), symbols, RELEASES[NEWEST].reads(READS))
    print("\n".join(report.lines(diffs=not args.names)))


if __name__ == "__main__":
    main()
