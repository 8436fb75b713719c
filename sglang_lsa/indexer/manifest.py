"""The manifest of a folder of recordings: what was recorded, and what its answers are from."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from dataclasses import dataclass
from typing import Any

from sglang_lsa.engine.admission import NAME
from sglang_lsa.indexer.recording import BadRecording

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One recording in the manifest; its file is ``<name>.safetensors`` beside it.

    Attributes:
        tokens: of the prompt, the answer in it included.
        answer_tokens: how many of the last ones are the answer.
        evidence: pages that the answer is from.
        bytes: of the file.
    """

    name: str
    family: str
    split: str
    source: str
    tokens: int
    answer_tokens: int
    evidence: tuple[int, ...]
    bytes: int

    @classmethod
    def from_json(cls, values: Any) -> Entry:
        """Read an entry as a file has it.

        Raises:
            ValueError, TypeError: a field is missing, unknown, or of another type than it is written as.
        """
        entry = cls(**values)
        for name in ("name", "family", "split", "source"):
            if not isinstance(value := getattr(entry, name), str):
                raise ValueError(f"{name} is {value!r:.40}, no text")
        for name in ("tokens", "answer_tokens", "bytes"):
            if not _is_count(value := getattr(entry, name)):
                raise ValueError(f"{name} is {value!r:.40}, no count")
        if not isinstance(entry.evidence, list) or not all(map(_is_count, entry.evidence)):
            raise ValueError(f"evidence is {entry.evidence!r:.40}, no list of pages")
        if not NAME.fullmatch(entry.name):
            raise ValueError(f"{entry.name!r:.80} is no name of a recording in this folder")
        return dataclasses.replace(entry, evidence=tuple(entry.evidence))


class Manifest:
    """``manifest.json``, written anew after each recording, so that an interrupted command can go on."""

    def __init__(self, folder: pathlib.Path, model: str, entries: dict[str, Entry]):
        self.folder, self.model, self.entries = folder, model, entries

    @classmethod
    def open(cls, folder: pathlib.Path, model: str | None = None) -> Manifest:
        """Read the manifest, or with ``model`` begin one.

        Raises:
            BadRecording: there is none and no model is given, it is damaged, or it is of another model.
        """
        path = folder / MANIFEST
        if not path.exists() and model is not None:
            return cls(folder, model, {})
        try:
            values = json.loads(path.read_text())
            if values["format"] != FORMAT:
                raise BadRecording(f"{path} is of format {values['format']}: record again with this version")
            entries = [Entry.from_json(entry) for entry in values["documents"]]
            if not isinstance(of := values["model"], str):
                raise ValueError(f"model is {of!r:.40}, no text")
            found = cls(folder, of, {entry.name: entry for entry in entries})
        except OSError as error:
            raise BadRecording(f"{path} cannot be read ({error.strerror}): run sglang-lsa record first") from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, BadRecording):
                raise
            raise BadRecording(f"{path} is damaged ({error}): delete the folder and record again") from None
        if model is not None and found.model != model:
            raise BadRecording(f"{path} is of the model {found.model}, not {model}: use another --output")
        return found

    def file(self, name: str) -> pathlib.Path:
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether this recording is there, in its full size."""
        entry = self.entries.get(name)
        return entry is not None and self.file(name).is_file() and self.file(name).stat().st_size == entry.bytes

    def add(self, entry: Entry) -> None:
        self.entries[entry.name] = entry
        values = {
            "format": FORMAT,
            "model": self.model,
            "documents": [dataclasses.asdict(entry) for entry in self.entries.values()],
        }
        partial = self.folder / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(values, indent=1) + "\n")
        os.replace(partial, self.folder / MANIFEST)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
