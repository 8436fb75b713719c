"""The plugin in real SGLang processes: absent without flags, whole with them, refused where it cannot work."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import plugin_probes
import pytest
from plugin_probes import DEFAULTS, INTAKE_TARGETS, REFUSED, TARGETS, WITH_SUPPORT

from sglang_lsa.config import LSAConfig
from sglang_lsa.doctor.findings import OK
from sglang_lsa.doctor.hooks import hook_finding
from sglang_lsa.patches.releases import IncompatibleSGLang
from sglang_lsa.patches.resolved import proof_of_life, remember
from sglang_lsa.patches.table import SERVING
from sglang_lsa.patches.table import install as install_hooks

pytestmark = pytest.mark.release
ON_A_CPU: dict[str, Any] = {"groups": False, "calibrate": "never"}
"""What is ``auto`` there."""


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Both probes, side by side; called with a name, returns what that one found."""
    folder = tmp_path_factory.mktemp("probes")
    running = {}
    for name in ("flags", "stock"):
        log = (folder / f"{name}.log").open("w")
        command = [sys.executable, plugin_probes.__file__, name, str(folder / f"{name}.json")]
        running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=WITH_SUPPORT)
    found: dict[str, dict[str, Any]] = {}

    def result(name: str) -> dict[str, Any]:
        if name not in found:
            running[name].wait(timeout=600)
            file = folder / f"{name}.json"
            assert file.exists(), (folder / f"{name}.log").read_text()[-3000:]
            found[name] = json.loads(file.read_text())
        return found[name]

    yield result
    for process in running.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def stock(probes: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return probes("stock")


@pytest.fixture(scope="module")
def flags(probes: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return probes("flags")


# flags


def test_flags_reach_server_args(flags: dict[str, Any]) -> None:
    expected = LSAConfig(budget=0.25, policy="recency", observe_layers=(3, 9), **ON_A_CPU)
    assert LSAConfig(**flags["plain"]["lsa_config"]) == expected
    assert LSAConfig(**flags["own sizes"]["lsa_config"]) == LSAConfig(window=32, **ON_A_CPU)


def test_flags_install_every_hook(flags: dict[str, Any]) -> None:
    assert flags["wrapped"] == TARGETS


def test_what_the_user_left_open_is_filled_in(flags: dict[str, Any]) -> None:
    assert {name: flags["plain"][name] for name in DEFAULTS} == {
        "device": "cpu",
        "page_size": 64,
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "radix_cache_backend": "lsa",
        "chunked_prefill_size": 2048,
        "max_running_requests": 256,
        "sleep_on_idle": True,
        "disable_radix_cache": False,
    }


def test_what_the_user_gave_is_kept(flags: dict[str, Any]) -> None:
    assert flags["own sizes"]["max_running_requests"] == 7
    assert flags["own sizes"]["chunked_prefill_size"] == 512
    assert flags["no tree"]["disable_radix_cache"] is True


def test_hooks_without_flags_change_no_argument(flags: dict[str, Any]) -> None:
    assert flags["stock"]["lsa_config"] is None
    assert flags["stock"]["radix_cache_backend"] is None
    assert flags["stock"]["page_size"] == 1
    assert flags["stock engine"]["lsa_config"] is None
    assert flags["stock engine"]["page_size"] == 1


def test_engine_takes_a_config(flags: dict[str, Any]) -> None:
    assert LSAConfig(**flags["engine"]["lsa_config"]) == LSAConfig(budget=0.25, **ON_A_CPU)
    names = [name for name in DEFAULTS if name != "lsa_config"]
    assert {name: flags["engine"][name] for name in names} == {name: flags["plain"][name] for name in names}
    assert flags["bad engine"]["kind"] == "ValueError"
    assert "lsa_config: unknown key 'budgets': use one of" in flags["bad engine"]["text"]


def test_pickled_arguments_install_the_hooks_in_a_child(flags: dict[str, Any]) -> None:
    child = flags["child"]
    assert child["argv"] == []  # nothing else could have told it
    assert child["before"] == []
    assert child["wrapped"] == TARGETS
    assert child["lsa_config"] == flags["plain"]["lsa_config"]
    assert child["backends"][:2] == ["sglang_lsa.plugin"] * 2
    assert "lsa" in child["backends"]


@pytest.mark.parametrize(("given", "words"), REFUSED, ids=[given for given, _ in REFUSED])
def test_unsupported_flags_are_refused(flags: dict[str, Any], given: str, words: str) -> None:
    assert re.search(words, flags[given]), flags[given] or "accepted"


def test_refusals_come_before_anything_is_loaded(flags: dict[str, Any]) -> None:
    assert flags["model code"] == []


def test_a_dead_hook_is_found_by_proof_of_life() -> None:
    """A hook can be installed on what SGLang never calls: a Struct has no use for its ``__init__``."""
    import msgspec

    class Arguments(msgspec.Struct, dict=True):
        model_path: str

    called = []
    Arguments.__init__ = lambda self, *_, **__: called.append(self)  # type: ignore[method-assign]
    made = Arguments("model")
    assert called == [], "it is dead"
    with pytest.raises(IncompatibleSGLang, match=r"from_cli_args was never called through its hook: the --lsa flags"):
        proof_of_life(made)
    remember(made, "lsa_config", LSAConfig())
    with pytest.raises(IncompatibleSGLang, match=r"resolve_once was never called .*these arguments were not checked"):
        proof_of_life(made)
    remember(made, "lsa_checked", True)
    assert proof_of_life(pickle.loads(pickle.dumps(SimpleNamespace(**vars(made))))).lsa_config == LSAConfig()


def test_processes_that_have_nothing_to_do_get_nothing() -> None:
    script = (
        "import sys; from setproctitle import setproctitle; setproctitle(sys.argv[1])\n"
        "sys.argv[1:] = ['--lsa-budget=1']\n"
        "from sglang_lsa.plugin import register; register(); print('sglang_lsa.patches.table' in sys.modules)"
    )
    for title, expected in (("sglang::detokenizer", "False"), ("sglang::data_parallel_controller", "False")):
        done = subprocess.run([sys.executable, "-c", script, title], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


# no flags


@pytest.mark.parametrize("how", ["command", "console"])
def test_no_flags_installs_nothing(stock: dict[str, Any], how: str) -> None:
    assert stock["module_name"] == "sglang.launch_server"
    assert any("Executed general plugin: lsa" in line for line in stock["executed"])
    assert stock[how] == []


def test_no_flags_installs_nothing_in_children(stock: dict[str, Any]) -> None:
    assert stock["child"]["main"] == "__mp_main__"
    assert stock["child"]["installed"] == []


def test_a_program_that_may_build_an_engine_gets_the_intake_only(stock: dict[str, Any]) -> None:
    assert stock["library"] == INTAKE_TARGETS


# all or nothing


def test_every_hook_target_exists(stock: dict[str, Any]) -> None:
    assert stock["checks"] == dict.fromkeys(sorted(stock["checks"]), "")
    assert sorted(stock["checks"]) == TARGETS


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        (
            "version",
            "SystemExit",
            "sglang-lsa: sglang is version 0.5.18; .* written for SGLang 0.5.17 or 0.5.23",
        ),
        ("signature", "IncompatibleSGLang", r"takes \(self, .*\), not 'no_such_parameter'"),
        ("method", "IncompatibleSGLang", "_gone not found"),
        ("module", "IncompatibleSGLang", "sglang.srt.gone.Class.method not found"),
    ],
)
def test_all_or_nothing(stock: dict[str, Any], case: str, kind: str, words: str) -> None:
    assert stock[case]["kind"] == kind
    assert re.search(words, stock[case]["text"])
    fix = "Install it (pip install sglang==0.5.17), or start without --lsa flags."
    assert stock[case]["text"].endswith(fix)
    assert stock[case]["installed"] == []


def test_a_hook_that_sglang_could_not_apply_is_an_error(stock: dict[str, Any]) -> None:
    assert stock["apply"]["kind"] == "IncompatibleSGLang"
    assert re.search(r"could not wrap sglang\.srt\..*\.config_from_budget", stock["apply"]["text"])


def test_a_hook_that_sglang_would_skip_is_installed_or_an_error(stock: dict[str, Any]) -> None:
    """Another plugin wrapped the target and applied that: SGLang would not wrap it again, and say nothing."""
    seen = stock["other plugin"]
    assert seen["kind"] == "IncompatibleSGLang" or seen["wrapped"] == TARGETS


def test_hooks_of_other_plugins_are_kept(flags: dict[str, Any]) -> None:
    """SGLang itself depends on a package with plugins; which of them runs first is a matter of luck."""
    assert flags["lost"] == []
    assert flags["lost later"] == []


def test_a_hook_on_what_sglang_does_without_is_left_out() -> None:
    """Without the package that it needs SGLang disables the part, and says so; its server starts all the same."""
    (hook,) = [hook for hook in SERVING if hook.target.endswith(".create_responses")]
    assert not hook.needless
    gone = dataclasses.replace(hook, target="sglang.srt.gone.Class.method", needs="no_such_package_of_anybody")
    assert gone.needless and gone.problem() is not None
    assert not dataclasses.replace(gone, needs="").needless
    install_hooks([gone])
    install_hooks([gone])
    assert hook_finding(gone).status == OK
