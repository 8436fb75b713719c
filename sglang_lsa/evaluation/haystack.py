"""Running text to hide things in: a folder of the user's own, or speeches that come with the package."""

from __future__ import annotations

import lzma
import pathlib
import random
import re
from functools import cached_property

SPEECHES = pathlib.Path(__file__).parent / "data" / "speeches.txt.xz"
"""State of the Union addresses of 1970 and later; none of them was trained on. See ``data/README.md``."""
PATTERNS = ("**/*.txt", "**/*.md", "**/*.rst")


class Haystack:
    """Documents of running text.

    Args:
        folder: of .txt, .md and .rst files; None takes :data:`SPEECHES`.

    Raises:
        ValueError: the folder has no such files.
    """

    def __init__(self, folder: pathlib.Path | None = None):
        self.folder = folder
        self.files = sorted(path for pattern in PATTERNS for path in folder.glob(pattern)) if folder else []
        if folder is not None and not self.files:
            raise ValueError(f"--texts {folder}: has no .txt, .md or .rst files: give a folder of text files")

    @cached_property
    def documents(self) -> list[str]:
        """Texts with single spaces, and line breaks only between paragraphs."""
        if self.folder is None:
            texts = lzma.decompress(SPEECHES.read_bytes()).decode().split("\f")
        else:
            texts = [path.read_text(errors="ignore") for path in self.files]
        return [tidy(text) for text in texts if text.strip()]

    def draw(self, rng: random.Random, characters: int) -> str:
        """Running text of that many characters. With the same generator, a longer text begins with the shorter one.

        Draws from ``rng`` once, whatever the size.
        """
        own = random.Random(rng.getrandbits(64))
        text = ""
        while len(text) < characters:
            document = own.choice(self.documents)
            begin = 0 if text else int(own.random() * len(document))
            text += document[begin:] + "\n"
        return text[:characters]

    def sentences(self, rng: random.Random, characters: int) -> list[str]:
        """The same, as sentences; the last one may be cut."""
        return split_sentences(self.draw(rng, characters))


def tidy(text: str) -> str:
    """Paragraphs of single-spaced words."""
    return "\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip())


def split_sentences(text: str) -> list[str]:
    """At full stops, exclamation and question marks before a space, and at line breaks."""
    return [part for part in re.split(r"(?<=[.!?])\s+|\n", text) if part]
