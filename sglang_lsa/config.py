"""Configuration: one frozen dataclass; flags, JSON file, README table and per-request override come from its fields."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import re
from dataclasses import dataclass
from typing import Any

POLICIES = ("indexer", "quest", "recency", "random", "full")
PREFILLS = ("exact", "resident")
PAGE_SIZE = 64
"""Tokens in one KV page; the unit of residency, of the host mirror and of radix sharing."""
RECORDED_POSITIONS = 128
"""Tokens before the first position to predict whose queries are recorded: an indexer may let that many vote."""
MOST_WATCHED = 256
"""Pages whose scores a request may ask for."""
MOST_LOOKED_UP = 64
"""Tokens at the end of a text that a request may ask to have occurred before."""
RUNS = 32
"""Equal parts of a page whose mean keys are recorded, and of which an indexer makes its keys."""


def _option(default: Any, help: str, *, metavar: str | None = None, choices: tuple[str, ...] | None = None) -> Any:
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
        "pages, random pages, or all of them. Default: indexer when --lsa-indexer is given, else quest.",
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
        None, "Folder of a trained memory indexer, or the name of a shipped one.", metavar="PATH"
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
        if self.policy is None:
            object.__setattr__(self, "policy", "indexer" if self.indexer else "quest")
        _require_choice("policy", self.policy, POLICIES)
        _require_choice("prefill", self.prefill, PREFILLS)
        _require_fraction("budget", self.budget)
        if self.threshold is not None and math.isnan(self.threshold):
            raise ValueError("--lsa-threshold nan is no number: use one")
        if not 0 <= self.min_coverage <= 1:
            raise ValueError(f"--lsa-min-coverage {self.min_coverage} is out of range: use a share in [0, 1]")
        if self.fallback_budget is not None:
            _require_fraction("fallback_budget", self.fallback_budget)
            if self.fallback_budget < self.budget:
                raise ValueError(
                    f"--lsa-fallback-budget {self.fallback_budget} is below --lsa-budget {self.budget}: raise it"
                )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{_flag(name)} {value} is no size: use a finite number")
            if value is not None and value < least:
                raise ValueError(f"{_flag(name)} {value} is too small: use {least} or more")
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
        if self.policy == "indexer" and not self.indexer:
            raise ValueError("--lsa-policy indexer needs a trained checkpoint: add --lsa-indexer PATH, or use quest")

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
        return _arrive, (dataclasses.asdict(self),)


arrived_by_pickle: list[LSAConfig] = []
"""Configurations that reached this process inside pickled server arguments."""


def _arrive(values: dict[str, Any]) -> LSAConfig:
    config = LSAConfig(**values)
    arrived_by_pickle.append(config)
    return config


@dataclass(frozen=True)
class GivenSet:
    """A resident set that a request names itself, for evaluation and replay.

    Attributes:
        tokens: context, in tokens, of the first decode step that reads it; the new token counts.
        tail_start: page from which on everything is read.
        positions: pages before that, ascending.
    """

    tokens: int
    tail_start: int
    positions: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.tokens}:{self.tail_start}:{','.join(map(str, self.positions))}"


@dataclass(frozen=True)
class RequestOptions:
    """What one request asked for: ``custom_params={"lsa": {...}}``. Everything absent comes from the server.

    Attributes:
        sets: resident sets of its windows, instead of predicted ones. In JSON a string, ``tokens:tail_start:p,p,p``
            with ``;`` between sets, which is what ``/lsa/requests`` tells of a request.
        record: how many of the prompt's last tokens are recorded as if they had been generated; 0 records nothing.
        dense_steps: decode steps that read everything before the first set is predicted.
        prompt_lookup: tokens at the end of its text that must have occurred before for what followed them to stay.
        watch: pages whose scores ``/lsa/requests`` tells of the request, for evaluation.
    """

    policy: str
    budget: float
    enabled: bool = True
    prefill: str = "exact"
    sets: tuple[GivenSet, ...] = ()
    record: int = 0
    dense_steps: int = 0
    prompt_lookup: int = LSAConfig.prompt_lookup
    watch: tuple[int, ...] = ()

    @property
    def dense(self) -> bool:
        """Whether this request reads all of its pages, whatever its length."""
        full = not self.enabled or self.policy == "full" or self.budget >= 1.0 or self.record > 0
        return not self.sets and full

    @classmethod
    def parse(cls, custom_params: Any, config: LSAConfig) -> RequestOptions:
        """Read ``custom_params`` of a request.

        Raises:
            ValueError: unknown key, wrong type or impossible value; becomes HTTP 400.
        """
        asked = (custom_params or {}).get("lsa") if isinstance(custom_params, dict) else None
        if asked is None:
            return cls(
                str(config.policy),
                config.budget,
                prefill=config.prefill,
                dense_steps=config.dense_steps,
                prompt_lookup=config.prompt_lookup,
            )
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(asked, dict):
            raise ValueError(f"custom_params.lsa is {asked!r}: use an object with {', '.join(known)}")
        unknown = sorted(set(asked) - set(known))
        if unknown:
            raise ValueError(f"custom_params.lsa has unknown key {unknown[0]!r}: use {', '.join(known)}")
        enabled = asked.get("enabled", True)
        if not isinstance(enabled, bool):
            raise ValueError(f"custom_params.lsa.enabled is {enabled!r}: use true or false")
        budget = asked.get("budget", config.budget)
        if isinstance(budget, bool) or not isinstance(budget, int | float):
            raise ValueError(f"custom_params.lsa.budget is {budget!r}: use a number in (0, 1]")
        _require_fraction("custom_params.lsa.budget", budget)
        policy = asked.get("policy", config.policy)
        allowed = POLICIES if config.indexer else tuple(name for name in POLICIES if name != "indexer")
        _require_choice("custom_params.lsa.policy", policy, allowed)
        prefill = asked.get("prefill", config.prefill)
        _require_choice("custom_params.lsa.prefill", prefill, PREFILLS)
        sets = _parse_sets(asked.get("sets", ""))
        if sets and (not enabled or policy == "full"):
            raise ValueError("custom_params.lsa names sets and switches pruning off: leave one of the two out")
        record = _count(asked, "record", 0, "tokens")
        if record and not config.record:
            raise ValueError(f"custom_params.lsa.record is {record}: this server was not started with --lsa-record")
        if record and sets:
            raise ValueError("custom_params.lsa has both record and sets: recordings are of full attention")
        dense_steps = _count(asked, "dense_steps", config.dense_steps, "steps")
        prompt_lookup = _count(asked, "prompt_lookup", config.prompt_lookup, "tokens")
        if prompt_lookup > MOST_LOOKED_UP:
            raise ValueError(
                f"custom_params.lsa.prompt_lookup is {prompt_lookup}: use a number of tokens, {MOST_LOOKED_UP} or less"
            )
        watch = asked.get("watch", [])
        if isinstance(watch, str) and re.fullmatch(r"(\d{1,10}(,\d{1,10})*)?", watch, re.ASCII):
            watch = [int(page) for page in watch.split(",") if page]  # as SGLang's messages can carry it
        pages = isinstance(watch, list) and all(type(page) is int and 0 <= page < 1 << 31 for page in watch)
        if not pages or len(watch) > MOST_WATCHED:
            raise ValueError(
                f"custom_params.lsa.watch is {watch!r:.80}: "
                f"use a list of at most {MOST_WATCHED} page numbers, or text as 0,3,5"
            )
        counts = (record, dense_steps, prompt_lookup)
        return cls(str(policy), float(budget), enabled, prefill, sets, *counts, tuple(watch))


def _count(asked: dict[str, Any], name: str, default: int, unit: str) -> int:
    value = asked.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"custom_params.lsa.{name} is {value!r}: use a number of {unit}, 0 or more")
    return value


def _parse_sets(text: Any) -> tuple[GivenSet, ...]:
    """Resident sets in their written form; see :class:`RequestOptions`."""
    problem = f"custom_params.lsa.sets is {text!r:.80}: write tokens:tail_start:p,p,p with ; between sets"
    if not isinstance(text, str):
        raise ValueError(problem)
    sets: list[GivenSet] = []
    for part in filter(None, text.split(";")):
        try:
            tokens, tail_start, positions = part.split(":")
            given = GivenSet(int(tokens), int(tail_start), tuple(int(p) for p in positions.split(",") if p))
        except ValueError:
            raise ValueError(problem) from None
        ordered = all(a < b for a, b in zip((-1, *given.positions), (*given.positions, given.tail_start), strict=True))
        if not ordered or given.tail_start * PAGE_SIZE >= given.tokens:
            raise ValueError(f"{problem}; positions ascend and lie before tail_start, and that before tokens")
        if sets and sets[-1].tokens >= given.tokens:
            raise ValueError(f"{problem}; each set begins at more tokens than the one before")
        sets.append(given)
    return tuple(sets)


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add one ``--lsa-*`` flag per configuration field, and ``--lsa-config``."""
    group = parser.add_argument_group("Lookahead Sparse Attention (sglang-lsa)")
    group.add_argument("--lsa-config", metavar="FILE.json", help="Read LSA options from a JSON file; flags win.")
    for field in dataclasses.fields(LSAConfig):
        options: dict[str, Any] = {"default": None, "help": field.metadata["help"]}
        if str(field.type) == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _PARSERS[str(field.type).removesuffix(" | None")]
            options["metavar"] = field.metadata["metavar"]
            options["choices"] = field.metadata["choices"]
            if field.default is not None:
                options["help"] += f" Default: {field.default}."
        group.add_argument(_flag(field.name), **options)


def markdown_table() -> str:
    """The table of flags in the README."""
    lines = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(LSAConfig):
        default = "" if field.default is None else str(field.default)
        values = f" One of {', '.join(field.metadata['choices'])}." if field.metadata["choices"] else ""
        lines.append(f"| `{_flag(field.name)}` | {default} | {field.metadata['help']}{values} |")
    return "\n".join(lines)


def config_from_args(args: argparse.Namespace) -> LSAConfig | None:
    """The configuration that the ``--lsa-*`` flags in ``args`` ask for; None when there is none of them."""
    given = {
        field.name: value
        for field in dataclasses.fields(LSAConfig)
        if (value := getattr(args, f"lsa_{field.name}", None)) is not None
    }
    path = getattr(args, "lsa_config", None)
    if path is None and not given:
        return None
    return LSAConfig.from_mapping({**(read_json_object(path) if path else {}), **given}, str(path or "--lsa flags"))


def config_from_argument(value: LSAConfig | dict[str, Any] | str | pathlib.Path | None) -> LSAConfig | None:
    """The configuration given to ``sgl.Engine(lsa_config=...)``: an LSAConfig, a mapping, or the path of a file."""
    if value is None or isinstance(value, LSAConfig):
        return value
    if isinstance(value, dict):
        return LSAConfig.from_mapping(value, "lsa_config")
    if isinstance(value, str | pathlib.Path):
        return LSAConfig.from_file(value)
    raise ValueError(f"lsa_config is {value!r}: use an LSAConfig, a mapping or the path of a JSON file")


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


_LEAST: dict[str, float] = {
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


def _layers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


_PARSERS: dict[str, Any] = {"str": str, "int": int, "float": float, "tuple[int, ...]": _layers}


def _flag(name: str) -> str:
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


def _require_fraction(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} {value} is out of range: use a number in (0, 1]")


def _require_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: use one of {', '.join(allowed)}")
