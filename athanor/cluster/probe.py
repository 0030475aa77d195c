"""Measures this machine: all ranks at once, since the rate of a rank whose neighbours idle is not what training sees."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import re
import shutil
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from athanor.cluster.spec import ClusterSpec
from athanor.foundation.errors import UserError
from athanor.foundation.launch import run_ranks
from athanor.foundation.processor import Share

SECONDS = 12.0  # of measuring; starting ranks comes on top
SHARES = {"matmul_fp32": 0.26, "matmul_bf16": 0.06, "matmul_fp64": 0.06, "attention": 0.08, "elementwise": 0.20,
          "memory": 0.02, "launch": 0.03, "optimizer": 0.04, "collectives": 0.16, "jitter": 0.05,
          "python": 0.02, "disk": 0.02}
PYTHON_LOOPS = 20_000
WAITING = {"collectives", "jitter", "disk"}  # parts in which threads wait for each other, or for the disk
DISK_BYTES = 2**25


def measure(log_folder: Path, devices: int | None = None, seconds: float = SECONDS,
            on_progress: Callable[[str, float], None] | None = None) -> ClusterSpec:
    """Measure `devices` of this machine (all unless given) for about `seconds` and return what was found.

    `on_progress(what, share done)` is called as parts finish. Raises UserError when there are not so many devices, and
    RankError when a rank fails.
    """
    available = count_devices()
    devices = devices or available
    if devices > available:
        raise UserError(f"this machine has {available} devices, {devices} were asked for")
    log_folder.mkdir(parents=True, exist_ok=True)
    begin = time.time()
    reports = run_ranks("athanor.cluster.probe:probe_rank", {"seconds": seconds, "folder": str(log_folder)}, devices,
                        log_folder=log_folder, timeout=seconds * 4 + 120,
                        on_message=lambda message: on_progress(message["part"], message["share"]) if on_progress else None)
    return combine(reports, begin)


def count_devices() -> int:
    """CUDA devices, or else the cores that this process may use (one rank each)."""
    if shutil.which("nvidia-smi") or os.environ.get("CUDA_VISIBLE_DEVICES"):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.device_count()
    return len(os.sched_getaffinity(0))


def probe_rank(channel: Callable[..., None], seconds: float, folder: str) -> dict[str, Any]:
    """One rank's part: measure everything in step with the others; `channel(part=, share=)` tells how far it is."""
    started = time.time()
    import torch
    import torch.distributed as dist

    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if is_cuda else "gloo")
    try:
        report = {"started": started, "joined_seconds": time.time() - started, **_device_facts(torch, device)}
        share, had = 0.0, Share()
        for part, measure_part in _parts(device, folder).items():
            dist.barrier()
            with contextlib.nullcontext() if part in WAITING else had.counted():
                report[part] = measure_part(seconds * SHARES[part], report)
            share += SHARES[part]
            if dist.get_rank() == 0:
                channel(part=part, share=share)
        return {**report, "processor_share": had.value}
    finally:
        dist.destroy_process_group()


def _parts(device: Any, folder: str) -> dict[str, Callable[[float, dict[str, Any]], Any]]:
    from athanor.cluster import network, operators
    from athanor.cluster.timing import Clock

    clock = Clock(device)
    dtype = "bf16" if clock.is_cuda else "fp32"
    parts: dict[str, Callable[[float, dict[str, Any]], Any]] = {
        f"matmul_{name}": lambda budget, report, name=name: operators.matmul_rows(clock, name, budget)  # type: ignore[misc]
        for name in operators.DTYPES}
    parts |= {
        "attention": lambda budget, report: operators.attention_rows(clock, dtype, budget),
        "elementwise": lambda budget, report: operators.elementwise_rows(clock, dtype, budget),
        "memory": lambda budget, report: operators.memory_rate(clock, budget),
        "launch": lambda budget, report: operators.launch_overhead(clock, budget),
        "optimizer": lambda budget, report: operators.optimizer_rows(clock, budget),
        "collectives": lambda budget, report: network.collective_curves(device, budget),
        "jitter": lambda budget, report: operators.jitter_rows(clock, lambda s: network.gather_seconds(s, device), budget),
        "python": lambda budget, report: python_speed(budget),
        "disk": lambda budget, report: disk_rates(Path(folder), budget)}
    return parts


def _device_facts(torch: Any, device: Any) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"accelerator": properties.name, "device_type": "cuda", "threads": torch.get_num_threads(),
                "memory_bytes": float(properties.total_memory), "versions": versions | {"cuda": str(torch.version.cuda)}}
    ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    return {"accelerator": processor_name(), "device_type": "cpu", "threads": torch.get_num_threads(),
            "memory_bytes": host_memory_bytes() / ranks, "versions": versions}


def processor_name() -> str:
    """The processor's name as Linux tells it, or the machine type."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return re.sub(r"\s+", " ", found.group(1)).strip() if found else platform.machine()


def host_memory_bytes() -> float:
    """Bytes of memory that this machine, or the control group we run in, may use."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = limit.read_text().strip() if limit.exists() else "max"
        if text.isdigit():
            total = min(total, float(text))
    return total


def python_speed(budget_seconds: float) -> dict[str, float]:
    """What the interpreter does in a second while all ranks are busy: loop passes, and bytes of text split and counted.

    Upper quartiles, since other processes only ever take time.
    """
    from athanor.cluster.timing import lower_quartile

    text = "def combine(left, right):\n    return {**left, 'total': left['total'] + right['total']}\n" * 40
    loops: list[float] = []
    texts: list[float] = []
    deadline = time.perf_counter() + budget_seconds
    while len(loops) < 3 or time.perf_counter() < deadline:
        begin = time.perf_counter()
        value = 0
        for i in range(PYTHON_LOOPS):
            value += i & 7
        middle = time.perf_counter()
        Counter(re.findall(r"\w+|[^\w\s]", text))
        loops.append(middle - begin)
        texts.append(time.perf_counter() - middle)
    return {"loops_per_second": PYTHON_LOOPS / lower_quartile(loops), "text_bytes_per_second": len(text) / lower_quartile(texts)}


def disk_rates(folder: Path, budget_seconds: float) -> dict[str, float]:
    """Bytes per second of writing with fsync and of reading back, all ranks at once, into `folder`."""
    path = folder / f".probe-{os.getpid()}"
    block = os.urandom(2**20) * (DISK_BYTES // 2**20)
    writes: list[float] = []
    reads: list[float] = []
    deadline = time.perf_counter() + budget_seconds
    try:
        while not writes or time.perf_counter() < deadline:
            begin = time.perf_counter()
            with path.open("wb") as file:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())
            writes.append(DISK_BYTES / (time.perf_counter() - begin))
            with path.open("rb") as file:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                begin = time.perf_counter()
                while file.read(2**20):
                    pass
                reads.append(DISK_BYTES / (time.perf_counter() - begin))
    finally:
        path.unlink(missing_ok=True)
    begin = time.perf_counter()
    small = folder / f".probe-small-{os.getpid()}"
    with small.open("wb") as file:
        file.write(b"x")
        os.fsync(file.fileno())
    small.unlink()
    return {"write": statistics.median(writes), "read": statistics.median(reads), "sync_seconds": time.perf_counter() - begin}


def combine(reports: list[dict[str, Any]], begin: float) -> ClusterSpec:
    """One description from what all ranks measured at the same time: mean times, and the best rate as the peak."""
    first = reports[0]

    def mean(*path: str) -> float:
        values = []
        for report in reports:
            value: Any = report
            for key in path:
                value = value[key]
            values.append(float(value))
        return statistics.fmean(values)

    matmul = [row for part in first if part.startswith("matmul_")
              for row in average_rows([r[part][0] for r in reports], labels=5, harmonic=True)]
    return ClusterSpec(
        accelerator=first["accelerator"], device_type=first["device_type"], devices=len(reports), per_node=len(reports),
        threads_per_device=first["threads"], memory_bytes=first["memory_bytes"],
        peak_flops={part.removeprefix("matmul_"): max(r[part][1] for r in reports)
                    for part in first if part.startswith("matmul_")},
        memory_bytes_per_second=mean("memory"), matmul=matmul,
        attention=average_rows([r["attention"] for r in reports], labels=4),
        elementwise=average_rows([r["elementwise"] for r in reports], labels=3),
        optimizer=average_rows([r["optimizer"] for r in reports], labels=2),
        overhead_seconds={"forward": mean("launch", "forward"), "forward_backward": mean("launch", "forward_backward")},
        collectives=first["collectives"], jitter=average_rows([r["jitter"] for r in reports], labels=0),
        disk={"write_bytes_per_second": mean("disk", "write"), "read_bytes_per_second": mean("disk", "read"),
              "sync_seconds": mean("disk", "sync_seconds")},
        python={name: mean("python", name) for name in first["python"]},
        startup_seconds={"launch": max(r["started"] for r in reports) - begin,
                         "join": max(r["joined_seconds"] for r in reports)},
        processor_share=mean("processor_share") if first["device_type"] == "cpu" else None,
        host=socket.gethostname(), date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=first["versions"], source="measured")


def average_rows(tables: list[list[list[Any]]], labels: int, harmonic: bool = False) -> list[list[Any]]:
    """Rows of all ranks as one table: the first `labels` columns name a row, the others are averaged."""
    average = statistics.harmonic_mean if harmonic else statistics.fmean
    return [[*rows[0][:labels], *(average([float(row[i]) for row in rows]) for i in range(labels, len(rows[0])))]
            for rows in zip(*tables, strict=True)]
