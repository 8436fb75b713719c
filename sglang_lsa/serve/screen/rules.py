"""What one field may be: a rule takes its value and returns the one to pass on, or refuses it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

INT32, INT64 = 2**31 - 1, 2**63 - 1


LARGEST_FLOAT32 = 3.4028234663852886e38


class Refused(ValueError):
    """A value that must not reach the scheduler; SGLang answers a ValueError with HTTP 400."""

    def __init__(self, name: str, value: Any, use: str):
        super().__init__(f"{name} is {shown(value)}: {use}")


@dataclass(frozen=True)
class Server:
    """What of a server decides what a request may say."""

    vocabulary: int
    hidden_size: int
    dtype: str = "bfloat16"
    disaggregated: bool = False
    encoders: bool = False
    """Whether encoders on other machines embed what is not text (``--language-only``)."""
    lora: bool = False
    delimiters: bool = False
    """Whether prompts of several items are scored (``--enable-mis`` or a delimiter token)."""
    labels: frozenset[str] = field(default_factory=frozenset)
    """Of metrics, that clients may set."""
    sampling: frozenset[str] | None = None
    """Keys of ``sampling_params`` that this release of SGLang has; None for all that any has."""
    resident: frozenset[type] = field(default_factory=frozenset)
    """Types that only a program around an Engine can pass, never JSON."""


Rule = Callable[[str, Any, Any, Server], Any]
"""``(name, value, request, server) -> value to pass on``; ``request`` is the whole one, for rules of two fields."""


def shown(value: Any) -> str:
    """``value`` for a message: bounded, and printable whatever it is."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def number(least: float = -math.inf, most: float = math.inf, use: str = "use a finite number") -> Rule:
    """A number (JSON's true and false count as 1 and 0, as they do in Python), or null for the default."""

    def rule(name: str, value: Any, request: Any, server: Server) -> Any:
        if value is None:
            return value
        if not isinstance(value, int | float) or not least <= value <= most or abs(value) > sys.float_info.max:
            raise Refused(name, value, use)
        return value if abs(value) <= INT64 else float(value)  # tensors take no larger integer

    return rule


def text(name: str, value: Any, request: Any, server: Server) -> Any:
    """Unicode text, or null. A lone surrogate is none: tokenizers and JSON encoders raise on it."""
    if value is None:
        return value
    if not isinstance(value, str):
        raise Refused(name, value, "use a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused(name, value, "use Unicode text (this has half a surrogate pair)") from None
    return value


def texts(name: str, value: Any, request: Any, server: Server) -> Any:
    """A text or several, or null."""
    if isinstance(value, list | tuple | set):
        return [_not_null(name, item, request, server) for item in value]
    return text(name, value, request, server)


def _not_null(name: str, value: Any, request: Any, server: Server) -> Any:
    if value is None:
        raise Refused(name, value, "use texts only")
    return text(name, value, request, server)


def flag(name: str, value: Any, request: Any, server: Server) -> Any:
    """Anything, by its truth as in Python; the tokenizer wants a real bool."""
    return None if value is None else bool(value)


def passed(name: str, value: Any, request: Any, server: Server) -> Any:
    """As it is: SGLang checks it."""
    return value


def dropped(name: str, value: Any, request: Any, server: Server) -> Any:
    """Not passed on: it means nothing here, or is not the client's to say."""
    return None


def unless(needed: Callable[[Server], bool]) -> Rule:
    """Passed on only to a server that has a use for it."""

    def rule(name: str, value: Any, request: Any, server: Server) -> Any:
        return value if needed(server) else None

    return rule
