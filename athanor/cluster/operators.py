"""What one rank's device can do while the others work too: matmuls, attention, element-wise chains, launches, the update.

Every function returns rows for `cluster.toml`; the sizes are those of small models on a CPU and of large ones on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from athanor.cluster.timing import Clock, Operation, Sample, filled, in_turns

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
MATMUL_SIZES: dict[str, dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]] = {  # (tokens, inner, outer)
    "cpu": {"fp32": ((128, 512, 2048), (64, 128, 256, 512), (64, 128, 256, 512, 4096)),
            "bf16": ((512, 4096), (64, 256), (64, 256)),
            "fp64": ((512, 2048), (64, 256), (64, 256))},
    "cuda": {"bf16": ((1024, 4096, 16384), (256, 1024, 4096, 8192), (256, 1024, 4096, 8192, 32768)),
             "fp32": ((2048, 8192), (256, 1024, 4096), (256, 1024, 4096)),
             "fp64": ((2048,), (256, 1024), (256, 1024))},
}
PEAK_SIZE = {"cpu": 1024, "cuda": 8192}
ATTENTION_SIZES = {"cpu": (16, (32, 64, 128, 256, 512), (32, 64)), "cuda": (64, (256, 1024, 4096), (64, 128))}
ELEMENT_COUNTS = {"cpu": (2**14, 2**17, 2**19, 2**22), "cuda": (2**16, 2**20, 2**24, 2**27)}
WIDTH = {"cpu": 256, "cuda": 4096}  # of the rows that element-wise work runs over
CLASSES = {"cpu": 4096, "cuda": 32768}  # columns of the cross-entropy's logits


def matmul_rows(clock: Clock, dtype: str, budget_seconds: float) -> tuple[list[list[Any]], float]:
    """Rates of the three products of a linear layer, and the best rate seen. Rows: dtype, form, m, k, n, FLOP/s.

    m tokens pass from k to n features: `forward` is x W^T, `input_gradient` is g W, `weight_gradient` is g^T x.
    """
    tokens, inner, outer = MATMUL_SIZES[clock.device.type][dtype]
    each = budget_seconds / (3 * len(tokens) * len(inner) * len(outer) + 3)
    rows, best = [], 0.0
    for m in tokens:
        for k in inner:
            for n in outer:
                for form, sample in _linear(clock, DTYPES[dtype], (m, k, n), each):
                    rows.append([dtype, form, m, k, n, 2.0 * m * k * n / sample.typical])
                    best = max(best, 2.0 * m * k * n / sample.best)
    size = PEAK_SIZE[clock.device.type]
    for _, sample in _linear(clock, DTYPES[dtype], (size, size, size), each):
        best = max(best, 2.0 * size**3 / sample.best)
    return rows, best


def _linear(clock: Clock, dtype: torch.dtype, size: tuple[int, int, int], budget: float) -> list[tuple[str, Sample]]:
    m, k, n = size
    w = torch.randn(n, k, dtype=dtype, device=clock.device)

    def activations() -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(filled(m, width, dtype=dtype, device=clock.device) for width in (k, n))  # type: ignore[return-value]

    def forward() -> Operation:
        x, _ = activations()
        return lambda: F.linear(x, w)

    def input_gradient() -> Operation:
        _, g = activations()
        return lambda: g @ w

    def weight_gradient() -> Operation:
        x, g = activations()
        return lambda: g.t() @ x

    size_bytes = dtype.itemsize * m * (k + n)
    return [(make.__name__, clock.time(in_turns(make, size_bytes, clock.device), budget))
            for make in (forward, input_gradient, weight_gradient)]


def attention_rows(clock: Clock, dtype: str, budget_seconds: float) -> list[list[Any]]:
    """Seconds of causal scaled dot-product attention. Rows: dtype, matrices, seq_len, head_dim, forward s, backward s.

    `matrices` is rows x heads.
    """
    matrices, lengths, widths = ATTENTION_SIZES[clock.device.type]
    each = budget_seconds / (2 * len(lengths) * len(widths))
    rows = []
    for length in lengths:
        for width in widths:
            def inputs(length: int = length, width: int = width) -> list[torch.Tensor]:
                return [filled(matrices // 4, 4, length, width, dtype=DTYPES[dtype], device=clock.device, requires_grad=True)
                        for _ in range(3)]

            size_bytes = 3 * DTYPES[dtype].itemsize * matrices * length * width
            rows.append([dtype, matrices, length, width, *forward_and_backward(clock, inputs, size_bytes, each)])
    return rows


def forward_and_backward(clock: Clock, inputs: Callable[[], list[torch.Tensor]], size_bytes: int,
                         budget: float) -> tuple[float, float]:
    """Seconds of attention forward, which records a graph, and of its backward pass."""
    def forward() -> Operation:
        query, key, value = inputs()
        return lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def backward() -> Operation:
        query, key, value = parts = inputs()
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        gradient = torch.full_like(output, 0.5)
        return lambda: torch.autograd.grad(output, parts, gradient, retain_graph=True)

    alone, back = (clock.time(in_turns(make, size_bytes, clock.device), budget).typical for make in (forward, backward))
    return alone, back


def elementwise_rows(clock: Clock, dtype: str, budget_seconds: float) -> list[list[Any]]:
    """Seconds of single passes over so many elements, outside autograd. Rows: dtype, operation, elements, seconds."""
    counts = ELEMENT_COUNTS[clock.device.type]
    each = budget_seconds / (len(counts) * len(OPERATIONS))
    rows = []
    for elements in counts:
        def fresh(elements: int = elements) -> torch.Tensor:
            width = WIDTH[clock.device.type]
            return filled(elements // width, width, dtype=DTYPES[dtype], device=clock.device)

        for name, make in OPERATIONS.items():
            operation = in_turns(lambda make=make: make(fresh()), DTYPES[dtype].itemsize * elements, clock.device)  # type: ignore[misc]
            rows.append([dtype, name, elements, clock.time(operation, each).typical])
    return rows


def _multiply(x: torch.Tensor) -> Operation:
    y = torch.full_like(x, 0.5)
    return lambda: x * y


def _copy(x: torch.Tensor) -> Operation:
    y = torch.empty_like(x)
    return lambda: y.copy_(x)


def _silu_backward(x: torch.Tensor) -> Operation:
    y = torch.full_like(x, 0.5)
    return lambda: torch.ops.aten.silu_backward(y, x)


def _log_softmax(x: torch.Tensor) -> Operation:
    logits = x.view(-1, min(CLASSES[x.device.type], x.numel()))
    return lambda: torch.log_softmax(logits, -1)


def _embedding(x: torch.Tensor) -> Operation:
    table = torch.randn(CLASSES[x.device.type], x.shape[1], dtype=x.dtype, device=x.device)
    index = torch.randint(0, table.shape[0], (x.shape[0],), device=x.device)
    return lambda: F.embedding(index, table)


def _embedding_backward(x: torch.Tensor) -> Operation:
    classes = CLASSES[x.device.type]
    index = torch.randint(0, classes, (x.shape[0],), device=x.device)
    return lambda: torch.ops.aten.embedding_dense_backward(x, index, classes, -1, False)


OPERATIONS: dict[str, Callable[[torch.Tensor], Operation]] = {
    "multiply": _multiply, "copy": _copy, "silu": lambda x: lambda: F.silu(x), "silu_backward": _silu_backward,
    "exp": lambda x: lambda: x.exp(), "log_softmax": _log_softmax, "embedding": _embedding,
    "embedding_backward": _embedding_backward}


def memory_rate(clock: Clock, budget_seconds: float) -> float:
    """Bytes per second read and written by copying an array that no cache holds."""
    source = torch.ones(2**25 if clock.device.type == "cpu" else 2**29, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2.0 * source.numel() / clock.time(lambda: target.copy_(source), budget_seconds).typical


def launch_overhead(clock: Clock, budget_seconds: float) -> dict[str, float]:
    """Seconds that one tiny operation costs: forward with a graph, and forward plus backward."""
    x = torch.ones(8, device=clock.device, requires_grad=True)
    depth = 20

    def forward() -> torch.Tensor:
        y = x
        for _ in range(depth):
            y = y * 1.0001
        return y

    alone = clock.time(forward, budget_seconds).typical
    both = clock.time(lambda: forward().sum().backward(), budget_seconds).typical
    return {"forward": alone / depth, "forward_backward": both / depth}


def optimizer_rows(clock: Clock, budget_seconds: float) -> list[list[Any]]:
    """Seconds of one AdamW update. Rows: number of parameter tensors, elements in all, seconds."""
    rows = []
    for tensors, elements in ((16, 2**10), (64, 2**10), (64, 2**16)):
        parameters = [torch.nn.Parameter(torch.randn(elements, device=clock.device)) for _ in range(tensors)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        update = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        rows.append([tensors, tensors * elements, clock.time(update.step, budget_seconds / 3).typical])
    return rows


def jitter_rows(clock: Clock, together: Callable[[float], list[float]], budget_seconds: float) -> list[list[float]]:
    """How unequal equal work is between ranks. Rows: seconds of the work, interquartile mean of (slowest / mean - 1).

    `together` exchanges one rank's seconds for those of all ranks, and is where they meet.
    """
    size = 256 if clock.device.type == "cpu" else 4096
    a = torch.randn(size, size, device=clock.device)
    one = max(together(clock.time(lambda: a @ a, 0.02).typical))
    rows = []
    for length in (0.002, 0.02, 0.1):
        calls = max(1, round(length / one))
        excess = []
        for _ in range(max(4, math.ceil(budget_seconds / 3 / (calls * one * 1.3)))):
            seconds = together(_run(clock, lambda: a @ a, calls))
            excess.append(max(seconds) / (sum(seconds) / len(seconds)) - 1.0)
        usual = sorted(excess)[len(excess) // 4:-(len(excess) // 4)]  # without what other processes did
        rows.append([calls * one, sum(usual) / len(usual)])
    return rows


def _run(clock: Clock, operation: Operation, calls: int) -> float:
    return clock.batch(operation, calls) * calls
