"""What the benchmarks compare: how servers are started, what they say of themselves, and what need not be run again."""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import pathlib
import urllib.error
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from sglang_lsa import cli
from sglang_lsa.bench import parser, prefill, prefill_groups, serving, serving_arms
from sglang_lsa.bench.prefill_report import PREFILL
from sglang_lsa.bench.report import SERVING
from sglang_lsa.bench.serving_arms import GROUPS, Arm, Group, chosen
from sglang_lsa.bench.shapes import KV_BYTES, SHAPES
from sglang_lsa.bench.systems import DEFAULT_SYSTEMS, SYSTEMS, System, backends, server_facts, upgraded
from sglang_lsa.server_process import ServerFailed

RESULTS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "results"
GB = 1 << 30

# --- servers ---------------------------------------------------------------------------------------------------------

BACKENDS = {
    "stock": None,
    "stock-flashinfer": "flashinfer",
    "lsa": None,
    "lsa-fa3": "fa3",
    "lsa-flashinfer": "flashinfer",
    "lsa-groups": None,
    "lsa-separate": None,
    "lsa-paced": None,
}
"""That are named by a flag."""


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with host memory for everything."""
    monkeypatch.setattr(serving_arms, "available_host_memory", lambda: 1 << 50)
    monkeypatch.setattr(prefill, "require_host_memory", lambda *_: None)


def value(flags: list[str], name: str) -> str | None:
    return flags[flags.index(name) + 1] if name in flags else None


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8_e4m3"])
def test_a_system_gets_its_backend_and_its_pool_and_is_otherwise_as_users_have_it(name: str, kv_dtype: str) -> None:
    system, model = SYSTEMS[name], pathlib.Path("model")
    group = Group("8b", 16, (Arm("tpot", 1024, 4, 8),), kv_dtype)
    asked = prefill_groups.Group("full", group.pool_tokens, (16_384,), kv_dtype=kv_dtype)
    for flags in (
        serving.arguments(group, system, model),
        prefill.arguments(asked, SHAPES["8b"], system, model),
    ):
        assert value(flags, "--attention-backend") == BACKENDS[name]
        assert not {"--page-size", "--cuda-graph-backend-prefill", "--prefill-attention-backend"} & set(flags)
        assert value(flags, "--kv-cache-dtype") == kv_dtype
        tokens = str(16 * GB // (131_072 * KV_BYTES[kv_dtype] // 2))
        pool, other = ("--lsa-device-tokens", "--max-total-tokens")[:: 1 if system.lsa else -1]
        assert value(flags, pool) == tokens and other not in flags
        assert ("--lsa-host-memory-gb" in flags) == system.lsa
    assert system.module == ("sglang_lsa.launch_server" if system.lsa else "sglang.launch_server")


@pytest.mark.parametrize(
    ("inside", "facts"),
    [
        ({}, ("fa3", "fa3")),
        ({"prefill_attention_backend": "fa3", "decode_attention_backend": "flashinfer"}, ("fa3", "flashinfer")),
        ({"attention_backend": "flashinfer", "prefill_attention_backend": "fa3"}, ("fa3", "flashinfer")),
        ({"attention_backend": "triton"}, ("triton", "triton")),
    ],
    ids=["one", "two", "one and prefill's", "resolved later"],
)
def test_backends_are_those_that_the_server_chose(inside: dict[str, Any], facts: tuple[str, str]) -> None:
    outside = {"attention_backend": "fa3", "prefill_attention_backend": None, "decode_attention_backend": None}
    outside |= {"kv_cache_dtype": "auto", "page_size": 1}
    for info in (outside | {"internal_states": [inside]}, outside | inside):
        found = server_facts(info)
        assert (found["prefill_backend"], found["decode_backend"]) == facts
        assert (found["kv_dtype"], found["page_size"]) == ("bfloat16", 1)
        assert backends(found) == "/".join(dict.fromkeys(facts))
    assert server_facts(outside | {"kv_cache_dtype": "fp8_e4m3"})["kv_dtype"] == "fp8_e4m3"


def test_systems_by_default() -> None:
    assert DEFAULT_SYSTEMS == ("stock", "stock-flashinfer", "lsa")
    assert [name for name, system in SYSTEMS.items() if system.lsa] == [
        "lsa",
        "lsa-fa3",
        "lsa-flashinfer",
        "lsa-groups",
        "lsa-separate",
        "lsa-paced",
    ]


# --- what is measured ------------------------------------------------------------------------------------------------


def test_arms_have_names_of_their_own() -> None:
    assert parser.ARMS == serving_arms.ARMS
    for model in ("1b", "8b", "70b"):
        names = [arm.name for group in GROUPS if group.model == model for arm in group.arms]
        assert len(set(names)) == len(names)
    assert set(parser.KV_DTYPES) == set(KV_BYTES)


def test_arms_are_chosen_by_name() -> None:
    found = list(chosen(["8b"], ["tpot", "shared", "iso"], ["256k", "8x40k", "shared32"], "auto"))
    assert [[arm.name for arm in group.arms] for group in found] == [["256k", "shared32", "8x40k"]]
    assert list(chosen(["1b"], ["tpot"], ["iso60k"], "auto")) == []


def test_the_same_bytes_hold_twice_the_contexts_of_half_the_bytes() -> None:
    (wide,), (narrow,) = (list(chosen(["8b"], ["iso"], ["iso60k"], kind)) for kind in ("auto", "fp8_e4m3"))
    assert narrow.pool_tokens == 2 * wide.pool_tokens and narrow.pool_gb == wide.pool_gb
    assert (wide.arms[0].batch, narrow.arms[0].batch) == (13, 26)
    assert narrow.pool_tokens * narrow.token_bytes == wide.pool_tokens * wide.token_bytes
    (single,) = chosen(["8b"], ["tpot"], ["8x40k"], "fp8_e4m3")
    assert single.arms[0].batch == 8


def test_a_model_for_several_gpus_is_measured_only_when_it_is_named() -> None:
    commands = argparse.ArgumentParser().add_subparsers()
    parser.add_parser(commands)
    asked = commands.choices["bench"].parse_args(["serving", "--tp-size", "2"])
    assert asked.models == ["1b", "8b"]
    named = commands.choices["bench"].parse_args(["serving", "--models", "70b", "--arms", "iso131k"])
    (group,) = chosen(named.models, named.workloads, named.arms, "fp8_e4m3", 2)
    assert (group.pool_tokens // 131_072, group.arms[0].batch, group.tp) == (2, 6, 2)


@pytest.mark.parametrize("argv", [["1k,256k", "shared32"], ["1k", "256k", "shared32,1k"]], ids=["commas", "blanks"])
def test_lists_are_separated_by_commas_or_blanks(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(serving, "run", lambda output, console, **asked: seen.append(asked))
    monkeypatch.setattr(prefill, "run", lambda output, console, **asked: seen.append(asked))
    more = ["--kv-cache-dtype", "fp8_e4m3", "--resume", "--systems", "stock,lsa-fa3"]
    assert cli.main(["bench", "serving", "--arms", *argv, *more]) == 0
    assert cli.main(["bench", "prefill", "--prompts", "131072,262144", "400000", *more]) == 0
    assert seen[0]["arms"] == ["1k", "256k", "shared32"]
    assert (seen[1]["prompts"], seen[1]["pools"]) == ([131_072, 262_144, 400_000], ["full", "quarter", "16gb"])
    for asked in seen:
        assert asked["systems"] == ["stock", "lsa-fa3"]
        assert (asked["kv_dtype"], asked["resume"]) == ("fp8_e4m3", True)


# --- runs that were cut ----------------------------------------------------------------------------------------------

FACTS = {"prefill_backend": "fa3", "decode_backend": "fa3", "kv_dtype": "bfloat16", "page_size": 1}


class Bench:
    """Benchmarks whose servers take no time; remembers what was measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, output: pathlib.Path):
        self.output = output
        self.seen: list[tuple[str, list[str]]] = []
        self.broken: tuple[str, str] | None = None
        self.drawn: list[int] = []
        """Rows of each picture."""
        self.error: BaseException = ServerFailed("no FA3 here")
        """A system that fails at an arm."""
        for module in (serving, prefill):
            monkeypatch.setattr(module, "gpu_name", lambda: "GPU of a test")
        for module, name in ((serving, "SERVING"), (prefill, "PREFILL")):  # pictures take a second each
            results = dataclasses.replace(getattr(module, name), draw=self.draw)
            monkeypatch.setattr(module, name, results)
        self.begun: list[str] = []
        monkeypatch.setattr(serving, "begin", self.begin)
        monkeypatch.setattr(serving, "measure", self.measure_serving)
        monkeypatch.setattr(prefill, "measure", self.measure_prefill)

    def draw(self, path: pathlib.Path, rows: Any) -> None:
        self.drawn.append(len(rows))

    def begin(self, group: Group, system: System, *_: Any) -> SimpleNamespace:
        self.begun.append(system.name)
        return SimpleNamespace(of=system.name, stop=lambda: self.begun.append(f"stops {system.name}"))

    def note(self, system: System, names: list[str]) -> Iterator[str]:
        self.seen.append((system.name, []))
        for name in names:
            if self.broken == (system.name, name):
                raise self.error
            self.seen[-1][1].append(name)
            yield name

    def measure_serving(
        self, server: Any, group: Group, system: System, planned: Any, *_: Any
    ) -> Iterator[dict[str, Any]]:
        assert server.of == system.name
        self.begun.append(f"measures {system.name}")
        figures = dict.fromkeys(("running_requests", "decode_tokens_per_s", "tpot_ms_p50", "tpot_ms_p99"), 1.0)
        planned = list(planned)
        names = [f"{arm.name} {policy}".strip() for arm, policy in planned]
        for (arm, policy), _ in zip(planned, self.note(system, names), strict=True):
            yield serving.labels(group, system, arm, policy) | FACTS | figures | {"kv_gpu_bytes": 1}

    def measure_prefill(
        self, group: prefill_groups.Group, shape: Any, system: System, *_: Any
    ) -> Iterator[dict[str, Any]]:
        what: list[tuple[Any, ...]] = [("ttft", tokens, None, None) for tokens in group.prompts]
        if group.questions:
            context = prefill_groups.MEMORY + prefill_groups.QUESTION
            what += [("question", context, how, where) for where in ("cold", "warm") for how in ("exact", "resident")]
        names = [
            f"{group.name} {workload} {how or tokens} {where or ''}".strip() for workload, tokens, how, where in what
        ]
        for each, _ in zip(what, self.note(system, names), strict=True):
            yield prefill.labels(group, shape, system, *each) | FACTS | {"ttft_s": 1.0, "kv_pool_bytes": 1}

    def serving(self, **asked: Any) -> list[tuple[str, list[str]]]:
        chosen: dict[str, Any] = {"models": ["8b"], "workloads": ["tpot"], "arms": ["1k", "256k"], "resume": False}
        chosen |= {"systems": ["stock", "lsa"], "policies": ["quest"], "kv_dtype": "auto", "tp": 1, "together": False}
        self.seen, self.begun, chosen = [], [], chosen | asked
        serving.run(self.output, Console(quiet=True), command="", **({"server_args": ""} | chosen))
        return self.seen

    def prefill(self, **asked: Any) -> list[tuple[str, list[str]]]:
        chosen: dict[str, Any] = {"pools": ["full", "quarter"], "prompts": [131_072, 262_144], "resume": False}
        chosen |= {"workloads": ["ttft"], "systems": ["stock", "lsa"], "kv_dtype": "auto", "repeats": 1, **asked}
        self.seen = []
        prefill.run(self.output, Console(quiet=True), command="", **({"server_args": ""} | chosen))
        return self.seen


@pytest.fixture
def bench(roomy: None, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Bench:
    return Bench(monkeypatch, tmp_path)


def test_a_run_that_is_resumed_measures_what_is_missing(bench: Bench) -> None:
    both = [("stock", ["1k", "256k"]), ("lsa", ["1k quest", "256k quest"])]
    assert bench.serving() == both
    assert bench.serving(resume=True) == [], "no server is started"
    assert bench.serving(resume=True, arms=["1k", "32k"]) == [("stock", ["32k"]), ("lsa", ["32k quest"])]
    assert bench.serving(resume=True, policies=["quest", "random"]) == [("lsa", ["1k random", "256k random"])]
    assert bench.serving(resume=True, models=["1b"]) == both
    assert bench.serving(resume=True, systems=["lsa-fa3"]) == [("lsa-fa3", ["1k quest", "256k quest"])]
    assert bench.serving() == both, "without being told so"
    assert len(SERVING.read(bench.output)) == 14


def test_servers_start_one_after_the_other_or_together(bench: Bench) -> None:
    bench.serving()
    assert bench.begun == ["stock", "measures stock", "stops stock", "lsa", "measures lsa", "stops lsa"]
    bench.serving(together=True)
    assert bench.begun == ["stock", "lsa", "measures stock", "measures lsa"], "all have the same company"


def test_logs_of_other_runs_are_kept(roomy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By names that tell arms, policies and arguments apart."""
    logs: list[pathlib.Path] = []

    def begin(system: System, shape: Any, context: int, flags: Any, log: pathlib.Path, stack: Any) -> Any:
        logs.append(log)
        raise ServerFailed("no server here")

    monkeypatch.setattr(serving.servers, "begin", begin)
    (one,) = serving_arms.chosen(["8b"], ["tpot"], ["1k"], "auto")
    (arm,), out = one.arms, pathlib.Path("out")
    for system, policies, given in (
        ("stock", "", ""),
        ("lsa", "q", ""),
        ("lsa", "qr", ""),
        ("lsa", "q", "--x"),
        ("lsa", "q", ""),
    ):
        with pytest.raises(ServerFailed):
            serving.begin(one, SYSTEMS[system], [(arm, policy) for policy in policies], given, out, ExitStack())
    assert len(set(logs)) == 4 and logs[1] == logs[4], "the same run has the same"
    logs.clear()
    for prompts, repeats, given in (((1024,), 3, ""), ((2048,), 3, ""), ((1024,), 1, ""), ((1024,), 3, "--x")):
        group = prefill_groups.Group("full", 4096, prompts)
        with pytest.raises(ServerFailed):
            list(prefill.measure(group, SHAPES["8b"], SYSTEMS["lsa"], repeats, given, out, Console(quiet=True)))
    assert len(set(logs)) == 4


def test_rows_of_several_ranks_are_rows_of_their_own(bench: Bench) -> None:
    bench.serving()
    assert len(bench.serving(resume=True, tp=2)) == 2
    assert sorted(row["tp"] for row in SERVING.read(bench.output)) == [1] * 4 + [2] * 4
    (group,) = serving_arms.chosen(["8b"], ["tpot"], ["1k"], "auto", 2)
    assert "--tp-size 2" in " ".join(serving.arguments(group, SYSTEMS["lsa"], pathlib.Path("model")))


def test_rows_of_another_type_of_kv_are_not_taken_for_those_asked_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.serving()
    assert len(bench.serving(resume=True, kv_dtype="fp8_e4m3")) == 2
    monkeypatch.setattr(serving, "gpu_name", lambda: "another card")
    assert len(bench.serving(resume=True)) == 2


@pytest.mark.parametrize("name", ["serving", "prefill"])
def test_rows_of_servers_with_other_arguments_are_other_rows(bench: Bench, name: str) -> None:
    """Neither taken for done nor compared, or a resumed run would have measured something else."""
    run, results = getattr(bench, name), {"serving": SERVING, "prefill": PREFILL}[name]
    asked = {"resume": True, "systems": ["stock", "lsa"], "server_args": "--log-level info"}
    seen = run()
    assert run(**asked) == seen and run(**asked | {"server_args": "--log-level   'info'"}) == []
    assert run(**asked | {"systems": ["stock-flashinfer"]}) != []
    rows = results.read(bench.output)
    assert {row["server_args"] for row in rows} == {"", "--log-level info"}
    assert {row["server_args"] for row in rows if f"{results.ratio}_to_stock-flashinfer" in row} == {"--log-level info"}
    with pytest.raises(ValueError, match="--server-args --x 'y: cannot be split"):
        run(server_args="--x 'y")
    assert bench.seen == []


def test_a_system_that_fails_leaves_its_rows_and_the_other_systems(bench: Bench) -> None:
    bench.broken = ("stock", "256k")
    with pytest.raises(RuntimeError, match="stock 8b: no FA3 here"):
        bench.serving()
    assert bench.seen == [("stock", ["1k"]), ("lsa", ["1k quest", "256k quest"])]
    assert len(json.loads((bench.output / "serving.json").read_text())) == 3
    bench.broken = None
    assert bench.serving(resume=True) == [("stock", ["256k"])]


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("refused"), http.client.RemoteDisconnected("gone")],
    ids=lambda error: type(error).__name__,
)
def test_a_server_that_ends_in_the_middle_ends_no_other_measurement(bench: Bench, error: Exception) -> None:
    bench.error, bench.broken = error, ("lsa", "full ttft 131072")
    with pytest.raises(RuntimeError, match="lsa full"):
        bench.prefill(systems=["lsa", "stock"])
    assert ("stock", ["full ttft 131072", "full ttft 262144"]) in bench.seen


def test_an_interrupt_leaves_a_picture_of_what_was_measured(bench: Bench) -> None:
    bench.error, bench.broken = KeyboardInterrupt(), ("lsa", "1k quest")
    with pytest.raises(KeyboardInterrupt):
        bench.serving()
    assert bench.drawn == [2]
    bench.drawn, bench.broken = [], ("stock", "full ttft 131072")
    with pytest.raises(KeyboardInterrupt):
        bench.prefill()
    assert bench.drawn == [], "nothing was measured"


def test_prefill_is_resumed_too(bench: Bench) -> None:
    full = ["full ttft 131072", "full ttft 262144"]
    quarters = [("lsa", ["quarter ttft 131072"]), ("lsa", ["quarter ttft 262144"])]
    assert bench.prefill() == [("stock", full), ("lsa", full), *quarters]
    assert bench.prefill(resume=True) == []
    assert bench.prefill(resume=True, prompts=[400_000], pools=["full"], systems=["stock"]) == [
        ("stock", ["full ttft 400000"])
    ]
    assert bench.prefill(resume=True, prompts=[262_144, 400_000], systems=["stock"]) == []
    bench.broken = ("lsa", "16gb question exact warm")
    with pytest.raises(RuntimeError, match="lsa 16gb"):
        bench.prefill(pools=["16gb"], workloads=["question"])
    bench.broken = None
    ((system, asked),) = bench.prefill(pools=["16gb"], workloads=["question"], resume=True)
    assert (system, len(asked)) == ("lsa", 4), "questions are measured together"
    assert bench.prefill(pools=["16gb"], workloads=["question"], resume=True) == []
    assert len(PREFILL.read(bench.output)) == 6 + 1 + 4


# --- results of earlier versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("results", [SERVING, PREFILL], ids=lambda results: results.name)
def test_results_in_the_repository_name_their_backends_when_they_are_read(results: Any, tmp_path: pathlib.Path) -> None:
    rows = results.read(RESULTS)
    assert len(rows) >= 8
    for row in rows:
        assert SYSTEMS[row["system"]] and results.identity(row)
        assert all(row[name] for name in ("prefill_backend", "decode_backend", "kv_dtype", "page_size", "gpu"))
    (tmp_path / f"{results.name}.json").write_text(json.dumps(rows))
    results.write(tmp_path, [])
    again = results.read(tmp_path)
    assert {results.identity(row) for row in again} == {results.identity(row) for row in rows}
    assert any(results.ratio in row for row in again)


def test_a_row_of_an_earlier_version_ran_with_flashinfer_and_pages_of_64_tokens() -> None:
    found = upgraded({"system": "lsa", "ttft_s": 1.5})
    assert found == {
        "system": "lsa-flashinfer",
        "ttft_s": 1.5,
        "prefill_backend": "flashinfer",
        "decode_backend": "flashinfer",
        "kv_dtype": "bfloat16",
        "page_size": 64,
    }
    assert upgraded(found) == found
    old = {"pool_tokens": 140_032, "system": "stock"}
    assert (PREFILL.upgrade(old)["pool"], PREFILL.upgrade(old)["system"]) == ("full", "stock-flashinfer")


def test_a_short_run_starts_the_server_of_a_long_one() -> None:
    """Or its rows would replace, and be compared with, rows of other graphs and other intervals between tokens."""
    everything = (["8b"], ["tpot", "iso", "shared"], serving_arms.ARMS, "auto")
    whole = next(serving_arms.chosen(*everything))
    (short,) = serving_arms.chosen(["8b"], ["tpot"], ["32k"], "auto")
    system, model = SYSTEMS["stock"], pathlib.Path("model")
    assert serving.arguments(short, system, model) == serving.arguments(whole, system, model)
