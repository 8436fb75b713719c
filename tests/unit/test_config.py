"""Configuration: flags, files, request options, refusals, and how a configuration reaches a child process."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import pathlib
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest

from sglang_lsa.config import (
    AUTO,
    PREFILLS,
    GivenSet,
    LSAConfig,
    RequestOptions,
    add_cli_args,
    arrived_by_pickle,
    config_from_args,
    config_from_argument,
    offered,
)
from sglang_lsa.config.kinds import CONSTANT, FLAG, KEY, REMOVED, flag_of

FIELDS = [field.name for field in dataclasses.fields(LSAConfig)]
KIND = {field.name: field.metadata["kind"] for field in dataclasses.fields(LSAConfig)}
NAMES = {kind: [name for name in FIELDS if KIND[name] == kind] for kind in (FLAG, KEY, CONSTANT)}


def parse(*flags: str) -> LSAConfig | None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_cli_args(parser)
    return config_from_args(parser.parse_args(flags))


def write(folder: pathlib.Path, text: str) -> str:
    file = folder / "lsa.json"
    file.write_text(text)
    return str(file)


# --- flags and files -------------------------------------------------------------------------------------------------


FLAGS: dict[str, tuple[list[str], Any]] = {
    "policy": (["recency"], "recency"),
    "budget": (["0.25"], 0.25),
    "min_pages": (["3"], 3),
    "window": (["32"], 32),
    "dense_steps": (["16"], 16),
    "prompt_lookup": (["0"], 0),
    "widen": (["1.5"], 1.5),
    "prefetch_steps": (["3"], 3),
    "sink_pages": (["2"], 2),
    "recent_pages": (["0"], 0),
    "prompt_pages": (["1"], 1),
    "fallback_budget": (["0.5"], 0.5),
    "min_coverage": (["0.75"], 0.75),
    "target_coverage": (["0.8"], 0.8),
    "max_budget": (["0.4"], 0.4),
    "threshold": (["-0.5"], -0.5),
    "min_context": (["0"], 0),
    "query_tokens": (["7"], 7),
    "observe_layers": (["3,5,8"], (3, 5, 8)),
    "prefill": (["resident"], "resident"),
    "staging_pages": (["16"], 16),
    "indexer": (["/models/indexer"], "/models/indexer"),
    "calibrate": (["always"], "always"),
    "record": (["/data/recordings"], "/data/recordings"),
    "device_tokens": (["4096"], 4096),
    "device_memory_gb": (["1.5"], 1.5),
    "host_memory_gb": (["8"], 8.0),
    "cache_outputs": ([], True),
    "groups": ([], True),
    "group_margin": (["0"], 0.0),
    "disable_view": ([], True),
    "debug": ([], True),
}


def flags_in_help() -> set[str]:
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    text = parser.format_help().split("Lookahead Sparse Attention")[-1]
    return set(re.findall(r"^  (--lsa-[a-z-]+)", text, re.MULTILINE))


def test_every_field_is_described() -> None:
    assert sorted(FLAGS) == sorted(FIELDS)
    assert all(len(field.metadata["help"]) > 20 for field in dataclasses.fields(LSAConfig))


def test_there_are_at_most_16_flags() -> None:
    options = {flag_of(name) for name in NAMES[FLAG]} | {"--lsa-config"}
    assert flags_in_help() == options
    assert len(options) <= 16


@pytest.mark.parametrize("values", [[], ["3"], ["-0.5"]], ids=["alone", "with a value", "with a negative value"])
@pytest.mark.parametrize("name", REMOVED)
def test_a_flag_that_is_gone_says_what_to_do(name: str, values: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([flag_of(name), *values, "--lsa-budget", "0.2"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"error: {flag_of(name)} is gone: {REMOVED[name]}")


@pytest.mark.parametrize("name", [name for name in REMOVED if KIND.get(name) != KEY])
def test_a_key_that_is_gone_says_what_to_do(name: str, tmp_path: pathlib.Path) -> None:
    for source in ({name: 3}, write(tmp_path, json.dumps({name: 3}))):
        with pytest.raises(ValueError, match=re.escape(f": {name} is gone: {REMOVED[name]}")):
            config_from_argument(source)


def test_what_is_gone_is_what_is_no_flag() -> None:
    """And what an advice says of a number is that number."""
    assert (set(NAMES[KEY]) | set(NAMES[CONSTANT])) - {
        "groups",
        "group_margin",
        "widen",
        "target_coverage",
        "max_budget",
    } <= set(REMOVED)
    assert not set(NAMES[FLAG]) & set(REMOVED)
    for name in ("min_pages", "prefetch_steps", "recent_pages", "prompt_pages", "query_tokens", "staging_pages"):
        assert re.search(rf"\b{getattr(LSAConfig, name)}\b", REMOVED[name]), name
    assert LSAConfig.sink_pages == 1 and "the first page" in REMOVED["sink_pages"]


@pytest.mark.parametrize(("tokens", "pages"), [(None, 256), (1 << 20, 256), (32768, 256), (2048, 16), (256, 2)])
def test_staging_is_no_larger_than_half_of_a_small_pool(tokens: int | None, pages: int) -> None:
    assert LSAConfig(device_tokens=tokens).staging_pages == pages


@pytest.mark.parametrize("name", NAMES[FLAG])
def test_flag(name: str) -> None:
    words, value = FLAGS[name]
    config = parse("--lsa-" + name.replace("_", "-"), *words)
    assert config is not None
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)
    follow = ("policy", "staging_pages")  # the indexer, and the size of the device pool
    others = {other: getattr(config, other) for other in FIELDS if other not in (name, *follow)}
    assert others == {other: getattr(LSAConfig(), other) for other in others}


@pytest.mark.parametrize("name", NAMES[FLAG] + NAMES[KEY])
def test_key_of_the_file(name: str, tmp_path: pathlib.Path) -> None:
    _, value = FLAGS[name]
    config = parse("--lsa-config", write(tmp_path, json.dumps({name: value})))
    assert config is not None
    assert getattr(config, name) == value


def test_a_switch_can_be_turned_off_again(tmp_path: pathlib.Path) -> None:
    config = parse("--lsa-config", write(tmp_path, '{"debug": true}'), "--no-lsa-debug")
    assert config is not None
    assert config.debug is False


def test_no_flag_no_configuration() -> None:
    assert parse() is None
    assert config_from_args(argparse.Namespace(model_path="m")) is None


def test_help_tells_the_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    text = " ".join(parser.format_help().split())
    assert "--lsa-budget" in text
    assert "Default: 0.135." in text
    assert "{indexer,retriever,quest,native,recency,random,full}" in text


def test_defaults() -> None:
    config = LSAConfig()
    assert (config.policy, config.budget, config.window, config.query_tokens) == ("quest", 0.135, 64, 32)
    assert (config.sink_pages, config.recent_pages, config.min_context) == (1, 4, 4096)
    assert config.cache_outputs is False
    assert LSAConfig.from_mapping({}) == config


@pytest.mark.parametrize(("window", "steps"), [(64, 16), (17, 16), (16, 4), (8, 2), (3, 0), (1, 0)])
def test_the_default_prefetch_follows_short_windows(window: int, steps: int) -> None:
    config = LSAConfig(window=window)
    assert config.prefetch_steps == steps < window
    assert LSAConfig(**json.loads(config.to_json())) == config
    assert dataclasses.replace(config, budget=0.5).prefetch_steps == steps


def test_pages_may_be_sent_for_up_to_a_window_ahead() -> None:
    assert LSAConfig(window=8, prefetch_steps=7).prefetch_steps == 7
    assert LSAConfig(prefetch_steps=0).prefetch_steps == 0


def test_an_indexer_is_used_when_it_is_given() -> None:
    assert LSAConfig(indexer="folder").policy == "indexer"
    assert LSAConfig(indexer="folder", policy="quest").policy == "quest"


def test_flags_win_over_the_file(tmp_path: pathlib.Path) -> None:
    file = write(tmp_path, '{"budget": 0.5, "window": 16, "debug": true}')
    config = parse("--lsa-config", file, "--lsa-budget", "0.25")
    assert config == LSAConfig(budget=0.25, window=16, debug=True)


def test_a_bad_value_of_the_file_does_not_count_where_a_flag_wins(tmp_path: pathlib.Path) -> None:
    config = parse("--lsa-config", write(tmp_path, '{"budget": 7}'), "--lsa-budget", "0.25")
    assert config == LSAConfig(budget=0.25)


@pytest.mark.parametrize(
    "flags",
    [
        ["--lsa-budget", "much"],
        ["--lsa-window", "1.5"],
        ["--lsa-observe-layers", "1,two"],
        ["--lsa-policy", "best"],
        ["--lsa-unknown", "1"],
    ],
)
def test_the_parser_refuses(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(flags)
    assert flags[0] in capsys.readouterr().err


def test_json_round_trip() -> None:
    config = LSAConfig(policy="random", budget=0.25, observe_layers=(1, 2), device_tokens=4096, debug=True)
    assert LSAConfig(**json.loads(config.to_json())) == config
    assert LSAConfig(**json.loads(LSAConfig().to_json())) == LSAConfig()


def test_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LSAConfig().budget = 0.5  # type: ignore[misc]


# --- refusals --------------------------------------------------------------------------------------------------------


REFUSED: list[tuple[dict[str, Any], str]] = [
    # (values, words: what, the value seen, what to do)
    ({"budget": 0}, r"budget 0\.0 is out of range: use a number in \(0, 1\]"),
    ({"budget": 1.5}, r"budget 1\.5 is out of range: use a number in \(0, 1\]"),
    ({"budget": -0.1}, r"budget -0\.1 is out of range: use a number"),
    ({"budget": float("nan")}, "budget nan is out of range: use a number"),
    ({"budget": "0.5"}, "budget is '0.5': use a number in"),
    ({"budget": True}, "budget is True: use a value of type float"),
    ({"budget": None}, "budget is None: use a value of type float"),
    ({"policy": "best"}, "policy is 'best': use one of indexer, retriever, quest, native, recency, random, full"),
    ({"policy": 3}, "policy is 3: use a value of type str"),
    ({"fallback_budget": 0.1}, "fallback_budget 0.1 is below --lsa-budget 0.135: raise it"),
    ({"fallback_budget": 1.5}, r"fallback_budget 1.5 is out of range: use a number in \(0, 1\]"),
    ({"min_coverage": -0.1}, r"min_coverage -0.1 is out of range: use a share in \[0, 1\]"),
    ({"min_coverage": float("nan")}, r"min_coverage nan is out of range"),
    ({"policy": "indexer"}, "--lsa-policy indexer needs a trained checkpoint: add --lsa-indexer PATH, or use quest"),
    ({"window": 0}, "--lsa-window 0 is too small: use 1 or more"),
    ({"window": 1.5}, r"window is 1\.5: use a value of type int"),
    ({"window": True}, "window is True: use a value of type int"),
    ({"dense_steps": -1}, "dense_steps -1 is too small: use 0 or more"),
    ({"prompt_lookup": 65}, "prompt_lookup 65 is too large: use 64 or less"),
    ({"widen": 5.0}, "widen 5.0 is too large: use 4 or less"),
    ({"groups": "on"}, "groups is 'on': use true, false or auto"),
    ({"groups": 1}, "groups is 1: use true, false or auto"),
    ({"groups": True, "group_margin": 1.0}, "group_margin 1.0 is too large: use a share below 1"),
    ({"groups": True, "group_margin": -0.1}, "group_margin -0.1 is too small: use 0 or more"),
    ({"group_margin": 0.1}, "group_margin 0.1 does nothing without groups: set groups, or leave it out"),
    ({"widen": 0.5}, "widen 0.5 is too small: use 1 or more"),
    ({"prompt_lookup": -1}, "prompt_lookup -1 is too small: use 0 or more"),
    ({"min_context": -1}, "--lsa-min-context -1 is too small: use 0 or more"),
    ({"prefill": "streamed"}, "prefill is 'streamed': use one of exact, resident"),
    ({"device_tokens": 255}, "--lsa-device-tokens 255 is too small: use 256 or more"),
    ({"device_memory_gb": -1}, r"--lsa-device-memory-gb -1\.0 is too small: use 0"),
    ({"host_memory_gb": -1}, r"--lsa-host-memory-gb -1\.0 is too small: use 0"),
    (
        {"device_tokens": 4096, "device_memory_gb": 1},
        r"--lsa-device-tokens 4096 and --lsa-device-memory-gb 1\.0 both size the device pool: give one of them",
    ),
    ({"observe_layers": "1,2"}, r"observe_layers is '1,2': use a value of type tuple\[int, \.\.\.\]"),
    ({"observe_layers": [1.5]}, r"observe_layers is \[1\.5\]: use a value of type tuple"),
    ({"debug": 1}, "debug is 1: use a value of type bool"),
    ({"indexer": ["a"]}, r"indexer is \['a'\]: use a value of type str"),
    ({"budgets": 0.5}, "unknown key 'budgets': use one of policy, budget, window"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED, ids=[str(values) for values, _ in REFUSED])
def test_impossible_values_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LSAConfig.from_mapping(values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prefetch_steps": -1}, "prefetch_steps -1 is too small: use 0 or more"),
        ({"prefetch_steps": 64}, "prefetch_steps 64 is not less than --lsa-window 64: lower it"),
        ({"prefetch_steps": 8, "window": 8}, "prefetch_steps 8 is not less than --lsa-window 8: lower it"),
        ({"min_pages": 0}, "min_pages 0 is too small: use 1 or more"),
        ({"sink_pages": -1}, "sink_pages -1 is too small: use 0 or more"),
        ({"recent_pages": -1}, "recent_pages -1 is too small: use 0 or more"),
        ({"query_tokens": 0}, "query_tokens 0 is too small: use 1 or more"),
        ({"staging_pages": 0}, "staging_pages 0 is too small: use 1 or more"),
    ],
    ids=str,
)
def test_impossible_constants_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        LSAConfig(**values)


@pytest.mark.parametrize("name", ["threshold", "device_memory_gb", "host_memory_gb"])
def test_nan_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name.replace('_', '.')}.* nan"):
        LSAConfig.from_mapping({name: float("nan")})


@pytest.mark.parametrize("name", ["device_memory_gb", "host_memory_gb"])
def test_infinite_memory_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name.replace('_', '.')}.* inf"):
        LSAConfig.from_mapping({name: float("inf")})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, r"cannot be read \(No such file or directory\): give an existing JSON file"),
        ("{budget: 1}", "not JSON .*: write an object like"),
        ("[1]", "holds a list: write a JSON object"),
        ('{"lsa_budget": 0.5}', "unknown key 'lsa_budget': use one of"),
        ('{"budget": "half"}', r"budget is 'half': use a number in \(0, 1\], or auto"),
    ],
)
def test_bad_files_are_refused(text: str | None, words: str, tmp_path: pathlib.Path) -> None:
    file = str(tmp_path / "missing.json") if text is None else write(tmp_path, text)
    with pytest.raises(ValueError, match=words) as caught:
        parse("--lsa-config", file)
    assert file in str(caught.value)


def test_groups_may_be_decided_by_the_backend() -> None:
    assert LSAConfig().groups is False
    config = parse("--lsa-config", '{"groups": "auto", "group_margin": 0.1}')
    assert config == LSAConfig(groups=AUTO, group_margin=0.1)
    assert LSAConfig.from_mapping(json.loads(config.to_json())) == config == pickle.loads(pickle.dumps(config))
    for wrong in ("yes", 1, 0.5, None, ["auto"]):
        with pytest.raises(ValueError, match=r"groups is .*: use true, false or auto"):
            LSAConfig.from_mapping({"groups": wrong})


def test_an_object_in_place_of_a_file() -> None:
    config = parse("--lsa-config", ' {"widen": 1.5, "groups": true}', "--lsa-budget", "0.2")
    assert config == LSAConfig(widen=1.5, groups=True, budget=0.2)
    with pytest.raises(ValueError, match="not JSON"):
        parse("--lsa-config", '{"widen": 1')


# --- sgl.Engine(lsa_config=...) --------------------------------------------------------------------------------------


def test_engine_argument(tmp_path: pathlib.Path) -> None:
    config = LSAConfig(budget=0.25)
    file = write(tmp_path, '{"budget": 0.25}')
    assert config_from_argument(None) is None
    for given in (config, {"budget": 0.25}, file, pathlib.Path(file)):
        assert config_from_argument(given) == config


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (0.25, r"lsa_config is 0\.25: use an LSAConfig, a mapping or the path of a JSON file"),
        (True, "lsa_config is True: use an LSAConfig"),
        ({"budgets": 1}, "lsa_config: unknown key 'budgets'"),
        ("/does/not/exist.json", "/does/not/exist.json: cannot be read"),
    ],
)
def test_bad_engine_arguments_are_refused(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_from_argument(given)


# --- per request -----------------------------------------------------------------------------------------------------

SERVER = LSAConfig(budget=0.25)


@pytest.mark.parametrize(
    ("custom_params", "expected"),
    [
        (None, RequestOptions("quest", 0.25)),
        ({}, RequestOptions("quest", 0.25)),
        ({"other": 1}, RequestOptions("quest", 0.25)),
        ({"lsa": None}, RequestOptions("quest", 0.25)),
        ({"lsa": {}}, RequestOptions("quest", 0.25)),
        ({"lsa": {"enabled": False}}, RequestOptions("quest", 0.25, enabled=False)),
        ({"lsa": {"enabled": True}}, RequestOptions("quest", 0.25)),
        ({"lsa": {"budget": 0.5}}, RequestOptions("quest", 0.5)),
        ({"lsa": {"budget": 1}}, RequestOptions("quest", 1.0)),
        ({"lsa": {"policy": "random"}}, RequestOptions("random", 0.25)),
        ({"lsa": {"policy": "full"}, "__req__": object()}, RequestOptions("full", 0.25)),
        (["not", "a", "mapping"], RequestOptions("quest", 0.25)),
    ],
)
def test_request_options(custom_params: Any, expected: RequestOptions) -> None:
    options = RequestOptions.parse(custom_params, SERVER)
    assert options == expected
    assert isinstance(options.budget, float)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (True, r"custom_params\.lsa is True: use an object with policy, budget, enabled, prefill, sets"),
        ("off", r"custom_params\.lsa is 'off': use an object"),
        ([], r"custom_params\.lsa is \[\]: use an object"),
        ({"budgets": 1}, r"custom_params\.lsa has unknown key 'budgets': use policy, budget, enabled, prefill, sets"),
        ({"window": 8}, "unknown key 'window'"),
        ({"enabled": 1}, r"custom_params\.lsa\.enabled is 1: use true or false"),
        ({"enabled": None}, r"custom_params\.lsa\.enabled is None: use true or false"),
        ({"budget": "0.5"}, r"custom_params\.lsa\.budget is '0\.5': use a number in \(0, 1\], or auto"),
        ({"budget": True}, r"custom_params\.lsa\.budget is True: use a number"),
        ({"budget": None}, r"custom_params\.lsa\.budget is None: use a number"),
        ({"budget": 0}, r"custom_params\.lsa\.budget 0 is out of range: use a number in \(0, 1\]"),
        ({"budget": 1.01}, r"custom_params\.lsa\.budget 1\.01 is out of range"),
        ({"budget": float("nan")}, r"custom_params\.lsa\.budget nan is out of range"),
        ({"policy": "best"}, r"custom_params\.lsa\.policy is 'best': use one of quest, recency, random, full"),
        ({"policy": None}, r"custom_params\.lsa\.policy is None: use one of"),
        ({"policy": ["quest"]}, r"custom_params\.lsa\.policy is \['quest'\]: use one of"),
        ({"policy": "indexer"}, r"custom_params\.lsa\.policy is 'indexer': use one of quest, recency, random, full"),
        ({1: 2}, "unknown key 1"),
    ],
)
def test_bad_request_options_are_refused(asked: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RequestOptions.parse({"lsa": asked}, SERVER)


def test_a_request_may_ask_for_the_indexer_where_there_is_one() -> None:
    config = LSAConfig(indexer="folder", policy="quest")
    for policy in offered("folder"):
        assert RequestOptions.parse({"lsa": {"policy": policy}}, config).policy == policy


@pytest.mark.parametrize(
    ("options", "dense"),
    [
        (RequestOptions("quest", 0.25), False),
        (RequestOptions("quest", 0.25, enabled=False), True),
        (RequestOptions("full", 0.25), True),
        (RequestOptions("quest", 1.0), True),
        (RequestOptions("quest", 0.25, prefill="resident"), False),
        (RequestOptions("quest", 1.0, prefill="resident"), True),
        (RequestOptions("quest", 1.0, sets=(GivenSet(65, 1, (0,)),)), False),
    ],
)
def test_dense(options: RequestOptions, dense: bool) -> None:
    assert options.dense is dense


@pytest.mark.parametrize("server", PREFILLS)
@pytest.mark.parametrize("asked", [None, *PREFILLS])
def test_how_a_prompt_reads_its_prefix(asked: str | None, server: str) -> None:
    """What the request asks for, or else the server's default."""
    config = LSAConfig(prefill=server)
    lsa = {"budget": 0.5} | ({"prefill": asked} if asked else {})
    assert RequestOptions.parse({"lsa": lsa}, config).prefill == (asked or server)
    assert RequestOptions.parse(None, config).prefill == server
    assert RequestOptions.parse({}, config).prefill == server


@pytest.mark.parametrize("asked", ["streamed", "Exact", "", None, True, ["exact"]], ids=repr)
def test_other_ways_of_prefill_are_refused(asked: Any) -> None:
    words = rf"custom_params\.lsa\.prefill is {re.escape(repr(asked))}: use one of exact, resident"
    with pytest.raises(ValueError, match=words):
        RequestOptions.parse({"lsa": {"prefill": asked}}, SERVER)


# --- sets that a request names itself --------------------------------------------------------------------------------


SETS: list[tuple[str, tuple[GivenSet, ...]]] = [
    ("", ()),
    (";", ()),
    ("65:1:0", (GivenSet(65, 1, (0,)),)),
    ("1:0:", (GivenSet(1, 0, ()),)),
    ("100:1:", (GivenSet(100, 1, ()),)),
    ("641:10:0,3,9", (GivenSet(641, 10, (0, 3, 9)),)),
    ("641:10:0,3,9;705:11:0,10", (GivenSet(641, 10, (0, 3, 9)), GivenSet(705, 11, (0, 10)))),
    ("641:10:3;700:0:;900:4:1,2;", (GivenSet(641, 10, (3,)), GivenSet(700, 0, ()), GivenSet(900, 4, (1, 2)))),
]


@pytest.mark.parametrize(("text", "sets"), SETS, ids=[repr(text) for text, _ in SETS])
def test_sets(text: str, sets: tuple[GivenSet, ...]) -> None:
    options = RequestOptions.parse({"lsa": {"sets": text}}, SERVER)
    assert options == RequestOptions("quest", 0.25, sets=sets)
    assert ";".join(map(str, sets)) == text.strip(";")
    assert options.dense is False


def test_sets_round_trip() -> None:
    """Of what the status of a finished request shows, through the text that another request is sent with."""
    sets = tuple(GivenSet(640 + 64 * number, number, tuple(range(0, number, 2))) for number in range(1, 12))
    text = ";".join(map(str, sets))
    assert RequestOptions.parse({"lsa": {"sets": text}}, SERVER).sets == sets


FORM = r"custom_params\.lsa\.sets is {}: write tokens:tail_start:p,p,p with ; between sets"
BAD_SETS: list[tuple[Any, str]] = [
    # (what is asked for, words after those of the form)
    (None, "$"),
    (7, "$"),
    ([[65, 1, [0]]], "$"),
    ({"65": [0]}, "$"),
    ("all", "$"),
    ("65:1", "$"),
    ("65:1:0:2", "$"),
    ("many:1:0", "$"),
    ("65:one:0", "$"),
    ("65:1:zero", "$"),
    ("65.0:1:0", "$"),
    ("65:1:0;;66:1:0;x", "$"),
    ("65:1:0 66:1:0", "$"),
    ("321:5:2,1", "; positions ascend and lie before tail_start, and that before tokens$"),
    ("321:5:1,1", "; positions ascend and lie before tail_start"),
    ("321:5:-1,1", "; positions ascend and lie before tail_start"),
    ("321:5:5", "; positions ascend and lie before tail_start"),
    ("321:5:0,9", "; positions ascend and lie before tail_start"),
    ("321:-1:", "; positions ascend and lie before tail_start"),
    ("320:5:0", "; positions ascend and lie before tail_start, and that before tokens"),
    ("100:2:0", "; positions ascend and lie before tail_start, and that before tokens"),
    ("0:0:", "; positions ascend and lie before tail_start, and that before tokens"),
    ("-64:-2:", "; positions ascend and lie before tail_start"),
    ("321:5:0;321:5:1", "; each set begins at more tokens than the one before$"),
    ("321:5:0;65:1:0", "; each set begins at more tokens than the one before$"),
]


@pytest.mark.parametrize(("asked", "words"), BAD_SETS, ids=[repr(asked) for asked, _ in BAD_SETS])
def test_bad_sets_are_refused(asked: Any, words: str) -> None:
    with pytest.raises(ValueError, match=FORM.format(re.escape(repr(asked))) + words):
        RequestOptions.parse({"lsa": {"sets": asked}}, SERVER)


def test_a_long_bad_set_is_shown_by_its_beginning() -> None:
    with pytest.raises(ValueError, match=r"^.{1,160}$"):
        RequestOptions.parse({"lsa": {"sets": "65:1:" + "0," * 10_000 + "x"}}, SERVER)


@pytest.mark.parametrize("other", [{"enabled": False}, {"policy": "full"}], ids=["disabled", "full"])
def test_sets_without_pruning_are_refused(other: dict[str, Any]) -> None:
    words = r"custom_params\.lsa names sets and switches pruning off: leave one of the two out"
    with pytest.raises(ValueError, match=words):
        RequestOptions.parse({"lsa": {"sets": "65:1:0", **other}}, SERVER)
    assert RequestOptions.parse({"lsa": {"sets": "", **other}}, SERVER).dense


def test_sets_win_over_a_budget_of_everything() -> None:
    options = RequestOptions.parse({"lsa": {"sets": "65:1:0", "budget": 1.0}}, SERVER)
    assert (options.budget, options.dense) == (1.0, False)


# --- from process to process -----------------------------------------------------------------------------------------


def test_a_pickled_configuration_announces_itself(tmp_path: pathlib.Path) -> None:
    """A fresh process that unpickles server arguments knows, before it loads plugins, that LSA is on."""
    config = LSAConfig(policy="random", budget=0.25, observe_layers=(1, 2))
    file = tmp_path / "arguments.pickle"
    file.write_bytes(pickle.dumps({"model_path": "m", "lsa_config": config}))
    script = f"""
import pickle
arguments = pickle.load(open({str(file)!r}, "rb"))
from sglang_lsa.config import arrived_by_pickle
assert arrived_by_pickle == [arguments["lsa_config"]]
print(arrived_by_pickle[0].to_json())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert LSAConfig(**json.loads(run.stdout)) == config


def test_building_a_configuration_announces_nothing() -> None:
    before = len(arrived_by_pickle)
    dataclasses.replace(LSAConfig(), budget=0.5)
    LSAConfig.from_mapping({})
    assert len(arrived_by_pickle) == before


def test_a_copy_is_equal() -> None:
    config = LSAConfig(observe_layers=(1, 2))
    assert copy.deepcopy(config) == config
    arrived_by_pickle.clear()


# --- dense steps and prompt lookup -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense_steps", "prompt_lookup"])
def test_steps_and_pages_of_a_request(name: str) -> None:
    config = LSAConfig.from_mapping({name: 8})
    for asked, value in ((None, 8), ({"lsa": {"budget": 0.1}}, 8), ({"lsa": {name: 0}}, 0)):
        assert getattr(RequestOptions.parse(asked, config), name) == value


@pytest.mark.parametrize("name", ["dense_steps", "prompt_lookup"])
@pytest.mark.parametrize("value", [-1, True, "8", 1.5, None])
def test_impossible_steps_and_pages(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name} is .*: use a number of (steps|tokens), 0 or more"):
        RequestOptions.parse({"lsa": {name: value}}, LSAConfig())


def test_more_tokens_than_are_looked_up() -> None:
    assert RequestOptions.parse({"lsa": {"prompt_lookup": 64}}, LSAConfig()).prompt_lookup == 64
    with pytest.raises(ValueError, match=r"prompt_lookup is 65: use a number of tokens, 64 or less"):
        RequestOptions.parse({"lsa": {"prompt_lookup": 65}}, LSAConfig())


def test_how_much_wider_a_requests_sets_may_be() -> None:
    assert RequestOptions.parse(None, LSAConfig(widen=3.0)).widen == 3.0
    assert RequestOptions.parse({"lsa": {}}, LSAConfig(widen=3.0)).widen == 3.0
    assert RequestOptions.parse({"lsa": {"widen": 1}}, LSAConfig(widen=3.0)).widen == 1.0
    for value in (0, 4.5, True, "2", None, float("nan")):
        with pytest.raises(ValueError, match=r"custom_params.lsa.widen is .*: use a number from 1 to 4"):
            RequestOptions.parse({"lsa": {"widen": value}}, LSAConfig())


# --- watched pages ---------------------------------------------------------------------------------------------------


def test_pages_to_watch() -> None:
    for pages in ([3, 0], "3,0"):
        assert RequestOptions.parse({"lsa": {"watch": pages}}, LSAConfig()).watch == (3, 0)
    assert RequestOptions.parse({"lsa": {}}, LSAConfig()).watch == ()


@pytest.mark.parametrize("pages", [None, 3, "3;4", "-1", [-1], [True], [1.0], [1 << 31], list(range(257))])
def test_impossible_pages_to_watch(pages: object) -> None:
    with pytest.raises(ValueError, match=r"watch is .*: use a list of at most 256 page numbers"):
        RequestOptions.parse({"lsa": {"watch": pages}}, LSAConfig())


# --- recording -------------------------------------------------------------------------------------------------------


def test_recorded_requests_read_everything() -> None:
    options = RequestOptions.parse({"lsa": {"record": 128}}, LSAConfig(record="folder"))
    assert (options.record, options.dense) == (128, True)
    assert RequestOptions.parse({"lsa": {"record": 0}}, SERVER).record == 0


@pytest.mark.parametrize(
    ("asked", "config", "words"),
    [
        ({"record": -1}, LSAConfig(record="folder"), "record is -1: use a number of tokens"),
        ({"record": True}, LSAConfig(record="folder"), "record is True: use a number of tokens"),
        ({"record": "all"}, LSAConfig(record="folder"), "record is 'all': use a number of tokens"),
        ({"record": 8}, SERVER, "was not started with --lsa-record"),
        ({"record": 8, "sets": "65:1:0"}, LSAConfig(record="folder"), "recordings are of full attention"),
    ],
)
def test_bad_recording_options_are_refused(asked: dict[str, Any], config: LSAConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RequestOptions.parse({"lsa": asked}, config)


# --- a budget of auto -------------------------------------------------------------------------------------------------


def test_auto_is_a_budget_of_a_server_with_an_indexer() -> None:
    config = parse("--lsa-budget", "auto", "--lsa-indexer", "x", "--lsa-config", '{"max_budget": 0.3}')
    assert config == LSAConfig(budget=AUTO, indexer="x", max_budget=0.3)
    assert config.auto and config.largest_budget == 0.3
    assert LSAConfig.from_mapping(json.loads(config.to_json())) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert (LSAConfig().auto, LSAConfig().largest_budget) == (False, LSAConfig.budget)
    assert LSAConfig(budget=AUTO, calibrate="cached").auto  # calibration may find an indexer


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {},
            r"--lsa-budget auto does not go with the policy quest.*use the policy indexer.*or a budget",
        ),
        ({"policy": "recency", "indexer": "x"}, "auto does not go with the policy recency"),
        ({"policy": "retriever", "indexer": "x"}, "auto does not go with the policy retriever"),
        (
            {"indexer": "x", "fallback_budget": 0.5},
            "fallback_budget 0.5 does not go with --lsa-budget auto",
        ),
        ({"indexer": "x", "target_coverage": 0.0}, r"target_coverage 0.0 is out of range: use a number in \(0, 1\]"),
        ({"indexer": "x", "max_budget": 1.5}, r"max_budget 1.5 is out of range: use a number in \(0, 1\]"),
    ],
)
def test_auto_is_refused_where_it_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LSAConfig(budget=AUTO, **options)
    with pytest.raises(ValueError, match=r"budget is 'much': use a number in \(0, 1\], or auto"):
        LSAConfig(budget="much")


def test_a_request_may_ask_for_auto() -> None:
    server = LSAConfig(indexer="x", budget=0.2)
    options = RequestOptions.parse({"lsa": {"budget": "auto", "target_coverage": 0.9}}, server)
    assert (options.target, options.largest_budget, options.dense) == (0.9, LSAConfig.max_budget, False)
    assert RequestOptions.parse({"lsa": {"budget": 0.3}}, LSAConfig(indexer="x", budget=AUTO)).target is None
    inherited = RequestOptions.parse(None, LSAConfig(indexer="x", budget=AUTO, max_budget=0.4))
    assert (inherited.target, inherited.largest_budget) == (LSAConfig.target_coverage, 0.4)
    assert RequestOptions.parse({"lsa": {"policy": "full"}}, LSAConfig(indexer="x", budget=AUTO)).dense


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"budget": "auto"}, "custom_params.lsa.budget auto does not go with the policy quest"),
        ({"max_budget": 0}, r"custom_params\.lsa\.max_budget 0 is out of range"),
        ({"target_coverage": "all"}, r"custom_params\.lsa\.target_coverage is 'all': use a number in \(0, 1\]"),
    ],
)
def test_bad_sizes_of_a_request_are_refused(asked: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RequestOptions.parse({"lsa": asked}, SERVER)
    with pytest.raises(ValueError, match="auto does not go with the policy recency"):
        RequestOptions.parse({"lsa": {"budget": "auto", "policy": "recency"}}, LSAConfig(indexer="x"))
