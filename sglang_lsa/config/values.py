"""LSAConfig: what LSA does on one server, checked when it is made."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from dataclasses import dataclass
from typing import Any

from sglang_lsa.config.allowed import AUTO, CALIBRATE, PAGE_SIZE, PREFILLS, check, coerce, least_pages
from sglang_lsa.config.kinds import CONSTANT, REMOVED, constant, key, option
from sglang_lsa.config.policies import POLICIES, offered


@dataclass(frozen=True)
class LSAConfig:
    """What LSA does on one server. An option is the flag ``--lsa-<name>`` and a key of the ``--lsa-config`` file.

    Raises:
        ValueError: a value is impossible; the message says which, what was seen and what is allowed.
    """

    policy: str | None = option(
        None,
        "How pages are chosen: a trained memory indexer, Quest's bounds on keys (training-free), the most recent "
        "pages, random pages, or all of them. DeepSeek-V4, which has an index of its own: a trained retriever, or what "
        "the index itself asks for (native, training-free), in place of the first two. Default: "
        "indexer or retriever when --lsa-indexer is given (as the launcher does for the embedded model), or when "
        "calibration finds heads for an indexer (see --lsa-calibrate); else quest or native.",
        choices=POLICIES,
    )
    budget: float | str = option(
        0.135,
        "Upper bound of a resident set, as a fraction of the request's pages, in (0, 1]; or auto: as many of the best "
        "pages as it takes to cover target_coverage of the attention, at most max_budget. Auto needs an indexer that "
        "knows what its sets cover, as that of SmolLM2 does.",
    )
    min_pages: int = constant(8, "A resident set is never bounded below this many pages.")
    floor_tokens: int = key(
        1536,
        "Tokens that a resident set may have whatever its budget, 24 pages of 64: of a short context a larger share "
        "stays, since the same share of few pages loses answers. Pages of DeepSeek-V4 are larger, and 8 of them more.",
    )
    window: int = option(64, "Decode steps during which a resident set stays fixed.")
    dense_steps: int = key(
        0,
        "Decode steps right after a prompt that read all of its pages, if they are on the device; the first set is "
        "then predicted from the beginning of the answer. For answers that copy or collect from a context. So long a "
        "request takes as much of the device pool as with full attention.",
    )
    prompt_lookup: int = key(
        6,
        "Where at least so many tokens at the end of a text have occurred in it before, the pages with what follows "
        "there are in the next set: for answers that copy a passage. At most 64; 0 does not look.",
    )
    widen: float = key(
        3.0,
        "How many times the pages of its budget a set may have while the answer copies its prompt or lists what is in "
        "it: those that follow what it has listed last, or the best scored ones for a copy. prompt_lookup tells "
        "which; at most 4; 1 does not widen. On two models 2 and 3 brought back part of what copies and lists lose; on "
        "one of them other tasks were asked, too, and did not change.",
    )
    prefetch_steps: int = constant(
        16,
        "Decode steps before a window at which its pages are predicted and sent for (GPU): a quarter of a window "
        "that is no longer than this.",
    )
    sink_pages: int = constant(1, "First pages of a request that always stay.")
    recent_pages: int = constant(4, "Last pages of a request that always stay (at most a quarter of the set).")
    prompt_pages: int = constant(
        2,
        "Last pages of a request's prompt that always stay, however long its answer gets (at most a quarter of the "
        "set): a model that no longer sees what it was asked for loses its way.",
    )
    fallback_budget: float | None = key(
        None,
        "Upper bound, as a fraction like --lsa-budget, of a set that an indexer expects to cover too little; see "
        "min_coverage. Default: such sets are not widened.",
    )
    min_coverage: float = key(
        0.5,
        "Share of attention that a set is to cover by the indexer's own estimate; sets below it are widened as far as "
        "fallback_budget allows.",
    )
    target_coverage: float = key(
        0.6,
        "Share of attention that a set is to cover with --lsa-budget auto, as measured when its indexer was made: of "
        "what the indexer's heads pay to all complete pages in the next window.",
    )
    max_budget: float = key(
        0.25, "Upper bound of a set with --lsa-budget auto, a fraction like it; buffers are sized for it."
    )
    threshold: float | None = key(
        None,
        "Pages scoring at or below this are left out even when the budget has room. Default: an indexer's own, else 0.",
    )
    min_context: int = option(4096, "Requests with fewer tokens than this read all their pages.")
    query_tokens: int = constant(32, "Recent positions whose queries vote for pages; the best vote of any counts.")
    observe_layers: tuple[int, ...] | None = option(
        None, "Decoder layers whose queries and keys are observed, comma separated. Default: four, evenly spread."
    )
    prefill: str = option(
        "exact",
        "How a prompt reads the prefix that the radix tree has: all of it, or (resident) only the pages of it that are "
        "predicted to matter. What was computed over a resident prefix does not enter the tree, unless "
        "--lsa-cache-outputs lets it.",
        choices=PREFILLS,
    )
    prefill_tokens_per_step: int = key(
        0,
        "Tokens of prompts that are computed for each decode step while requests decode, 256 for example: prompts of "
        "8,192 are then followed by 32 steps. For loads of new prompts, which else are computed one after the other "
        "while those that decode stand still; first tokens come later. 0: prompts first, as in SGLang.",
    )
    prefill_burst_tokens: int = key(
        65_536,
        "Tokens of one prompt that are computed before the decode steps that prefill_tokens_per_step asks for: of a "
        "shorter one all, so that requests that decode are interrupted once for each, by a longer one for about as "
        "long as those take, and a chunk. 0: steps follow every chunk.",
    )
    staging_pages: int = constant(
        256,
        "Pages in each of the two buffers, one layer large, through which a prompt reads what is not on the device: "
        "half of a device pool of fewer than twice as many.",
    )
    indexer: str | None = option(
        None,
        "Folder of a trained memory indexer, or the name of a shipped one; for DeepSeek-V4 the file of a FlashMemory "
        "checkpoint.",
        metavar="PATH",
    )
    calibrate: str = option(
        AUTO,
        "Whether a server that is given neither --lsa-policy nor --lsa-indexer makes an indexer without training at "
        "its start: the loaded model reads a few made prompts, and heads that look at evidence choose pages from then "
        "on. never: Quest; cached: once for a model, then what is in the cache folder; always: at every start; auto: "
        "cached on one GPU with KV in bfloat16 and SGLang 0.5.17, else never.",
        choices=CALIBRATE,
    )
    record: str | None = option(
        None, "Folder for recordings, on which an indexer is trained; see sglang-lsa record.", metavar="PATH"
    )
    device_tokens: int | None = option(None, "Tokens of KV in the device pool.")
    device_memory_gb: float | None = option(None, "Device KV pool in GB, instead of --lsa-device-tokens.")
    host_memory_gb: float | None = option(None, "Host mirror in GB; it decides how many tokens can be cached.")
    cache_outputs: bool = option(
        False, "Also keep generated tokens in the radix tree. Their KV was computed under pruned attention."
    )
    groups: bool | str = key(
        AUTO,
        "Requests that decode over one prefix read the pages that several of them chose once for all, each of them "
        "also those that it did not choose itself; an answer may then depend on who decodes beside it. Not with "
        "FlashAttention-3 in decode. CUDA graphs are captured twice, with groups and without, and batches that share "
        "nothing replay the latter. Auto: on where it was measured, which is decode by FlashInfer on one GPU, KV "
        "in bfloat16, for models that attend to all they are given, with SGLang 0.5.17; else off.",
    )
    group_margin: float = key(
        0.0,
        "Experimental, with groups: by what share of its score a page that one request alone would read may be better "
        "than one that its group reads and still give its place in the set to that; below 1. Sets then depend on who "
        "decodes beside. 0 chooses for each request alone. 0.2 cost no points on one model, and saved 3 to 6 % of the "
        "pages.",
    )
    disable_view: bool = option(False, "Do not serve the live view at /lsa.")
    debug: bool = option(False, "Check the page ledger after every batch (slow).")

    def __post_init__(self) -> None:
        if self.observe_layers is not None:
            object.__setattr__(self, "observe_layers", tuple(int(layer) for layer in self.observe_layers))
        object.__setattr__(self, "_policy_is_default", self.policy is None)
        if self.policy is None:
            object.__setattr__(self, "policy", offered(self.indexer)[0])
        check(self)
        if self.prefetch_steps >= self.window:
            object.__setattr__(self, "prefetch_steps", self.window // 4)  # the default follows short windows
        if self.device_tokens is not None:
            pool = self.device_tokens // PAGE_SIZE
            object.__setattr__(self, "staging_pages", min(self.staging_pages, pool // 2))

    @property
    def auto(self) -> bool:
        """Sets of requests that ask for no budget are as large as they need to be."""
        return self.budget == AUTO

    @property
    def largest_budget(self) -> float:
        """The largest share of its pages that a set has of a request that asks for no budget."""
        return self.max_budget if isinstance(self.budget, str) else self.budget

    def least_pages(self, page_tokens: int = PAGE_SIZE) -> int:
        """Pages of that size that a resident set may have whatever its budget."""
        return least_pages(self.min_pages, self.floor_tokens, page_tokens)

    @property
    def policy_is_default(self) -> bool:
        """Nobody asked for the policy: a model of another kind may have another default."""
        return bool(self.__dict__["_policy_is_default"])

    @property
    def may_calibrate(self) -> bool:
        """A server of this configuration makes an indexer of its own, if its model attends to all it is given and,
        with ``auto``, if its device is one for that: nobody said how pages are chosen, which layers are observed, or
        that attention is recorded."""
        asked = self.indexer or self.record or self.observe_layers is not None
        return self.policy_is_default and self.policy == "quest" and self.calibrate != "never" and not asked

    @property
    def calibrates(self) -> bool:
        """The same, once it is known whether ``auto`` is for its device."""
        return self.may_calibrate and self.calibrate != AUTO

    @classmethod
    def from_mapping(cls, values: dict[str, Any], source: str = "LSA configuration") -> LSAConfig:
        """Build from a plain mapping (parsed JSON, keyword arguments). Unknown keys and wrong types are refused, and
        constants that are not what they are, so that what a server says of itself can be given back to one."""
        constants = {
            field.name: field.default for field in dataclasses.fields(cls) if field.metadata["kind"] == CONSTANT
        }
        fields = {field.name: field for field in dataclasses.fields(cls) if field.metadata["kind"] != CONSTANT}

        def refuse(unknown: set[str]) -> None:
            if unknown and (advice := REMOVED.get(min(unknown))) is not None:
                raise ValueError(f"{source}: {min(unknown)} is gone: {advice}")
            if unknown:
                raise ValueError(f"{source}: unknown key {min(unknown)!r}: use one of {', '.join(fields)}")

        changed = {name for name in values.keys() & constants if values[name] != constants[name]}
        refuse(set(values) - set(fields) - set(constants))
        made = cls(
            **{name: coerce(name, str(fields[name].type), values[name], source) for name in values if name in fields}
        )
        refuse({name for name in changed if values[name] != getattr(made, name)})  # some follow a small pool or window
        return made

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
    """Read a JSON file that holds one object; what begins with a brace is not its path but the object itself.

    Raises:
        ValueError: the file is missing, is not JSON, or holds something else.
    """
    try:
        text = str(path)
        values = json.loads(text if text.lstrip().startswith("{") else pathlib.Path(path).read_text())
    except OSError as error:
        raise ValueError(
            f"--lsa-config {path}: cannot be read ({error.strerror}): give an existing JSON file"
        ) from None
    except ValueError as error:
        raise ValueError(f'--lsa-config {path}: not JSON ({error}): write an object like {{"budget": 0.1}}') from None
    if not isinstance(values, dict):
        raise ValueError(f"--lsa-config {path}: holds a {type(values).__name__}: write a JSON object")
    return values
