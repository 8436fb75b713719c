"""The SGLang releases that hooks and subclasses were written for. Everything that is asked of a release is asked here.

A release is let in by this table together with its fingerprints (``fingerprints/<release>.json``): names and
parameters alone stay the same in releases that break us.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

ARGUMENTS = "sglang.srt.server_args.ServerArgs"
FIELDS = "sglang.srt.arg_groups.fields."
VIEW = "sglang.srt.arg_groups.model_override_base."
REQ, REQ_KV = "sglang.srt.managers.schedule_batch.Req", "sglang.srt.managers.schedule_batch.ReqKvInfo"
TREE = "sglang.srt.mem_cache."

SINCE_0_5_22 = (
    f"{ARGUMENTS}.resolve_once",
    VIEW.removesuffix("."),
    REQ_KV,
    "sglang.srt.layers.logits_processor.LogitsProcessorOutput.finalize_input_logprobs",
    f"{TREE}base_prefix_cache.TreeLock",
    f"{TREE}common.checkpoint_kv_cache",
    f"{TREE}common.match_kv_cache",
    f"{TREE}common.free_kv_row_segments",
    "sglang.srt.runtime_context.create_context",
    "sglang.srt.runtime_context.use_context",
)
"""Of what is relied on, what 0.5.17 does not have or is not used of it."""
UNTIL_0_5_21 = (
    f"{TREE}chunk_cache.",
    f"{TREE}deepseek_v4_memory_pool.DeepSeekV4",
    f"{TREE}kv_cache_configurator.KVCacheConfigurator._build_dsv4_kv_pool",
    f"{TREE}kv_cache_configurator.KVCacheConfigurator.ps",
    f"{TREE}unified_cache.",
    f"{TREE}unified_radix_cache.",
    f"{TREE}allocator.swa.",
    "sglang.srt.environ.Envs.SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND",
    "sglang.srt.layers.attention.deepseek_v4_backend.",
    "sglang.srt.layers.attention.dsv4.",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.logical_rid_to_child_rids",
    "sglang.srt.model_executor.model_runner.ModelRunner.ps",
    "sglang.srt.model_executor.pool_configurator.DSV4PoolConfigurator",
    "sglang.srt.runtime_context.ParallelContext.attn_tp_size",
)
"""Of what is relied on, what 0.5.23 does not have or is not used of it; DeepSeek-V4 is refused there."""
SPREAD = (
    *("device.Device", "lora.Lora", "memory.Memory", "mm.Mm", "model.Model", "observability.Observability"),
    *("disagg.Disagg", "parallel.Parallel", "schedule.Schedule", "serving.Serving", "spec.Spec"),
    *(f"exec_.Exec{name}" for name in ("Comm", "Deterministic", "Dllm", "Features", "Graph", "Kernel", "Mamba")),
    *(f"exec_.Exec{name}" for name in ("Moe", "Offload", "Overlap")),
)
"""Classes that SGLang puts the fields of its arguments together from."""


@dataclass(frozen=True)
class Release:
    """What one release has under another name or in another place than the others, and what it does otherwise.

    Attributes:
        sized_by: module in which SGLang looks up ``get_device_memory_capacity``, by which it chooses its defaults.
        lacks: beginnings of what is relied on in another release and not in this one.
        moved: what is relied on, a symbol or ``class.attribute`` -> what is relied on in its place.
        resolves_late: arguments are resolved after they were made, and stay as they were given (``resolve_once``).
        checkpoints: trees insert what runs and what has finished by one ``checkpoint``, and KV of a request is in
            ``req.kv``.
        deepseek_v4: that model can be paged.
        measured: groups and calibration were run on a GPU with it, so that ``auto`` has them there.
    """

    sized_by: str
    lacks: tuple[str, ...]
    moved: Mapping[str, str] = field(default_factory=dict)
    resolves_late: bool = False
    checkpoints: bool = False
    deepseek_v4: bool = True
    measured: bool = True

    def has(self, symbol: str) -> bool:
        """Whether what is relied on somewhere is relied on in this release, under whatever name."""
        return not symbol.startswith(self.lacks)

    def symbols(self, symbols: Iterable[str]) -> list[str]:
        """Those that are relied on in this release, as it names them."""
        return list(dict.fromkeys(self.moved.get(symbol, symbol) for symbol in symbols if self.has(symbol)))

    def reads(self, reads: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
        """Attributes that are read in this release: classes (several where fields are spread: ``a|b``) -> names."""
        found: dict[str, dict[str, None]] = {}
        for owner, names in reads.items():
            for name in names:
                if self.has(symbol := f"{owner}.{name}"):
                    place, _, called = self.moved.get(symbol, symbol).rpartition(".")
                    found.setdefault(self.moved.get(f"{place}.*", place), {})[called] = None
        return {owner: tuple(names) for owner, names in found.items()}


RELEASES = {
    "0.5.17": Release(sized_by="sglang.srt.server_args", lacks=SINCE_0_5_22),
    "0.5.23": Release(
        sized_by="sglang.srt.arg_groups.memory_hook",
        lacks=UNTIL_0_5_21,
        moved={
            f"{REQ}.extend_range": f"{REQ}.extend_end",
            f"{REQ}.kv_committed_len": f"{REQ_KV}.kv_committed_len",
            f"{REQ}.prefix_indices": f"{REQ}.prefix_len",
            f"{REQ}.req_pool_idx": f"{REQ_KV}.req_pool_idx",
            f"{ARGUMENTS}.*": "|".join([ARGUMENTS, *(FIELDS + name for name in SPREAD)]),
            f"{ARGUMENTS}._get_default_attn_backend": f"{VIEW}get_default_attn_backend",
            f"{ARGUMENTS}.get_attention_backends": f"{VIEW}attention_backends_of",
            f"{ARGUMENTS}.get_model_config": f"{VIEW}model_config_of",
            f"{ARGUMENTS}.use_mla_backend": f"{VIEW}use_mla_backend",
        },
        resolves_late=True,
        checkpoints=True,
        deepseek_v4=False,
        measured=False,
    ),
}
"""Oldest first."""
NEWEST = next(reversed(RELEASES))
DEFAULT = "0.5.17"
"""The release that is set up where none is asked for: the newest that the published GPU figures were measured with."""


class IncompatibleSGLang(RuntimeError):
    """The installed SGLang is not one that the hooks were written for."""


def installed() -> Release:
    """The release of this process; asked where SGLang is running already."""
    import sglang

    return RELEASES[sglang.__version__]


def check_version(installed: str) -> None:
    """Raise IncompatibleSGLang unless ``installed`` is a release that the hooks were written for."""
    if installed not in RELEASES:
        raise IncompatibleSGLang(refusal("sglang", f"is version {installed}", installed))


def refusal(symbol: str, seen: str, installed: str | None = None) -> str:
    """What is wrong with a symbol of SGLang, which releases are right, and what to do."""
    return f"{symbol} {seen}; sglang-lsa was written for SGLang {' or '.join(RELEASES)}. {fix(installed)}."


def fix(installed: str | None = None) -> str:
    """What to do about another release than those in the table."""
    return f"Install it (pip install sglang=={nearest(installed)}), or start without --lsa flags"


def nearest(installed: str | None) -> str:
    """The release in the table that is nearest to the installed one (of two the newer); None: nobody knows which."""
    if installed in RELEASES:
        return str(installed)
    if (number := _number(installed or "")) is None:
        return DEFAULT
    return min(reversed(RELEASES), key=lambda release: abs((_number(release) or 0) - number))


def _number(release: str) -> int | None:
    """Of a version, so that nearer ones differ by less; None for what is no version."""
    from packaging.version import InvalidVersion, Version

    try:
        major, minor, micro = Version(release).release[:3]
    except (InvalidVersion, ValueError):
        return None
    return (major * 1000 + minor) * 1000 + micro
