"""``sglang-lsa record`` without a server: which prompts are made, pools, and how servers share the work."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import pathlib
import shlex
import threading
from typing import Any

import pytest

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.embedded_model import embedded_model_path
from sglang_lsa.indexer.manifest import Entry
from sglang_lsa.texts.corpus import Prompt, Tokens, make_prompts, name_of
from sglang_lsa.training import pool, record
from sglang_lsa.training.pool import LEAST_TOKENS, gpus_of, names_pool, pool_flags


def test_known_prompts_are_not_made() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    families = ("facts", "pairs")
    every = [prompt.name for prompt, _ in make_prompts(tokenizer, "train", (600,), 2, families)]
    assert every == [name_of("train", family, 600, number) for number in range(2) for family in families]
    left = make_prompts(tokenizer, "train", (600,), 2, families, known=lambda name: name != every[2])
    assert [prompt.name for prompt, _ in left] == [every[2]]


def test_texts_without_held_out_ones_are_told_first(tmp_path: pathlib.Path) -> None:
    """Not when everything else is recorded."""
    (tmp_path / "c.txt").write_text("a text")  # by its name it is one to train on
    make_prompts(None, "train", (600,), 1, ("text",), tmp_path)
    with pytest.raises(ValueError, match="too few"):
        make_prompts(None, "held-out", (600,), 1, ("text",), tmp_path)


def test_what_is_named_twice_is_recorded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    asked: list[str] = []

    def entries(servers: Any, prompts: Any, *more: Any) -> Any:
        for prompt, _ in prompts:
            asked.append(prompt.name)
            yield entry(prompt.name)

    monkeypatch.setattr(record, "_servers", lambda count, *more: contextlib.nullcontext([None] * count))
    monkeypatch.setattr(record, "_entries", entries)
    found = record.record(
        tmp_path,
        str(embedded_model_path()),
        splits=("train", "train"),
        lengths=(600, 600),
        each=1,
        families=("facts", "facts"),
        texts=None,
        last=8,
        new_tokens=1,
        layers=1,
        server_args="--lsa-observe-layers 1",
        servers=2,
    )
    assert found == 1 and asked == ["train-facts-600-0"]


def test_a_pool_is_of_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2 keeps 3 heads of 64 numbers, keys and values, in 30 layers."""
    monkeypatch.setattr(pool, "_host_bytes", lambda: 64e9)
    model = str(embedded_model_path())
    flags = pool_flags(model, 32_100, 2, "")
    assert flags[::2] == ["--lsa-device-tokens", "--lsa-host-memory-gb"]
    assert int(flags[1]) == 64_256 and float(flags[3]) == pytest.approx(
        2 * 64_256 * 2 * 30 * 3 * 64 * 4 / 1e9, abs=0.01
    )
    assert pool_flags(model, 600, 2, "--lsa-host-memory-gb 1") == ["--lsa-device-tokens", str(LEAST_TOKENS)]
    least = pool_flags(model, 600, 2, "--lsa-host-memory-gb=0.05")
    assert int(least[1]) * 2 * 30 * 3 * 64 * 4 < 0.05e9 and len(least) == 2
    assert pool_flags(model, 600, 2, """--lsa-config '{"device_tokens": 9984}'""") == []


NAMED = [
    "--lsa-device-tokens 100000",
    "--lsa-device-tokens=100000",
    "--lsa-device-t 9984",
    """--lsa-config '{"device_tokens": 9984}'""",
    "--lsa-config DIR/lsa.json",
    "--config DIR/flags.yaml",
    "--config DIR/object.yaml",
]


@pytest.fixture
def files(tmp_path: pathlib.Path) -> pathlib.Path:
    """Files that name a pool, each in its way, and that name none."""
    (tmp_path / "lsa.json").write_text('{"device_memory_gb": 1}')
    (tmp_path / "mirror.json").write_text('{"host_memory_gb": 0.05, "device_tokens": null}')
    (tmp_path / "flags.yaml").write_text("lsa-device-tokens: 9984\ntrust-remote-code: true\n")
    (tmp_path / "object.yaml").write_text("lsa-config:\n  device_tokens: 9984\ngc-threshold: [7, 5]\n")
    (tmp_path / "ranks.yaml").write_text("tp-size: 4\ntrust-remote-code: false\n")
    return tmp_path


@pytest.mark.parametrize("named", NAMED)
def test_a_pool_that_is_named_has_the_mirror_of_one_server_alone(named: str, files: pathlib.Path) -> None:
    """A smaller one than the pool is refused, and only the server knows how large the pool is."""
    model, named = str(embedded_model_path()), named.replace("DIR", str(files))
    assert pool_flags(model, 600, 2, named) == []
    assert names_pool(named) and not names_pool("--lsa-host-memory-gb 1 --tp-size 2")


@pytest.mark.parametrize("named", NAMED)
def test_servers_share_the_host_whatever_names_their_pool(
    named: str, files: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_host_bytes", lambda: 4e9)
    named = named.replace("DIR", str(files))
    flags = pool_flags(str(embedded_model_path()), 600, 2, named, servers=4)
    assert flags == ["--lsa-host-memory-gb", "1.00"]
    assert pool_flags(str(embedded_model_path()), 600, 2, f"{named} --lsa-host-memory-gb 2", servers=4) == []


def test_a_file_that_names_no_pool_changes_no_pool(files: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_host_bytes", lambda: 4e9)
    model = str(embedded_model_path())
    plain = pool_flags(model, 600, 2, "", servers=4)
    for given in ("""--lsa-config '{"groups": true}'""", f"--config {files / 'ranks.yaml'}"):
        assert not names_pool(given) and pool_flags(model, 600, 2, given, servers=4) == plain
    for given in ("--lsa-host-memory-gb 0.05", f"--lsa-config {files / 'mirror.json'}"):
        assert pool_flags(model, 600, 2, given) == pool_flags(model, 600, 2, "--lsa-host-memory-gb=0.05") != plain


def test_pools_are_read_as_a_server_reads_them(files: pathlib.Path) -> None:
    """Flags before what ``--lsa-config`` holds, and both before SGLang's own file."""
    from sglang.srt.server_args import ServerArgs

    from sglang_lsa.config import add_cli_args, config_from_args

    folder = "sglang.srt" if importlib.util.find_spec("sglang.srt.server_args_config_parser") else "sglang.srt.utils"
    merger = importlib.import_module(f"{folder}.server_args_config_parser").ConfigArgumentMerger
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    add_cli_args(parser)
    for given in (
        f"--config {files / 'flags.yaml'}",
        f"--config {files / 'object.yaml'} --lsa-device-tokens 640",
        f"--lsa-config {files / 'mirror.json'} --config {files / 'flags.yaml'} --tp 2",
        f"--tensor-parallel-size 2 --config {files / 'ranks.yaml'} --lsa-host-memory-gb 0.25",
    ):
        words = merger(parser).merge_config_with_args(shlex.split(f"--model-path x {given}"))
        args = parser.parse_args(words)
        config, named = config_from_args(args), pool._named(given)
        assert len(gpus_of(given)) == args.tp_size
        assert (named[pool.TRUSTED] is not None) == args.trust_remote_code
        assert config is not None
        for flag, value in (
            ("--lsa-device-tokens", config.device_tokens),
            ("--lsa-host-memory-gb", config.host_memory_gb),
        ):
            assert named[flag] == (None if value is None else str(value)), flag


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--lsa-config DIR/none.json", "none.json: cannot be read .*: give an existing JSON file"),
        ("--config DIR/none.yaml", "none.yaml: cannot be read .*: give an existing YAML file"),
        ("--config", "--config : cannot be read"),
        ("--config DIR/list.yaml", "list.yaml: holds a list: write one flag a line"),
    ],
)
def test_files_that_cannot_be_read_are_told(given: str, words: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    for ask in (names_pool, gpus_of, lambda text: pool_flags("model", 600, 2, text)):
        with pytest.raises(ValueError, match=words):
            ask(given.replace("DIR", str(tmp_path)))


def test_gpus_of_a_server() -> None:
    assert list(gpus_of("")) == [0] and list(gpus_of("--tp 4")) == [0, 1, 2, 3]
    assert list(gpus_of("--tensor-parallel-size=2 --base-gpu-id 1 --gpu-id-step 2")) == [1, 3]
    for given in ("--tp-size 0", "--tp-size two", "--tp-size", "--gpu-id-step 0", "--base-gpu-id -1"):
        with pytest.raises(ValueError, match=rf"{given.split()[0]} .*: use a whole number, [01] or more"):
            gpus_of(given)


def test_servers_share_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(embedded_model_path())
    monkeypatch.setattr(pool, "_host_bytes", lambda: 4e9)
    assert pool_flags(model, 600, 2, "--lsa-device-tokens 9984", servers=4) == ["--lsa-host-memory-gb", "1.00"]
    flags = pool_flags(model, 60_000, 2, "", servers=4)
    assert flags[2:] == ["--lsa-host-memory-gb", "1.00"]
    assert 20_000 < int(flags[1]) < 1e9 / (2 * 30 * 3 * 64 * 4) and int(flags[1]) % PAGE_SIZE == 0


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mamba", "num_hidden_layers": 2},
        {"model_type": "own", "auto_map": {"AutoConfig": "configuration.Own"}},
    ],
    ids=["no-heads", "own-code"],
)
def test_the_server_says_what_is_wrong_with_a_model(config: dict[str, Any], tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert pool_flags(str(tmp_path), 600, 2, "") == []


def entry(name: str) -> Entry:
    return Entry(name, "facts", "train", "a text", 600, 5, (1,), 10)


class Server:
    """Stands for a server process."""

    def __init__(self, ready: threading.Event, fails: bool = False):
        self.ready, self.fails, self.asked = ready, fails, list[str]()

    def wait_until_ready(self) -> Server:
        assert self.ready.wait(30)
        if self.fails:
            raise record.ServerFailed("it ended")
        return self


def prompts(made: list[str], count: int) -> Any:
    for number in range(count):
        made.append(f"p{number}")
        yield Prompt(f"p{number}", "facts", "train", "", ""), Tokens([1], 0, ())


def answer(server: Server, output: pathlib.Path, prompt: Prompt, *more: Any) -> Entry:
    server.asked.append(prompt.name)
    return entry(prompt.name)


def test_prompts_are_made_while_servers_start(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(record, "_record_one", answer)
    ready = threading.Event()
    made: list[str] = []

    def all_made() -> Any:
        yield from prompts(made, 40)
        assert not any(server.asked for server in servers)
        ready.set()

    servers: list[Any] = [Server(ready) for _ in range(3)]
    found = list(record._entries(servers, all_made(), tmp_path, 8, 1))
    assert sorted(each.name for each in found) == sorted(made)
    assert sum(len(server.asked) for server in servers) == 40


def test_a_server_that_fails_ends_it(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """And the rest is not asked of the others."""
    monkeypatch.setattr(record, "_record_one", answer)
    ready = threading.Event()
    ready.set()
    servers: list[Any] = [Server(ready, fails=True)]
    with pytest.raises(record.ServerFailed, match="it ended"):
        list(record._entries(servers, prompts([], 1000), tmp_path, 8, 1))


def test_nobody_waits_for_the_others_when_one_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """They may take minutes to start, or to record; they are stopped once the failure is told."""
    monkeypatch.setattr(record, "_record_one", answer)
    at_once, late, told = threading.Event(), threading.Event(), threading.Event()
    at_once.set()

    def ask() -> None:
        with pytest.raises(record.ServerFailed, match="it ended"):
            list(record._entries([Server(late), Server(at_once, fails=True)], prompts([], 8), tmp_path, 8, 1))  # type: ignore[list-item]
        told.set()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        assert told.wait(10)
    finally:
        late.set()
        asking.join()


def test_an_interrupted_one_asks_nothing_more(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    begun, going_on = threading.Semaphore(0), threading.Event()
    asked: list[str] = []

    def slow(server: Server, output: pathlib.Path, prompt: Prompt, *more: Any) -> Entry:
        asked.append(prompt.name)
        begun.release()
        assert going_on.wait(30)
        return entry(prompt.name)

    def interrupted() -> Any:
        yield from prompts([], 20)
        begun.acquire()
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "_record_one", slow)
    ready = threading.Event()
    ready.set()
    ended = threading.Event()

    def ask() -> None:
        with pytest.raises(KeyboardInterrupt):
            list(record._entries([Server(ready)], interrupted(), tmp_path, 8, 1))  # type: ignore[list-item]
        ended.set()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        assert ended.wait(10)
    finally:
        going_on.set()
        asking.join()
    assert asked == ["p0"]


def test_prompts_are_made_no_further_ahead_than_memory_is_meant_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(record, "AHEAD", 5)
    most, made, recorded = [0], list[str](), list[str]()
    busy = threading.Event()
    threading.Timer(0.5, busy.set).start()

    def slowly(server: Server, output: pathlib.Path, prompt: Prompt, *more: Any) -> Entry:
        assert busy.wait(30), "until then all others could be made"
        most[0] = max(most[0], len(made) - len(recorded))
        recorded.append(prompt.name)
        return entry(prompt.name)

    monkeypatch.setattr(record, "_record_one", slowly)
    ready = threading.Event()
    ready.set()
    servers: list[Any] = [Server(ready), Server(ready)]
    assert len(list(record._entries(servers, prompts(made, 60), tmp_path, 8, 1))) == 60
    assert most[0] <= 5 + len(servers) + 1
