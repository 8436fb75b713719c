"""The configuration: flags, files, refusals, and its way from process to process."""

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
from config_parts import parse

from sglang_lsa.config import (
    AUTO,
    LSAConfig,
    add_cli_args,
    arrived_by_pickle,
    config_from_args,
    config_from_argument,
)
from sglang_lsa.config.kinds import CONSTANT, FLAG, KEY, REMOVED, flag_of

FIELDS = [field.name for field in dataclasses.fields(LSAConfig)]
KIND = {field.name: field.metadata["kind"] for field in dataclasses.fields(LSAConfig)}
NAMES = {kind: [name for name in FIELDS if KIND[name] == kind] for kind in (FLAG, KEY, CONSTANT)}


def write(folder: pathlib.Path, text: str) -> str:
    file = folder / "lsa.json"
    file.write_text(text)
    return str(file)


# --- flags and files -------------------------------------------------------------------------------------------------

FLAGS: dict[str, tuple[list[str], Any]] = {
    "policy": (["recency"], "recency"),
    "budget": (["0.25"], 0.25),
    "min_pages": (["3"], 3),
    "floor_tokens": (["0"], 0),
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
    "prefill_tokens_per_step": (["256"], 256),
    "prefill_burst_tokens": (["8192"], 8192),
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
        "floor_tokens",
        "widen",
        "target_coverage",
        "max_budget",
        "prefill_tokens_per_step",
        "prefill_burst_tokens",
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
    (
        {"groups": False, "group_margin": 0.1},
        "group_margin 0.1 does nothing without groups: set groups, or leave it out",
    ),
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
    ({"budgets": 0.5}, "unknown key 'budgets': use one of policy, budget, floor_tokens"),
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
        ({"floor_tokens": -1}, "floor_tokens -1 is too small: use 0 or more"),
        pytest.param({"floor_tokens": 10**400}, "floor_tokens 10+ is no size: use a finite number", id="beyond"),
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
    assert LSAConfig().groups == AUTO
    config = parse("--lsa-config", '{"groups": "auto", "group_margin": 0.1}')
    assert config == LSAConfig(groups=AUTO, group_margin=0.1)
    assert LSAConfig.from_mapping(json.loads(config.to_json())) == config == pickle.loads(pickle.dumps(config))
    for wrong in ("yes", 1, 0.5, None, ["auto"]):
        with pytest.raises(ValueError, match=r"groups is .*: use true, false or auto"):
            LSAConfig.from_mapping({"groups": wrong})


@pytest.mark.parametrize("values", [{"device_tokens": 6400}, {"window": 16}, {"window": 1, "device_tokens": 256}])
def test_what_a_server_says_of_itself_can_be_given_back(values: dict[str, int]) -> None:
    """Buffers follow a small pool, and what is sent ahead a short window; they are said, too."""
    config = LSAConfig(**values)  # type: ignore[arg-type]
    assert LSAConfig.from_mapping(json.loads(config.to_json())) == config
    other = json.loads(config.to_json()) | {"staging_pages": config.staging_pages + 1}
    with pytest.raises(ValueError, match="staging_pages is gone"):
        LSAConfig.from_mapping(other)


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
