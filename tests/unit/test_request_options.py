"""What one request may ask for."""

from __future__ import annotations

import json
import pickle
import re
from typing import Any

import pytest
from config_parts import parse

from sglang_lsa.config import (
    AUTO,
    PREFILLS,
    GivenSet,
    LSAConfig,
    RequestOptions,
    offered,
)

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
        ({"lsa": {"groups": False}}, RequestOptions("quest", 0.25, groups=False)),
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
        ({"groups": "no"}, r"custom_params\.lsa\.groups is 'no': use true or false"),
        ({"groups": None}, r"custom_params\.lsa\.groups is None: use true or false"),
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


# --- a budget of auto ------------------------------------------------------------------------------------------------


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
        *(
            (chosen, r"--lsa-budget auto does not go with the policy quest.*use the policy indexer.*or a budget")
            for chosen in ({"policy": "quest"}, {"calibrate": "never"}, {"observe_layers": (1,)})
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
