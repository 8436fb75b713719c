"""``/metrics`` of a real server: every documented metric is there, and what dashboard and alerts ask for exists."""

from __future__ import annotations

import pathlib
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml
from prompts import prose
from release import HERE
from serving import flush, generate, wait_until_idle

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.serve.metrics import COUNTERS, GAUGES, PREFIX
from sglang_lsa.server_process import ServerProcess

pytestmark = pytest.mark.server
EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples" / "grafana"


@pytest.fixture(scope="module")
def scraped(lsa: ServerProcess) -> tuple[dict[str, Any], dict[str, Any]]:
    """Families by name, and the status of the same idle server."""
    from prometheus_client.parser import text_string_to_metric_families

    generate(lsa, prose(1700, 5), tokens=80)  # with a resident set, and pages that come back
    generate(lsa, prose(300, 6), tokens=4)
    before = wait_until_idle(lsa)
    # The last request lets go of its last page a pass after it is gone, and metrics are set a moment after that.
    while (status := lsa.get("/lsa/status"))["physical"] != before["physical"]:
        before = status
    lsa.get("/lsa/status")  # a message later, so after the scheduler saw that it is idle
    text = urllib.request.urlopen(lsa.url + "/metrics", timeout=60).read().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}, status


def test_every_documented_metric_is_scraped_and_agrees_with_the_status(scraped) -> None:
    families, status = scraped
    expected = values_in(status)
    assert sorted(expected) == sorted([*GAUGES, *COUNTERS]), "every metric has its number in the status"
    for kind, metrics in (("gauge", GAUGES), ("counter", COUNTERS)):
        for name, metric in metrics.items():
            family = families[PREFIX + name]
            (sample,) = family.samples
            assert (family.type, family.documentation) == (kind, metric.text)
            assert sample.name == PREFIX + name + ("_total" if kind == "counter" else "")
            assert sample.labels == {"model_name": "smollm2"}
            assert sample.value == pytest.approx(expected[name], rel=1e-9), name
    assert expected["lsa_refreshes"] >= 2
    assert expected["lsa_virtual_pages_allocated"] > 0, "the prompts are in the radix tree"
    ours = {name for name in families if name.startswith(PREFIX + "lsa_")}
    assert ours == {PREFIX + name for name in (*GAUGES, *COUNTERS)}, "nothing is exported that is not documented"


def values_in(status: dict[str, Any]) -> dict[str, float]:
    """What every metric should say of a server with this status, on which nothing runs."""
    physical, host, virtual, recalls = (status[part] for part in ("physical", "host", "virtual", "recalls"))
    prefill, pressure, failures, radix = (status[part] for part in ("prefill", "pressure", "failures", "radix"))
    groups = status["groups"] or dict.fromkeys((*GROUP_COUNTS, "formed"), 0)
    assert status["running"]["requests"] == 0
    return {
        "lsa_device_pages": physical["pages"],
        "lsa_device_pages_held": physical["held"],
        "lsa_device_pages_cached": physical["cached"],
        "lsa_promised_pages": physical["promised"],
        "lsa_staging_bytes": physical["overhead_bytes"]["staging"],
        "lsa_virtual_pages": virtual["pages"],
        "lsa_virtual_pages_allocated": virtual["allocated"],
        "lsa_host_pages": host["pages"],
        "lsa_host_bytes": host["bytes"],
        "lsa_host_mirror_bytes": host["mirror_bytes"],
        "lsa_context_pages": 0,
        "lsa_resident_pages": 0,
        "lsa_resident_share": 0,
        "lsa_budget": status["budget"],
        "lsa_coverage": 1,
        "lsa_recalled_pages": recalls["pages"],
        "lsa_recalled_bytes": recalls["bytes"],
        "lsa_recall_seconds": recalls["seconds"],
        "lsa_prefetched_pages": recalls["prefetched_pages"],
        "lsa_late_pages": recalls["late_pages"],
        "lsa_warmed_pages": recalls["warmed_pages"],
        "lsa_stored_pages": status["stores"]["pages"],
        "lsa_evicted_pages": status["evictions"],
        "lsa_refreshes": status["refreshes"],
        "lsa_refresh_host_seconds": status["refresh_host_seconds"],
        "lsa_refresh_device_seconds": status["refresh_device_seconds"],
        "lsa_stalls": status["stalls"],
        "lsa_ranks": status["ranks"]["size"],
        "lsa_rank_checks": status["ranks"]["checks"],
        "lsa_fallbacks": status["fallbacks"],
        "lsa_widened_sets": status["widened_sets"],
        "lsa_collapsed_sets": status["collapsed_sets"],
        "lsa_shrunk_sets": pressure["shrunk_sets"],
        "lsa_paced_passes": pressure["paced_passes"],
        "lsa_streamed_passes": prefill["streamed_passes"],
        "lsa_streamed_pages": prefill["streamed_pages"],
        "lsa_resident_prompts": prefill["resident_prompts"],
        "lsa_admission_waits": pressure["admission_waits"],
        "lsa_retractions": pressure["retractions"],
        "lsa_host_evicted_pages": pressure["host_evicted_pages"],
        "lsa_refresh_failures": failures["refreshes"],
        "lsa_failed_batches": failures["batches"],
        "lsa_integrity_failures": failures["integrity"],
        "lsa_weight_updates": status["weights"]["updates"],
        "lsa_indexer_stale": float(status["weights"]["indexer_is_stale"]),
        "lsa_graphless_steps": status["graphless_steps"],
        "lsa_prompt_tokens": radix["prompt_tokens"],
        "lsa_prefix_hit_tokens": radix["hit_tokens"],
        "lsa_config_changes": status["config_changes"],
        **dict.fromkeys(("lsa_groups", "lsa_group_requests", "lsa_group_pages", "lsa_group_chosen_pages"), 0),
        **{f"lsa_group_{name}": groups[name] for name in GROUP_COUNTS},
        "lsa_groups_formed": groups["formed"],
    }


GROUP_COUNTS = ("steps", "saved_reads", "added_reads", "exchanged_pages", "host_seconds")

PROMETHEUS = {
    "2.42": "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "3.5": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
}
"""What a Prometheus of this version accepts."""


@pytest.mark.parametrize("accepts", PROMETHEUS.values(), ids=PROMETHEUS.keys())
def test_prometheus_stores_them_under_these_names(scraped, lsa: ServerProcess, accepts: str) -> None:
    """After the relabelling in ``prometheus.yml``: the client may have written ``sglang_``."""
    request = urllib.request.Request(lsa.url + "/metrics/", headers={"Accept": accepts})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        lines = answer.read().decode().splitlines()
    (rule,) = yaml.safe_load((EXAMPLES / "prometheus.yml").read_text())["scrape_configs"][0]["metric_relabel_configs"]
    written = {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}
    stored = {re.sub(rf"^{rule['regex']}$", rule["replacement"].replace("$1", r"\1"), name) for name in written}
    families, _ = scraped
    assert {sample.name for family in families.values() for sample in family.samples} <= stored


@pytest.mark.parametrize("file", ["dashboard.json", "alerts.yaml"])
def test_what_is_asked_for_is_exported(scraped, file: str) -> None:
    """SGLang's own metrics, too."""
    families, _ = scraped
    exported = {sample.name for family in families.values() for sample in family.samples}
    asked = set(re.findall(r"sglang:\w+", (EXAMPLES / file).read_text()))
    assert len(asked) > 10
    assert sorted(asked - exported) == []


def test_a_full_device_pool_is_load(small: ServerProcess) -> None:
    """27 of 32 device pages, which is an eighth of the virtual ones: routers that ask must not send more."""
    flush(small)
    seen: dict[str, float] = dict.fromkeys(("loads", "tokens", "metric"), 0.0)
    old_route = HERE == "0.5.17"  # the newer release has /v1/loads alone
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate, small, prose(1650, 5), 100, "dense", policy="full")
        while not running.done():
            (load,) = small.get("/v1/loads")["loads"]
            (old,) = small.get("/get_load") if old_route else [{"num_tokens": load["num_total_tokens"]}]
            text = urllib.request.urlopen(small.url + "/metrics", timeout=60).read().decode()
            usage = re.search(r"^sglang:token_usage{.*} (.*)$", text, re.M)
            now = load["token_usage"], old["num_tokens"] / load["max_total_num_tokens"], float(usage[1]) if usage else 0
            seen = {name: max(before, value) for (name, before), value in zip(seen.items(), now, strict=True)}
    pages = pages_spanned(running.result()["meta_info"]["prompt_tokens"] + 100, PAGE_SIZE)
    assert pages >= 26
    for name, value in seen.items():
        assert pages / 32 - 0.05 < value <= 1.0, (name, seen)
    wait_until_idle(small)
    (load,) = small.get("/v1/loads")["loads"]
    assert load["token_usage"] < 0.05, "what the tree keeps can be given up"
