"""LSAConfig: what LSA does on one server, checked when it is made."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sglang_lsa.config.policies import POLICIES, looks_at_index, offered

PREFILLS = ("exact", "resident")
CALIBRATE = ("never", "cached", "always")
PAGE_SIZE = 64
"""Tokens in one KV page; the unit of residency, of the host mirror and of radix sharing."""
RECORDED_POSITIONS = 128
"""Tokens before the first position to predict whose queries are recorded: an indexer may let that many vote."""
MOST_LOOKED_UP = 64
"""Tokens at the end of a text that a request may ask to have occurred before."""
RUNS = 32
"""Equal parts of a page whose mean keys are recorded, and of which an indexer makes its keys."""


def _option(default: Any, help: str, *, metavar: str | None = None, choices: Collection[str] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "metavar": metavar, "choices": choices})


@dataclass(frozen=True)
class LSAConfig:
    """What LSA does on one server. Every field is the flag ``--lsa-<name>`` and a key of the ``--lsa-config`` file.

    Raises:
        ValueError: a value is impossible; the message says which, what was seen and what is allowed.
    """

    policy: str | None = _option(
        None,
        "How pages are chosen: a trained memory indexer, Quest's bounds on keys (training-free), the most recent "
        "pages, random pages, or all of them. DeepSeek-V4, which has an index of its own: a trained retriever, or what "
        "the index itself asks for (native, training-free), in place of the first two. Default: "
        "indexer or retriever when --lsa-indexer is given, or when calibration finds heads for an indexer (see "
        "--lsa-calibrate); else quest or native.",
        choices=POLICIES,
    )
    budget: float = _option(0.135, "Upper bound of a resident set, as a fraction of the request's pages, in (0, 1].")
    min_pages: int = _option(8, "A resident set is never bounded below this many pages.")
    window: int = _option(64, "Decode steps during which a resident set stays fixed.")
    first_window: int | None = _option(
        None,
        "Decode steps of a request's first window; each one after it is twice as long, up to --lsa-window. What is "
        "chosen right after a prompt knows only the question. Default: no window is shorter than the others.",
    )
    dense_steps: int = _option(
        0,
        "Decode steps right after a prompt that read all of its pages, if they are on the device; the first set is "
        "then predicted from the beginning of the answer. For answers that copy or collect from a context. So long a "
        "request takes as much of the device pool as with full attention.",
    )
    prompt_lookup: int = _option(
        6,
        "Where at least so many tokens at the end of a text have occurred in it before, the pages with what follows "
        "there are in the next set: for answers that copy a passage. At most 64; 0 does not look.",
    )
    prefetch_steps: int = _option(
        16,
        "Decode steps before a window at which its pages are predicted and sent for (GPU); less than --lsa-window. "
        "Of a shorter window (see --lsa-first-window) at most a quarter.",
    )
    sink_pages: int = _option(1, "First pages of a request that always stay.")
    recent_pages: int = _option(4, "Last pages of a request that always stay (at most a quarter of the set).")
    prompt_pages: int = _option(
        2,
        "Last pages of a request's prompt that always stay, however long its answer gets (at most a quarter of the "
        "set): a model that no longer sees what it was asked for loses its way.",
    )
    fallback_budget: float | None = _option(
        None,
        "Upper bound, as a fraction like --lsa-budget, of a set that an indexer expects to cover too little; see "
        "--lsa-min-coverage. Default: such sets are not widened.",
    )
    min_coverage: float = _option(
        0.5,
        "Share of attention that a set is to cover by the indexer's own estimate; sets below it are widened as far as "
        "--lsa-fallback-budget allows.",
    )
    threshold: float | None = _option(
        None,
        "Pages scoring at or below this are left out even when the budget has room. Default: an indexer's own, else 0.",
    )
    min_context: int = _option(4096, "Requests with fewer tokens than this read all their pages.")
    query_tokens: int = _option(32, "Recent positions whose queries vote for pages; the best vote of any counts.")
    observe_layers: tuple[int, ...] | None = _option(
        None, "Decoder layers whose queries and keys are observed, comma separated. Default: four, evenly spread."
    )
    prefill: str = _option(
        "exact",
        "How a prompt reads the prefix that the radix tree has: all of it, or (resident) only the pages of it that are "
        "predicted to matter. What was computed over a resident prefix does not enter the tree, unless "
        "--lsa-cache-outputs lets it.",
        choices=PREFILLS,
    )
    staging_pages: int = _option(
        256,
        "Pages in each of the two buffers, one layer large, through which a prompt reads what is not on the device.",
    )
    indexer: str | None = _option(
        None,
        "Folder of a trained memory indexer, or the name of a shipped one; for DeepSeek-V4 the file of a FlashMemory "
        "checkpoint.",
        metavar="PATH",
    )
    calibrate: str = _option(
        "never",
        "Whether a server that is given neither --lsa-policy nor --lsa-indexer makes an indexer without training at "
        "its start: the loaded model reads a few made prompts, and heads that look at evidence choose pages from then "
        "on. never: Quest; cached: once for a model, then what is in the cache folder; always: at every start.",
        choices=CALIBRATE,
    )
    record: str | None = _option(
        None, "Folder for recordings, on which an indexer is trained; see sglang-lsa record.", metavar="PATH"
    )
    device_tokens: int | None = _option(None, "Tokens of KV in the device pool.")
    device_memory_gb: float | None = _option(None, "Device KV pool in GB, instead of --lsa-device-tokens.")
    host_memory_gb: float | None = _option(None, "Host mirror in GB; it decides how many tokens can be cached.")
    cache_outputs: bool = _option(
        False, "Also keep generated tokens in the radix tree. Their KV was computed under pruned attention."
    )
    disable_view: bool = _option(False, "Do not serve the live view at /lsa.")
    debug: bool = _option(False, "Check the page ledger after every batch (slow).")

    def __post_init__(self) -> None:
        if self.observe_layers is not None:
            object.__setattr__(self, "observe_layers", tuple(int(layer) for layer in self.observe_layers))
        object.__setattr__(self, "_policy_is_default", self.policy is None)
        if self.policy is None:
            object.__setattr__(self, "policy", offered(self.indexer)[0])
        require_choice("policy", self.policy, tuple(POLICIES))
        require_choice("calibrate", self.calibrate, CALIBRATE)
        require_choice("prefill", self.prefill, PREFILLS)
        require_fraction("budget", self.budget)
        if self.threshold is not None and math.isnan(self.threshold):
            raise ValueError("--lsa-threshold nan is no number: use one")
        if not 0 <= self.min_coverage <= 1:
            raise ValueError(f"--lsa-min-coverage {self.min_coverage} is out of range: use a share in [0, 1]")
        if self.fallback_budget is not None:
            require_fraction("fallback_budget", self.fallback_budget)
            if self.fallback_budget < self.budget:
                raise ValueError(
                    f"--lsa-fallback-budget {self.fallback_budget} is below --lsa-budget {self.budget}: raise it"
                )
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{flag_of(name)} {value} is no size: use a finite number")
            if value is not None and value < least:
                raise ValueError(f"{flag_of(name)} {value} is too small: use {least} or more")
        if self.prompt_lookup > MOST_LOOKED_UP:
            raise ValueError(f"--lsa-prompt-lookup {self.prompt_lookup} is too large: use {MOST_LOOKED_UP} or less")
        if self.prefetch_steps >= self.window:
            if self.prefetch_steps != type(self).prefetch_steps:
                raise ValueError(
                    f"--lsa-prefetch-steps {self.prefetch_steps} is not less than --lsa-window {self.window}: lower it"
                )
            object.__setattr__(self, "prefetch_steps", self.window // 4)  # the default follows short windows
        if self.device_tokens is not None and self.device_memory_gb is not None:
            raise ValueError(
                f"--lsa-device-tokens {self.device_tokens} and --lsa-device-memory-gb {self.device_memory_gb} "
                "both size the device pool: give one of them"
            )
        if self.policy not in offered(self.indexer, None):
            raise ValueError(
                f"--lsa-policy {self.policy} needs a trained checkpoint: add --lsa-indexer PATH, or use "
                f"{offered(None, looks_at_index(self.policy))[0]}"
            )

    @property
    def policy_is_default(self) -> bool:
        """Nobody asked for the policy: a model of another kind may have another default."""
        return bool(self.__dict__["_policy_is_default"])

    @property
    def calibrates(self) -> bool:
        """A server of this configuration makes an indexer of its own, if its model attends to all it is given: nobody
        said how pages are chosen, which layers are observed, or that attention is recorded."""
        asked = self.indexer or self.record or self.observe_layers is not None
        return self.policy_is_default and self.policy == "quest" and self.calibrate != "never" and not asked

    @classmethod
    def from_mapping(cls, values: dict[str, Any], source: str = "LSA configuration") -> LSAConfig:
        """Build from a plain mapping (parsed JSON, keyword arguments). Unknown keys and wrong types are refused."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(f"{source}: unknown key {unknown[0]!r}: use one of {', '.join(fields)}")
        return cls(**{name: coerce(name, str(fields[name].type), value, source) for name, value in values.items()})

    @classmethod
    def from_file(cls, path: str | pathlib.Path) -> LSAConfig:
        """Read a JSON object whose keys are field names."""
        return cls.from_mapping(read_json_object(path), str(path))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def __reduce__(self):
        # SGLang hands its server arguments to every child process as a pickle. Unpickling one of these is how a
        # child learns, before it loads plugins, that LSA is on.
        # That nobody asked for the policy stays known.
        return _arrive, ({**dataclasses.asdict(self), **({"policy": None} if self.policy_is_default else {})},)


arrived_by_pickle: list[LSAConfig] = []
"""Configurations that reached this process inside pickled server arguments."""


def _arrive(values: dict[str, Any]) -> LSAConfig:
    config = LSAConfig(**values)
    arrived_by_pickle.append(config)
    return config


def read_json_object(path: str | pathlib.Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        ValueError: the file is missing, is not JSON, or holds something else.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text())
    except OSError as error:
        raise ValueError(
            f"--lsa-config {path}: cannot be read ({error.strerror}): give an existing JSON file"
        ) from None
    except ValueError as error:
        raise ValueError(f"--lsa-config {path}: not JSON ({error}): write an object like {{'budget': 0.1}}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--lsa-config {path}: holds a {type(values).__name__}: write a JSON object")
    return values


LEAST: dict[str, float] = {
    "min_pages": 1,
    "window": 1,
    "first_window": 1,
    "dense_steps": 0,
    "prompt_lookup": 0,
    "prefetch_steps": 0,
    "sink_pages": 0,
    "recent_pages": 0,
    "prompt_pages": 0,
    "min_context": 0,
    "query_tokens": 1,
    "staging_pages": 1,
    "device_tokens": PAGE_SIZE * 4,
    "device_memory_gb": 0,
    "host_memory_gb": 0,
}
"""The smallest value of a field that is a number."""


def flag_of(name: str) -> str:
    """Of the field ``name``."""
    return "--lsa-" + name.replace("_", "-")


def coerce(name: str, declared: str, value: Any, source: str) -> Any:
    """``value`` as the type that the field ``name`` declares.

    Raises:
        ValueError: it has another type; the message begins with ``source``.
    """
    base = declared.removesuffix(" | None")
    if value is None and declared.endswith("| None"):
        return None
    accepted: dict[str, Any] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
    if base.startswith("tuple"):
        if isinstance(value, list | tuple) and all(isinstance(item, int) for item in value):
            return tuple(value)
    elif isinstance(value, accepted[base]) and (base == "bool" or not isinstance(value, bool)):
        return float(value) if base == "float" else value
    raise ValueError(f"{source}: {name} is {value!r}: use a value of type {base}")


def require_fraction(name: str, value: float) -> None:
    """Raises ValueError unless it is in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} {value} is out of range: use a number in (0, 1]")


def require_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless it is one of them."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: use one of {', '.join(allowed)}")
