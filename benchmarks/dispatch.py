"""What tensor parallelism costs the processor before anything is computed or sent: forward and backward of one block.

    python benchmarks/dispatch.py [--rounds N] [--json] [--quick]

Tiny tensors and a fake process group of two ranks, so that neither kernels nor communication hide the dispatch. Side by side:
a block in plain torch; our block on one rank; our block with explicit tensor and sequence parallelism; the plain block under
DTensor's `parallelize_module`. They take turns; printed are medians of processor time per block on one thread, and ratios to
the plain block with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pairs import compare, interval_text, take_turns
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from athanor.models.context import Groups, Packed, Rope
from athanor.models.decoder import Block
from athanor.models.fused import rope_table
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.zoo.llama import TENSOR_DIMS
from athanor.parallel.tensor import shard_parameters

TOKENS, TENSOR_RANKS = 8, 2
SHAPE = DecoderShape(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
PLAIN, OURS_ALONE, OURS, DTENSOR = "plain torch", "athanor, one rank", "athanor, tensor parallel", "DTensor"


class PlainAttention(nn.Module):
    """Separate projections, rotary positions, scaled_dot_product_attention. x [1, T, H]."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(shape.hidden_size, shape.hidden_size, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        out = F.scaled_dot_product_attention(turn(q, cos, sin), turn(k, cos, sin), v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class PlainMLP(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class PlainBlock(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (
            nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps) for _ in range(2))
        self.self_attn, self.mlp = PlainAttention(shape), PlainMLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


def with_dtensor(block: PlainBlock, mesh: DeviceMesh) -> PlainBlock:
    """Tensor and sequence parallel by DTensor's own styles."""
    rowwise, colwise = RowwiseParallel(output_layouts=Shard(1)), ColwiseParallel()
    attention = PrepareModuleInput(input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None))
    parallelize_module(block, mesh, {
        "input_layernorm": SequenceParallel(), "post_attention_layernorm": SequenceParallel(),
        "self_attn": attention, "self_attn.q_proj": colwise, "self_attn.k_proj": colwise, "self_attn.v_proj": colwise,
        "self_attn.o_proj": rowwise, "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": colwise, "mlp.up_proj": colwise, "mlp.down_proj": rowwise})
    return block


def contestants(mesh: DeviceMesh, repeats: int) -> dict[str, Callable[[], None]]:
    """`repeats` times forward and backward of each block."""
    def repeat(block: nn.Module, tokens: int, shape: tuple[int, ...], forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        x = torch.randn(shape, requires_grad=True)

        def work() -> None:
            for _ in range(repeats):
                block.zero_grad(set_to_none=True)
                x.grad = None
                forward(x).sum().backward()  # type: ignore[no-untyped-call]

        return work

    def ours(groups: Groups, tokens: int) -> Callable[[], None]:
        block = Block(SHAPE, 0)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
        if groups.tp is not None:
            shard_parameters(block, TENSOR_DIMS, mesh)
        context = Packed.of([TOKENS], groups=groups)
        rope = Rope(rope_table(context.positions, SHAPE.head_dim, SHAPE.rope_theta, torch.float32))
        context = replace(context, rope=rope)
        return repeat(block, tokens, (tokens, SHAPE.hidden_size), lambda x: block(x, context))

    def plain(block: PlainBlock, tokens: int) -> Callable[[], None]:
        angles = torch.rand(TOKENS, SHAPE.head_dim)
        cos, sin = angles.cos(), angles.sin()
        return repeat(block, tokens, (1, tokens, SHAPE.hidden_size), lambda x: block(x, cos, sin))

    part = TOKENS // TENSOR_RANKS
    return {PLAIN: plain(PlainBlock(SHAPE), TOKENS), OURS_ALONE: ours(Groups(), TOKENS),
            OURS: ours(Groups(tp=mesh.get_group()), part), DTENSOR: plain(with_dtensor(PlainBlock(SHAPE), mesh), part)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", action="store_true", help="print one JSON document to standard output")
    parser.add_argument("--quick", action="store_true", help="few repetitions, to see that everything runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    repeats, rounds = (2, 2) if options.quick else (20, options.rounds)
    dist.init_process_group("fake", rank=0, world_size=TENSOR_RANKS, store=FakeStore())
    mesh = init_device_mesh("cpu", (TENSOR_RANKS,), mesh_dim_names=("tp",))
    found = compare(take_turns(contestants(mesh, repeats), rounds), PLAIN)
    dist.destroy_process_group()
    for row in found.values():
        row["cpu_milliseconds"] = 1e3 * float(row.pop("cpu_seconds")) / repeats  # type: ignore[arg-type]
        del row["wall_seconds"], row["wall_ratio"]
    if options.json:
        print(json.dumps({"rounds": rounds, "blocks": found}))
        return
    for name, row in found.items():
        print(f"{name:26} {row['cpu_milliseconds']:6.2f} ms of processor time, {interval_text(row['cpu_ratio'])} x plain")


if __name__ == "__main__":
    main()
