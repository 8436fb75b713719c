"""The tree inside of SGLang's UnifiedRadixCache, with the pages of its nodes known on the host.

SGLang makes new tensors wherever it cuts or fills a node. What is in them came from an inserted request, whose pages
are known, or from the node before.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.unified_cache.components import BASE_COMPONENT_TYPE, ComponentType, SWAComponent
from sglang.srt.mem_cache.unified_cache.tree_core_registry import register_tree_core_backend
from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeCore, UnifiedTreeNode

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
    """Follows a node that takes the pages of the request that is being inserted, because they have a window.

    SGLang lets go of the pages that the node had. Nobody holds those: it does so only where no request reads.
    """

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
