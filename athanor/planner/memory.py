"""Peak memory of our own trainer, by kind and pipeline rank, in bytes."""

from __future__ import annotations

import functools
import math

from athanor.cost.measured import LOGITS_BYTES, WIDTH_BYTES
from athanor.cost.pipeline import kept_microbatches
from athanor.foundation.layout import Layout, keeps_whole
from athanor.foundation.schedules import DEFAULT_SCHEDULE, cut, stages_of
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.products import Product


def peak_memory(shape: DecoderShape, layout: Layout, *, rows: int, seq_len: int, dtype: str, recompute: str = "none",
                num_microbatches: int = 1, optimizer: str = "adamw", schedule: str = DEFAULT_SCHEDULE,
                device_type: str = "cpu") -> dict[str, list[float]]:
    """Bytes by kind of each pipeline rank of our own trainer, at its fullest moment; `athanor rehearse` runs it to see.

    That is the last forward pass that is alive, a block computed again, or the end, when gradients are complete. Weights and
    state are kept in fp32 (fp64 for fp64), sharded over dp_shard x cp x tp; weights are gathered whole or a block at a time. In
    16 bits gathered ones are as short, an unsharded model has a copy, and logits come in both widths.
    """
    stored, width, is_short = 8 if dtype == "fp64" else 4, WIDTH_BYTES[dtype] if dtype != "fp8" else 2, dtype in ("bf16", "fp8")
    tokens, hidden = rows * seq_len / layout.cp, shape.hidden_size
    table = shape.vocab_size * hidden
    products, blocks = _blocks(shape)
    further, is_whole = shape.prediction_blocks(), keeps_whole(layout, shape.parameters())
    out: dict[str, list[float]] = {}
    for rank in range(layout.pp):
        held = _held(shape, layout.pp, schedule, seq_len)[rank]
        is_first, is_last = 0 in held, shape.num_hidden_layers - 1 in held
        tables = 1 if shape.tie_word_embeddings else max(is_first + is_last, 1) + (further > 0 and is_last and layout.pp > 1)
        ends = table * (tables if is_first or is_last else 0) + is_last * shape.NORM_VECTORS * hidden
        weights = (sum(blocks[n] for n in held) + ends) / layout.tp
        own = weights / (layout.dp_shard * layout.cp)
        slots = 2 * own - (sum(blocks[n] for n in held) / layout.tp / (layout.dp_shard * layout.cp) if optimizer == "muon" else 0)
        gathered = min(stored, width) * (weights if is_whole else (max(blocks[n] for n in held) + ends) / layout.tp)
        kept, worked = _kept(shape, held, products, layout.tp, recompute, device_type)
        flight = float(kept_microbatches(schedule, layout.pp, stages_of(schedule), num_microbatches, rank))
        fused = sum(p.inputs * p.outputs for n in held for p in products[n] if p.cut == "outputs") / layout.tp
        between = 6.0 * hidden if layout.pp > 1 else 0.0  # what a stage got, and what it handed on
        at_end = is_last * hidden * (2.5 + 2 / layout.tp) * (1 + further)
        # whatever the number of tokens: joined weights, the head's gradient, and once more for what predicts further tokens
        whole = fused + is_last * table / layout.tp * (1 + (further > 0))
        logits = min(LOGITS_BYTES[device_type], 4 * tokens * shape.vocab_size / layout.tp) * (1.5 if is_short else 1) * is_last
        gradients = stored * (weights if is_whole else own)
        copies = width if is_short and layout.dp_shard * layout.cp == 1 else 0
        base = {"parameters": (stored + copies) * own, "optimizer": stored * slots,
                "gathered": gathered if layout.dp_shard * layout.cp > 1 else 0.0,
                "communication": width * num_microbatches * tokens * hidden / layout.tp if layout.pp > 1 else 0.0}
        alive = flight * tokens * (kept + between + at_end) + whole
        forward = base | {"gradients": gradients if num_microbatches > 1 else 0.0, "logits": logits, "activations": width * alive}
        again = base | {"gradients": forward["gradients"], "logits": 0.0,
                        "activations": width * (flight * tokens * (kept + between) + tokens * worked + fused)}
        backward = base | {"gradients": gradients, "logits": 0.0, "activations": width * fused}
        for kind, size in max(forward, again, backward, key=lambda kinds: math.fsum(kinds.values())).items():
            out.setdefault(kind, []).append(size)
    return out


@functools.lru_cache(maxsize=256)
def _blocks(shape: DecoderShape) -> tuple[list[list[Product]], list[int]]:
    """Products and parameters of each block, those that predict further tokens included."""
    products = [shape.block_products(n) for n in range(shape.num_hidden_layers + shape.prediction_blocks())]
    return products, [sum(p.parameters for p in each) + shape.block_vectors(n) for n, each in enumerate(products)]


@functools.lru_cache(maxsize=256)
def _held(shape: DecoderShape, pp: int, schedule: str, seq_len: int) -> list[list[int]]:
    """The blocks of each pipeline rank."""
    blocks = range(shape.num_hidden_layers, shape.num_hidden_layers + shape.prediction_blocks())
    if pp == 1:
        return [list(range(blocks.stop))]
    pipeline = cut(pp, schedule, shape.block_costs(seq_len / 2))
    held = [[n for stage in pipeline.stages_of(rank) for n in pipeline.blocks[stage]] for rank in range(pp)]
    held[pipeline.ranks[-1]] += blocks
    return held


def _kept(shape: DecoderShape, held: list[int], products: list[list[Product]], tp: int, recompute: str,
          device_type: str) -> tuple[float, float]:
    """Numbers of a token that the held blocks keep for the backward pass, and those of a block that is computed again and of the
    widest gradient in it.

    The residual stream twice, what products read (whole, where it is gathered) and what they make; on accelerators, which take
    plain expressions, also the turned queries and keys and silu(gate) beside what they were made of.
    """
    each, hidden, blocks = [], shape.hidden_size, [products[n] for n in held]
    is_plain = device_type != "cpu" and recompute != "selective"
    for n, block in zip(held, blocks, strict=True):
        gates = sum(p.times * p.outputs / 2 / tp for p in block if is_plain and p.name.endswith("gate_up"))
        numbers = 2.0 * hidden / tp + max(gates, shape.kept_beside(n, tp))
        for p in block:
            numbers += p.times * (p.inputs / tp if p.cut == "inputs" else p.inputs + p.outputs / (tp if p.cut else 1))
            numbers += (shape.query_size + shape.key_value_size) / tp if p.name == "qkv" and is_plain and shape.IS_ROTARY else 0.0
        each.append(numbers)
    if recompute in ("none", "selective"):
        return sum(each), 0.0
    widest = max(p.times * p.outputs / (tp if p.cut else 1) for block in blocks for p in block)
    every = int(recompute.removeprefix("every-")) if recompute.startswith("every-") else 1
    again = [number for n, number in zip(held, each, strict=True) if (n + 1) % every == 0]
    return sum(each) - sum(again) + len(again) * hidden / tp, (max(again) + 2 * hidden + widest if again else 0.0)


def fits(memory: dict[str, list[float]], available_bytes: float, share: float = 0.8) -> bool:
    """Whether a peak fits with room for allocator and runtime."""
    return fullest(memory) <= share * available_bytes


def fullest(memory: dict[str, list[float]]) -> float:
    """Bytes of the fullest pipeline rank."""
    return max(map(math.fsum, zip(*memory.values(), strict=True)))
