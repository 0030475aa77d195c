"""A mixture of experts in place of the feed-forward layer: every token goes to its top experts, and none is dropped.

Tokens are sorted by expert, so that each expert multiplies one contiguous run of rows. Under expert parallelism a rank holds
a run of whole experts and rows travel there and back; under tensor parallelism every rank routes all tokens alike and holds
a part of every expert, which leaves partial sums.
Legend: T tokens, H hidden_size, E experts and F their width (this rank's part), K experts per token, N rows (token and expert).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athanor.models.collectives import all_to_all, exchange, size
from athanor.models.context import Context
from athanor.models.fused import swiglu
from athanor.models.pieces import Matrix
from athanor.models.rehearsed import on_host
from athanor.models.shapes.deepseek_v3 import Shape as SigmoidShape
from athanor.models.shapes.mixture import MixtureShape
from athanor.models.shapes.yuan import Shape as AttendedShape

GROUPED_ALIGNMENT_BYTES = 16  # of the rows that grouped_mm takes


class Stacked(nn.Module):
    """One matrix per expert in a single weight [E, rows, columns], not yet initialised."""

    def __init__(self, experts: int, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, rows, columns))


class Router(nn.Module):
    """Which experts a token goes to, and with what weights."""

    def __init__(self, shape: MixtureShape) -> None:
        super().__init__()
        self.top, self.is_normalised = shape.num_experts_per_tok, shape.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(shape.num_experts, shape.hidden_size))

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """x [T, H] -> gates [T, K] in fp32 or wider, experts [T, K].

        A tensor-parallel rank sees a part of every expert, so its gradient of the weight is one of several summands.
        """
        return choose(F.linear(x, self.weight), self.top, self.is_normalised)


class AttentionRouter(nn.Module):
    """Yuan 2.0-M32's (arXiv:2405.17976): each expert's query attends to all experts' keys, so that their correlations count."""

    def __init__(self, shape: MixtureShape) -> None:
        super().__init__()
        self.top, self.is_normalised = shape.num_experts_per_tok, shape.norm_topk_prob
        self.query, self.key, self.value = (Matrix(shape.num_experts, shape.hidden_size) for _ in range(3))

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """As Router's; all of it in fp32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = torch.cat([self.query.weight, self.key.weight, self.value.weight]).to(wide)
        query, key, value = F.linear(x.to(wide), weight).chunk(3, 1)
        attended = (query.unsqueeze(2) * key.unsqueeze(1)).softmax(-1)  # [T, E, E]
        return choose((attended * value.unsqueeze(1)).sum(-1), self.top, self.is_normalised)


def choose(logits: Tensor, top: int, is_normalised: bool) -> tuple[Tensor, Tensor]:
    """The largest of the softmax of logits [T, E]: gates [T, K] in fp32 or wider, maybe divided by their sum, and which."""
    gates, experts = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).topk(top, -1)
    return gates / gates.sum(-1, keepdim=True) if is_normalised else gates, experts


class SigmoidRouter(nn.Module):
    """DeepSeek-V3's (arXiv:2412.19437): experts are chosen by scores with a bias that no gradient moves, groups of them first;
    gates are the scores without it."""

    def __init__(self, shape: SigmoidShape) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(shape.num_experts, shape.hidden_size))
        self.e_score_correction_bias = nn.Parameter(torch.empty(shape.num_experts), requires_grad=False)
        self.load: Tensor
        self.register_buffer("load", torch.zeros(shape.num_experts, dtype=torch.int64), persistent=False)  # tokens in training

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SigmoidRouter:
        """It never gets narrower than fp32, on disk neither, as transformers keeps it."""
        exact = {name: parameter.data for name, parameter in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters():
            if parameter.dtype.itemsize < torch.float32.itemsize:
                parameter.data = exact[name].to(parameter.device)
        return self

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """As Router's."""
        shape, wide = self.shape, torch.promote_types(x.dtype, torch.float32)
        scores = F.linear(x.to(wide), self.weight.to(wide)).sigmoid()
        wanted = scores.detach() + self.e_score_correction_bias
        if shape.topk_group < shape.n_group:
            groups = wanted.unflatten(1, (shape.n_group, -1))
            best = groups.topk(min(2, groups.shape[2]), -1).values.sum(-1).topk(shape.topk_group, -1).indices
            is_kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
            wanted = groups.masked_fill(~is_kept.unsqueeze(2), -math.inf).flatten(1)
        experts = wanted.topk(shape.num_experts_per_tok, -1).indices
        if self.training:
            self.load.add_(torch.zeros_like(self.load).scatter_add_(0, experts.flatten(), torch.ones_like(experts.flatten())))
        gates = scores.gather(1, experts)
        gates = gates / gates.sum(-1, keepdim=True) if shape.norm_topk_prob else gates
        return gates * shape.routed_scaling_factor, experts


def new_router(shape: MixtureShape) -> Router | SigmoidRouter | AttentionRouter:
    """What sends the tokens of a shape to its experts."""
    if isinstance(shape, SigmoidShape):
        return SigmoidRouter(shape)
    return AttentionRouter(shape) if isinstance(shape, AttendedShape) else Router(shape)


class Experts(nn.Module):
    """The SwiGLU layers of all experts (under expert parallelism: of this rank's)."""

    def __init__(self, shape: MixtureShape) -> None:
        super().__init__()
        count, width, hidden = shape.num_experts, shape.moe_intermediate_size, shape.hidden_size
        self.gate_proj = Stacked(count, width, hidden)
        self.up_proj = Stacked(count, width, hidden)
        self.down_proj = Stacked(count, hidden, width)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Rows [N, H] sorted by expert -> the experts' answers [N, H]; ends [E] int32, where each expert's rows end."""
        gate_up = [multiply(rows, each.weight, ends) for each in (self.gate_proj, self.up_proj)]
        return multiply(swiglu(torch.cat(gate_up, -1)), self.down_proj.weight, ends)


class Mixture(nn.Module):
    """A router and its experts: [T, H] -> [T, H], the sum of each token's experts weighted by their gates, and of the experts
    that all tokens share."""

    def __init__(self, shape: MixtureShape, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.num_experts = shape.num_experts
        self.gate = new_router(shape)
        self.experts = Experts(shape)
        self.shared_experts = shared

    closing_bias = None

    @property
    def is_one_graph(self) -> bool:
        """Whether it compiles without a break: not where rows travel, whose counts the host must know.

        To be asked before fully_shard, which cuts the experts for another reason.
        """
        return self.experts.gate_proj.weight.shape[0] == self.num_experts

    def forward(self, x: Tensor, context: Context) -> Tensor:
        gates, experts = self.gate(x, context)
        chosen, order = experts.flatten().sort(stable=True)
        back = inverse(order)
        ends = torch.searchsorted(chosen, torch.arange(self.num_experts, device=x.device), right=True, out_int32=True)
        rows = take_rows(x, order, back, gates.shape[1])
        answers = self.experts(rows, ends) if size(context.groups.ep) == 1 else self.travel(rows, ends, context)
        answers = take_rows(answers, back, order, 1).unflatten(0, gates.shape)
        routed = (answers * gates.unsqueeze(-1)).sum(1).to(x.dtype)
        return routed if self.shared_experts is None else routed + self.shared_experts(x, context)

    @torch.compiler.disable
    def travel(self, rows: Tensor, ends: Tensor, context: Context) -> Tensor:
        """Send each row to the rank that holds its expert, and bring the answers back. ends [all experts]."""
        ep = context.groups.ep
        counts = ends.diff(prepend=ends.new_zeros(1)).view(size(ep), -1)  # of each rank's experts
        arriving = all_to_all(counts, ep, "expert")  # from each rank, for my experts
        sent, received = on_host(torch.stack([counts.sum(1), arriving.sum(1)]), len(rows))
        rows = exchange(rows, ep, sent, received)
        expert = torch.arange(counts.shape[1], device=rows.device).repeat(size(ep))
        order = expert.repeat_interleave(arriving.flatten(), output_size=len(rows)).sort(stable=True).indices
        back = inverse(order)
        answers = self.experts(take_rows(rows, order, back, 1), arriving.sum(0).cumsum(0, dtype=torch.int32))
        return exchange(take_rows(answers, back, order, 1), ep, received, sent)


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order` [N]."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def take_rows(x: Tensor, order: Tensor, back: Tensor, copies: int) -> Tensor:
    """Every row of x [N / copies, H] `copies` times, in a new order: row i is row order[i] of the copies. `back` undoes it."""
    return _TakeRows.apply(x, order, back, copies)


class _TakeRows(torch.autograd.Function):
    """Both ways only read rows: nothing is added in an order that could change from run to run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return x[order if copies == 1 else order // copies]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (back,) = ctx.saved_tensors
        rows = gradient[back]
        return rows if ctx.copies == 1 else rows.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


def multiply(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each expert's rows of x [N, H] times its matrix of weight [E, F, H], transposed: [N, F].

    ends [E] int32: where each expert's rows end. torch's grouped kernels, which need not know them on the host, take bf16 in
    rows of whole 16 bytes, and at least one; all else goes expert by expert. On a CPU both take the same time (measured), and
    so does one multiplication by gate and up joined, for which weights would be copied.
    """
    is_aligned = not any(length * x.element_size() % GROUPED_ALIGNMENT_BYTES for length in weight.shape[1:])
    if x.dtype == torch.bfloat16 and is_aligned and x.shape[0]:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return multiply_by_loop(x, weight, ends)


@torch.library.custom_op("athanor::multiply_by_loop", mutates_args=())
def multiply_by_loop(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`multiply` expert by expert, in any dtype."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    for matrix, rows in zip(weight, _runs(ends), strict=True):
        torch.mm(x[rows], matrix.t(), out=out[rows])
    return out


@torch.library.custom_op("athanor::multiply_by_loop_backward", mutates_args=())
def multiply_by_loop_backward(gradient: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight; zero for an expert without rows."""
    to_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    to_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for matrix, to_matrix, rows in zip(weight, to_weight, _runs(ends), strict=True):
        torch.mm(gradient[rows], matrix, out=to_x[rows])
        torch.mm(gradient[rows].t(), x[rows], out=to_matrix)
    return to_x, to_weight


def _runs(ends: Tensor) -> list[slice]:
    places = [0, *ends.tolist()]
    return [slice(begin, end) for begin, end in pairwise(places)]


@multiply_by_loop.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@multiply_by_loop_backward.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return (torch.empty_like(x, memory_format=torch.contiguous_format),
            torch.empty_like(weight, memory_format=torch.contiguous_format))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    return *multiply_by_loop_backward(gradient, *ctx.saved_tensors), None


multiply_by_loop.register_autograd(_backward, setup_context=_keep)
