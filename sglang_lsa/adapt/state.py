"""How far a run is, in ``adapt.json`` of its folder: what it is of, and which steps are done."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from dataclasses import dataclass, field
from typing import Any

FILE = "adapt.json"
FORMAT = 1


@dataclass
class State:
    """One folder's.

    Attributes:
        about: everything that a result depends on.
        done: steps, each with the seconds that it took.
    """

    folder: pathlib.Path
    about: dict[str, Any]
    done: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: pathlib.Path, about: dict[str, Any]) -> State:
        """Go on with what is in the folder, or begin.

        Args:
            about: of this run: ``model``, ``weights`` and whatever else; compared with the folder's.

        Raises:
            ValueError: the folder holds something else.
        """
        about = json.loads(json.dumps(about))
        path = folder / FILE
        if not path.exists():
            others = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
            others = [name for name in others if not name.startswith(f"{FILE}.")]
            if others:
                raise ValueError(f"--output {folder} has other files ({', '.join(others[:3])}): use a new folder")
            return cls(folder, about)
        try:
            values = json.loads(path.read_text())
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']}, not {FORMAT}")
            known = cls(folder, dict(values["about"]), {str(k): float(v) for k, v in values["done"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be used ({error}): use a new --output, or delete the folder") from None
        for name in ("model", "weights", *about):
            if known.about.get(name) != about[name]:
                what = "of other weights" if name == "weights" else f"begun with {name} {known.about.get(name)!r}"
                raise ValueError(
                    f"--output {folder} was {what}, and this is {about[name]!r}: give the same again to go on, or "
                    "use a new folder"
                )
        return known

    def finish(self, step: str, seconds: float) -> None:
        """Note that a step is done."""
        self.done[step] = round(seconds, 1)
        self.save()

    def save(self) -> None:
        """Write the file; it appears whole or not at all."""
        partial = self.folder / f"{FILE}.partial"
        partial.write_text(json.dumps({"format": FORMAT, **_plain(self)}, indent=1) + "\n")
        os.replace(partial, self.folder / FILE)


def _plain(state: State) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(state).items() if name != "folder"}
