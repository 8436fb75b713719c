"""The tree inside of SGLang's UnifiedRadixCache, with the pages of its nodes known on the host.

SGLang makes new tensors wherever it cuts or fills a node. What is in them came from an inserted request, whose pages
are known, or from the node before.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.unified_cache.components import (
    BASE_COMPONENT_TYPE,
    ComponentType,
    LRURefreshPhase,
    SWAComponent,
)
from sglang.srt.mem_cache.unified_cache.tree_core_registry import register_tree_core_backend
from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeCore, UnifiedTreeNode

from sglang_lsa.memory.pages import align_up
from sglang_lsa.radix_ext.swa_checkpoints import Checkpoints

TREE_CORE = "lsa"
"""By what SGLang finds :class:`LSATreeCore`."""


class LSATreeNode(UnifiedTreeNode):
    """Has what a node of SGLang's other radix tree has, of full attention."""

    @property
    def value(self) -> Any:
        """Slots, int64 ``[len(key)]``; of the root an empty list."""
        return self.component_data[BASE_COMPONENT_TYPE].value

    @property
    def lock_ref(self) -> int:
        """Running requests that read through it."""
        return self.component_data[BASE_COMPONENT_TYPE].lock_ref


class LSATreeCore(UnifiedTreeCore):
    """Notes the pages of nodes that are new or cut."""

    def __init__(self, params, components):
        self.page_index = params.token_to_kv_pool_allocator.pager.page_index
        super().__init__(params, components)

    def _new_node(self, priority: int = 0) -> LSATreeNode:
        node = LSATreeNode(self.component_types, priority=priority)
        self._register_node(node)
        return node

    def _add_new_node(self, parent, key, value, priority=0):
        node = super()._add_new_node(parent, key, value, priority)
        self.page_index.note(node.value, self.page_index.pages(value))
        return node

    def _split_node(self, key, child, split_len):
        whole, pages, cut = child.value, self.page_index.pages(child.value), split_len // self.page_size
        self.page_index.views(whole, pages)  # an insertion that goes on may free a part of it
        above, action = super()._split_node(key, child, split_len)
        self.page_index.note(above.value, pages[:cut])
        self.page_index.note(child.value, pages[cut:])
        return above, action


class LSASwaComponent(SWAComponent):
    """Gives up the windows of checkpoints last, and follows nodes that take the pages of an inserted request."""

    def __init__(self, cache, params):
        super().__init__(cache, params)
        tail = align_up(self.sliding_window_size, params.page_size)
        most = params.token_to_kv_pool_allocator.size_swa // tail // 2
        self.checkpoints = Checkpoints(self, tail, most)

    def refresh_lru(self, phase, node, root_node):
        super().refresh_lru(phase, node, root_node)
        if phase is LRURefreshPhase.MATCH_END and node in self.checkpoints:
            self.checkpoints.keep(node)

    def redistribute_on_node_split(self, new_parent, child):
        super().redistribute_on_node_split(new_parent, child)
        if child in self.checkpoints:  # both have a part of its window
            self.checkpoints.keep(new_parent, child)

    def evict_component(self, node, *arguments, **options):
        freed = super().evict_component(node, *arguments, **options)
        if not self.node_has_component_data(node):
            self.checkpoints.forget(node)
        return freed

    def _evict_device_start(self, request_cnt):
        self.checkpoints.spare(request_cnt)
        super()._evict_device_start(request_cnt)

    # Where a node has lost its window, SGLang lets it take the pages of the request, which have one, unless somebody
    # reads the node. Nobody holds the pages that it had.

    def update_component_on_insert_overlap(
        self, node, prefix_len, total_prefix_len, value_slice, params, cache_actions
    ):
        index, page = self.cache.page_index, self.cache.page_size
        before = index.pages(node.value)
        kept = super().update_component_on_insert_overlap(
            node, prefix_len, total_prefix_len, value_slice, params, cache_actions
        )
        if index.noted(node.value) is None:
            after = index.pages(value_slice[kept:])
            index.note(node.value, after)
            self.cache.lsa.pager.inherit(before[kept // page :], after)
        return kept


register_tree_core_backend(TREE_CORE, LSATreeCore)
COMPONENTS = {ComponentType.SWA: LSASwaComponent}
"""In place of SGLang's own."""
