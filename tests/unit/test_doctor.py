"""sglang-lsa doctor: each kind of trouble is found and named, and the numbers are right.

Importing SGLang takes most of the time, so one process (this file, run as a script) runs all commands that need it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import io
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from sglang_lsa.cli import main
from sglang_lsa.config import LSAConfig
from sglang_lsa.doctor import command, kernels, machine, versions
from sglang_lsa.doctor.command import Report, context_finding, examine, plan_findings
from sglang_lsa.doctor.contexts import Fit, fit
from sglang_lsa.doctor.findings import NOTE, OK, SKIPPED, TROUBLE, Finding
from sglang_lsa.doctor.hooks import hook_findings
from sglang_lsa.doctor.kernels import REFERENCE, kernel_finding, kernel_findings, kernel_mode
from sglang_lsa.doctor.machine import GB, Host, gpu_here, host_findings, host_here
from sglang_lsa.doctor.report import show
from sglang_lsa.doctor.server import DeviceMemory, HostMemory, Server
from sglang_lsa.doctor.versions import package_finding, version_findings
from sglang_lsa.doctor.weights import Weights, safetensors_bytes, weights_of
from sglang_lsa.engine.sizing import MemoryPlan
from sglang_lsa.indexer.expectation import Expectation
from sglang_lsa.memory.layout.base import PageShape
from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.releases import RELEASES

EIGHT_B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
}
EIGHT_B_NUMBERS = 2 * 128256 * 4096 + 32 * (4096 * (4096 * 2 + 1024 * 2 + 3 * 14336) + 2 * 4096) + 4096
SLIDING = {**EIGHT_B, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "sliding_window": 4096}
NAMES_ONE = {**EIGHT_B, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4096}
"""A window that SGLang's model ignores."""

RELEASE = RELEASES[importlib.metadata.version("sglang")]
COMMANDS: dict[str, list[str]] = {
    # the model's folder is added, and --json
    "80 GB": ["8b", "--gpu-memory-gb", "80", "--free-host-memory-gb", "200", "--context-tokens", "32768", "131072"],
    "indexer": ["", "--gpu-memory-gb", "24", "--free-host-memory-gb", "9", "--lsa-indexer", "smollm2-135m-instruct"],
    "12 GB": ["8b", "--gpu-memory-gb", "12"],
    "sliding window": ["sliding", "--gpu-memory-gb", "80"],
    "names a window": ["names one", "--gpu-memory-gb", "80", "--free-host-memory-gb", "200"],
    "two ranks": ["8b", "--gpu-memory-gb", "80", "--free-host-memory-gb", "200", "--tp-size", "2"],
    "flags": ["", "--tp-size", "2", "--page-size", "32"],
    "no such model": ["missing"],
    "too large a mirror": ["", "--lsa-host-memory-gb", "1000000"],
    "too small a mirror": ["", "--lsa-host-memory-gb", "0.05", "--lsa-device-tokens", "9600"],
    "context longer than the mirror": [
        *("", "--lsa-host-memory-gb", "0.1", "--lsa-device-tokens", "1024", "--context-tokens", "2048", "8192"),
    ],
    "context longer than the model": ["", "--lsa-host-memory-gb", "1", "--context-tokens", "9000"],
    "a cpu too small": ["", "--free-host-memory-gb", "1", "--lsa-host-memory-gb", "0.9"],
}


def probe(folder: pathlib.Path) -> dict[str, Any]:
    """Run all commands in this process."""
    from sglang_lsa.embedded_model import embedded_model_path

    paths = {name: folder / name for name in ("8b", "sliding", "names one", "missing")}
    for name, values in (("8b", EIGHT_B), ("sliding", SLIDING), ("names one", NAMES_ONE)):
        paths[name].mkdir()
        (paths[name] / "config.json").write_text(json.dumps(values))
    found = {}
    for name, (model, *flags) in COMMANDS.items():
        path = paths[model] if model else embedded_model_path()
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = main(["doctor", "--model-path", str(path), *flags, "--json"])
        found[name] = {"status": status, **json.loads(out.getvalue())}
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("doctor")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True, env=environment, timeout=600
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
    (note,) = (f for f in report["findings"] if f["name"] == "model")
    assert note["status"] == NOTE
    assert note["seen"].startswith("its configuration names a sliding window of 4096 tokens: whether SGLang's model")
    assert note["why"] == "the server looks at a model once more when it is loaded"
    assert not [f for f in found["80 GB"]["findings"] if f["name"] == "model"]


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


# --- the machine -----------------------------------------------------------------------------------------------------


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "nvidia_smi", lambda: (["NVIDIA H100"], "550.1"))
    gpu, finding = gpu_here()
    assert gpu is None
    assert (finding.status, finding.seen) == (TROUBLE, "nvidia-smi sees NVIDIA H100 (driver 550.1), torch sees none")


def test_no_gpu_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "nvidia_smi", lambda: ([], None))
    assert gpu_here()[1].status == NOTE


def test_what_nvidia_smi_says(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.95.05'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert machine.nvidia_smi() == (["NVIDIA H100 80GB HBM3"], "580.95.05")
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed, because it could not reach the driver'\nexit 9\n")
    assert machine.nvidia_smi() == ([], None)


def test_this_host() -> None:
    host = host_here()
    assert 0 < host.free_bytes <= host.total_bytes
    assert host.memlock_bytes is None or host.memlock_bytes >= 0


HOST = Host(free_bytes=10 * GB, total_bytes=16 * GB, memlock_bytes=GB, shm_bytes=2 * GB)


@pytest.mark.parametrize(
    ("host", "mirror", "pinned", "statuses"),
    [
        pytest.param(HOST, 2 * GB, True, [OK, NOTE, OK], id="a mirror above the limit"),
        pytest.param(HOST, GB, True, [OK, OK, OK], id="a mirror at the limit"),
        pytest.param(HOST, 2 * GB, False, [OK, SKIPPED, OK], id="a CPU locks nothing"),
        pytest.param(dataclasses.replace(HOST, memlock_bytes=None), 2 * GB, True, [OK, OK, OK], id="no limit"),
        pytest.param(dataclasses.replace(HOST, shm_bytes=64 << 20), None, True, [OK, OK, NOTE], id="Docker's /dev/shm"),
        pytest.param(dataclasses.replace(HOST, shm_bytes=None), None, True, [OK, OK, NOTE], id="no /dev/shm"),
    ],
)
def test_a_host(host: Host, mirror: int | None, pinned: bool, statuses: list[str]) -> None:
    assert [finding.status for finding in host_findings(host, mirror, pinned)] == statuses


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they run")
def test_without_a_gpu_kernels_are_not_run() -> None:
    assert kernel_mode() == REFERENCE
    mode, (finding,) = kernel_findings()
    assert (mode, finding.status) == (REFERENCE, SKIPPED)


def test_kernels_equal_their_references() -> None:
    """On a GPU as they are, elsewhere under Triton's interpreter, which must be chosen before they are imported."""
    program = (
        "import json, dataclasses; from sglang_lsa.doctor.kernels import kernel_findings; mode, found = "
        "kernel_findings(); print(json.dumps([mode, [dataclasses.asdict(f) for f in found]]))"
    )
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **interpreted}
    )
    assert run.returncode == 0, run.stderr[-2000:]
    mode, found = json.loads(run.stdout)
    assert mode == ("interpreted" if interpreted else "triton")
    assert [finding for finding in found if finding["status"] != OK] == []
    folder = pathlib.Path(kernels.__file__).parents[1] / "kernels"
    modules = {file.stem for file in folder.glob("*.py")}
    tables = dict.fromkeys(("decode_indices", "decode_pages", "physical_slots"), "page_table")
    assert {tables.get(finding["name"], finding["name"]) for finding in found} == modules


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        pytest.param(torch.tensor([1.0, 2.5]), "differs from its reference by 0.5", id="wrong"),
        pytest.param(torch.tensor([1.0, float("nan")]), "differs from its reference by nan", id="not a number"),
        pytest.param(None, "failed (RuntimeError: no kernel image)", id="fails"),
    ],
)
def test_a_kernel_that_is_wrong(seen: torch.Tensor | None, words: str) -> None:
    def check(device: str) -> kernels.Outputs:
        if seen is None:
            raise RuntimeError("no kernel image")
        return seen, torch.tensor([1.0, 2.0]), 1e-3

    finding = kernel_finding("page_score", check, REFERENCE)
    assert finding.status == TROUBLE
    assert words in finding.seen


# --- weights ---------------------------------------------------------------------------------------------------------


def test_safetensors_in_the_type_that_is_served(tmp_path: pathlib.Path) -> None:
    """Floats are loaded in the model's type; what is quantized, and whole numbers, stay as they are."""
    tensors = {
        "a": torch.zeros(3, 5),
        "b": torch.zeros(7, dtype=torch.bfloat16),
        "c": torch.zeros(11, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert safetensors_bytes(tmp_path / "model.safetensors", 2) == 15 * 2 + 7 * 2 + 11
    assert safetensors_bytes(tmp_path / "model.safetensors", None) == 15 * 4 + 7 * 2 + 11
    save_file({"d": torch.zeros(4)}, tmp_path / "model-2.safetensors")
    config = argparse.Namespace()
    assert weights_of(str(tmp_path), config, 2) == Weights(55 + 8, "measured", "headers of 2 safetensors files")
    config.quantization_config = {"quant_method": "gptq"}
    assert weights_of(str(tmp_path), config, 2).bytes == 85 + 16


@pytest.mark.parametrize("content", [b"", b"\x02\0\0\0\0\0\0\0[]", b"\xff" * 20, b"version https://git-lfs.github.com"])
def test_a_file_that_is_no_safetensors(content: bytes, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: no safetensors file: download it again"):
        safetensors_bytes(file, 2)


def test_a_file_that_is_cut_off(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, file)
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"has {whole - 1} bytes, its header says {whole}"):
        safetensors_bytes(file, 2)


@pytest.mark.parametrize("name", ["pytorch_model-1.bin", "model.gguf"])
def test_other_files_count_by_their_size(name: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / name).write_bytes(b"x" * 123)
    found = weights_of(str(tmp_path), argparse.Namespace(), 2)
    assert (found.bytes, found.how) == (123, "measured")
    assert weights_of(str(tmp_path / name), argparse.Namespace(), 2).bytes == 123


@pytest.mark.parametrize("dummy", [False, True])
def test_without_files_the_shape_counts(dummy: bool, tmp_path: pathlib.Path) -> None:
    from transformers import LlamaConfig

    if dummy:
        save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**shape, vocab_size=32, tie_word_embeddings=True)
    numbers = 32 * 8 + 2 * (4 * 8 * 8 + 3 * 8 * 16 + 2 * 8) + 8
    assert weights_of(str(tmp_path), config, 2, dummy) == Weights(
        numbers * 2, "computed", "shape of the model: no weights are here"
    )


@pytest.mark.parametrize("name", ["fp8", "w8a8_fp8"])
def test_what_sglang_narrows_itself_counts_as_narrow(name: str, tmp_path: pathlib.Path) -> None:
    """Matrices, but not those of tokens, nor norms; what is quantized in its files stays as it is."""
    from transformers import LlamaConfig

    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**shape, vocab_size=32, tie_word_embeddings=False)
    narrow, wide = 2 * (4 * 8 * 8 + 3 * 8 * 16), 2 * 32 * 8 + 2 * 2 * 8 + 8
    found = weights_of(str(tmp_path), config, 2, quantization=name)
    assert found == Weights(
        narrow + 2 * wide, "computed", f"shape of the model: no weights are here, with --quantization {name}"
    )
    assert weights_of(str(tmp_path), config, 2, quantization="gptq").bytes == 2 * (narrow + wide)
    tensors = {
        "model.embed_tokens.weight": torch.zeros(32, 8),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(16, 8),
        "model.norm.weight": torch.zeros(8),
        "lm_head.weight": torch.zeros(32, 8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert weights_of(str(tmp_path), config, 2, quantization=name).bytes == 16 * 8 + 2 * (2 * 32 * 8 + 8)
    config.quantization_config = {"quant_method": "fp8"}
    assert weights_of(str(tmp_path), config, 2, quantization=name).bytes == 4 * (16 * 8 + 2 * 32 * 8 + 8)


def test_no_files_and_no_shape(tmp_path: pathlib.Path) -> None:
    from transformers import PretrainedConfig

    with pytest.raises(ValueError, match="no weights are here, and transformers makes no model of the configuration"):
        weights_of(str(tmp_path), PretrainedConfig(), 2)


# --- contexts --------------------------------------------------------------------------------------------------------


def contexts(
    tokens: int,
    physical: int = 1000,
    virtual: int = 100_000,
    chunk: int | None = 2048,
    requests: int = 10_000,
    overhead: int = 0,
    on_gpu: bool = True,
    expectations: dict[str, Expectation] | None = None,
    **options: Any,
) -> Fit:
    """With KV of one byte a token, and a mirror that is never the limit unless ``virtual`` says so."""
    plan = MemoryPlan(physical * 64, virtual * 64, PageShape(64, ((64,),)), {"staging": overhead})
    config = LSAConfig(**{"budget": 0.1, "min_context": 1024, **options})
    return fit(
        config,
        plan,
        tokens,
        context_tokens=131_072,
        chunk_tokens=chunk,
        max_requests=requests,
        on_gpu=on_gpu,
        expectations=expectations,
    )


def test_each_context_holds_its_resident_set_and_a_page_to_grow_into() -> None:
    """100 pages of 1,000: sets of 10 and a page each, and for the last one's prompt a chunk of 32 pages and one."""
    found = contexts(6400)
    assert found == Fit(
        6400, stock=10, lsa=1 + (1000 - 1 - 33) // 11, limit="device pool", resident_pages=10, pages=100
    )


@pytest.mark.parametrize(
    ("options", "lsa", "limit"),
    [
        pytest.param({}, 88, "device pool", id="device pool"),
        pytest.param({"virtual": 1050}, 10, "host mirror", id="host mirror"),
        pytest.param({"virtual": 99, "physical": 99}, 0, "host mirror", id="longer than the mirror"),
        pytest.param({"requests": 5}, 5, "--max-running-requests", id="requests"),
        pytest.param({"chunk": None}, 82, "device pool", id="prompts in one pass"),
        pytest.param({"chunk": 64 * 400}, 82, "device pool", id="a chunk longer than the prompt"),
        pytest.param({"physical": 60}, 3, "device pool", id="a chunk larger than half of the pool"),
        pytest.param({"physical": 60, "chunk": None}, 0, "device pool", id="no chunks, larger than the pool"),
        pytest.param({"budget": 1.0}, 9, "device pool", id="all pages"),
        pytest.param({"policy": "full"}, 9, "device pool", id="policy full"),
        pytest.param({"policy": "full", "physical": 100}, 0, "device pool", id="all pages, larger than the pool"),
        pytest.param({"min_context": 8192}, 9, "device pool", id="too short to be pruned"),
        pytest.param({"min_pages": 50}, 19, "device pool", id="least pages"),
    ],
)
def test_what_limits_contexts_of_100_pages(options: dict[str, Any], lsa: int, limit: str) -> None:
    found = contexts(6400, **options)
    assert (found.lsa, found.limit) == (lsa, limit)


def test_of_a_budget_of_auto_what_sets_are_expected_to_take_is_counted() -> None:
    known = {"indexer": Expectation(((0.0, 0.0, 0.0), (1.0, 1.0, 0.05)), "a test")}
    auto = {"budget": "auto", "indexer": "x", "policy": "indexer", "max_budget": 0.5}
    assert contexts(6400, **auto, expectations=known).resident_pages == 5 + 3  # 0.6 of a twentieth of 95 pages
    assert contexts(6400, **auto, target_coverage=1.0, expectations=known).resident_pages == 5 + 5
    assert contexts(6400, **auto).resident_pages == 50, "nobody knows"


def test_pruning_starts_at_half_of_a_small_pool() -> None:
    assert contexts(6400, physical=150, min_context=100_000).resident_pages == 10
    assert contexts(6400, physical=220, min_context=100_000).resident_pages == 100


def test_no_set_is_larger_than_half_of_the_pool() -> None:
    assert contexts(6400, physical=40, budget=0.9).resident_pages == 20


@pytest.mark.parametrize(("on_gpu", "stock"), [(True, 11), (False, 10)])
def test_what_lsa_takes_beside_kv_is_kv_for_stock(on_gpu: bool, stock: int) -> None:
    assert contexts(6400, overhead=6400, on_gpu=on_gpu).stock == stock


# --- findings about a plan -------------------------------------------------------------------------------------------


def cpu_server(virtual: int = 64 * 1000, **changed: Any) -> Server:
    server = Server(
        name="a model",
        device="cpu",
        config=LSAConfig(),
        memory=DeviceMemory(20 * GB, 10 * GB, "measured"),
        host=HostMemory(10 * GB, "measured"),
        weights=Weights(GB, "measured", "headers of 1 safetensors file"),
        static_share=0.8,
        budgeted_bytes=7 * GB,
        budgeted_tokens=300_032,
        plan=MemoryPlan(64 * 64, virtual, PageShape(64, ((64 * 23040,),)), {"page_keys": 1000}),
        context_tokens=8192,
        table_tokens=8196,
        chunk_tokens=2048,
        max_requests=256,
        dtype="bfloat16",
    )
    return dataclasses.replace(server, **changed)


def test_a_mirror_smaller_than_the_device_is_noted() -> None:
    (finding,) = plan_findings(cpu_server(device="cuda"))
    assert finding.status == NOTE
    assert float(finding.fix.split()[1].rstrip(",")) * GB >= (300_032 + 64) * 23040
    assert plan_findings(cpu_server(device="cuda", config=LSAConfig(device_tokens=4096)))[0].status == OK
    assert plan_findings(cpu_server(device="cuda", budgeted_tokens=64_000))[0].status == OK


def test_a_cpu_server_that_needs_more_than_there_is() -> None:
    assert plan_findings(cpu_server())[0].status == OK
    (finding,) = plan_findings(cpu_server(host=HostMemory(2 * GB, "measured")))
    assert finding.status == TROUBLE


def test_default_lengths_are_no_trouble() -> None:
    server = cpu_server(virtual=64 * 70)
    notes = [context_finding(server, server.fit(8192), asked) for asked in (False, True)]
    assert [note.status for note in notes if note] == [NOTE, TROUBLE]
    assert context_finding(server, server.fit(4096), asked=True) is None


def test_a_context_that_reads_all_and_is_larger_than_the_pool() -> None:
    server = cpu_server(config=LSAConfig(policy="full"))
    problem = context_finding(server, server.fit(8192), asked=True)
    assert problem is not None
    assert "a budget below 1 and a policy other than full" in problem.fix


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


if __name__ == "__main__":
    results = pathlib.Path(sys.argv[1])
    (results / "found.json").write_text(json.dumps(probe(results)))
