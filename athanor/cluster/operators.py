"""What one rank's device can do while the others work too: matmuls, attention, element-wise chains, launches, the update.

Every function returns rows for `cluster.toml`; the sizes are those of small models on a CPU and of large ones on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from athanor.cluster.timing import Clock, Operation, Sample

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
MATMUL_SIZES: dict[str, dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]] = {  # (tokens, inner, outer)
    "cpu": {"fp32": ((512, 4096), (64, 128, 256, 512), (64, 128, 256, 512, 4096)),
            "bf16": ((512, 4096), (64, 256), (64, 256)),
            "fp64": ((512, 2048), (64, 256), (64, 256))},
    "cuda": {"bf16": ((2048, 16384), (256, 1024, 4096, 8192), (256, 1024, 4096, 8192, 32768)),
             "fp32": ((2048, 8192), (256, 1024, 4096), (256, 1024, 4096)),
             "fp64": ((2048,), (256, 1024), (256, 1024))},
}
PEAK_SIZE = {"cpu": 1024, "cuda": 8192}
ATTENTION_SIZES = {"cpu": ((16,), (32, 64, 128, 256, 512), (32, 64)), "cuda": ((64,), (256, 1024, 4096), (64, 128))}
ELEMENT_COUNTS = {"cpu": (2**14, 2**17, 2**20, 2**22), "cuda": (2**16, 2**20, 2**24, 2**27)}
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
                    rows.append([dtype, form, m, k, n, 2.0 * m * k * n / sample.median])
                    best = max(best, 2.0 * m * k * n / sample.best)
    size = PEAK_SIZE[clock.device.type]
    for _, sample in _linear(clock, DTYPES[dtype], (size, size, size), each):
        best = max(best, 2.0 * size**3 / sample.best)
    return rows, best


def _linear(clock: Clock, dtype: torch.dtype, size: tuple[int, int, int], budget: float) -> list[tuple[str, Sample]]:
    m, k, n = size
    x = torch.randn(m, k, dtype=dtype, device=clock.device)
    w = torch.randn(n, k, dtype=dtype, device=clock.device)
    g = torch.randn(m, n, dtype=dtype, device=clock.device)
    forms: dict[str, Operation] = {"forward": lambda: F.linear(x, w), "input_gradient": lambda: g @ w,
                                   "weight_gradient": lambda: g.t() @ x}
    return [(form, clock.time(operation, budget)) for form, operation in forms.items()]


def attention_rows(clock: Clock, dtype: str, budget_seconds: float) -> list[list[Any]]:
    """Seconds of scaled dot-product attention. Rows: dtype, mask, matrices, seq_len, head_dim, forward s, backward s.

    `matrices` is rows x heads; `mask` is 'causal' (by flag) or 'documents' (a boolean mask per row).
    """
    matrices, lengths, widths = ATTENTION_SIZES[clock.device.type]
    each = budget_seconds / (4 * len(matrices) * len(lengths) * len(widths))
    rows = []
    for count in matrices:
        for length in lengths:
            for width in widths:
                for mask in ("causal", "documents"):
                    forward, backward = _attention(clock, DTYPES[dtype], (count, length, width), mask, each)
                    rows.append([dtype, mask, count, length, width, forward, backward])
    return rows


def _attention(clock: Clock, dtype: torch.dtype, size: tuple[int, int, int], mask: str, budget: float) -> tuple[float, float]:
    count, length, width = size
    heads = 4
    query, key, value = (torch.randn(count // heads, heads, length, width, dtype=dtype, device=clock.device,
                                     requires_grad=True) for _ in range(3))
    allowed = None
    if mask == "documents":
        allowed = torch.ones(count // heads, 1, length, length, dtype=torch.bool, device=clock.device).tril()
        allowed[:, :, length // 2:, :length // 2] = False

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, is_causal=allowed is None)

    return forward_and_backward(clock, forward, [query, key, value], budget)


def forward_and_backward(clock: Clock, forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor],
                         budget: float) -> tuple[float, float]:
    """Seconds of a forward pass that records a graph, and of its backward pass."""
    output = forward()
    gradient = torch.randn_like(output)
    alone = clock.time(forward, budget).median
    backward = clock.time(lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True), budget).median
    return alone, backward


def elementwise_rows(clock: Clock, dtype: str, budget_seconds: float) -> list[list[Any]]:
    """Seconds of chains without matmuls by number of elements. Rows: dtype, chain, elements, forward s, backward s.

    add (residual), rms_norm, silu_mul, rotary, embedding, cross_entropy (elements = rows x classes), copy.
    """
    counts = ELEMENT_COUNTS[clock.device.type]
    each = budget_seconds / (2 * len(counts) * len(CHAINS))
    rows = []
    for chain, make in CHAINS.items():
        for elements in counts:
            forward, inputs = make(clock.device, DTYPES[dtype], elements)
            rows.append([dtype, chain, elements, *forward_and_backward(clock, forward, inputs, each)])
    return rows


Chain = tuple[Callable[[], torch.Tensor], list[torch.Tensor]]


def _leaf(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device=device, requires_grad=True)


def _add(device: torch.device, dtype: torch.dtype, elements: int) -> Chain:
    a, b = _leaf(device, dtype, elements), _leaf(device, dtype, elements)
    return lambda: a + b, [a, b]


def _copy(device: torch.device, dtype: torch.dtype, elements: int) -> Chain:
    a = _leaf(device, dtype, elements)
    return a.clone, [a]


def _rms_norm(device: torch.device, dtype: torch.dtype, elements: int) -> Chain:
    width = WIDTH[device.type]
    x, w = _leaf(device, dtype, elements // width, width), _leaf(device, dtype, width)
    return lambda: F.rms_norm(x, (width,), w, 1e-5), [x, w]


def _silu_mul(device: torch.device, dtype: torch.dtype, elements: int) -> Chain:
    a, b = _leaf(device, dtype, elements), _leaf(device, dtype, elements)
    return lambda: F.silu(a) * b, [a, b]


def _rotary(device: torch.device, dtype: torch.dtype, elements: int) -> Chain:
    half = 32
    x = _leaf(device, dtype, elements // (8 * half), 4, 2 * half)
    cosine, sine = (torch.randn(x.shape[0], 1, 2 * half, dtype=dtype, device=device) for _ in range(2))

    def forward() -> torch.Tensor:
        rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * cosine + rotated * sine

    return forward, [x]


def _embedding(device: torch.device, dtype: torch.dtype, elements: int) -> Chain:
    width = WIDTH[device.type]
    table = _leaf(device, dtype, CLASSES[device.type], width)
    index = torch.randint(0, table.shape[0], (elements // width,), device=device)
    return lambda: F.embedding(index, table), [table]


def _cross_entropy(device: torch.device, dtype: torch.dtype, elements: int) -> Chain:
    classes = CLASSES[device.type]
    logits = _leaf(device, dtype, max(1, elements // classes), classes)
    target = torch.randint(0, classes, (logits.shape[0],), device=device)
    return lambda: F.cross_entropy(logits.float(), target, reduction="sum"), [logits]


CHAINS: dict[str, Callable[[torch.device, torch.dtype, int], Chain]] = {
    "add": _add, "copy": _copy, "rms_norm": _rms_norm, "silu_mul": _silu_mul, "rotary": _rotary,
    "embedding": _embedding, "cross_entropy": _cross_entropy}


def memory_rate(clock: Clock, budget_seconds: float) -> float:
    """Bytes per second read and written by copying an array that no cache holds."""
    source = torch.ones(2**25 if clock.device.type == "cpu" else 2**29, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2.0 * source.numel() / clock.time(lambda: target.copy_(source), budget_seconds).median


def launch_overhead(clock: Clock, budget_seconds: float) -> dict[str, float]:
    """Seconds that one tiny operation costs: forward with a graph, and forward plus backward."""
    x = torch.ones(8, device=clock.device, requires_grad=True)
    depth = 20

    def forward() -> torch.Tensor:
        y = x
        for _ in range(depth):
            y = y * 1.0001
        return y

    alone = clock.time(forward, budget_seconds).median
    both = clock.time(lambda: forward().sum().backward(), budget_seconds).median
    return {"forward": alone / depth, "forward_backward": both / depth}


def optimizer_rows(clock: Clock, budget_seconds: float) -> list[list[Any]]:
    """Seconds of one AdamW update. Rows: number of parameter tensors, elements in all, seconds."""
    rows = []
    for tensors, elements in ((16, 2**10), (64, 2**10), (64, 2**16)):
        parameters = [torch.nn.Parameter(torch.randn(elements, device=clock.device)) for _ in range(tensors)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        update = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        rows.append([tensors, tensors * elements, clock.time(update.step, budget_seconds / 3).median])
    return rows


def jitter_rows(clock: Clock, together: Callable[[float], list[float]], budget_seconds: float) -> list[list[float]]:
    """How unequal equal work is between ranks. Rows: seconds of the work, mean of (slowest / mean - 1) over ranks.

    `together` exchanges one rank's seconds for those of all ranks, and is where they meet.
    """
    size = 256 if clock.device.type == "cpu" else 4096
    a = torch.randn(size, size, device=clock.device)
    one = max(together(clock.time(lambda: a @ a, 0.02).median))
    rows = []
    for length in (0.002, 0.02, 0.1):
        calls = max(1, round(length / one))
        excess = []
        for _ in range(max(3, math.ceil(budget_seconds / 3 / (calls * one * 1.3)))):
            seconds = together(_run(clock, lambda: a @ a, calls))
            excess.append(max(seconds) / (sum(seconds) / len(seconds)) - 1.0)
        rows.append([calls * one, sum(excess) / len(excess)])
    return rows


def _run(clock: Clock, operation: Operation, calls: int) -> float:
    return clock.batch(operation, calls) * calls
