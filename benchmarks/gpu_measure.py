"""What a card does by itself: its clocks while it works, and how fast it multiplies, attends and moves memory."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from athanor.models.attention import attend_evenly
from athanor.models.context import Packed
from athanor.models.fp8 import FORWARD, quantise
from athanor.models.fused import rms_norm, rope_table, rotate, swiglu
from athanor.models.loss import score
from athanor.models.shapes.decoder import DecoderShape

PEAK_FLOPS = 989e12  # dense bf16 of H100 and H200
LLAMA = {"vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192}
SHAPES = {"8B": DecoderShape(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                             num_key_value_heads=8, **LLAMA),
          "1B": DecoderShape(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=16,
                             num_key_value_heads=8, **LLAMA)}
TOYS = {name: DecoderShape(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
                           num_attention_heads=4, num_key_value_heads=2) for name, layers in (("8B", 8), ("1B", 2))}
QUERY = "clocks.sm,power.draw,temperature.gpu,clocks_throttle_reasons.active"


class Bench:
    """Where and how big: a card, or (`is_dry`) a CPU with toys, which shows that the script works and nothing else.

    `problems` are sentences on what a measurement should not have been; they do not stop the others.
    """

    def __init__(self, is_dry: bool) -> None:
        self.is_dry, self.device, self.problems = is_dry, torch.device("cpu" if is_dry else "cuda"), list[str]()

    @property
    def shapes(self) -> dict[str, DecoderShape]:
        return TOYS if self.is_dry else SHAPES

    @property
    def tokens(self) -> int:
        return 64 if self.is_dry else 8192

    @property
    def backend(self) -> str:
        return "aot_eager" if self.is_dry else "inductor"

    def seconds(self, wanted: float) -> float:
        return 0.01 if self.is_dry else wanted

    def random(self, *size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Random numbers: a card multiplies zeros faster than it can multiply anything else."""
        return torch.randn(*size, device=self.device, dtype=torch.float32).to(dtype)

    def wait(self) -> None:
        if not self.is_dry:
            torch.cuda.synchronize()


class Clocks:
    """Reads the card's clock, power, temperature and reasons to slow down once a second, while it is entered."""

    def __init__(self, bench: Bench) -> None:
        self.rows: list[dict[str, Any]] = []
        self.is_done, self.is_dry = threading.Event(), bench.is_dry
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Clocks:
        if not self.is_dry:
            self.uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}".replace("GPU-GPU-", "GPU-")
            self.thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.is_done.set()
        if self.thread.is_alive():
            self.thread.join(timeout=10)

    def _watch(self) -> None:
        begin = time.perf_counter()
        command = ["nvidia-smi", "-i", self.uuid, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
        while not self.is_done.wait(1.0):
            try:
                found = subprocess.run(command, capture_output=True, text=True, timeout=8, check=True).stdout
            except (OSError, subprocess.SubprocessError):
                continue  # a second that was not read is a row less
            clock, watts, degrees, reasons = (part.strip() for part in found.split(","))
            self.rows.append({"seconds": time.perf_counter() - begin, "sm_mhz": clock, "watts": watts, "celsius": degrees,
                              "throttle_reasons": reasons})

    def summary(self) -> dict[str, Any]:
        def middle(key: str) -> float | None:
            values = [float(row[key]) for row in self.rows if row[key].replace(".", "", 1).isdigit()]
            return statistics.median(values) if values else None

        return {"sm_mhz": middle("sm_mhz"), "watts": middle("watts"), "celsius": middle("celsius"), "readings": len(self.rows),
                "throttle_reasons": sorted({row["throttle_reasons"] for row in self.rows})}


def time_work(bench: Bench, work: Callable[[], object], seconds: float = 1.0, warm: int = 3, least: int = 5) -> dict[str, float]:
    """Seconds of one call: median, 10th and 90th percentile by events on the device, and by the clock on the wall."""
    for _ in range(warm):
        work()
    bench.wait()
    begin = time.perf_counter()
    work()
    bench.wait()
    once = max(1e-7, time.perf_counter() - begin)
    inner = max(1, round(0.005 / once))  # calls between events: at least 5 ms
    rounds = max(least, round(bench.seconds(seconds) / (inner * once)))
    marks, begin = [_mark(bench)], time.perf_counter()
    for _ in range(rounds):
        for _ in range(inner):
            work()
        marks.append(_mark(bench))
    bench.wait()
    wall = (time.perf_counter() - begin) / (rounds * inner)
    times = [_between(a, b) / inner for a, b in itertools.pairwise(marks)]
    compare_clocks(bench, sum(times) * inner, wall * rounds * inner)
    return {**spread(times), "wall_seconds": wall, "calls": float(rounds * inner)}


def compare_clocks(bench: Bench, on_device: float, wall: float) -> None:
    """Note when seconds by events and by the wall clock differ by more than 3 % and 2 ms."""
    if abs(wall - on_device) > max(0.03 * wall, 2e-3) and not bench.is_dry:
        bench.problems.append(f"events say {on_device:.4f} s where the wall clock says {wall:.4f} s")


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median and 10th and 90th percentile."""
    ordered = sorted(times)
    return {"median_seconds": statistics.median(ordered), "p10_seconds": ordered[len(ordered) // 10],
            "p90_seconds": ordered[(len(ordered) * 9) // 10]}


def _mark(bench: Bench) -> Any:
    if bench.is_dry:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(a: Any, b: Any) -> float:
    return float(b - a) if isinstance(a, float) else float(a.elapsed_time(b)) / 1e3


def kernels_of(bench: Bench, work: Callable[[], object]) -> list[str]:
    """Names of what ran on the device (of operators on a CPU) during one call."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU] if bench.is_dry else [activity.CPU, activity.CUDA]) as profile:
        work()
        bench.wait()
    device = torch.autograd.DeviceType.CPU if bench.is_dry else torch.autograd.DeviceType.CUDA
    return sorted({event.name for event in profile.events() if event.device_type == device})


def sustained(bench: Bench) -> dict[str, Any]:
    """FLOP/s of 8192^3 products over a minute: of the first half second, and of the second half of the minute."""
    size, wanted = (64, 0.05) if bench.is_dry else (8192, 60.0)
    a, b = bench.random(size, size), bench.random(size, size)
    out = torch.empty_like(a)
    rates, begin = list[tuple[float, float]](), time.perf_counter()
    with Clocks(bench) as clocks:
        while (elapsed := time.perf_counter() - begin) < wanted:
            marks = _mark(bench)
            for _ in range(50):
                torch.mm(a, b, out=out)
            end = _mark(bench)
            bench.wait()
            rates.append((elapsed, 50 * 2 * size**3 / _between(marks, end)))
    burst = [rate for at, rate in rates if at < wanted / 120] or [rates[0][1]]
    late = [rate for at, rate in rates if at > wanted / 2] or [rates[-1][1]]
    return {"burst_flops": max(burst), "sustained_flops": statistics.median(late), "clocks": clocks.summary(),
            "rows": clocks.rows}


def products(bench: Bench) -> list[dict[str, Any]]:
    """FLOP/s of every product of a block and of the head, forward and backward, in bf16 and in fp8."""
    found = []
    for model, shape in bench.shapes.items():
        rows = 16 if bench.is_dry else 2048
        sizes = {"qkv": (bench.tokens, shape.query_size + 2 * shape.key_value_size, shape.hidden_size),
                 "o": (bench.tokens, shape.hidden_size, shape.query_size),
                 "gate_up": (bench.tokens, 2 * shape.intermediate_size, shape.hidden_size),
                 "down": (bench.tokens, shape.hidden_size, shape.intermediate_size),
                 "head": (rows, shape.vocab_size, shape.hidden_size)}
        for name, (m, n, k) in sizes.items():
            x, weight, gradient = bench.random(m, k), bench.random(n, k), bench.random(m, n)
            works: dict[str, Callable[[], object]] = {
                "forward bf16": lambda x=x, w=weight: x @ w.t(), "dgrad bf16": lambda g=gradient, w=weight: g @ w,
                "wgrad bf16": lambda g=gradient, x=x: g.t() @ x}
            if name != "head":
                small, scale = quantise(x, FORWARD)
                for kind, (rows_8, columns_8) in {"forward": (small, quantise(weight, FORWARD)[0]),
                                                  "dgrad": (quantise(gradient, torch.float8_e5m2)[0],
                                                            quantise(weight.t().contiguous(), FORWARD)[0]),
                                                  "wgrad": (quantise(gradient.t().contiguous(), torch.float8_e5m2)[0],
                                                            quantise(x.t().contiguous(), FORWARD)[0])}.items():
                    for fast in (True, False):
                        works[f"{kind} fp8{' fast' if fast else ''}"] = (
                            lambda a=rows_8, b=columns_8, s=scale, f=fast: torch._scaled_mm(
                                a, b.t(), s, s, out_dtype=torch.bfloat16, use_fast_accum=f))
            for kind, work in works.items():
                times = time_work(bench, work, 0.4)
                found.append({"model": model, "product": name, "kind": kind, "m": m, "n": n, "k": k, **times,
                              "flops_per_second": 2.0 * m * n * k / times["median_seconds"]})
    return found


def attention_table(bench: Bench) -> list[dict[str, Any]]:
    """Causal FLOP/s of each backend, with the kernels that ran; notes when those are not the backend's own."""
    lengths = [16, 32] if bench.is_dry else [2048, 4096, 8192]
    heads = {"4/2 d16": (4, 2, 16)} if bench.is_dry else {"32/8 d128": (32, 8, 128), "16/8 d128": (16, 8, 128),
                                                         "32/8 d64": (32, 8, 64)}
    backends = {"flash": (SDPBackend.FLASH_ATTENTION, "flash")}
    if not bench.is_dry:
        backends["cudnn"] = (SDPBackend.CUDNN_ATTENTION, "cudnn")
    found = []
    for length in lengths:
        for name, (query_heads, kv_heads, width) in heads.items():
            query, key, value = (bench.random(bench.tokens, count, width).requires_grad_()
                                 for count in (query_heads, kv_heads, kv_heads))
            flowing = torch.randn_like(query)
            for backend, (kind, word) in {**backends, "ours": (None, "flash" if bench.is_dry else "cudnn")}.items():
                def forward(kind: Any = kind, parts: Any = (query, key, value), length: int = length) -> Tensor:
                    if kind is None:
                        return attend_evenly(*parts, length)
                    q, k, v = (part.unflatten(0, (-1, length)).transpose(1, 2) for part in parts)
                    with sdpa_kernel(kind):
                        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                    return out.transpose(1, 2).flatten(0, 1)

                def both(forward: Any = forward, parts: Any = (query, key, value), flowing: Tensor = flowing) -> object:
                    return torch.autograd.grad(forward(), parts, flowing)

                names = kernels_of(bench, both)
                if not any(word in kernel for kernel in names):
                    bench.problems.append(f"{backend} attention ran {names}, none of which is a {word} kernel")
                flops = 4.0 * bench.tokens * query_heads * width * (length + 1) / 2
                one, two = time_work(bench, forward, 0.3), time_work(bench, both, 0.5)
                back = two["median_seconds"] - one["median_seconds"]
                found.append({"backend": backend, "heads": name, "seq_len": length, "forward": one, "forward_backward": two,
                              "forward_flops_per_second": flops / one["median_seconds"],
                              "backward_flops_per_second": 2.5 * flops / back if back > 0 else None, "kernels": names})
    return found


def element_wise(bench: Bench) -> list[dict[str, Any]]:
    """Seconds, and bytes per second that have to move, of what is not a product; compiled as it is inside a block."""
    shape = bench.shapes["8B"]
    x, wide = bench.random(bench.tokens, shape.hidden_size), bench.random(bench.tokens, 2 * shape.intermediate_size)
    scale, heads = bench.random(shape.hidden_size), bench.random(bench.tokens, shape.num_attention_heads, shape.head_dim)
    rope = rope_table(Packed.of([bench.tokens], bench.device).positions, shape.head_dim, shape.rope_theta, torch.bfloat16)
    pieces = {"rms_norm": (lambda a, w: rms_norm(a, w, 1e-5), (x, scale), 2, 4), "swiglu": (swiglu, (wide,), 1.5, 2.5),
              "rope": (rotate, (heads, rope), 2, 2)}
    found = []
    for name, (function, inputs, forward_passes, backward_passes) in pieces.items():
        leaves = [part.detach().requires_grad_(part.dtype == torch.bfloat16) for part in inputs]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        compiled = torch.compile(function, backend=bench.backend, fullgraph=True, dynamic=False)
        flowing = torch.randn_like(compiled(*leaves))
        one = time_work(bench, lambda f=compiled, a=leaves: f(*a), 0.3)
        two = time_work(bench, lambda f=compiled, a=leaves, w=wanted, g=flowing: torch.autograd.grad(f(*a), w, g), 0.3)
        size = inputs[0].numel() * 2
        back = two["median_seconds"] - one["median_seconds"]
        found.append({"piece": name, "forward": one, "forward_backward": two,
                      "forward_bytes_per_second": forward_passes * size / one["median_seconds"],
                      "backward_bytes_per_second": backward_passes * size / back if back > 0 else None})
    head = bench.random(shape.vocab_size, shape.hidden_size).requires_grad_()
    targets = torch.randint(0, shape.vocab_size, (bench.tokens,), device=bench.device)
    weights, hidden = torch.ones(bench.tokens, device=bench.device), x.detach().requires_grad_()
    loss = time_work(bench, lambda: torch.autograd.grad(score(hidden, head, targets, weights, None).weighted_sum,
                                                        (hidden, head)), 1.0)
    flops = 6.0 * bench.tokens * shape.vocab_size * shape.hidden_size
    found.append({"piece": "head and loss", "forward_backward": loss, "flops_per_second": flops / loss["median_seconds"]})
    found.append(_adamw(bench))
    return found


def _adamw(bench: Bench) -> dict[str, Any]:
    count = 4096 if bench.is_dry else 1 << 28
    weight = torch.nn.Parameter(bench.random(count, dtype=torch.float32))
    weight.grad = bench.random(count, dtype=torch.float32)
    optimizer = torch.optim.AdamW([weight], lr=1e-4, fused=True)
    times = time_work(bench, optimizer.step, 0.5)
    return {"piece": "fused AdamW, fp32", "step": times, "bytes_per_second": 28.0 * count / times["median_seconds"]}
