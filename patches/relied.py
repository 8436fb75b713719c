"""What we rely on of SGLang beside the targets of hooks, and the check that all of it is what we wrote against."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.releases import RELEASES, IncompatibleSGLang
from sglang_lsa.patches.source import Source, fingerprints, is_unchanged, missing_attributes

FOLDER = pathlib.Path(__file__).parent / "fingerprints"
SGLANG = "sglang."

BEYOND_HOOKS = (
    # radix_ext/
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator",
    "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator",
    "sglang.srt.mem_cache.allocator.paged.alloc_extend_naive",
    "sglang.srt.utils.get_num_new_pages",
    "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache",
    "sglang.srt.mem_cache.base_prefix_cache.MatchPrefixParams",
    "sglang.srt.mem_cache.base_prefix_cache.MatchResult",
    "sglang.srt.mem_cache.cache_init_params.CacheInitParams",
    "sglang.srt.mem_cache.base_prefix_cache.TreeLock",
    "sglang.srt.mem_cache.chunk_cache.ChunkCache",
    "sglang.srt.mem_cache.common.checkpoint_kv_cache",
    "sglang.srt.mem_cache.common.free_kv_row_segments",
    "sglang.srt.mem_cache.common.match_kv_cache",
    "sglang.srt.managers.schedule_batch.ReqKvInfo",
    "sglang.srt.mem_cache.radix_cache.RadixCache",
    "sglang.srt.mem_cache.radix_cache.RadixKey",
    "sglang.srt.mem_cache.radix_cache.TreeNode",
    # of models with a sliding window
    "sglang.srt.environ.EnvField",
    "sglang.srt.environ.envs",
    "sglang.srt.environ.Envs.SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND",
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator",
    "sglang.srt.mem_cache.chunk_cache.SWAChunkCache",
    "sglang.srt.mem_cache.common.evict_from_tree_cache",
    "sglang.srt.mem_cache.common.free_swa_out_of_window_slots",
    "sglang.srt.mem_cache.unified_cache.cache_action.FreeDeviceKV",
    "sglang.srt.mem_cache.unified_cache.cache_action.RecoverSWAWithLockedFull",
    "sglang.srt.mem_cache.unified_cache.cache_action.SWARebuild",
    "sglang.srt.mem_cache.unified_cache.component_type.BASE_COMPONENT_TYPE",
    "sglang.srt.mem_cache.unified_cache.component_type.ComponentType",
    "sglang.srt.mem_cache.unified_cache.components.full_component.FullComponent",
    "sglang.srt.mem_cache.unified_cache.components.swa_component.SWAComponent",
    "sglang.srt.mem_cache.unified_cache.components.tree_component.LRURefreshPhase",
    "sglang.srt.mem_cache.unified_cache.components.tree_component.TreeComponent",
    "sglang.srt.mem_cache.unified_cache.tree_core_registry.create_tree_core",
    "sglang.srt.mem_cache.unified_cache.tree_core_registry.register_tree_core_backend",
    "sglang.srt.mem_cache.unified_cache.unified_tree_core.UnifiedLRUList",
    "sglang.srt.mem_cache.unified_cache.unified_tree_core.UnifiedTreeCore",
    "sglang.srt.mem_cache.unified_cache.unified_tree_core.UnifiedTreeNode",
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache",
    # attend/
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend",
    "sglang.srt.layers.attention.deepseek_v4_backend.DSV4AttnMetadata",
    "sglang.srt.layers.attention.deepseek_v4_backend.DeepseekV4AttnBackend",
    "sglang.srt.layers.attention.dsv4.indexer.C4IndexerBackendMixin",
    "sglang.srt.layers.attention.flashattention_backend.FlashAttentionBackend",
    "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend",
    "sglang.srt.layers.attention.flashinfer_backend.FlashInferIndicesUpdaterDecode",
    "sglang.srt.layers.attention.flashinfer_backend.FlashInferIndicesUpdaterPrefill",
    "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend",
    "sglang.srt.mem_cache.memory_pool.KVWriteLoc",
    # the model, its pool and their configuration, see model_guard and models
    "sglang.srt.configs.hybrid_arch.mambaish_config",
    "sglang.srt.configs.model_config.ModelConfig",
    "sglang.srt.configs.model_config.is_minimax_sparse",
    "sglang.srt.layers.radix_attention.AttentionType",
    "sglang.srt.layers.radix_attention.RadixAttention",
    "sglang.srt.mem_cache.deepseek_v4_memory_pool.DeepSeekV4SingleKVPool",
    "sglang.srt.mem_cache.deepseek_v4_memory_pool.DeepSeekV4TokenToKVPool",
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool",
    # routes and messages
    "sglang.srt.entrypoints.http_server._global_state",
    "sglang.srt.entrypoints.http_server.app",
    "sglang.srt.managers.io_struct.BaseReq",
    "sglang.srt.managers.io_struct.GetInternalStateReq",
    "sglang.srt.managers.io_struct.hook_custom_types",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.auto_create_handle_loop",
    "sglang.srt.utils.auth.AuthLevel",
    "sglang.srt.utils.auth.auth_level",
    # the plugin and the entry points
    "sglang.launch_server.run_server",
    "sglang.srt.layers.attention.attention_registry.register_attention_backend",
    "sglang.srt.layers.rotary_embedding.base._is_cpu",
    "sglang.srt.mem_cache.registry.TreeCacheBuildContext",
    "sglang.srt.mem_cache.registry.register_radix_cache_backend",
    "sglang.srt.plugins.hook_registry.HookRegistry",
    "sglang.srt.plugins.hook_registry.HookRegistry._apply_target",
    "sglang.srt.plugins.hook_registry.HookType",
    "sglang.srt.plugins.hook_registry._propagate_patch",
    "sglang.srt.plugins.load_plugins",
    "sglang.srt.server_args.ServerArgs._get_default_attn_backend",
    "sglang.srt.server_args.ServerArgs.get_attention_backends",
    "sglang.srt.server_args.ServerArgs.use_mla_backend",
    "sglang.srt.server_args.prepare_server_args",
    "sglang.srt.utils.kill_process_tree",
    # what the doctor plans with, see arguments
    "sglang.srt.mem_cache.allocation_sizing.get_req_to_token_extra_context_len",
    "sglang.srt.runtime_context.create_context",
    "sglang.srt.runtime_context.use_context",
    "sglang.srt.mem_cache.kv_cache_dtype.configure_kv_cache_dtype",
    "sglang.srt.utils.common.get_available_gpu_memory",
    "sglang.srt.utils.common.get_device_memory_capacity",
)
"""Symbols that no hook wraps: what is subclassed (base classes whole, for an override fits the rest of its class),
registered with, imported. Checked wherever a hook is installed that serves."""


@dataclass(frozen=True)
class Fingerprints:
    """What a release was when we wrote for it.

    Attributes:
        files: hashes of the files in which the symbols are; if all are these, nothing need be parsed.
        symbols: fingerprints.
    """

    files: Mapping[str, str]
    symbols: Mapping[str, str]

    @classmethod
    def load(cls, release: str) -> Fingerprints:
        return cls(**json.loads((FOLDER / f"{release}.json").read_text()))

    @classmethod
    def take(cls, source: Source, symbols: Iterable[str], reads: Mapping[str, Sequence[str]]) -> Fingerprints:
        """Those of a source.

        Raises:
            LookupError: naming the symbols and attributes that are not there.
        """
        found = fingerprints(source, sorted(set(symbols)))
        missing = [symbol for symbol, seen in found.items() if seen is None] + missing_attributes(source, reads)
        if missing:
            raise LookupError(f"not in this SGLang: {', '.join(missing)}")
        return cls(dict(sorted(source.files.items())), {symbol: str(seen) for symbol, seen in found.items()})

    def text(self) -> str:
        """As :meth:`load` reads it."""
        return json.dumps({"files": self.files, "symbols": self.symbols}, indent=1) + "\n"


def symbols_of(hooks: Iterable[Hook]) -> list[str]:
    """What these hooks rely on of SGLang, each once, sorted. Other packages have releases of their own."""
    named = {symbol for hook in hooks for symbol in (hook.target, *hook.relies_on)}
    return sorted(symbol for symbol in named if symbol.startswith(SGLANG))


def changed(
    source: Source, known: Fingerprints, symbols: Iterable[str], reads: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Symbols that are not what they were, and what is different about each.

    Args:
        reads: dotted path of a class -> attributes that are read of its instances.
    """
    symbols = list(symbols)
    if is_unchanged(source, known.files) and known.symbols.keys() >= set(symbols):
        return {}  # what is read was there when the hashes were written
    found = {}
    for symbol, seen in fingerprints(source, symbols).items():
        if seen is None:
            found[symbol] = "is not in its source"
        elif (was := known.symbols.get(symbol)) != seen:
            found[symbol] = "has changed" if was else "has no fingerprint: run scripts/fingerprints.py"
    return found | dict.fromkeys(missing_attributes(source, reads), "is no attribute by its source")


def check_source(release: str, symbols: Iterable[str], reads: Mapping[str, Sequence[str]]) -> None:
    """Raise IncompatibleSGLang, naming all that is different, unless the installed SGLang has these symbols as they
    were when we wrote for ``release``.

    Imports nothing, and parses nothing where all files are those of the release, which takes some 10 ms.
    """
    known = RELEASES[release]
    found = changed(Source.installed(), Fingerprints.load(release), known.symbols(symbols), known.reads(reads))
    if found:
        raise IncompatibleSGLang(changes_text(release, found))


def changes_text(release: str, found: Mapping[str, str]) -> str:
    """What is different and what to do, for somebody whose server does not start."""
    lines = "".join(f"\n  {symbol} {what}" for symbol, what in found.items())
    return f"SGLang calls itself {release}, but is not what sglang-lsa was written for:{lines}\n{reinstall(release)}."


def reinstall(release: str) -> str:
    """What to do about an SGLang that is not what was released under its version."""
    return (
        f"Install it as it was released (pip install --force-reinstall --no-deps sglang=={release}), "
        "or start without --lsa flags"
    )
