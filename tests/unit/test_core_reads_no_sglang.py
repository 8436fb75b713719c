"""The core sees nothing of SGLang's objects: what it must know of them is translated in ``patches/``."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import torch
from release import RELEASE

from sglang_lsa.patches import batch, reads, request_kv, requests
from sglang_lsa.patches.releases import REQ, REQ_KV
from sglang_lsa.patches.source import Source

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = ("memory", "engine", "indexer", "kernels")
"""Of the core."""
FILES = [file for folder in FOLDERS for file in sorted((ROOT / "sglang_lsa" / folder).rglob("*.py"))]
CLASSES = (
    "sglang.srt.configs.model_config.ModelConfig",
    "sglang.srt.managers.schedule_batch.Req",
    "sglang.srt.managers.schedule_batch.ScheduleBatch",
    "sglang.srt.managers.schedule_policy.PrefillAdder",
    "sglang.srt.managers.scheduler.Scheduler",
    "sglang.srt.mem_cache.radix_cache.TreeNode",
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch",
    "sglang.srt.model_executor.model_runner.ModelRunner",
    "sglang.srt.sampling.sampling_params.SamplingParams",
    "sglang.srt.server_args.ServerArgs",
)
"""Whose objects hooks have in their hands."""
THEIRS = {"batch_of_sglang", "forward_batch", "model_runner", "node", "req", "reqs", "schedule_batch", "scheduler"}
THEIRS |= {"server_args", "tree_cache"}
"""What objects of these classes are called where one is a parameter."""
PLAIN = (torch.Tensor, torch, torch.cuda, np.ndarray, np, str, dict, list, set, pathlib.Path, ast)
"""Attributes of these are everybody's."""


def own_names(trees: Iterable[ast.Module]) -> set[str]:
    """Attributes that classes of these modules have: what they define, and what they assign to ``self``."""
    found = set()
    for node in (
        node for tree in trees for one in ast.walk(tree) if isinstance(one, ast.ClassDef) for node in ast.walk(one)
    ):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is(node.value, "self"):
            found.add(node.attr)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def sglang_names(own: set[str]) -> set[str]:
    """Attributes that SGLang's classes have, and neither ours nor everybody's."""
    source = Source.installed()
    theirs: set[str] = set()
    for symbol in (*CLASSES, *([REQ_KV] if RELEASE.has(REQ_KV) else ())):
        for one in RELEASE.moved.get(f"{symbol}.*", symbol).split("|"):
            names = source.attributes(one)
            assert names, f"{one} is not in SGLang's source"
            theirs |= names
    return theirs - own - {name for thing in PLAIN for name in dir(thing)}


def sightings(tree: ast.Module, names: set[str]) -> list[str]:
    """Where a module takes an object of SGLang's, or reads or sets an attribute of one."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.arg in THEIRS:
            found.append(f"line {node.lineno}: the parameter {node.arg}")
        elif isinstance(node, ast.Attribute) and node.attr in names and not _is(node.value, "self"):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Call) and _is(node.func, "getattr") and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and name.value in names:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.fixture(scope="module")
def trees() -> dict[pathlib.Path, ast.Module]:
    return {file: ast.parse(file.read_text()) for file in FILES}


def test_no_attribute_of_sglangs_objects_is_read(trees: dict[pathlib.Path, ast.Module]) -> None:
    assert {file.parent.name for file in FILES} >= set(FOLDERS)
    names = sglang_names(own_names(trees.values()))
    prefix = RELEASE.symbols([f"{REQ}.prefix_indices"])[0].rpartition(".")[2]
    assert {"kv_committed_len", "origin_input_ids", "sampling_params", prefix, "seq_lens_cpu"} <= names
    found = [f"{file.relative_to(ROOT)}, {seen}" for file, tree in trees.items() for seen in sightings(tree, names)]
    assert found == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("def f(req): pass", 1),
        ("def f(reqs: Any): return [one.kv_committed_len for one in reqs]", 2),
        ("def f(request: Any) -> None: request.extra_key = request.rid", 1),
        ("def f(thing): return getattr(thing, 'last_node', None)", 1),
        ("class A:\n    def f(self): self.sampling_params = 1", 0),
        ("def f(request): return request.rid, len(request.pages), request.pages.shape", 0),
    ],
)
def test_it_is_seen(source: str, count: int, trees: dict[pathlib.Path, ast.Module]) -> None:
    names = sglang_names(own_names(trees.values()))
    assert len(sightings(ast.parse(source), names)) == count


# --- what is read instead, where the core's values are made ----------------------------------------------------------


def attributes_of(tree: ast.Module, variables: Sequence[str]) -> set[str]:
    """Attributes that are read or set of what these variables hold; ours begin with ``lsa_``."""
    found = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in variables
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(node.args[0], ast.Name) and node.args[0].id in variables and isinstance(name, ast.Constant):
                found.add(str(name.value))
    return {name for name in found if not name.startswith("lsa_")}


def test_what_is_translated_is_listed() -> None:
    """So that a release that renames it is refused at start."""
    managers = "sglang.srt.managers.schedule_batch"
    tree = ast.parse("".join(pathlib.Path(str(one.__file__)).read_text() for one in (request_kv, requests)))
    assert attributes_of(tree, ["req"]) - ELSEWHERE == set(requests.READS[f"{managers}.Req"])
    assert attributes_of(tree, ["node"]) == set(requests.READS["sglang.srt.mem_cache.radix_cache.TreeNode"])
    tree = ast.parse(pathlib.Path(batch.__file__).read_text())
    assert attributes_of(tree, ["batch"]) == set(batch.READS[f"{managers}.ScheduleBatch"])
    for listed in (requests.READS, batch.READS):
        for symbol, names in listed.items():
            assert set(names) <= set(reads.READS[symbol])


@pytest.mark.parametrize("file", sorted((ROOT / "patches").glob("*.py")), ids=lambda file: file.stem)
def test_hooks_read_of_requests_what_is_listed(file: pathlib.Path) -> None:
    of_req = set(reads.READS["sglang.srt.managers.schedule_batch.Req"]) | CALLED | ELSEWHERE
    assert attributes_of(ast.parse(file.read_text()), ["req", "other"]) <= of_req


@pytest.mark.parametrize(
    ("file", "variables", "symbol"),
    [
        ("evaluation/forced.py", ["request"], REQ),
        ("serve/view/tree.py", ["node", "root"], "sglang.srt.mem_cache.radix_cache.TreeNode"),
    ],
)
def test_what_others_read_is_listed(file: str, variables: list[str], symbol: str) -> None:
    """Code of ours that SGLang's objects are handed to, though no hook."""
    tree = ast.parse((ROOT / "sglang_lsa" / file).read_text())
    assert attributes_of(tree, variables) <= set(reads.READS[symbol])


ELSEWHERE = {"extend_end", "kv", "prefix_len"}
"""Where newer releases have what is listed; see ``Release.moved``."""
CALLED = {"init_next_round_input", "set_finish_with_abort"}
"""Methods of requests that hooks call, whose source is compared with what it was (``relies_on``)."""


# --- how many tokens a page has --------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["memory", "engine", "attend"])
def test_the_page_size_is_the_layouts_to_say(folder: str) -> None:
    for file in (ROOT / "sglang_lsa" / folder).rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
        assert "PAGE_SIZE" not in names, file
