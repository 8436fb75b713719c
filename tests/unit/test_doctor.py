"""``sglang-lsa doctor``: whole commands, wrong usage, versions, hooks, tables."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import doctor_reports
import pytest
from doctor_reports import cpu_server
from rich.console import Console

from sglang_lsa.cli import main
from sglang_lsa.doctor import command, versions
from sglang_lsa.doctor.command import Report, context_finding, examine
from sglang_lsa.doctor.findings import NOTE, OK, SKIPPED, TROUBLE, Finding
from sglang_lsa.doctor.hooks import hook_findings
from sglang_lsa.doctor.machine import GB
from sglang_lsa.doctor.report import show
from sglang_lsa.doctor.server import DeviceMemory
from sglang_lsa.doctor.versions import package_finding, version_findings
from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.releases import RELEASES

EIGHT_B_NUMBERS = 2 * 128256 * 4096 + 32 * (4096 * (4096 * 2 + 1024 * 2 + 3 * 14336) + 2 * 4096) + 4096
RELEASE = RELEASES[importlib.metadata.version("sglang")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("doctor")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, doctor_reports.__file__, str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def troubles(report: dict[str, Any]) -> list[str]:
    return [f"{f['name']}: {f['seen']}: {f['why']}: {f['fix']}" for f in report["findings"] if f["status"] == TROUBLE]


# --- whole commands --------------------------------------------------------------------------------------------------


def test_a_plan_for_a_gpu_that_is_not_here(found: dict[str, Any]) -> None:
    report = found["80 GB"]
    assert (report["status"], report["ok"], troubles(report)) == (0, True, [])
    plan = report["plan"]
    assert plan["device"] == "cuda"
    assert plan["token_bytes"] == 32 * 8 * 2 * 128 * 2
    assert plan["page_bytes"] == 64 * plan["token_bytes"]
    assert plan["chunk_tokens"] == 8192  # SGLang's own choice for a GPU of this size
    assert plan["device_memory"] == {"total_bytes": 80 * GB, "free_bytes": 80 * GB - GB // 2, "how": "assumed"}
    assert plan["host_memory"] == {"free_bytes": 200 * GB, "how": "assumed"}
    assert plan["weights"]["bytes"] == EIGHT_B_NUMBERS * 2
    assert plan["weights"]["how"] == "computed"
    assert plan["mirror_bytes"] <= 200 * GB * 0.6 < plan["mirror_bytes"] + plan["page_bytes"]
    taken = plan["kv_bytes"] - plan["page_bytes"] + sum(plan["overhead_bytes"].values())
    budget = int((80 * GB - GB // 2) * plan["mem_fraction_static"]) - plan["weights"]["bytes"]
    assert plan["budgeted_bytes"] == budget
    assert budget - 4 * plan["page_bytes"] < taken <= budget
    assert plan["unused_bytes"] < 4 * plan["page_bytes"]


def test_contexts_on_a_gpu_that_is_not_here(found: dict[str, Any]) -> None:
    plan, contexts = found["80 GB"]["plan"], found["80 GB"]["contexts"]
    pool = plan["kv_bytes"] - plan["page_bytes"] + sum(plan["overhead_bytes"].values())
    for context, tokens in zip(contexts, (32768, 131072), strict=True):
        assert context["stock"] == pool // (tokens * plan["token_bytes"])
        assert context["resident_pages"] == int(tokens // 64 * 0.135)
        assert context["lsa"] == plan["virtual_pages"] // (tokens // 64) > context["stock"]
        assert context["limit"] == "host mirror"


def test_an_indexer_has_its_own_line(found: dict[str, Any]) -> None:
    plan = found["indexer"]["plan"]
    assert plan["overhead_bytes"]["indexer"] == (plan["virtual_pages"] + 1) * 9216
    assert plan["weights"] == {"bytes": 269030016, "how": "measured", "source": "headers of 1 safetensors file"}


def test_what_only_a_loaded_model_shows_is_a_note(found: dict[str, Any]) -> None:
    report = found["names a window"]
    assert (report["status"], report["ok"]) == (0, True)
    note, *others = (f for f in report["findings"] if f["name"] == "model")
    assert note["status"] == NOTE
    assert note["seen"].startswith("its configuration names a sliding window of 4096 tokens: whether SGLang's model")
    assert note["why"] == "the server looks at a model once more when it is loaded"
    assert [f for f in found["80 GB"]["findings"] if f["name"] == "model"] == others
    assert ["heads that choose pages are looked for" in other["seen"] for other in others] == [True] * RELEASE.measured
    for named in ("indexer", "two ranks"):
        assert not [f for f in found[named]["findings"] if f["name"] == "model"]


def test_every_hook_of_the_table_is_told(found: dict[str, Any]) -> None:
    from sglang_lsa.patches.table import INTAKE, SERVING

    told = {f["name"]: f["status"] for f in found["80 GB"]["findings"] if f["section"] == "hooks"}
    assert told == {"sglang": OK, **{hook.target: OK for hook in (*INTAKE, *SERVING) if RELEASE.has(hook.target)}}


@pytest.mark.skipif(RELEASE.resolves_late, reason="several ranks are refused with this SGLang")
def test_a_rank_has_half_of_everything(found: dict[str, Any]) -> None:
    one, two = (found[name]["plan"] for name in ("80 GB", "two ranks"))
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert two["page_bytes"] * 2 == one["page_bytes"]
    assert two["weights"]["bytes"] == one["weights"]["bytes"] // 2
    assert two["host_mirror_bytes"] == 2 * two["mirror_bytes"]
    assert abs(two["host_mirror_bytes"] - one["host_mirror_bytes"]) <= 4 * one["page_bytes"], "of one host's memory"
    assert two["physical_pages"] > 2 * one["physical_pages"] or two["physical_pages"] == two["virtual_pages"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("12 GB", ["the weights (14.96 GB) leave no memory for KV", "--mem-fraction-static"]),
        ("sliding window", ["has sliding-window attention: not supported with LSA yet: use a dense model"]),
        ("flags", ["has 9 attention heads, which cannot be shared by 2 ranks: use --tp-size 1, 3", "--page-size 32: "]),
        ("no such model", ["missing"]),
        ("too large a mirror", ["--lsa-host-memory-gb 1000000.0 needs 1000000.0 GB of host memory", "lower it"]),
        ("too small a mirror", ["fewer than the device pool's 9600: raise --lsa-host-memory-gb to"]),
        ("context longer than the mirror", ["contexts of 8192: none fits", "--lsa-host-memory-gb 0.18 or more"]),
        ("context longer than the model", ["contexts of 9000: longer than the model takes", "8192 at most"]),
        ("a cpu too small", ["a CPU server of 1.", "1.00 GB are free", "lower --lsa-host-memory-gb"]),
    ],
)
def test_trouble(name: str, words: list[str], found: dict[str, Any]) -> None:
    report = found[name]
    assert (report["status"], report["ok"]) == (1, False)
    text = "\n".join(troubles(report))
    assert [word for word in words if word not in text] == [], text
    planned = name.startswith(("context", "a cpu"))
    assert (report["plan"] is not None) == planned


def test_lengths_that_fit_are_no_trouble_beside_one_that_does_not(found: dict[str, Any]) -> None:
    report = found["context longer than the mirror"]
    assert len(troubles(report)) == 1
    assert [context["lsa"] for context in report["contexts"]] == [1, 0]


def test_the_advice_for_a_longer_context_is_enough() -> None:
    server = cpu_server(virtual=64 * 70)
    problem = context_finding(server, server.fit(8192), asked=True)
    assert problem is not None
    host_bytes = float(problem.fix.split()[1]) * GB
    larger = cpu_server(virtual=int(host_bytes) // 23040 // 64 * 64 - 64)
    assert larger.fit(8192).lsa == 1


# --- wrong usage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lsa-budget 7", "budget 7.0 is out of range: use a number in (0, 1]"),
        ("--lsa-window 0", "--lsa-window 0 is too small: use 1 or more"),
        ("--lsa-config /does/not/exist.json", "--lsa-config /does/not/exist.json: cannot be read"),
        ("--gpu-memory-gb 0", "--gpu-memory-gb 0.0 is no size: use a number of GB above 0"),
        ("--gpu-memory-gb nan", "--gpu-memory-gb nan is no size"),
        ("--gpu-memory-gb 0.4", "--gpu-memory-gb 0.4 is no GPU: use 1 or more"),
        ("--free-host-memory-gb -1", "--free-host-memory-gb -1.0 is no size"),
        ("--context-tokens 8192 0", "--context-tokens 0 is no length: use 1 or more"),
        ("--gpu-memory-gb 80 --device cpu", "plans for a GPU, --device cpu is none: leave one of the two out"),
    ],
)
def test_wrong_usage(flags: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *flags.split(), "--json"]) == 2
    seen = capsys.readouterr()
    assert words in seen.err
    assert seen.out == ""


def test_a_flag_that_is_gone_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--lsa-prefetch-steps", "32", "--json"])
    assert ended.value.code == 2
    seen = capsys.readouterr()
    assert "--lsa-prefetch-steps is gone: pages are sent for 16 steps ahead" in seen.err and seen.out == ""


@pytest.mark.parametrize("flags", ["--context-tokens many", "--gpu-memory-gb", "--lsa-window half"])
def test_flags_that_cannot_be_read(flags: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", *flags.split()])
    assert caught.value.code == 2


def test_other_commands_still_refuse_what_they_do_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["model", "--lsa-budget", "0.2"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --lsa-budget 0.2" in capsys.readouterr().err


# --- versions --------------------------------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, **installed: str | None) -> None:
    """Packages have these versions, or (None) are not installed."""
    version = importlib.metadata.version

    def seen(name: str) -> str:
        if name.replace("-", "_") not in installed:
            return version(name)
        if (found := installed[name.replace("-", "_")]) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", seen)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_the_versions_here_are_right() -> None:
    found = by_name(version_findings(on_gpu=False))
    assert {name for name, finding in found.items() if finding.status == TROUBLE} == set()
    assert {"python", "sglang-lsa", "plugin", *versions.ALWAYS_TOLD} <= found.keys()
    assert found["sglang"].seen == importlib.metadata.version("sglang")


def test_another_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, sglang="0.5.18")
    sglang = by_name(version_findings(on_gpu=False))["sglang"]
    assert (sglang.status, sglang.seen) == (TROUBLE, "0.5.18")
    assert "!=0.5.18.*" in sglang.why
    assert sglang.fix == "pip install 'sglang==0.5.17'"


@pytest.mark.parametrize(
    ("asked", "installed", "on_gpu", "status"),
    [
        pytest.param("torch==2.11.0", "2.11.0+cu128", False, OK, id="a build of the right version"),
        pytest.param("torch==2.11.0", "2.9.1", False, TROUBLE, id="wrong"),
        pytest.param("numpy>=1.26", None, False, TROUBLE, id="missing"),
        pytest.param('flashinfer-python==0.6.15; extra == "gpu"', "0.6.1", False, NOTE, id="for a GPU, without one"),
        pytest.param('flashinfer-python==0.6.15; extra == "gpu"', "0.6.1", True, TROUBLE, id="for a GPU"),
        pytest.param('flashinfer-python==0.6.15; extra == "gpu"', None, True, TROUBLE, id="missing on a GPU"),
        pytest.param('triton==3.6.0; extra == "gpu"', None, False, TROUBLE, id="kernels import triton everywhere"),
        pytest.param('sentence-transformers>=5.1; extra == "train"', None, True, NOTE, id="only for training"),
    ],
)
def test_a_package(
    asked: str, installed: str | None, on_gpu: bool, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = asked.partition("=")[0].partition(">")[0]
    pretend(monkeypatch, **{name.replace("-", "_"): installed})
    finding = package_finding(asked, on_gpu)
    assert (finding.name, finding.status) == (name, status)
    assert status == OK or finding.fix.startswith("pip install ")


def test_a_package_that_is_not_installed_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    pretend(monkeypatch, sglang_lsa=None)
    for function in ("requires", "metadata"):
        monkeypatch.setattr(importlib.metadata, function, missing)
    found = by_name(version_findings(on_gpu=False))
    assert found["sglang-lsa"].status == TROUBLE
    assert found["sglang-lsa"].fix == "pip install sglang-lsa"
    assert found["sglang"].status == OK


def test_a_plugin_that_sglang_does_not_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    plugin = by_name(version_findings(on_gpu=False))["plugin"]
    assert (plugin.status, plugin.seen) == (TROUBLE, "no entry point lsa in sglang.srt.plugins")


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions.platform, "python_version", lambda: "3.9.1")
    python = by_name(version_findings(on_gpu=False))["python"]
    assert (python.status, python.seen) == (TROUBLE, "3.9.1")


# --- hooks -----------------------------------------------------------------------------------------------------------


def hook(target: str, *parameters: str) -> Hook:
    return Hook(target, "after", print, parameters, "why it is needed.", "until", "test")


@pytest.mark.parametrize(
    ("target", "parameters", "status", "words"),
    [
        pytest.param("json.dumps", ["obj"], OK, "after", id="fits"),
        pytest.param("json.loads", ["obj"], TROUBLE, "takes (s, cls, ", id="other parameters"),
        pytest.param("json.gone", [], TROUBLE, "not found (", id="no such symbol"),
        pytest.param("no_such_module.Class.method", [], TROUBLE, "not found (No module named", id="no such module"),
        pytest.param("test_doctor_broken.f", [], TROUBLE, "cannot be looked at (RuntimeError(", id="broken module"),
    ],
)
def test_a_hook(
    target: str,
    parameters: list[str],
    status: str,
    words: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "test_doctor_broken.py").write_text("raise RuntimeError('needs another driver')")
    monkeypatch.syspath_prepend(str(tmp_path))
    _, finding = hook_findings([hook(target, *parameters)])
    assert (finding.name, finding.status, finding.why) == (target, status, "why it is needed.")
    assert words in finding.seen
    assert bool(finding.fix) == (status == TROUBLE)


@pytest.mark.parametrize(("installed", "words"), [(None, "not installed"), ("0.6.0", "is version 0.6.0")])
def test_the_release_of_the_hooks(installed: str | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, sglang=installed)
    sglang, other = hook_findings([hook("json.dumps", "obj")])
    assert (sglang.status, sglang.seen) == (TROUBLE, words)
    assert f"pip install sglang=={'0.5.23' if installed else '0.5.17'}" in sglang.fix
    assert other.status == OK


def doctor_arguments(**given: Any) -> argparse.Namespace:
    defaults = {"context_tokens": None, "gpu_memory_gb": None, "free_host_memory_gb": None, "json": False}
    return argparse.Namespace(**{**defaults, **given})


def test_without_sglang_the_rest_is_still_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, sglang=None)
    monkeypatch.setitem(sys.modules, "sglang", None)
    report = examine(doctor_arguments(), [])
    assert not report.ok
    assert report.server is None
    assert report.host is not None
    hooks = [finding for finding in report.findings if finding.section == "hooks"]
    assert len(hooks) > 10
    assert {finding.status for finding in hooks if finding.name.startswith("sglang")} == {TROUBLE}
    (plan,) = [finding for finding in report.findings if finding.section == "server"]
    assert (plan.name, plan.status) == ("memory plan", SKIPPED)
    out = io.StringIO()
    show(report, Console(file=out, width=120))
    assert f"{sum(f.status == TROUBLE for f in report.findings)} troubles:" in out.getvalue()


def test_a_package_that_our_own_code_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "hook_findings", lambda: [])
    monkeypatch.setitem(sys.modules, "sglang_lsa.doctor.server", None)
    report = examine(doctor_arguments(), [])
    (plan,) = [finding for finding in report.findings if finding.section == "server"]
    assert (plan.name, plan.status) == ("memory plan", TROUBLE)
    assert plan.seen.startswith("not made (import of sglang_lsa.doctor.server")


# --- tables ----------------------------------------------------------------------------------------------------------


def test_tables_say_what_was_measured_and_what_assumed() -> None:
    server = cpu_server(device="cuda", memory=DeviceMemory(80 * GB, 79 * GB, "assumed"))
    findings = (Finding("hooks", "sglang.srt.a.Class.method", TROUBLE, "is gone", "reasons", "install it"),)
    out = io.StringIO()
    show(Report(findings, None, None, None, server, (server.fit(8192),)), Console(file=out, width=150))
    text = out.getvalue()
    for words in (
        "80.00 GB",
        "assumed",
        "measured: headers of 1",
        "host mirror, 1000 pages",
        "Class.method",
        "install it",
    ):
        assert words in text
    assert "1 trouble:" in text


def test_what_libraries_print_does_not_reach_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    with command._quiet():
        print("from Python")
        os.write(1, b"from C\n")
    print("the report")
    seen = capfd.readouterr()
    assert seen.out == "the report\n"
    assert "from Python" in seen.err
    assert "from C" in seen.err
