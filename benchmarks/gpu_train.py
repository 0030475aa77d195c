"""How fast a card trains: a layer by differences, whole models through the real training code, and transformers beside it."""

from __future__ import annotations

import copy
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gpu_measure import PEAK_FLOPS, Bench, Clocks, compare_clocks, kernels_of, spread, time_work
from torch import Tensor

from athanor.foundation.errors import LayoutError
from athanor.foundation.layout import Layout
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder
from athanor.models.context import Packed
from athanor.models.decoder import Decoder
from athanor.models.fp8 import convert
from athanor.models.initialize import initialize
from athanor.models.shapes.decoder import DecoderShape
from athanor.parallel.mesh import leave, make_mesh
from athanor.train import loop
from athanor.train.settings import settle
from athanor.train.stage import Job, make_pipeline
from athanor.train.step import Trainee, run_step

GRADIENTS = {"bf16": 0.99, "fp8": 0.93}  # least cosine of a parameter's gradient with that of fp32


def close_to_exact(bench: Bench) -> list[dict[str, Any]]:
    """Losses and gradients of a small model, eager and compiled, bf16 and fp8, documents even and ragged, beside eager fp32."""
    width, vocabulary = (64, 128) if bench.is_dry else (512, 2048)
    shape = DecoderShape(vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.05)
    exact = Decoder(shape)
    initialize(exact, 0)
    tokens = torch.randint(0, vocabulary, (2, 8 * bench.tokens if bench.is_dry else 1024))
    found = []
    for lengths in ([tokens.shape[1] // 4] * 4, [tokens.shape[1] - 100, 93, 7]):
        wanted_loss, wanted = _gradients(exact, tokens, lengths)
        for precision in ("bf16", "fp8"):
            for is_compiled in (False, True):
                model = copy.deepcopy(exact).to(bench.device, torch.bfloat16)
                _prepare(bench, model, precision, is_compiled)
                loss, gradients = _gradients(model, tokens.to(bench.device), lengths)
                worst = min((F.cosine_similarity(gradients[name].cpu().float().flatten(), gradient.flatten(), dim=0).item(), name)
                            for name, gradient in wanted.items())
                row = {"precision": precision, "is_compiled": is_compiled, "lengths": lengths, "loss": loss,
                       "exact_loss": wanted_loss, "least_cosine": worst[0], "of": worst[1]}
                found.append(row)
                if not (worst[0] > GRADIENTS[precision] and abs(loss / wanted_loss - 1) < 0.02):
                    bench.problems.append(f"gradients differ from eager fp32: {row}")
    return found


def _gradients(model: Decoder, tokens: Tensor, lengths: list[int]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    weights = torch.ones(tokens.shape[1], device=tokens.device)
    scored = model(tokens[0], Packed.of(lengths, tokens.device), tokens[1], weights)
    (scored.weighted_sum / tokens.shape[1]).backward()
    return scored.weighted_sum.item() / tokens.shape[1], {name: p.grad for name, p in model.named_parameters()}  # type: ignore


def _prepare(bench: Bench, model: Decoder, precision: str, is_compiled: bool) -> None:
    if precision == "fp8":
        convert(model)
    if is_compiled:
        for block in model.blocks.values():
            block.compile(backend=bench.backend, fullgraph=True, dynamic=False)


def _random_weights(model: torch.nn.Module) -> None:
    """Weights of the usual size, drawn on the device: names and layouts do not matter here, seconds do."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)


def layer_times(bench: Bench) -> list[dict[str, Any]]:
    """Milliseconds of one 8B layer forward and backward: 8 layers minus 4, so that embedding and head cancel."""
    found = []
    tokens = torch.randint(0, bench.shapes["8B"].vocab_size, (2, bench.tokens), device=bench.device)
    weights, context = torch.ones(bench.tokens, device=bench.device), Packed.of([bench.tokens], bench.device)
    for precision, is_compiled in (("bf16", False), ("bf16", True), ("fp8", True)):
        seconds: dict[int, dict[str, float]] = {}
        for layers in (4, 8):
            shape = replace(bench.shapes["8B"], num_hidden_layers=layers)
            with torch.device(bench.device):
                model = Decoder(shape).to(torch.bfloat16)
            _random_weights(model)
            _prepare(bench, model, precision, is_compiled)

            def step(model: Decoder = model) -> None:
                model.zero_grad(set_to_none=True)
                model(tokens[0], context, tokens[1], weights).weighted_sum.backward()

            seconds[layers] = time_work(bench, step, 6.0, warm=1 if bench.is_dry else 8, least=2 if bench.is_dry else 10)
        layer = (seconds[8]["median_seconds"] - seconds[4]["median_seconds"]) / 4
        flops = shape.flops(bench.tokens, (bench.tokens + 1) / 2) - 6.0 * bench.tokens * shape.vocab_size * shape.hidden_size
        found.append({"precision": precision, "is_compiled": is_compiled, "layer_seconds": layer, "of_layers": seconds,
                      "flops_per_second": flops / 8 / layer if layer > 0 else None, "kernels": kernels_of(bench, step)})
        del model, step
        _forget(bench)
    return found


class Rows:
    """Synthetic rows of one document each: tokens are a pure function of the row's number."""

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        self.vocab_size, self.seq_len, self.count = vocab_size, seq_len, 1 << 30

    def take(self, first: int, count: int) -> list[dict[str, Any]]:
        return [{"tokens": np.random.default_rng(number).integers(3, self.vocab_size, self.seq_len + 1).astype(np.int32),
                 "starts": np.zeros(1, np.int32), "weight": np.ones(self.seq_len, np.float32)}
                for number in range(first, first + count)]


def make_job(bench: Bench, shape: DecoderShape, precision: str, seq_len: int, micro_batches: int, recompute: str) -> Job:
    """A stage of the real trainer on one rank, with made-up rows."""
    stage: dict[str, Any] = {"optimizer_state_dtype": "bf16", "seq_len": seq_len, "steps": 1000,
                             "micro_batch_size": bench.tokens // seq_len,
                             "global_batch_tokens": bench.tokens * micro_batches, "optimizer": "adamw",
                             "precision": precision, "compile": not bench.is_dry}
    lines = ['name = "gpu"', "[[data.source]]", 'name = "synthetic"', 'kind = "text"', 'path = "none"', "[parallel]",
             f'recompute = "{recompute}"', "[[stage]]",
             'name = "pretrain"', *(f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
                                    for key, value in stage.items())]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gpu.toml"
        file.write_text("\n".join(lines).replace("'", '"'))
        recipe = load_recipe(file)
    layout, run = Layout(), RunFolder(Path("unused"))
    settings = settle(recipe, recipe.stage[0], layout, shape)
    rows: Any = Rows(shape.vocab_size, seq_len)
    return Job(run, run.stage("pretrain"), recipe, settings, layout, make_pipeline(recipe, layout, settings, shape), shape,
               None, rows, rows, {})


def build(job: Job, device_type: str) -> Trainee:
    """What the trainer builds, but for weights drawn on the device."""
    is_mixed = loop.compute_dtype(job.settings.precision) is not None and not loop.keeps_masters(job)
    mesh = make_mesh(job.layout, device_type, is_mixed)
    stages, sharded = loop.lay_out(job, mesh)
    for part in stages.parts.values():
        part.to_empty(device=mesh.device)
        _random_weights(part)
    return loop.equip(job, stages, sharded)


def predicted_bytes(shape: DecoderShape, tokens: int, recompute: str) -> dict[str, float]:
    """Memory of training in bf16 with exact weights beside, moments in bf16 and gradients added up in fp32.

    A compiled block keeps, per token in bf16, its input, the middle of its residual stream and both normed (H each), queries,
    keys and values as made and as turned, attention's output, gate, up and their product; `selective` only what products and
    attention make; a recomputed block its input, and one block at a time the rest.
    """
    parameters, layers = float(shape.parameters()), shape.num_hidden_layers
    projected = shape.query_size + 2 * shape.key_value_size
    whole = 4 * shape.hidden_size + 2 * projected + shape.query_size + 3 * shape.intermediate_size
    made = 2 * shape.hidden_size + projected + shape.query_size + 2 * shape.intermediate_size + shape.hidden_size
    kept = {"none": layers * whole, "selective": layers * made + whole,
            "every-2": layers // 2 * (whole + shape.hidden_size) + whole, "full": layers * shape.hidden_size + whole}[recompute]
    return {"exact weights": 4 * parameters, "copies": 2 * parameters, "gradients": 4 * parameters, "optimizer": 4 * parameters,
            "activations": 2.0 * kept * tokens, "head": 8.0 * shape.vocab_size * (shape.hidden_size + 2048)}


def choices(bench: Bench, shape: DecoderShape) -> list[tuple[DecoderShape, str]]:
    """Ways to train a shape, best first: those with what the card is predicted to hold, and at last with fewer layers."""
    if bench.is_dry:
        return [(shape, "selective")]
    room = 0.97 * torch.cuda.get_device_properties(0).total_memory
    found = [(shape, policy) for policy in ("none", "selective", "every-2", "full")
             if sum(predicted_bytes(shape, bench.tokens, policy).values()) <= room]
    parts = (replace(shape, num_hidden_layers=layers) for layers in range(shape.num_hidden_layers - 1, 0, -1))
    fewer = [part for part in parts if sum(predicted_bytes(part, bench.tokens, "none").values()) <= 0.9 * room]
    return found + [(part, "none") for part in fewer[:1]]


def cases(bench: Bench) -> Iterator[tuple[str, str, int, int, float]]:
    """Model, precision, sequence length, micro-batches per step, and seconds to spend on it: 7 minutes in all."""
    long, short = (32, 16) if bench.is_dry else (8192, 4096)
    yield "8B", "bf16", long, 8, 90.0
    yield "8B", "fp8", long, 8, 75.0
    yield "8B", "bf16", short, 8, 60.0
    yield "1B", "bf16", long, 8, 40.0
    yield "1B", "bf16", short, 8, 30.0
    yield "1B", "fp8", long, 8, 30.0


def train(bench: Bench, sustained_flops: float | None) -> list[dict[str, Any]]:
    """Tokens per second and MFU of whole optimizer steps through the trainer, with memory predicted and used."""
    found = []
    for model, precision, seq_len, micro_batches, seconds in cases(bench):
        for shape, recompute in choices(bench, bench.shapes[model]):
            row: dict[str, Any] = {"model": model, "layers": shape.num_hidden_layers,
                                   "of_layers": bench.shapes[model].num_hidden_layers, "precision": precision,
                                   "seq_len": seq_len, "micro_batches": micro_batches, "recompute": recompute,
                                   "predicted_bytes": predicted_bytes(shape, bench.tokens, recompute)}
            found.append(row)
            try:
                job = make_job(bench, shape, precision, seq_len, micro_batches, recompute)
                row |= _train_one(bench, job, sustained_flops, seconds)
            except (LayoutError, torch.OutOfMemoryError) as error:
                row["refused"] = str(error).splitlines()[0]
            finally:
                leave()
            _forget(bench)
            if "out of memory" not in row.get("refused", ""):
                break
    return found


def _forget(bench: Bench) -> None:
    """Give back the memory of the model before."""
    gc.collect()
    if not bench.is_dry:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _train_one(bench: Bench, job: Job, sustained_flops: float | None, seconds: float) -> dict[str, Any]:
    begin = time.perf_counter()
    trainee = build(job, bench.device.type)
    settings = job.settings
    size, mine = settings.micro_batch_size, settings.rows_per_step
    batches = [trainee.objective.collate(job.rows.take(i, size), settings.seq_len) for i in range(0, mine, size)]
    losses, times, walls = list[float](), list[float](), list[float]()
    is_ready = time.perf_counter()

    def step() -> None:
        losses.append(run_step(trainee, batches, 1e-4, 1.0).loss)

    for _ in range(2):
        step()
    warm = time.perf_counter()
    with Clocks(bench) as clocks:
        while len(times) < 2 or (time.perf_counter() - begin < bench.seconds(seconds) and len(times) < 40):
            start, wall = _event(bench), time.perf_counter()
            step()
            end = _event(bench)
            bench.wait()
            walls.append(time.perf_counter() - wall)
            times.append(walls[-1] if bench.is_dry else start.elapsed_time(end) / 1e3)
    compare_clocks(bench, sum(times), sum(walls))
    if not losses[-1] < losses[0]:
        bench.problems.append(f"the loss went from {losses[0]} to {losses[-1]} on rows seen again and again")
    tokens, middle = settings.global_batch_tokens, spread(times)
    step_seconds = middle["median_seconds"]
    causal = job.shape.flops(tokens, (settings.seq_len + 1) / 2) / step_seconds
    full = job.shape.flops_full(tokens, settings.seq_len) / step_seconds
    return {"tokens_per_second": tokens / step_seconds, "tokens_per_second_p10": tokens / middle["p90_seconds"],
            "tokens_per_second_p90": tokens / middle["p10_seconds"], "steps": len(times), "losses": losses,
            "mfu_causal": causal / PEAK_FLOPS, "mfu_full": full / PEAK_FLOPS,
            "share_of_sustained": causal / sustained_flops if sustained_flops else None,
            "used_bytes": None if bench.is_dry else torch.cuda.max_memory_allocated(), "build_seconds": is_ready - begin,
            "warm_up_seconds": warm - is_ready, "clocks": clocks.summary()}


def _event(bench: Bench) -> Any:
    event = None if bench.is_dry else torch.cuda.Event(enable_timing=True)
    if event is not None:
        event.record()
    return event


def peers(bench: Bench) -> list[dict[str, Any]]:
    """Forward, backward and a fused AdamW on bf16 weights: this decoder and transformers' Llama, taking turns on one card.

    Both compiled block by block, both with attention that sees no mask; the same shape, tokens and weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    found = []
    for model, layers in (("8B", 8), ("1B", bench.shapes["1B"].num_hidden_layers)):
        shape = replace(bench.shapes[model], num_hidden_layers=layers)
        tokens = torch.randint(0, shape.vocab_size, (2, bench.tokens), device=bench.device)
        with torch.device(bench.device):
            ours = Decoder(shape).to(torch.bfloat16)
            theirs: Any = LlamaForCausalLM(LlamaConfig(**shape.to_config(), attn_implementation="sdpa")).to(torch.bfloat16)
        _random_weights(ours)
        theirs.load_state_dict(ours.state_dict(), strict=False)
        _prepare(bench, ours, "bf16", True)
        for layer in theirs.model.layers:
            layer.compile(backend=bench.backend, dynamic=False)
        weights, context = torch.ones(bench.tokens, device=bench.device), Packed.of([bench.tokens], bench.device)
        losses: dict[str, Callable[[], Tensor]] = {
            "athanor": lambda m=ours, c=context, t=tokens, w=weights: m(t[0], c, t[1], w).weighted_sum / t.shape[1],
            "transformers": lambda m=theirs, t=tokens: F.cross_entropy(m(t[0][None], use_cache=False).logits[0].float(), t[1])}
        modules = {"athanor": ours, "transformers": theirs}
        steps = {name: _peer_step(modules[name], loss) for name, loss in losses.items()}
        values = {name: step().item() for name, step in steps.items()}
        if abs(values["athanor"] / values["transformers"] - 1) > 0.01:
            bench.problems.append(f"the peers' losses differ: {values}")
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
        for _ in range(1 if bench.is_dry else 3):
            for name, step in steps.items():
                turns[name].append(time_work(bench, step, 5.0, warm=1 if bench.is_dry else 5, least=2))
        for name, times in turns.items():
            middle = sorted(turn["median_seconds"] for turn in times)[len(times) // 2]
            found.append({"peer": name, "model": model, "layers": layers, "tokens_per_second": bench.tokens / middle,
                          "mfu_causal": shape.flops(bench.tokens, (bench.tokens + 1) / 2) / middle / PEAK_FLOPS,
                          "turns": times, "first_loss": values[name]})
        del ours, theirs, losses, modules, steps
        _forget(bench)
    return found


def _peer_step(module: torch.nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return value.detach()

    return step
