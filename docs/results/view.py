"""Times the live view: what the page costs a browser, and what an open page costs a server's decode throughput.

    python docs/results/view.py --output docs/results/view.json --picture docs/view.png
    python docs/results/view.py --repeats 0 --picture docs/view.png    # the picture alone

Two parts. The page over 100 made-up requests (the real page, routes and events) and over 8 real ones of the embedded
model: milliseconds of script per update in headless Chromium. The same 8 requests decoding with nobody watching, with
a client that only reads the stream, and with the page open in Chromium, in turns: tokens per second. Chromium takes
time of the cores that a CPU server computes on, which it does not where it runs on another machine: so the page is also
opened in a second Chromium of the lowest priority.

The picture is of another server, which forms groups: six agents over one text of 5,000 words, and two reports.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import psutil  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402
from prompts import needle, prose  # noqa: E402
from view_pages import ARGUMENTS, CHROMIUM, Crowd, ViewServer  # noqa: E402

from sglang_lsa.embedded_model import embedded_model_path  # noqa: E402
from sglang_lsa.server_process import LSA, ServerProcess  # noqa: E402

REQUESTS = 8
NAMES = [*(f"agent-{number}" for number in range(1, 5)), *(f"report-{number}" for number in range(1, 5))]
PICTURE_TOKENS = 650
"""Enough for a minute of updates on two cores."""
PICTURE_NAMES = [*(f"agent-{number}" for number in range(1, 7)), "report-1", "report-2"]
PICTURE_FLAGS = ["--skip-server-warmup", "--max-running-requests", str(REQUESTS), "--lsa-device-tokens", "7040"]
PICTURE_FLAGS += ["--lsa-host-memory-gb", "2", "--lsa-min-context", "1024", "--lsa-budget", "0.3"]
PICTURE_FLAGS += ["--lsa-config", '{"groups": true}']
FLAGS = ["--skip-server-warmup", "--max-running-requests", str(REQUESTS), "--lsa-device-tokens", "6400"]
FLAGS += ["--lsa-host-memory-gb", "2", "--lsa-min-context", "1024", "--lsa-budget", "0.2"]
OBSERVE = """
window.took = [];
new PerformanceObserver(list => {
  for (const entry of list.getEntries()) if (entry.name === "lsa-update") took.push(entry.duration);
}).observe({entryTypes: ["measure"]});
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="of each way to watch; 0 measures nothing; default: 3"
    )
    parser.add_argument("--tokens", type=int, default=80, metavar="N", help="of each answer; default: 80")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--picture", type=pathlib.Path, help="a screenshot of the page with the real requests")
    args = parser.parse_args()
    if CHROMIUM is None:
        print("view.py: there is no Chromium on the PATH: apt-get install chromium", file=sys.stderr)
        return 1
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        others = descendants()
        behind = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        for process in descendants() - others:  # what they start later has their priority
            os.setpriority(os.PRIO_PROCESS, process, 19)
        if args.repeats:
            result: dict[str, Any] = {
                "cores": os.cpu_count(),
                "chromium": browser.version,
                "commit": commit(),
                "synthetic": {"requests": 100, **synthetic(browser)},
            }
            result["real"] = {"requests": REQUESTS, "answer_tokens": args.tokens, **real(browser, behind, args)}
            print(json.dumps(result, indent=1))
            if args.output is not None:
                args.output.write_text(json.dumps(result, indent=1) + "\n")
        taken = args.picture is None or take_picture(browser, args.picture)
        browser.close()
        behind.close()
    return 0 if taken else 1


def descendants() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def commit() -> str:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip()


def scripting(milliseconds: list[float]) -> dict[str, float]:
    ordered = sorted(milliseconds)
    return {
        "updates": len(ordered),
        "median_ms": round(statistics.median(ordered), 2),
        "p95_ms": round(ordered[int(0.95 * (len(ordered) - 1))], 2),
        "most_ms": round(ordered[-1], 2),
    }


def synthetic(browser: Any) -> dict[str, float]:
    """At the pace of a server, and with a window so tall that every map is drawn."""
    page = open_page(browser, height=12_000)
    with ViewServer(Crowd(100), seconds=0.25) as server:
        page.goto(server.url + "/lsa")
        while page.evaluate("took.length") < 60:
            page.wait_for_timeout(200)
        took = page.evaluate("took")
        page.close()
    return scripting(took)


def open_page(browser: Any, height: int = 1250) -> Any:
    page = browser.new_page(viewport={"width": 1360, "height": height}, color_scheme="dark")
    page.add_init_script(OBSERVE)
    return page


def real(browser: Any, behind: Any, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--model-path", str(embedded_model_path()), *FLAGS]
        with ServerProcess(LSA, flags, pathlib.Path(folder) / "server.log") as server:
            server.wait_until_ready()
            prompts = make_prompts()
            for prompt in prompts:  # from now on only decode counts: the tree has the prompts
                answer(server, prompt, 1, "warm")
            speeds: dict[str, list[float]] = {"closed": [], "reading": [], "open": [], "open_behind": []}
            took: list[float] = []
            for turn in range(args.repeats):
                order = list(speeds)[turn % 4 :] + list(speeds)[: turn % 4]
                for how in order:
                    with watching(behind if how == "open_behind" else browser, server, how, took) as page:
                        speeds[how].append(decode(server, prompts, args.tokens, page))
    rates = {how: [round(value, 2) for value in values] for how, values in speeds.items()}
    closed = statistics.median(speeds["closed"])
    ratios = {how: round(statistics.median(values) / closed, 4) for how, values in speeds.items()}
    return {**scripting(took), "tokens_per_second": rates, "median_of_closed": ratios}


def make_prompts() -> list[str]:
    """Four agents over one text, and four texts of their own; 1,300 to 3,200 tokens."""
    shared = needle(2200, 0.4, 7).prompt
    return [f"{shared} Agent {number}: {prose(120, number)}" for number in range(4)] + [
        prose(900 + 350 * number, 20 + number) for number in range(4)
    ]


def answer(server: ServerProcess, prompt: str, tokens: int, rid: str) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return server.post("/generate", {"text": prompt, "rid": rid, "sampling_params": sampling})


def decode(server: ServerProcess, prompts: list[str], tokens: int, page: Any) -> float:
    """Tokens per second of all requests together, from the first answer asked for to the last one given."""
    ends = []

    def one(prompt: str, name: str) -> None:
        answer(server, prompt, tokens, name)
        ends.append(time.perf_counter())

    began = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        running = [pool.submit(one, prompt, name) for prompt, name in zip(prompts, NAMES, strict=True)]
        while page is not None and not all(future.done() for future in running):
            page.wait_for_timeout(1000)  # the browser's driver works only while it is called
        for future in running:
            future.result()
    return len(prompts) * tokens / (max(ends) - began)


@contextlib.contextmanager
def watching(browser: Any, server: ServerProcess, how: str, took: list[float]) -> Iterator[Any]:
    """``closed``: nobody; ``reading``: a client of the stream; ``open``: the page, whose times go to ``took``."""
    if how.startswith("open"):
        page = open_page(browser)
        page.goto(server.url + "/lsa")
        try:
            yield page
        finally:
            took.extend(page.evaluate("took"))
            page.close()
    elif how == "reading":
        with urllib.request.urlopen(server.url + "/lsa/events", timeout=600) as stream:
            end = threading.Event()

            def read() -> None:
                while stream.readline() and not end.is_set():
                    pass

            reader = threading.Thread(target=read)
            reader.start()
            yield None
            end.set()
            reader.join()
    else:
        yield None


def abort_all(server: ServerProcess) -> None:
    body = json.dumps({"abort_all": True}).encode()
    kind = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(server.url + "/abort_request", body, kind), timeout=60).close()


def take_picture(browser: Any, file: pathlib.Path) -> bool:
    """Of the page over requests that read together; whether there was time for it."""
    shared = needle(5000, 0.4, 7).prompt
    prompts = [f"{shared} Agent {number}: {prose(120, number)}" for number in range(6)]
    prompts += [prose(900 + 700 * number, 20 + number) for number in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--model-path", str(embedded_model_path()), *PICTURE_FLAGS]
        with ServerProcess(LSA, flags, pathlib.Path(folder) / "server.log") as server:
            server.wait_until_ready()
            for prompt in prompts:
                answer(server, prompt, 1, "warm")
            page = open_page(browser)
            page.goto(server.url + "/lsa")
            taken = False
            with ThreadPoolExecutor(len(prompts)) as pool:
                named = zip(prompts, PICTURE_NAMES, strict=True)
                running = [pool.submit(answer, server, prompt, PICTURE_TOKENS, name) for prompt, name in named]
                while not taken and not all(future.done() for future in running):
                    page.wait_for_timeout(500)
                    updates = page.evaluate("Math.min(...[...shown.values()].map(row => row.rows.length))")
                    whole = page.locator(".request").count() == REQUESTS and page.locator(".group").count() > 0
                    if whole and updates >= 45:
                        page.screenshot(path=file, full_page=True)
                        taken = True
                abort_all(server)
            page.close()
    if not taken:
        print("view.py: the answers were too quick for a picture, or there were no groups", file=sys.stderr)
    return taken


if __name__ == "__main__":
    raise SystemExit(main())
