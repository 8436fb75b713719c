"""What is wrong with a command line is said before anything is imported or loaded."""

from __future__ import annotations

import pathlib
import socket
import subprocess
import sys

import pytest

from sglang_lsa.config.command_line import check_command_line


def test_what_is_right_passes(tmp_path: pathlib.Path) -> None:
    check_command_line(["--model-path", str(tmp_path), "--lsa-budget", "0.2", "--lsa-debug", "--port", "1"])
    check_command_line(["--model", "some/name", "--lsa-bud=0.2", "--mem-fraction-static", "0.8", "--port", "1"])
    check_command_line(["--lsa-nonsense", "--help"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--lsa-budgt", "0.2"], "there is no --lsa-budgt: did you mean --lsa-budget?"),
        (["--lsa-groups"], "it is a key, --lsa-config '{\"groups\": VALUE}'"),
        (["--lsa-group-margins=0.1"], "did you mean the key group_margin, --lsa-config"),
        (["--lsa-xyzzy"], "use one of --lsa-budget, "),
        (["--lsa-policy", "nonsense"], "argument --lsa-policy: invalid choice: 'nonsense'"),
        (["--lsa-budget", "much"], "'much' is no budget: use a number in (0, 1], or auto"),
    ],
)
def test_flags_that_do_not_exist(given: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check_command_line([*given, "--port", "1"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sglang-lsa: error: ") and words in line


def test_values_that_are_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"budget 2.0 is out of range: use a number in \(0, 1\]"):
        check_command_line(["--lsa-budget", "2", "--port", "1"])
    with pytest.raises(ValueError, match=r"--lsa-config /nowhere\.json: cannot be read"):
        check_command_line(["--lsa-config", "/nowhere.json", "--port", "1"])


def test_a_folder_that_is_not_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"--model-path .*/none: there is no such folder: give one with a config.json"):
        check_command_line(["--model-path", str(tmp_path / "none"), "--port", "1"])


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_somebody_listens_on(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: a server listens there already, on {host}: end it, or"):
            check_command_line(["--host", host, f"--port={port}"])
        check_command_line(["--host", host, f"--port={port}", "--node-rank", "1"])
    check_command_line(["--host", host, f"--port={port}"])


def test_what_a_file_or_an_abbreviation_may_say_is_left_to_sglang() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = f"--port={server.getsockname()[1]}"
        check_command_line(["--config", "server.yaml", port])
        check_command_line(["--lsa-policy", "indexer", "--lsa-indexe", "some", port])
    with pytest.raises(ValueError, match="indexer"):
        check_command_line(["--lsa-policy", "indexer", "--port", "1"])


def test_a_port_that_is_only_kept_is_free() -> None:
    """A socket that is bound and does not listen keeps a port for the server that is about to start."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        check_command_line(["--port", str(held.getsockname()[1])])


def test_the_launcher_says_so_before_it_imports_sglang() -> None:
    program = (
        "import runpy, sys\n"
        "sys.argv[1:] = ['--lsa-budgt', '1']\n"
        "try:\n"
        "    runpy.run_module('sglang_lsa.launch_server', run_name='__main__')\n"
        "finally:\n"
        "    print([name for name in ('sglang', 'torch') if name in sys.modules])\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (2, "[]\n")
    assert "did you mean --lsa-budget?" in ran.stderr
