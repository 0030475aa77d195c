"""Tokens per second of one training step (forward, loss, backward) on one thread: ours, a minimal hand-written loop in plain
torch, and transformers' LlamaForCausalLM where it is installed, all with the same shape, rows and dtype.

The hand-written loop is what one writes first: separate projections, F.rms_norm, scaled_dot_product_attention over rows,
F.cross_entropy over all logits. The three take turns, and seconds are this process's own on its processor, so that a busy
machine is unfair to none; medians are printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athanor.models.context import Packed
from athanor.models.decoder import Decoder
from athanor.models.initialize import initialize
from athanor.models.shapes.decoder import DecoderShape

ROWS, SEQ_LEN, ROUNDS = 16, 256, 7
SHAPE = DecoderShape(vocab_size=4096, hidden_size=128, intermediate_size=352, num_hidden_layers=6, num_attention_heads=4,
                     tie_word_embeddings=True)


class Plain(nn.Module):
    """The same model, written without thought for speed."""

    def __init__(self, shape: DecoderShape, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.shape = shape
        self.w = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(w.clone()) for name, w in weights.items()})

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of rows [B, S]."""
        shape, w = self.shape, {name.replace("/", "."): p for name, p in self.w.items()}
        angles = torch.outer(torch.arange(tokens.shape[1]).float(), shape.rope_theta ** (
            -torch.arange(0, shape.head_dim, 2).float() / shape.head_dim))
        cos, sin = (f(torch.cat([angles, angles], -1)).to(w["model.embed_tokens.weight"].dtype) for f in (torch.cos, torch.sin))

        def turn(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat([-second, first], -1) * sin

        def heads(x: Tensor, name: str) -> Tensor:
            return F.linear(x, w[name]).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)

        x = F.embedding(tokens, w["model.embed_tokens.weight"])
        for i in range(shape.num_hidden_layers):
            block = f"model.layers.{i}."
            y = F.rms_norm(x, (x.shape[-1],), w[block + "input_layernorm.weight"], shape.rms_norm_eps)
            q, k, v = (heads(y, f"{block}self_attn.{name}_proj.weight") for name in "qkv")
            out = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True, enable_gqa=True)
            x = x + F.linear(out.transpose(1, 2).flatten(2), w[block + "self_attn.o_proj.weight"])
            y = F.rms_norm(x, (x.shape[-1],), w[block + "post_attention_layernorm.weight"], shape.rms_norm_eps)
            gate, up = (F.linear(y, w[f"{block}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, w[block + "mlp.down_proj.weight"])
        x = F.rms_norm(x, (x.shape[-1],), w["model.norm.weight"], shape.rms_norm_eps)
        return F.cross_entropy(F.linear(x, w["model.embed_tokens.weight"]).flatten(0, 1).float(), targets.flatten())


def steps(dtype: torch.dtype, rows: int) -> dict[str, Callable[[], float]]:
    """One step of each contestant on the same weights and tokens; a step returns its loss."""
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(0, SHAPE.vocab_size, (2, rows, SEQ_LEN), generator=generator)
    ours = Decoder(SHAPE).to(dtype)
    initialize(ours, 0)
    plain = Plain(SHAPE, dict(ours.state_dict()))
    context = Packed.of([SEQ_LEN] * rows)
    weights = torch.ones(rows * SEQ_LEN)

    def step(model: nn.Module, loss: Callable[[], Tensor]) -> float:
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return float(value)

    found = {"athanor": lambda: step(ours, lambda: ours(tokens.flatten(), context, targets.flatten(), weights).weighted_sum
                                     / weights.sum()),
             "plain torch": lambda: step(plain, lambda: plain(tokens, targets))}
    if importlib.util.find_spec("transformers"):
        from transformers import LlamaConfig, LlamaForCausalLM

        peer: nn.Module = LlamaForCausalLM(LlamaConfig(**SHAPE.to_config()))
        peer.to(dtype)
        peer.load_state_dict(ours.state_dict(), strict=False)
        found["transformers"] = lambda: step(peer, lambda: F.cross_entropy(peer(tokens).logits.flatten(0, 1).float(),
                                                                           targets.flatten()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of one row, to see that everything runs")
    rows, rounds = (1, 1) if parser.parse_args().quick else (ROWS, ROUNDS)
    torch.set_num_threads(1)
    flops = SHAPE.flops(rows * SEQ_LEN, (SEQ_LEN + 1) / 2)
    result: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        contestants = steps(dtype, rows)
        losses = {name: step() for name, step in contestants.items()}
        assert max(losses.values()) - min(losses.values()) < (0.1 if dtype == torch.bfloat16 else 1e-3), losses
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, step in contestants.items():
                start = time.process_time()
                step()
                seconds[name].append(time.process_time() - start)
        for name, times in seconds.items():
            middle = statistics.median(times)
            result.setdefault(str(dtype).removeprefix("torch."), {})[name] = round(rows * SEQ_LEN / middle)
            print(f"{dtype!s:15} {name:14} {rows * SEQ_LEN / middle:8.0f} tokens/s  {flops / middle / 1e9:6.1f} GFLOP/s useful  "
                  f"(best {rows * SEQ_LEN / min(times):.0f}, loss {losses[name]:.5f})", file=sys.stderr)
    print(json.dumps({"parameters": SHAPE.parameters(), "tokens_per_second": result}))


if __name__ == "__main__":
    main()
