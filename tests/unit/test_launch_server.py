"""The launcher switches LSA on and fills in a model, without overruling anybody."""

from __future__ import annotations

import importlib.metadata
import pathlib
import subprocess
import sys
from contextlib import nullcontext

import pytest
from transformers import AutoConfig

from sglang_lsa import launch_server
from sglang_lsa.config.command_line import read_command_line
from sglang_lsa.embedded_model import INDEXER_NAME, MODEL_NAME, embedded_model_path
from sglang_lsa.indexer.checkpoint import read_checkpoint_config
from sglang_lsa.launch_server import check_choice, with_defaults
from sglang_lsa.patches.models import shape_of


def test_nothing_given_serves_the_embedded_model() -> None:
    assert with_defaults([]) == [
        *("--model-path", str(embedded_model_path())),
        *("--served-model-name", MODEL_NAME),
        *("--lsa-indexer", "smollm2-135m-instruct"),
        *("--lsa-budget", "0.135"),
    ]


def test_the_embedded_model_has_its_indexer() -> None:
    """It is the one of this model, and is taken however much of the rest is given."""
    folder = embedded_model_path()
    read_checkpoint_config(INDEXER_NAME).require_model(shape_of(AutoConfig.from_pretrained(folder)), "it")
    given = ["--lsa-device-tokens", "6400", "--port", "1"]
    assert with_defaults(given)[4:] == ["--lsa-indexer", INDEXER_NAME, *given]


@pytest.mark.parametrize(
    "given",
    [
        *("--lsa-policy quest", "--lsa-pol=quest", "--lsa-indexer mine", "--lsa-calibrate cached"),
        *('--lsa-config {"policy":"quest"}', '--lsa-config={"calibrate":"always"}', "--lsa-conf c.json"),
        *("--lsa-record r", "--lsa-observe-layers 3,9"),
        *("--json-model-override-args {}", "--json-model-override {}", "--model-path m", "--model-pa m"),
    ],
)
def test_an_indexer_is_not_added_to_another_choice(given: str) -> None:
    assert INDEXER_NAME not in with_defaults(given.split())


@pytest.mark.parametrize("given", ['--lsa-config={"floor_tokens": 0}', "--lsa-config=c.json", "--lsa-config"])
def test_a_configuration_that_says_nothing_of_it_leaves_the_indexer(given: str, tmp_path: pathlib.Path) -> None:
    """Nor does one that cannot be read, or is not there; it is refused later."""
    (tmp_path / "c.json").write_text('{"widen": 1, "budget": 0.2}')
    named = given.replace("c.json", str(tmp_path / "c.json"))
    assert INDEXER_NAME in with_defaults([named])
    assert INDEXER_NAME in with_defaults(["--lsa-config", named.partition("=")[2] or "/no/such/file"])
    (tmp_path / "c.json").write_text('{"policy": "recency"}')
    assert (INDEXER_NAME in with_defaults([named])) == ("c.json" not in given)


def test_the_last_configuration_counts() -> None:
    chooses, leaves = '--lsa-config={"policy": "quest"}', '--lsa-config={"widen": 1}'
    assert INDEXER_NAME in with_defaults([chooses, leaves])
    assert INDEXER_NAME not in with_defaults([leaves, chooses])


def test_children_import_neither_sglang_nor_torch_with_it() -> None:
    """They import it as ``__mp_main__`` before they answer, for which uvicorn gives HTTP workers five seconds."""
    code = (
        "import runpy, sys\n"
        "runpy.run_module('sglang_lsa.launch_server', run_name='__mp_main__', alter_sys=True)\n"
        "print(*{'sglang', 'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_name_that_was_given_comes_last_and_wins() -> None:
    assert with_defaults(["--served-model-name", "mine"])[-2:] == ["--served-model-name", "mine"]


@pytest.mark.parametrize(
    "given", [["--model-path", "m"], ["--model-path=m"], ["--model", "m"], ["--model-p", "m"]], ids=" ".join
)
def test_a_model_that_was_given_is_kept(given: list[str]) -> None:
    assert with_defaults(given) == ["--lsa-budget", "0.135", *given]


def test_lsa_flags_that_were_given_are_enough() -> None:
    assert with_defaults(["--model", "m", "--lsa-policy", "recency"]) == ["--model", "m", "--lsa-policy", "recency"]


CPU, GPU = ["--device", "cpu"], ["--device", "cuda"]
AUTO = ["--lsa-budget", "auto"]
KNOWS, KNOWS_NOT = ["--lsa-indexer", "smollm2-135m-instruct"], ["--lsa-indexer", "qwen2.5-coder-0.5b-instruct"]
NO_POLICY = r"--lsa-budget auto does not go with the policy quest, .*: use the policy indexer \(--lsa-indexer, or"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        pytest.param([*AUTO, *CPU], NO_POLICY, id="a CPU"),
        pytest.param(["--lsa-config", '{"budget": "auto"}', *CPU], NO_POLICY, id="in an object"),
        pytest.param(AUTO, NO_POLICY, id="nothing said, no GPU here"),
        pytest.param([*AUTO, *GPU, "--tp-size", "2"], NO_POLICY, id="two GPUs"),
        pytest.param([*AUTO, *GPU, "--tensor-parallel-size=2"], NO_POLICY, id="two GPUs, by another name"),
        pytest.param([*AUTO, *GPU, "--kv-cache-dtype", "fp8_e4m3"], NO_POLICY, id="FP8"),
        pytest.param(
            [*AUTO, *KNOWS_NOT], "budget auto needs an indexer that knows", id="an indexer that does not know"
        ),
        pytest.param(["--lsa-indexer", "/nowhere"], "--lsa-indexer /nowhere: has no config.json", id="no indexer"),
        pytest.param([*AUTO, *KNOWS, *CPU], None, id="an indexer that knows"),
        pytest.param([*AUTO, "--lsa-calibrate", "cached", *CPU], None, id="calibration that was asked for"),
        pytest.param([*AUTO, *GPU], None, id="a GPU"),
        pytest.param([*AUTO, "--lsa-policy", "full", *CPU], None, id="all pages"),
        pytest.param(["--lsa-budget", "0.2", *CPU], None, id="a number"),
        pytest.param(CPU, None, id="nothing of LSA"),
    ],
)
def test_what_chooses_pages_is_refused_early(
    given: list[str], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_server, "_cuda", lambda: False)
    monkeypatch.setattr(launch_server.importlib.metadata, "version", lambda name: "0.5.17")
    known = read_command_line(["--model-path", "m", *given])
    with nullcontext() if words is None else pytest.raises(ValueError, match=words):
        check_choice(known)


def test_sglang_that_is_no_package_is_left_to_its_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(launch_server.importlib.metadata, "version", missing)
    check_choice(read_command_line(["--model-path", "m", *AUTO, *GPU]))
    with pytest.raises(ValueError, match=NO_POLICY):
        check_choice(read_command_line(["--model-path", "m", *AUTO, *CPU]))


def test_an_indexer_that_cannot_be_looked_for_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_server.sys, "argv", ["launch_server"])
    with pytest.raises(SystemExit, match=r"^sglang-lsa: .*File name too long"):
        launch_server.main(["--model-path", "m", "--lsa-indexer", "i" * 5000, "--port", "1"])


def test_auto_is_refused_before_sglang_is_imported() -> None:
    program = (
        "import runpy, sys\n"
        "sys.argv[1:] = ['--model-path', 'some/name', '--device', 'cpu', '--lsa-budget', 'auto', '--port', '1']\n"
        "try:\n"
        "    runpy.run_module('sglang_lsa.launch_server', run_name='__main__')\n"
        "finally:\n"
        "    print([name for name in ('sglang', 'torch') if name in sys.modules])\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (1, "[]\n")
    assert ran.stderr.startswith("sglang-lsa: --lsa-budget auto does not go with")


def test_the_embedded_model_has_an_indexer_that_knows() -> None:
    check_choice(read_command_line(with_defaults([*AUTO, *CPU])))
