"""The machine: its GPU, and the memory of the host that a mirror can be made of."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from dataclasses import dataclass

from sglang_lsa.doctor.findings import NOTE, OK, SKIPPED, TROUBLE, Finding

SECTION = "machine"
GB = 1 << 30
SHM = "/dev/shm"
SHM_BYTES = 1 << 30
"""SGLang's processes hand each other large requests through shared memory; Docker's default is 64 MB."""


@dataclass(frozen=True)
class Gpu:
    """The first GPU that torch sees. ``total_bytes`` and ``free_bytes`` are measured by its driver."""

    name: str
    total_bytes: int
    free_bytes: int
    driver: str | None
    cuda: str | None
    capability: str


def gpu_here() -> tuple[Gpu | None, Finding]:
    """The GPU, if there is one, and what is to be said about it."""
    names, driver = nvidia_smi()
    try:
        import torch

        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info(0)
            capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
            gpu = Gpu(torch.cuda.get_device_name(0), total, free, driver, torch.version.cuda, capability)
            seen = (
                f"{gpu.name}, {total / GB:.1f} GB, {free / GB:.1f} GB free, capability {capability}, driver "
                f"{driver or 'unknown'}, CUDA {gpu.cuda}"
            )
            return gpu, Finding(SECTION, "gpu", OK, seen)
        built = torch.version.cuda
    except Exception as error:  # torch is missing, or its driver fails
        fix = "see the versions above" if not names else "check the driver (nvidia-smi) and reinstall torch"
        return None, Finding(
            SECTION, "gpu", TROUBLE, f"torch cannot look for one ({error!r})", "serving needs torch", fix
        )
    if names:
        seen = f"nvidia-smi sees {names[0]} (driver {driver}), torch sees none"
        fix = (
            f"check CUDA_VISIBLE_DEVICES, and that the driver is new enough for CUDA {built}"
            if built
            else "install a torch that is built with CUDA"
        )
        return None, Finding(SECTION, "gpu", TROUBLE, seen, "the server would run on the CPU", fix)
    why = "servers run on the CPU here; --gpu-memory-gb plans for a GPU that is elsewhere"
    return None, Finding(SECTION, "gpu", NOTE, "none", why)


def nvidia_smi() -> tuple[list[str], str | None]:
    """Names of the GPUs and version of the driver, from ``nvidia-smi``; nothing where it is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return [], None
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return [], None
    lines = [line.rsplit(",", 1) for line in run.stdout.splitlines() if "," in line] if run.returncode == 0 else []
    return [name.strip() for name, _ in lines], lines[0][1].strip() if lines else None


@dataclass(frozen=True)
class Host:
    """Bytes; ``memlock_bytes`` None without a limit, ``shm_bytes`` None where there is no shared memory."""

    free_bytes: int
    total_bytes: int
    memlock_bytes: int | None
    shm_bytes: int | None


def host_here() -> Host:
    """What this process can have of the host's memory, its container's limit included."""
    import psutil

    from sglang_lsa.memory.mirror import available_host_memory

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    free = shutil.disk_usage(SHM).free if os.path.isdir(SHM) else None
    memlock = None if limit == resource.RLIM_INFINITY else limit
    return Host(available_host_memory(), psutil.virtual_memory().total, memlock, free)


def host_findings(host: Host, mirror_bytes: int | None, pinned: bool) -> list[Finding]:
    """What is to be said about the host.

    Args:
        mirror_bytes: of the planned host mirror; None without a plan.
        pinned: the mirror would be page-locked.
    """
    found = [
        Finding(SECTION, "host memory", OK, f"{host.free_bytes / GB:.1f} GB free of {host.total_bytes / GB:.1f} GB")
    ]
    limit = host.memlock_bytes
    seen = "no limit" if limit is None else f"{limit / GB:.2f} GB"
    if not pinned:
        found.append(Finding(SECTION, "locked memory (ulimit -l)", SKIPPED, seen, "a CPU server locks none"))
    elif limit is not None and mirror_bytes is not None and limit < mirror_bytes:
        why = (
            f"the host mirror page-locks {mirror_bytes / GB:.1f} GB; NVIDIA's driver seldom counts that against the "
            "limit, containers and others do"
        )
        fix = "if locking fails at start: ulimit -l unlimited (Docker: --ulimit memlock=-1)"
        found.append(Finding(SECTION, "locked memory (ulimit -l)", NOTE, seen, why, fix))
    else:
        found.append(Finding(SECTION, "locked memory (ulimit -l)", OK, seen))
    if host.shm_bytes is None or host.shm_bytes < SHM_BYTES:
        seen = "missing" if host.shm_bytes is None else f"{host.shm_bytes / GB:.2f} GB free"
        why = "SGLang's processes may exchange data through it"
        found.append(Finding(SECTION, SHM, NOTE, seen, why, "give the container more (Docker: --shm-size 1g)"))
    else:
        found.append(Finding(SECTION, SHM, OK, f"{host.shm_bytes / GB:.1f} GB free"))
    return found
