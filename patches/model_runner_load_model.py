"""Ranks that were told different things are found out before any of them loads weights."""

from __future__ import annotations

from sglang_lsa.patches.arguments import tp_size_of
from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.ranks import ranks


def compare_options(self, *args, **kwargs):
    if tp_size_of(self) > 1:
        require_equal_options(ranks(tp_size_of(self)), self.server_args.lsa_config)


def require_equal_options(joined, config):
    """
    Raises:
        ValueError: another rank has other options; all of them raise it.
    """
    seen = joined.every(repr(config), "compare options")
    for rank, told in enumerate(seen):
        if told != seen[0]:
            raise ValueError(
                f"LSA: ranks have different options: rank 0 has {seen[0]}, rank {rank} has {told}: start all of them "
                "with the same flags"
            )


HOOK = Hook(
    target="sglang.srt.model_executor.model_runner.ModelRunner.load_model",
    kind="before",
    function=compare_options,
    parameters=("self",),
    why="Ranks that prune differently wait for each other's collectives for ever; weights take minutes to load first.",
    until="SGLang compares what its ranks were told.",
    test="tests/unit/test_ranks.py::test_ranks_with_different_options_are_refused_before_weights_are_loaded",
    relies_on=("sglang.srt.distributed.parallel_state.get_tp_group",),
)
