"""Dockerfile, Compose and Kubernetes files: well-formed, and consistent with this package. Nothing is built."""

from __future__ import annotations

import argparse
import importlib.metadata
import pathlib
import re
from typing import Any

import pytest
import torch
import yaml

import sglang_lsa
from sglang_lsa.config import add_cli_args, config_from_args
from sglang_lsa.indexer.checkpoint import shipped_indexers
from sglang_lsa.patches.releases import DEFAULT

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = yaml.safe_load((ROOT / "examples" / "compose.yaml").read_text())["services"]["sglang-lsa"]
DEPLOYMENT, SERVICE = yaml.safe_load_all((ROOT / "examples" / "kubernetes" / "lsa.yaml").read_text())
POD = DEPLOYMENT["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
STARTED = {"compose.yaml": COMPOSE["command"], "lsa.yaml": CONTAINER["args"]}
BESIDE_THE_MIRROR_GB = 16


def instructions(text: str) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile with their arguments; comments left out, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, " ".join(rest)) for word, *rest in map(str.split, joined.splitlines())]


def arguments() -> dict[str, str]:
    """Build arguments with their defaults."""
    found: dict[str, str] = {}
    for word, rest in instructions(DOCKERFILE.read_text()):
        if word == "ARG":
            name, _, default = rest.partition("=")
            found[name] = re.sub(r"\$\{(\w+)\}", lambda match: found[match[1]], default)
    return found


# --- Dockerfile ----------------------------------------------------------------------------------------------------


def test_instructions_are_docker_s() -> None:
    known = {"ARG", "FROM", "RUN", "ENV", "COPY", "USER", "WORKDIR", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    words = [word for word, _ in instructions(DOCKERFILE.read_text())]
    assert set(words) == known
    assert set(words[: words.index("FROM")]) == {"ARG"}
    assert words.count("USER") == words.count("ENTRYPOINT") == words.count("CMD") == 1
    assert words.index("RUN") < words.index("USER"), "what is installed is not the user's to change"


def test_shell_of_the_dockerfile() -> None:
    """What the usual linter asks: no list of packages left, no recommended ones, no cache, no latest."""
    text = DOCKERFILE.read_text()
    for word, rest in instructions(text):
        if word == "RUN" and "apt-get" in rest:
            assert rest.startswith("apt-get update && ") and rest.endswith("rm -rf /var/lib/apt/lists/*")
            assert rest.count("apt-get install") == rest.count("apt-get install -y --no-install-recommends")
        if word == "RUN" and "pip install" in rest:
            assert rest.count("pip install") == rest.count("pip install --no-cache-dir")
        if word in ("ENTRYPOINT", "CMD"):
            assert isinstance(yaml.safe_load(rest), list), "in JSON, so that signals reach the server"
    assert ":latest" not in text and "ADD " not in text and "sudo" not in text


def test_versions_of_the_image() -> None:
    given = arguments()
    assert given["SGLANG_VERSION"] == DEFAULT
    assert '"/src[gpu]" "sglang==${SGLANG_VERSION}"' in DOCKERFILE.read_text()
    assert given["BASE"] == f"nvidia/cuda:{given['CUDA_VERSION']}-runtime-ubuntu24.04"
    major_minor = ".".join(given["CUDA_VERSION"].split(".")[:2])
    assert given["CUDA_PACKAGES"] == major_minor.replace(".", "-")
    text = DOCKERFILE.read_text()
    assert f"lmsysorg/sglang:v{DEFAULT}" in text
    assert f"sglang-lsa:{sglang_lsa.__version__}" in text
    if importlib.metadata.version("sglang") == DEFAULT:
        pins = [line for line in importlib.metadata.requires("sglang") or () if line.startswith("torch==")]
        assert f"({pins[0].removeprefix('torch==')})" in text
    if torch.version.cuda:
        assert torch.version.cuda == major_minor


def test_the_readme_lists_the_arguments() -> None:
    table = (ROOT / "docker" / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", table, flags=re.M))
    assert rows == {name: default for name, default in arguments().items() if name != "DEBIAN_FRONTEND"}


def test_what_is_generated_is_not_copied() -> None:
    ignored = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().split()
    generated = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    assert {".git", ".venv", "build", "dist", "demo-output", "bench-output"} <= set(ignored)
    assert set(ignored) - generated <= {".git", "**/__pycache__"}


# --- what they start -----------------------------------------------------------------------------------------------


def parsed(flags: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and those that are left for SGLang."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_cli_args(parser)
    return parser.parse_known_args(flags)


@pytest.mark.parametrize("file", STARTED)
def test_flags_exist(file: str) -> None:
    flags = STARTED[file]
    assert all(isinstance(flag, str) for flag in flags), "YAML takes unquoted numbers for numbers"
    ours, left = parsed(flags)
    config = config_from_args(ours)
    assert config is not None and config.host_memory_gb
    assert config.indexer in shipped_indexers()
    assert not [flag for flag in left if flag.startswith("--lsa")]
    assert left[:2] == ["--model-path", "Qwen/Qwen2.5-Coder-0.5B-Instruct"]
    assert left[2:] == ["--enable-metrics", "--host", "0.0.0.0", "--port", "30000"]


def test_flags_in_the_readme_exist() -> None:
    text = (ROOT / "docker" / "README.md").read_text()
    (given,) = re.findall(r"sglang-lsa:0\.1\.0 (--host .*)$", text, flags=re.M)
    ours, left = parsed(given.split())
    assert config_from_args(ours) is not None
    assert left == ["--host", "0.0.0.0", "--port", "30000"]


def gigabytes(size: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(g|Gi)", size).groups()  # type: ignore[union-attr]
    assert unit in ("g", "Gi")  # both of 2^30 bytes
    return float(number)


@pytest.mark.parametrize("file", STARTED)
def test_memory_has_room_for_the_mirror(file: str) -> None:
    limits = CONTAINER["resources"]["limits"]["memory"], CONTAINER["resources"]["requests"]["memory"]
    limit = gigabytes(COMPOSE["mem_limit"] if file == "compose.yaml" else limits[0])
    assert limits[0] == limits[1], "page-locked memory cannot be taken back"
    config = config_from_args(parsed(STARTED[file])[0])
    assert config is not None and config.host_memory_gb is not None
    assert limit == config.host_memory_gb + BESIDE_THE_MIRROR_GB


def test_image_is_this_version() -> None:
    for image in (COMPOSE["image"], CONTAINER["image"]):
        assert image.split("/")[-1] == f"sglang-lsa:{sglang_lsa.__version__}"
    context = (ROOT / "examples" / COMPOSE["build"]["context"]).resolve()
    assert context == ROOT and (context / COMPOSE["build"]["dockerfile"]) == DOCKERFILE


def test_user_and_cache_are_the_image_s() -> None:
    assert POD["securityContext"] == {"runAsNonRoot": True, "runAsUser": 10001, "fsGroup": 10001}
    assert "USER 10001" in DOCKERFILE.read_text() and "--uid 10001" in DOCKERFILE.read_text()
    assert COMPOSE["volumes"] == ["lsa-cache:/home/lsa/.cache"]
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert mounts == {"cache": "/home/lsa/.cache", "shm": "/dev/shm"}
    assert {volume["name"] for volume in POD["volumes"]} == set(mounts)


def test_ports_probes_and_labels_belong_together() -> None:
    port: dict[str, Any] = CONTAINER["ports"][0]
    assert port == {"name": "http", "containerPort": 30000}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINER[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert SERVICE["spec"]["ports"][0]["targetPort"] == "http"
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels == SERVICE["spec"]["selector"]
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert COMPOSE["ulimits"]["memlock"] == -1 and "IPC_LOCK" in CONTAINER["securityContext"]["capabilities"]["add"]
