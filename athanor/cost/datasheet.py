"""Rates of accelerators known by name: datasheet peaks times fitted efficiencies (datasheet.toml says from what data)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from athanor.cluster.spec import load_accelerator
from athanor.cost.case import FULL, Array, Case
from athanor.cost.rates import Work, smooth_max
from athanor.foundation.errors import UserError

GENERATIONS = ("volta", "ampere", "hopper", "blackwell", "blackwell-ultra", "other")
PROGRAMS = ("megatron", "megatron-deepspeed", "scaling", "megatron-core", "fsdp", "zero3", "jax")
SCATTERING = ("megatron", "megatron-core")  # programs whose tensor ranks share what goes from stage to stage
KERNELS = ("flash", "flash2", "flash1", "fused", "eager")  # flash2 is made for ampere, flash for whatever the device is
TORCH_KERNEL = "flash2"  # that torch's attention is
LATEST = 2026.7  # release of a program that is known by no date
FUSED, GRAPHED = 2025.6, 2026.4  # releases since which experts are computed in few kernels, and (on Blackwell) in a graph
MULTIPROCESSORS = np.array([80, 108, 132, 148, 160, 128])  # of a device of each generation (NVIDIA's architecture papers)
# tiles of a result, the parts that a sum is split into and computed side by side, and their best rates
TILES = (256, 128, 1, 1.0), (128, 256, 1, 1.0), (128, 128, 1, 0.95), (128, 64, 1, 0.8), (64, 128, 1, 0.8), (128, 128, 4, 0.85)
LEAST_SUMMED = 512  # in a part
PLAIN = 16  # how much slower products are without tensor cores, which want sides of 8 numbers (A100: 19.5 of 312 TFLOP/s)
UNFUSED_SOFTMAX = 0.4  # launches of a softmax of one operator after another, of those of a dense layer
DENSE = 4.0  # products of a dense layer, by which launches are counted


@dataclass(frozen=True)
class Machine:
    """Accelerators, links and program of each configuration, [C] or [1]; SI units, rates of one device in one direction."""

    peak_flops: Array  # in the dtype of the weights
    product_flops: Array  # in that of the blocks' products
    attainable: Array  # best matmul rate ever measured on this accelerator / its peak
    product_attainable: Array
    memory_bytes_per_second: Array
    scale_up: Array  # bytes per second
    domain: Array  # devices that scale_up links
    network: Array  # bytes per second
    memory_bytes: Array
    generation: Array  # index into GENERATIONS
    program: Array  # index into PROGRAMS
    kernel: Array  # index into KERNELS
    release: Array  # of the program, in years
    is_norm_fused: Array

    def take(self, index: object) -> Machine:
        return Machine(**{f.name: v if (v := getattr(self, f.name)).shape[-1] == 1 else v[..., index] for f in fields(self)})


ATTAINABLE = 0.78, 0.72  # of the peak in 16 and in fewer bits, where nobody measured an accelerator's matmul


@functools.cache
def accelerator(name: str) -> dict[str, Any]:
    """The plain values of a known accelerator. Raises UserError with the nearest name, or for one without its main figures."""
    facts = {key: entry["value"] for key, entry in load_accelerator(name).items() if isinstance(entry, dict)}
    facts = {key: max(value) if isinstance(value, list) else value for key, value in facts.items()}
    for key in ("peak_bf16_flops", "memory_bytes", "memory_bytes_per_second", "scale_up_bytes_per_second"):
        if key not in facts:
            raise UserError(f"accelerator '{name}': its {key} is unknown, so nothing can be priced on it")
    return facts


def machine_of(rows: Sequence[Mapping[str, float | str]]) -> Machine:
    """Machines of known accelerators. A row: accelerator, program, kernel, product_bytes; may have per_node (devices),
    nic_gbps (of a device), memory_gib, release (of the program, in years)."""
    return Machine(**{name: np.array(values) for name, values in zip(
        (f.name for f in fields(Machine)), zip(*map(_machine_row, rows), strict=True), strict=True)})


def _machine_row(row: Mapping[str, Any]) -> tuple[float, ...]:
    facts, bits = accelerator(row["accelerator"]), row.get("product_bytes", 2.0) * 8
    peak = facts["peak_bf16_flops"]
    few_bits = "fp8" if bits >= 8 or "peak_fp4_flops" not in facts else "fp4"
    dtype = f"fp{bits:.0f}" if bits > 16 else "bf16" if bits == 16 else few_bits
    if bits > 16 and f"peak_{dtype}_flops" not in facts:
        raise UserError(f"accelerator '{row['accelerator']}': its peak in {dtype} is unknown, so nothing can be priced in it")
    product = facts.get(f"peak_{dtype}_flops", peak)
    weights = product if bits > 16 else peak
    measured = facts.get("measured_bf16_flops", facts.get("expected_bf16_flops", peak * ATTAINABLE[0])) / peak
    few = facts.get("measured_fp8_flops", ATTAINABLE[1] * facts.get("peak_fp8_flops", 1.0)) / facts.get("peak_fp8_flops", 1.0)
    domain = facts.get("scale_up_devices", 8)
    if domain <= 16:
        domain = row.get("per_node", domain)
    nic = row["nic_gbps"] * 1e9 if "nic_gbps" in row else facts.get("nic_bits_per_second", 4e11)
    memory = row["memory_gib"] * 2**30 if "memory_gib" in row else facts["memory_bytes"]
    return (weights, product, measured, measured if bits >= 16 else few, facts["memory_bytes_per_second"],
            facts["scale_up_bytes_per_second"], domain, nic / 8, memory, GENERATIONS.index(facts.get("generation", "other")),
            PROGRAMS.index(row["program"]), KERNELS.index(row["kernel"]), min(LATEST, row.get("release", LATEST)),
            row.get("is_norm_fused", 1.0))


def usual_kernel(program: str) -> str:
    """The kernel of attention that a family of programs takes where it may."""
    return TORCH_KERNEL if program in ("fsdp", "scaling") else "flash"


class Rated:
    """Machines beside fitted coefficients: base values by their names, factors of a program or generation as "name.group"."""

    def __init__(self, machine: Machine, coefficients: Mapping[str, float]) -> None:
        self.machine, self._c = machine, coefficients

    def coefficient(self, name: str) -> Array | float:
        """A base value, times the factors of each configuration's program and generation where it has them."""
        value: Array | float = self._c[name]
        for groups, index in ((PROGRAMS, self.machine.program), (GENERATIONS, self.machine.generation)):
            if f"{name}.{groups[0]}" in self._c:
                value = value * np.array([self._c[f"{name}.{group}"] for group in groups])[index.astype(int)]
        return value

    @staticmethod
    def program(name: str) -> int:
        return PROGRAMS.index(name)


class Datasheet(Rated):
    """Seconds of the operations of each configuration, by the coefficients of `datasheet.toml` [time]."""

    @property
    def peak_flops(self) -> Array:
        return self.machine.product_flops

    def matmul(self, m: Array, n: Array, k: Array, peak: Array) -> Array:
        """Seconds of an m x k by k x n product: small sides leave parts of the device idle, and so do tiles of the result that
        do not fill the last round over its multiprocessors; where they are few, long sums over k are split."""
        c, many = self._c, MULTIPROCESSORS[self.machine.generation.astype(int)]

        def filled(high: int, wide: int, parts: int, rate: float) -> Array:
            full = np.ceil(np.ceil(m / high) * np.ceil(n / wide) * parts / many) * (high * wide / parts / rate)
            return full if parts == 1 else np.where(k >= LEAST_SUMMED * parts, full, np.inf)

        share = m / (m + c["m0"]) * n / (n + c["n0"]) * k / (k + c["k0"]) * m * n / np.maximum(
            1.0, many * functools.reduce(np.minimum, (filled(*tile) for tile in TILES)))
        return np.asarray(2.0 * m * n * k / (peak * np.maximum(share, 1e-9)))

    def linear(self, m: Array, n: Array, k: Array, peak: Array) -> tuple[Array, Array]:
        """Forward, and both gradients."""
        return self.matmul(m, n, k, peak), self.matmul(m, k, n, peak) + self.matmul(n, k, m, peak)

    def work(self, case: Case) -> Work:
        machine, c, tokens = self.machine, self._c, case.tokens
        reach = self.coefficient("matmul")
        peak = machine.product_flops * np.where(case.product_bytes < 2, machine.product_attainable * c["eight_bits"],
                                                machine.attainable) * reach
        peak = peak * np.where(case.product_bytes < 1, c["four_bits"], 1.0)
        local = np.maximum(1.0, case.copies / case.ep)
        is_expert = case.copies > 1
        # routed tokens of a rank spread evenly over the experts it holds; experts are whole, tensor ranks bring their own tokens
        rows = np.where(is_expert, tokens * case.ep / case.copies / case.tp * _times(case), tokens)
        cut = np.where(is_expert | (case.is_whole > 0), 1.0, case.tp)
        inputs, outputs = (np.where(case.is_row > 0, case.inputs / cut, case.inputs),
                           np.where(case.is_row > 0, case.outputs, case.outputs / cut))
        number = np.where(is_expert, local * case.moe_layers, case.uses) / case.layers
        peak = np.where(is_expert, peak * c["grouped"], peak)
        forward, backward = ((time * number).sum(axis=0) for time in self.linear(np.maximum(rows, 1.0), outputs, inputs, peak))
        attention = self.attention(case)
        made = np.where(is_expert, outputs / case.tp, outputs) * case.uses
        wide = np.where(case.is_row > 0, 0.0, made).sum(axis=0) / case.layers
        passes = self.passes(case, wide)
        moved, launches = self.mixture(case)
        own = np.where(is_expert, 0.0, case.uses).sum(axis=0) / case.layers / DENSE
        floor = self.coefficient("launch") * (own + UNFUSED_SOFTMAX * self.is_eager(case) + launches) * np.where(
            self.is_graphed(), c["graphed_launch"], 1.0)
        work = Work()
        work.add("matmul", forward, backward)
        work.add("attention", attention, 2.5 * attention)
        # engines that keep each gradient beside its parameter add every further micro-batch's to it in a pass, not in the product
        is_apart = machine.program == self.program("megatron-deepspeed")
        adding = is_apart * (1 - 1 / case.num_microbatches) * c["accumulate"] / machine.memory_bytes_per_second
        held = (inputs * outputs * number).sum(axis=0)
        work.add("elementwise", passes + moved, c["passes_backward"] * passes + 2 * moved + adding * held)
        one, two = work.seconds("block")
        work.add("launch", smooth_max(one, np.asarray(floor)) - one, smooth_max(two, np.asarray(1.5 * floor)) - two)
        # torchtitan selects operators: of two products it computes one again, and all between them
        some = np.where(machine.program == self.program("fsdp"), forward / 2 + passes, attention)
        work.recomputed = np.select([case.recompute == FULL, case.recompute > FULL], [work.seconds("block")[0], some], 0.0)
        width, reach, times = case.vocab / case.tp, machine.peak_flops * machine.attainable * reach, case.heads_of_loss
        forward, backward = self.linear(tokens, width, case.hidden, reach)
        work.add("matmul", times * forward, times * backward, "ends")
        logits = c["loss_passes"] * tokens * width * 4 / machine.memory_bytes_per_second
        work.add("cross_entropy", np.zeros(1), times * logits, "ends")
        work.add("elementwise", np.zeros(1), adding * case.hidden * width, "ends")
        return work

    def mixture(self, case: Case) -> tuple[Array, Array]:
        """Seconds of sorting tokens for their experts forward, and launches beyond those of a dense layer, in an average layer.

        Both shrank with the years: a kernel for each expert became some for all, then whole steps one CUDA graph.
        """
        machine, c, share = self.machine, self._c, case.moe_layers / case.layers
        local = np.maximum(1.0, case.copies / case.ep).max(axis=0)  # experts of a rank
        launches = c["launch_experts"] * share * local ** np.where(machine.release < FUSED, 0.75, 0.25)
        size = case.tokens / case.tp * case.top_k * case.hidden * 2.0
        moved = c["dispatch"] * share * size / machine.memory_bytes_per_second
        return moved * np.where(self.is_graphed(), c["graphed"], 1.0), launches

    def is_graphed(self) -> NDArray[np.bool_]:
        """Whether a whole step is one CUDA graph."""
        machine = self.machine
        return np.asarray((machine.release >= GRAPHED) & (machine.generation >= GENERATIONS.index("blackwell")))

    def attention(self, case: Case) -> Array:
        """Scores and values, forward, in an average layer: bound by arithmetic when fused, by traffic when scores exist.

        There, heads of sizes that tensor cores do not take are multiplied without them.
        """
        c, machine = self._c, self.machine
        heads = case.heads / case.tp
        flops = 2.0 * case.tokens * heads * (case.key_size + case.value_size) * case.mean_context
        narrow = np.minimum(1.0, case.key_size / 128) ** c["narrow"]
        rate = machine.peak_flops * self.coefficient("flash") * narrow
        is_foreign = (machine.kernel == 1) & (machine.generation > GENERATIONS.index("ampere"))
        flash = flops / rate / np.where(machine.kernel == 2, c["flash1"], 1.0) / np.where(is_foreign, c["flash2"], 1.0)
        reach = machine.peak_flops * machine.attainable * self.coefficient("matmul")
        reach = np.where(case.key_size % 8 > 0, machine.peak_flops / PLAIN, reach)
        traffic = np.where(self.is_eager(case), c["scores_eager"], c["scores_fused"]) * case.tokens * heads * case.seq_len * 2
        return np.where(machine.kernel < 3, flash, 2 * flops / reach / narrow + traffic / machine.memory_bytes_per_second)

    def is_eager(self, case: Case) -> NDArray[np.bool_]:
        """Whether softmax is one operator after another: also where Megatron's fused kernel wants a multiple of 4 matrices
        (megatron/model/fused_softmax.py)."""
        machine = self.machine
        is_odd = case.micro_batch_size * case.heads / case.tp % 4 > 0
        is_megatron = machine.program <= self.program("megatron-deepspeed")
        return np.asarray((machine.kernel == 4) | (machine.kernel == 3) & is_megatron & is_odd)

    def passes(self, case: Case, wide: Array) -> Array:
        """Element-wise work of an average layer forward: norms and residuals, and what the column-cut products make, `wide`."""
        shared = np.where(case.is_sequence_parallel > 0, 1 / case.tp, 1.0)
        norms = np.where(self.machine.is_norm_fused > 0, 1.0, self._c["unfused_norms"])
        scan = self._c["passes_scan"] * case.scanned / case.layers / case.tp
        numbers = scan + self._c["passes_hidden"] * norms * case.hidden * shared + self._c["passes_wide"] * wide
        quantised = np.where(case.product_bytes < 2, self._c["quantise"], 1.0)
        size = 2.0 * case.tokens * numbers
        return np.asarray(self.coefficient("passes") * quantised * size / self.machine.memory_bytes_per_second)

    def bus(self, ranks: Array, stride: Array) -> tuple[Array, NDArray[np.bool_]]:
        """Bytes per second that a ring of ranks, `stride` devices apart, moves at each; and whether it leaves the domain."""
        machine = self.machine
        inside = np.minimum(np.maximum(1.0, machine.domain / stride), ranks)
        outside = (ranks * stride > machine.domain) & (ranks > 1)
        link = machine.scale_up * self._c["scale_up"]
        return np.where(outside, np.minimum(machine.network * self._c["network"] * inside, link), link), outside

    def gather(self, size: Array, ranks: Array, stride: Array) -> Array:
        """An all-gather or reduce-scatter of `size` bytes in all."""
        bus, outside = self.bus(ranks, stride)
        c, own = self._c, size * (ranks - 1) / ranks
        return np.where(ranks > 1, own / bus * (1.0 + c["knee"] / np.maximum(size, 1.0))
                        + np.where(outside, c["network_latency"], c["latency"]), 0.0)

    def exchange(self, tokens: Array, size: Array, times: Array, ranks: Array, stride: Array) -> Array:
        """An all-to-all in which each rank sends each of its `tokens`, of `size` bytes, to `times` ranks.

        Between domains a token travels once to each domain that it is sent to.
        """
        machine, c = self.machine, self._c
        inside = np.minimum(np.maximum(1.0, machine.domain / stride), ranks)
        domains = np.maximum(1.0, ranks / inside)
        far = (domains - 1) * (1 - (1 - 1 / domains) ** times)
        near = times * (inside - 1) / inside
        return np.where(ranks > 1, tokens * size * np.maximum(near / (machine.scale_up * c["scale_up"]),
                                                              far / (machine.network * c["network"])) + c["latency"], 0.0)

    def tensor(self, case: Case) -> tuple[Array, Array]:
        size = case.tokens * case.hidden * case.weight_bytes
        pair = 4.0 * self.gather(size, case.tp, np.ones(1))  # of a pass: two gathers and scatters, or all-reduces
        return np.asarray(pair * (2 + (case.recompute == FULL)) * self.coefficient("tensor")), np.zeros(1)

    def context(self, case: Case) -> Array:
        keys = 2 * case.tokens * case.key_value_heads * case.key_size / case.tp * case.weight_bytes * case.cp
        return np.asarray(3 * self.gather(keys, case.cp, case.tp) * self.coefficient("context"))

    def expert(self, case: Case) -> Array:
        width = np.where((case.copies > 1) & (case.is_row == 0), case.inputs, 0.0).max(axis=0)  # experts may read a latent space
        once = self.exchange(case.tokens / case.tp, width * case.weight_bytes, case.top_k, case.ep, np.ones(1))
        return np.asarray(case.moe_layers / case.layers * 4 * self.coefficient("expert") * once)

    def hop(self, case: Case) -> Array:
        machine, c = self.machine, self._c
        size = case.tokens * case.hidden * case.weight_bytes / np.where(case.is_scattered > 0, case.tp, 1.0)
        is_far = case.tp * case.cp * case.dp >= machine.domain
        rate = np.where(is_far, machine.network * c["network"], machine.scale_up * c["scale_up"])
        return np.asarray((size / rate + c["latency"]) * self.coefficient("pipeline"))

    def data_parallel(self, case: Case, computing: Array) -> Array:
        """Gradients once a step, or (ZeRO-3) parameters for every micro-batch, some of it behind the computing.

        Where several groups of ranks hold all parameters (HSDP), each gathers its own, and shards of gradients are reduced once.
        """
        ranks, held = case.dp * case.cp, case.held_parameters * 2
        own, near = self.gather(held, ranks, case.tp), self.gather(held, np.minimum(case.shard, ranks), case.tp)
        across = 2 * self.gather(held / case.shard, np.maximum(1.0, ranks / case.shard), case.tp * case.shard)
        hidden = self.coefficient("sharded_overlap") * computing
        traffic = case.num_microbatches * 3 * near * self.coefficient("sharded")
        sharded = smooth_max(traffic, np.asarray(hidden)) - hidden + self.coefficient("sharded_rest") * traffic
        once = np.where(case.zero >= 3, across, 2 * own) * self.coefficient("data_parallel")
        return np.where(case.zero >= 3, sharded, 0.0) + once

    def update(self, case: Case) -> tuple[Array, Array]:
        """32 bytes of memory traffic a parameter: weight, gradient and both moments, read and written."""
        held = case.held_parameters * np.where(case.zero > 0, 1.0 / case.shard, 1.0)
        return np.asarray(self._c["optimizer"] * held * 32 / self.machine.memory_bytes_per_second), np.zeros(1)

    def host(self, case: Case) -> tuple[Array, Array]:
        return np.ones(1) * self.coefficient("host"), np.zeros(1)

    def skew(self, case: Case, total: Array, computing: Array) -> Array:
        """Grows with the number of replicas as the slowest of so many, with the root of a logarithm; within one, stages that are
        slower eat up bubbles."""
        replicas = np.minimum(case.devices / 8, case.dp * case.cp)
        return np.asarray(total * self.coefficient("straggler") * np.sqrt(np.log2(np.maximum(1.0, replicas))))

    def own(self) -> Array:
        return np.ones(1) * self.coefficient("own")


def _times(case: Case) -> Array:
    """How many of a kind's matrices a token meets in a layer."""
    return np.where(case.copies > 1, case.uses / np.maximum(case.moe_layers, 1.0), 1.0)
