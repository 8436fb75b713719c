"""Running text to hide things in: a folder of the user's own, or speeches that come with the package."""

from __future__ import annotations

import lzma
import pathlib
import random
import re
import sysconfig
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

SPEECHES = pathlib.Path(__file__).parent / "data" / "speeches.txt.xz"
"""State of the Union addresses of 1970 and later; none of them was trained on. See ``data/README.md``."""
PATTERNS = ("**/*.txt", "**/*.md", "**/*.rst")
SENTENCE = r"(?<=[.!?])\s+|\n"
"""What is between sentences, and between lines."""
HELD_OUT_SHARE = 5
"""One document of so many is held out."""
Document = TypeVar("Document")


def running_text(
    rng: random.Random, documents: Sequence[Document], read: Callable[[Document], str], characters: int
) -> tuple[str, list[Document]]:
    """Text of that many characters, from one document or, when it ends, several; and these.

    With the same ``rng``, a longer text begins with the shorter one.
    """
    text, drawn = "", list[Document]()
    while len(text) < characters:
        document = rng.choice(documents)
        whole = read(document)
        begin = 0 if drawn else int(rng.random() * len(whole))
        text += whole[begin:] + "\n"
        drawn.append(document)
    return text[:characters], drawn


class Haystack:
    """Documents of running text.

    Args:
        folder: of .txt, .md and .rst files; None takes :data:`SPEECHES`.
        documents: these texts instead.

    Raises:
        ValueError: the folder has no such files.
    """

    def __init__(self, folder: pathlib.Path | None = None, documents: Sequence[str] | None = None):
        self.folder, self.given = folder, documents
        self.files = sorted(path for pattern in PATTERNS for path in folder.glob(pattern)) if folder else []
        if folder is not None and not self.files:
            raise ValueError(f"--texts {folder}: has no .txt, .md or .rst files: give a folder of text files")

    @cached_property
    def documents(self) -> list[str]:
        """Texts with single spaces, and line breaks only between paragraphs."""
        if self.given is not None:
            texts = list(self.given)
        elif self.folder is None:
            texts = lzma.decompress(SPEECHES.read_bytes()).decode().split("\f")
        else:
            texts = [path.read_text(errors="ignore") for path in self.files]
        return [tidy(text) for text in texts if text.strip()]

    def draw(self, rng: random.Random, characters: int) -> str:
        """Running text of that many characters. With the same generator, a longer text begins with the shorter one.

        Draws from ``rng`` once, whatever the size.
        """
        own = random.Random(rng.getrandbits(64))
        return running_text(own, self.documents, str, characters)[0]

    def sentences(self, rng: random.Random, characters: int) -> list[str]:
        """The same, as sentences; the last one may be cut."""
        return split_sentences(self.draw(rng, characters))


class Texts:
    """Documents of one split: files of a folder (``.txt``, ``.md``, ``.rst``, ``.py``), or Python's own library.

    Raises:
        ValueError: the folder has no such files, or none for this split.
    """

    def __init__(self, split: str, folder: pathlib.Path | None = None):
        root = folder or pathlib.Path(sysconfig.get_paths()["stdlib"])
        patterns = ("**/*.txt", "**/*.md", "**/*.rst", "**/*.py") if folder else ("*.py",)
        files = sorted(path for pattern in patterns for path in root.glob(pattern))
        if not files:
            raise ValueError(f"--texts {root}: has no .txt, .md, .rst or .py files: give a folder of text files")
        held_out = split == "held-out"
        self.files = [
            path
            for path in files
            if (zlib.crc32(path.relative_to(root).as_posix().encode()) % HELD_OUT_SHARE == 0) == held_out
        ]
        if not self.files:
            raise ValueError(
                f"--texts {root}: {len(files)} files are too few to hold one of {HELD_OUT_SHARE} out: add more"
            )
        self.root = root

    def draw(self, rng: random.Random, characters: int) -> tuple[str, str]:
        """A piece of running text, from one document or, when it ends, several; and their names.

        With the same ``rng``, a longer one begins with the shorter.
        """
        text, drawn = running_text(rng, self.files, lambda path: path.read_text(errors="ignore"), characters)
        return text, " ".join(path.relative_to(self.root).as_posix() for path in drawn)


def tidy(text: str) -> str:
    """Paragraphs of single-spaced words."""
    return "\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip())


def split_sentences(text: str) -> list[str]:
    """At full stops, exclamation and question marks before a space, and at line breaks."""
    return [part for part in re.split(SENTENCE, text) if part]
