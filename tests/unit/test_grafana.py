"""Dashboard, alerts and scrape configuration: well formed, and about metrics that exist. A real scrape is compared in
``tests/server/test_monitoring.py``; what the alerts say of good and bad servers, ``promtool test rules`` tells."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from sglang_lsa.serve.metrics import COUNTERS, GAUGES, PREFIX

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "examples" / "grafana"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
EXPORTED = {*(PREFIX + name for name in GAUGES), *(f"{PREFIX}{name}_total" for name in COUNTERS)}


def names(text: str) -> set[str]:
    """Metrics in a PromQL expression."""
    return set(re.findall(r"sglang:\w+", text))


def values_of(tree: Any, key: str) -> Iterator[Any]:
    """What stands under ``key``, anywhere in parsed JSON."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        if name == key:
            yield value
        yield from values_of(value, key)


def expressions() -> dict[str, str]:
    found = {rule["alert"]: rule["expr"] for rule in RULES}
    for panel in PANELS:
        found |= {f"{panel['title']} {target['refId']}": target["expr"] for target in panel["targets"]}
    return found | {"annotation": DASHBOARD["annotations"]["list"][0]["expr"]}


@pytest.mark.parametrize("expression", expressions().values(), ids=expressions().keys())
def test_expressions(expression: str) -> None:
    assert names(expression), "it asks for something"
    assert {name for name in names(expression) if name.startswith(PREFIX + "lsa_")} <= EXPORTED
    for opening, closing in ("()", "[]", "{}"):
        assert expression.count(opening) == expression.count(closing)
    # a counter is only looked at through its growth
    for name in names(expression):
        if name.endswith("_total") and name != PREFIX + "lsa_config_changes_total":
            assert re.search(rf"(rate|increase)\({name}[{{[]", expression), name


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {name for panel in PANELS for target in panel["targets"] for name in names(target["expr"])}
    assert EXPORTED - shown == set()
    assert {"sglang:num_running_reqs", "sglang:token_usage", "sglang:gen_throughput"} <= shown


def test_the_dashboard_goes_with_any_data_source() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    sources = list(values_of(DASHBOARD, "datasource"))
    assert len(sources) > 2 * len(PANELS)
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    used = set(re.findall(r"\$(?!__)(?:{)?(\w+)", json.dumps(DASHBOARD)))
    assert used == set(variables)


def test_the_dashboard_is_laid_out() -> None:
    identities = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identities)) == len(identities)
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Memory", "Selection quality", "Transfers", "Pressure", "Groups", "SGLang"]
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies over another"
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for panel in PANELS:
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        assert panel["fieldConfig"]["defaults"]["unit"]


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_alerts_say_where_and_what_to_do(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"LSA[A-Za-z]+", rule["alert"])
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert re.fullmatch(r"\d+m", rule.get("for", "0m"))
    assert "{{ $labels.instance }}" in rule["annotations"]["summary"]
    assert len(rule["annotations"]["description"]) > 30


def test_every_kind_of_trouble_has_an_alert() -> None:
    asked = set().union(*(names(rule["expr"]) for rule in RULES))
    for trouble in ("coverage", "collapsed_sets_total", "fallbacks_total", "refresh_failures_total", "stalls_total"):
        assert f"{PREFIX}lsa_{trouble}" in asked
    for trouble in ("virtual_pages", "retractions_total", "failed_batches_total", "graphless_steps_total"):
        assert f"{PREFIX}lsa_{trouble}" in asked
    assert len({rule["alert"] for rule in RULES}) == len(RULES)


def test_every_alert_is_tested() -> None:
    """By promtool: here only that none is forgotten, and that its series have names that exist."""
    tests = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())
    assert tests["rule_files"] == ["alerts.yaml"]
    (test,) = tests["tests"]
    expected = [sample["labels"] for sample in test["promql_expr_test"][0]["exp_samples"]]
    assert sorted(re.findall(r'alertname="(\w+)"', " ".join(expected))) == sorted(rule["alert"] for rule in RULES)
    series = set().union(*(names(item["series"]) for item in test["input_series"]))
    assert series == set().union(*(names(rule["expr"]) for rule in RULES))
    severities = {rule["alert"]: rule["labels"]["severity"] for rule in RULES}
    for labels in expected:
        (name,), (severity,) = re.findall(r'alertname="(\w+)"', labels), re.findall(r'severity="(\w+)"', labels)
        assert severities[name] == severity


def test_prometheus_reads_the_alerts_of_this_folder() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert config["rule_files"] == ["alerts.yaml"]
    (job,) = config["scrape_configs"]
    assert job["static_configs"][0]["targets"] == ["127.0.0.1:30000"]
    assert job.get("metrics_path", "/metrics") == "/metrics"
    (rule,) = job["metric_relabel_configs"]
    assert (rule["source_labels"], rule["target_label"]) == (["__name__"], "__name__")
    for name in EXPORTED:
        assert re.fullmatch(rule["regex"], name) is None, "what is right stays"
        seen = re.fullmatch(rule["regex"], name.replace(":", "_"))
        assert seen is not None and rule["replacement"].replace("$1", seen[1]) == name


def test_the_containers_find_their_files() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    mounts = [mount for service in services.values() for mount in service["volumes"] if mount.startswith("./")]
    assert len(mounts) == 4
    for mount in mounts:
        assert (FOLDER / mount.split(":")[0]).exists(), mount
    source = yaml.safe_load((FOLDER / "provisioning" / "datasources" / "prometheus.yaml").read_text())
    (address,) = (part for part in services["prometheus"]["command"] if part.startswith("--web.listen-address="))
    assert source["datasources"][0]["url"] == "http://" + address.split("=")[1]
    provider = yaml.safe_load((FOLDER / "provisioning" / "dashboards" / "lsa.yaml").read_text())["providers"][0]
    assert any(mount.split(":")[1].startswith(provider["options"]["path"]) for mount in mounts)
