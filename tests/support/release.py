"""The SGLang that is installed here, as tests of more than one release see it."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace
from typing import Any
from unittest import mock

from sglang_lsa.patches.reads import READS as ALL_READS
from sglang_lsa.patches.releases import RELEASES
from sglang_lsa.patches.relied import BEYOND_HOOKS, symbols_of
from sglang_lsa.patches.table import INTAKE, SERVING, used

HERE = importlib.metadata.version("sglang")
RELEASE = RELEASES[HERE]
HOOKS = used((*INTAKE, *SERVING), RELEASE)
SYMBOLS = sorted({*RELEASE.symbols([*symbols_of(HOOKS), *BEYOND_HOOKS])})
READS = RELEASE.reads(ALL_READS)


def prepared(argv: list[str]) -> Any:
    """SGLang's arguments for this command line, as they are in force."""
    from sglang.srt.server_args import prepare_server_args

    return in_force(prepare_server_args(argv))


def in_force(server_args: Any) -> Any:
    from sglang_lsa.patches.resolved import resolved

    if RELEASE.resolves_late:
        server_args.resolve_once()
    return resolved(server_args)


class OfEveryRelease:
    """Goes before a request that was made up in the shape of 0.5.17: has that of the others as well."""

    def __getattr__(self, name: str) -> Any:
        if name == "kv":
            return self
        if name == "prefix_len":
            return len(self.prefix_indices)
        if name == "last_node":
            slots = self.prefix_indices
            return SimpleNamespace(value=slots, parent=SimpleNamespace(parent=None)) if len(slots) else None
        raise AttributeError(name)


class MadeUp(OfEveryRelease, SimpleNamespace):
    """A request of a test."""


class TreeDriver:
    """Tells one of our trees of requests as the scheduler of its release does."""

    def __init__(self, tree: Any):
        self.tree = tree

    def request(self, rid: str, tokens: Any, row: int, salt: str | None = None) -> Any:
        """One with this prompt, and a row in SGLang's table."""
        from sglang.srt.managers.schedule_batch import ReqKvInfo

        req = SimpleNamespace(rid=rid, lsa_key=rid, origin_input_ids=tokens, output_ids=tokens[:0], priority=0)
        req.finished, req.finished_reason = (lambda: False), None
        if RELEASE.checkpoints:
            req.kv, req.extra_key, req.cache_salt = ReqKvInfo(req_pool_idx=row), None, salt
            req.skip_radix_cache_insert, req.lock = False, None
            req.refresh_fill_ids = lambda: setattr(req, "full_untruncated_fill_ids", tokens + req.output_ids)
        else:
            req.extra_key = salt  # which SGLang makes a part of it
        req.req_pool_idx = row
        return req

    def match(self, req: Any, tokens: Any) -> Any:
        """Look for these tokens and lock what is found. Returns slots."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        salt = {"cache_salt": req.cache_salt} if RELEASE.checkpoints else {}
        found = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(tokens, req.extra_key, **salt)))
        req.last_node = found.last_device_node
        if RELEASE.checkpoints:
            req.prefix_len = req.kv.cache_protected_len = found.device_prefix_len
            req.lock = self.tree.lock(req.last_node)
            return self.tree.path_device_indices(req.last_node)
        req.cache_protected_len = len(found.device_indices)
        if not self.tree.disable:
            self.tree.inc_lock_ref(req.last_node)
        return found.device_indices

    def computed(self, req: Any, end: int, chunked: bool) -> None:
        """The first tokens of its prompt are."""
        if RELEASE.checkpoints:
            from sglang.srt.mem_cache.common import checkpoint_kv_cache

            req.full_untruncated_fill_ids, req.extend_end = req.origin_input_ids, end
            checkpoint_kv_cache(req, self.tree)
            req.cache_protected_len = req.kv.cache_protected_len
        else:
            req.get_fill_ids = lambda: req.origin_input_ids[:end]
            req.extend_range = SimpleNamespace(end=end)
            self.tree.cache_unfinished_req(req, chunked=chunked)

    def release(self, req: Any, length: int, insert: bool) -> None:
        """It ended after so many tokens; without ``insert`` it was aborted or retracted."""
        if RELEASE.checkpoints:
            from sglang.srt.mem_cache.common import release_kv_cache

            req.owned_kv_len = lambda: length
            req.kv.kv_committed_len = req.kv.kv_allocated_len = length
            with mock.patch("sglang.srt.mem_cache.common._release_overallocated_kv_indices"):  # asks for a server
                release_kv_cache(req, self.tree, checkpoint=insert)
        else:
            self.tree.cache_finished_req(req, is_insert=insert, kv_len_to_handle=length)
