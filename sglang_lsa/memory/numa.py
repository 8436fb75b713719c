"""On which NUMA nodes memory of this process lies.

SGLang binds each rank's process, memory included, to the node of its GPU (``--numa-node``, or by itself where it can),
and the mirror is first touched in that process. So it lies there without our doing; what is left is to say so.
"""

from __future__ import annotations

import pathlib
import re

MAPS = pathlib.Path("/proc/self/numa_maps")


def nodes_of(address: int, maps: pathlib.Path = MAPS) -> dict[int, int]:
    """Bytes of the mapping at ``address`` on each node; empty where the system does not tell.

    Only what has been touched is anywhere.
    """
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return {}
    found = ""
    for line in lines:  # ascending; a mapping is named by where it begins
        if int(line.split(" ", 1)[0], 16) > address:
            break
        found = line
    size = re.search(r"kernelpagesize_kB=(\d+)", found)
    unit = int(size[1]) * 1024 if size else 4096
    return {int(node): int(pages) * unit for node, pages in re.findall(r"\bN(\d+)=(\d+)", found)}


def spread(address: int, maps: pathlib.Path = MAPS) -> str:
    """The same in words: "node 0", or "nodes 0 (75 %) and 1 (25 %)"; "" where the system does not tell."""
    nodes = nodes_of(address, maps)
    if len(nodes) < 2:
        return "".join(f"node {node}" for node in nodes)
    total = sum(nodes.values())
    return "nodes " + " and ".join(f"{node} ({part / total:.0%})" for node, part in sorted(nodes.items()))
