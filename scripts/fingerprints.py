"""Write the fingerprints of a SGLang release: ``python scripts/fingerprints.py [WHEEL]``, by default the installed one.

To be run when a hook relies on something else, and when a release is added to ``patches/releases.py``; read what
``scripts/port_report.py`` shows before. A test compares the file with the SGLang that is installed.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import sys

from sglang_lsa.patches.reads import READS
from sglang_lsa.patches.releases import RELEASES
from sglang_lsa.patches.relied import BEYOND_HOOKS, FOLDER, Fingerprints, symbols_of
from sglang_lsa.patches.source import Source
from sglang_lsa.patches.table import INTAKE, SERVING


def taken(source: Source, release: str) -> Fingerprints:
    """Of everything that we rely on in this release.

    Raises:
        LookupError: some of it is not there.
    """
    known, symbols = RELEASES[release], [*symbols_of((*INTAKE, *SERVING)), *BEYOND_HOOKS]
    return Fingerprints.take(source, known.symbols(symbols), known.reads(READS))


def main(argv: list[str]) -> None:
    if argv:
        (wheel,) = map(pathlib.Path, argv)
        release, source = wheel.name.split("-")[1], Source.wheel(wheel)
    else:
        release, source = importlib.metadata.version("sglang"), Source.installed()
    file = FOLDER / f"{release}.json"
    try:
        fingerprints = taken(source, release)
    except LookupError as error:
        raise SystemExit(str(error)) from None
    FOLDER.mkdir(exist_ok=True)
    file.write_text(fingerprints.text())
    print(f"{file}: {len(fingerprints.symbols)} symbols in {len(fingerprints.files)} files")


if __name__ == "__main__":
    main(sys.argv[1:])
