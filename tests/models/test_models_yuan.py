"""Yuan 2.0 and M32 against a reference written from their papers' formulas, on the tensors that a published folder holds."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import models_ranks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from athanor.foundation.errors import ModelError
from athanor.foundation.launch import run_ranks
from athanor.inference.cache import PagePool
from athanor.inference.engine import Engine, Sampling, generate
from athanor.models.adapters import merge_adapter
from athanor.models.context import Groups, Packed
from athanor.models.decoder import Decoder
from athanor.models.experts import AttentionRouter
from athanor.models.find import load_architecture
from athanor.models.huggingface import load_model, logits, read_shape, save_model
from athanor.models.shapes.find import find_shape, new_shape
from athanor.models.shapes.yuan import Shape
from athanor.models.zoo import yuan
from athanor.train import flops

DENSE: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "initializer_range": 0.12, "max_position_embeddings": 128}
ODD = {**DENSE, "num_attention_heads": 3, "hidden_size": 30, "head_dim": 6, "tie_word_embeddings": False, "rope_theta": 500.0}
MIXTURE = {**DENSE, "num_experts": 8, "head_dim": 16, "rope_theta": 40890.0}  # heads wider than the stream, half of them turned
KINDS = [DENSE, ODD, MIXTURE, {**MIXTURE, "num_experts_per_tok": 3, "norm_topk_prob": False, "moe_intermediate_size": 20}]


def build(sizes: dict[str, Any], dtype: torch.dtype = torch.float32) -> Decoder:
    """A model whose every parameter matters: norms are not 1, biases are not 0."""
    module = yuan.build(Shape(**sizes)).to(dtype)
    models_ranks.initialize(module, 7)
    return module


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def filtered(x: Tensor, part: dict[str, Tensor]) -> Tensor:
    """LFA of x [S, H] as two-dimensional convolutions over [channels, tokens, 1], padded by a token on either side."""
    image = x.t()[None, :, :, None]
    for name in ("conv1", "conv2"):
        weight, bias = (part[f"self_attn.lf_gate.{name}.{leaf}"] for leaf in ("weight", "bias"))
        image = F.conv2d(image, weight, bias, padding=(1, 0))[:, :, :-1]
    return norm(image[0, :, :, 0].t() + x, part["self_attn.lf_gate.output_layernorm.weight"], 1e-6)


def turned(x: Tensor, theta: float) -> Tensor:
    """Rotary positions of x [S, heads, channels], channel i paired with i + channels / 2."""
    channels = x.shape[-1]
    angles = torch.outer(torch.arange(len(x), dtype=torch.float32), 1 / theta**(torch.arange(0, channels, 2) / channels))
    angles = torch.cat([angles, angles], 1)[:, None]
    first, second = x.chunk(2, -1)
    return x * angles.cos().to(x) + torch.cat([-second, first], -1) * angles.sin().to(x)


def routed(token: Tensor, part: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """What the experts make of one token [H]."""
    query, key, value = (part[f"mlp.gate.{name}.weight"] @ token for name in ("query", "key", "value"))
    weights = (torch.outer(query, key).softmax(1) @ value).softmax(0)
    chosen = weights.argsort(descending=True)[:config["moe_config"]["moe_top_k"]]
    total, out = weights[chosen].sum() if config["moe_config"]["norm_topk_prob"] else 1.0, torch.zeros_like(token)
    for number in chosen.tolist():
        gate, up = (part[f"mlp.experts.{number}.w1.weight"] @ token).chunk(2)
        out = out + weights[number] / total * (part[f"mlp.experts.{number}.w2.weight"] @ (F.silu(gate) * up))
    return out


def reference(folder: Path, ids: list[int], starts: tuple[int, ...] = (0,), dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits [S, vocabulary] of documents that begin at `starts`, their filters reading on from one into the next."""
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    size = config["attention_projection_size"] // heads
    rotary = size // 2 if config["use_moe"] else size
    document = torch.bucketize(torch.arange(len(ids)), torch.tensor(starts), right=True)
    mask = (document[:, None] == document).tril()
    x = tensors["model.embed_tokens.weight"][torch.tensor(ids)]
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        part = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
        u = norm(x, part["input_layernorm.weight"], eps)
        f = filtered(u, part)
        both = torch.cat([f @ part["self_attn.q_proj.weight"].t(), f @ part["self_attn.k_proj.weight"].t()], 1)
        query, key = both.view(len(ids), heads, 2 * size).split(size, 2)
        value = (u @ part["self_attn.v_proj.weight"].t()).view(len(ids), heads, size)
        query, key = (torch.cat([torch.cat([turned(piece, config["rope_theta"]) for piece in one[..., :rotary].split(lengths(
            starts, len(ids)))]), one[..., rotary:]], 2) for one in (query, key))
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(size)
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", weights, value).flatten(1) @ part["self_attn.o_proj.weight"].t()
        u = norm(x, part["post_attention_layernorm.weight"], eps)
        if config["use_moe"]:
            x = x + torch.stack([routed(token, part, config) for token in u])
        else:
            gate, up, down = (part[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            x = x + (u @ gate.t() * F.silu(u @ up.t())) @ down.t()
    head = tensors["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return norm(x, tensors["model.norm.weight"], eps) @ head.t()


def lengths(starts: tuple[int, ...], total: int) -> list[int]:
    return [end - start for start, end in zip(starts, (*starts[1:], total), strict=True)]


@pytest.mark.parametrize("sizes", KINDS)
def test_logits_are_those_of_the_formulas(sizes: dict[str, Any], tmp_path: Path) -> None:
    module = build(sizes)
    save_model(module, tmp_path)
    ids = tokens(40)
    expected = reference(tmp_path, ids)
    assert expected.abs().max() > 0.5
    assert (logits(module, ids) - expected).abs().max() <= 1e-5
    assert (logits(load_model(tmp_path), ids) - expected).abs().max() <= 1e-5
    exact = build(sizes, torch.float64)
    save_model(exact, tmp_path)
    assert (logits(exact, ids) - reference(tmp_path, ids, dtype=torch.float64)).abs().max() <= 1e-12


@pytest.mark.parametrize("sizes", [DENSE, MIXTURE])
def test_gradients_are_those_of_the_formulas(sizes: dict[str, Any], tmp_path: Path) -> None:
    """Of the filter and of the router, whose names are the same on disk, by central differences of the reference."""
    module, ids, targets = build(sizes, torch.float64), tokens(12), tokens(12, 1)
    save_model(module, tmp_path)
    module(torch.tensor(ids), Packed.of([12]), torch.tensor(targets), torch.ones(12)).weighted_sum.backward()
    tensors = load_file(tmp_path / "model.safetensors")
    start = "model.layers.1."
    looked = {"self_attn.lf_gate.conv1.weight": (3, 5, 0, 0), "self_attn.lf_gate.conv2.weight": (2, 7, 1, 0),
              "self_attn.lf_gate.conv1.bias": (4,)} | ({"mlp.gate.key.weight": (2, 9)} if "num_experts" in sizes else {})
    for name, place in looked.items():
        found = module.get_parameter(start + name).grad
        if found.ndim == 2 and len(place) == 4:
            found = torch.stack(found.chunk(2, 1), 2).unsqueeze(3)
        losses = []
        for change in (1e-5, -1e-5):
            moved = tensors[start + name].clone()
            moved[place] += change
            save_file({**tensors, start + name: moved}, tmp_path / "model.safetensors")
            predicted = reference(tmp_path, ids, dtype=torch.float64)
            losses.append(F.cross_entropy(predicted, torch.tensor(targets), reduction="sum").item())
        assert abs(found[place].item()) > 1e-4
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(found[place].item(), rel=1e-5), name


@torch.no_grad()
@pytest.mark.parametrize("sizes", [DENSE, MIXTURE])
def test_streaming_is_exact(sizes: dict[str, Any], tmp_path: Path) -> None:
    """Prompts cut anywhere, then token by token, several sequences at once: each token's logits are the formulas'."""
    module = build(sizes)
    save_model(module, tmp_path)
    sequences = [tokens(50, seed) for seed in range(3)]
    expected = [reference(tmp_path, ids) for ids in sequences]
    pool = PagePool(module, 256, Groups())
    for kept in pool.cache.filters.values():
        kept.fill_(3.0)  # what sequences before left in these pages
    pages = [pool.take(4) for _ in sequences]
    done = [0, 0, 0]
    for counts in ((1, 2, 15), (16, 1, 1), (1, 13, 1), (14, 1, 30), *(1, 1, 1) * np.ones((3, 1), int)):
        context = replace(pool.context(pages, done, [int(count) for count in counts]), wanted=None)
        ids = [each for one, first, count in zip(sequences, done, counts, strict=True) for each in one[first:first + count]]
        found = module(torch.tensor(ids), context).split([int(count) for count in counts])
        for number, (part, count) in enumerate(zip(found, counts, strict=True)):
            assert (part - expected[number][done[number]:done[number] + count]).abs().max() <= 1e-5
            done[number] += int(count)


def test_the_engine_answers_with_what_the_formulas_find_likeliest(tmp_path: Path) -> None:
    """Also where pages run out, and a prompt begins anew."""
    module = build(MIXTURE, torch.float64)
    save_model(module, tmp_path)
    prompts = [tokens(count, count) for count in (1, 5, 16, 17, 31)]
    answers = generate(module, prompts, 20)
    engine = Engine(module, 7 * 16)
    requests = [engine.submit(prompt, Sampling(20)) for prompt in prompts]
    engine.drain()
    assert [request.token_ids for request in requests] == answers
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = reference(tmp_path, prompt + answer, dtype=torch.float64)
        assert answer == whole[len(prompt) - 1:-1].argmax(1).tolist()


def test_documents_are_apart_unless_the_model_reads_on(tmp_path: Path) -> None:
    starts, ids = (0, 7, 8, 20), tokens(32)
    context = replace(Packed.of(lengths(starts, 32)), row_tokens=32)
    apart, on = build(DENSE, torch.float64), build({**DENSE, "filter_crosses_documents": True}, torch.float64)
    save_model(on, tmp_path)
    alone = torch.cat([logits(apart, ids[first:first + count]) for first, count in zip(starts, lengths(starts, 32), strict=True)])
    leaking = reference(tmp_path, ids, starts, torch.float64)
    assert (apart(torch.tensor(ids), context) - alone).abs().max() <= 1e-12
    assert (on(torch.tensor(ids), context) - leaking).abs().max() <= 1e-12
    assert (leaking - alone).abs().max() > 1e-2 and load_model(tmp_path).shape == on.shape
    twice = replace(Packed.of(lengths(starts, 32) * 2), row_tokens=32)
    assert (on(torch.tensor(ids * 2), twice)[32:] - leaking).abs().max() <= 1e-12, "rows are always apart"


def test_a_token_reaches_two_tokens_on() -> None:
    gate = build(DENSE, torch.float64).blocks["0"].self_attn.lf_gate
    x = torch.randn(9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    other = x.clone()
    other[3] += 1
    context = Packed.of([9])
    assert (gate(x, context) != gate(other, context)).any(1).tolist() == [3 <= place <= 5 for place in range(9)]


def test_the_router_attends_token_by_token() -> None:
    router = AttentionRouter(Shape(**{**MIXTURE, "num_experts": 32})).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2, generator=generator)
    x = torch.randn(11, 32, dtype=torch.float64, generator=generator)
    gates, experts = router(x, Packed.of([11]))
    for token, gate, expert in zip(x, gates, experts, strict=True):
        query, key, value = (each.weight @ token for each in (router.query, router.key, router.value))
        logit = [sum(math.exp(q * k) * v for k, v in zip(key.tolist(), value.tolist(), strict=True))
                 / sum(math.exp(q * k) for k in key.tolist()) for q in query.tolist()]
        best = sorted(range(32), key=lambda number: -logit[number])[:2]
        assert expert.tolist() == best
        share = 1 / (1 + math.exp(logit[best[1]] - logit[best[0]]))  # of the two alone
        assert gate.tolist() == pytest.approx([share, 1 - share], abs=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [DENSE, ODD, MIXTURE])
def test_published_folders_go_both_ways_byte_by_byte(sizes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    """Tensors as a published folder has them, with the buffer and the tied head that some hold besides."""
    shape = Shape(**sizes)
    generator = torch.Generator().manual_seed(3)
    hidden, width, inner = shape.hidden_size, shape.query_size, shape.intermediate_size
    named: dict[str, list[int]] = {"model.embed_tokens.weight": [96, hidden], "model.norm.weight": [hidden]}
    if not shape.tie_word_embeddings:
        named["lm_head.weight"] = [96, hidden]
    for layer in range(2):
        block = {"input_layernorm": [hidden], "post_attention_layernorm": [hidden],
                 **{f"self_attn.{name}_proj": [width, hidden] for name in "qkv"}, "self_attn.o_proj": [hidden, width],
                 "self_attn.lf_gate.conv1": [hidden // 2, hidden, 2, 1], "self_attn.lf_gate.conv2": [hidden, hidden // 2, 2, 1],
                 "self_attn.lf_gate.output_layernorm": [hidden]}
        if shape.num_experts:
            block |= {f"mlp.gate.{name}": [shape.num_experts, hidden] for name in ("query", "key", "value")}
            block |= {f"mlp.experts.{number}.w1": [2 * inner, hidden] for number in range(shape.num_experts)}
            block |= {f"mlp.experts.{number}.w2": [hidden, inner] for number in range(shape.num_experts)}
        else:
            block |= {"mlp.up_proj": [inner, hidden], "mlp.gate_proj": [inner, hidden], "mlp.down_proj": [hidden, inner]}
        named |= {f"model.layers.{layer}.{name}.weight": size for name, size in block.items()}
        named |= {f"model.layers.{layer}.self_attn.lf_gate.{name}.bias": [size] for name, size in (("conv1", hidden // 2),
                                                                                                  ("conv2", hidden))}
    tensors = {name: torch.randn(size, generator=generator).to(getattr(torch, dtype)) for name, size in named.items()}
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    (tmp_path / "config.json").write_text(json.dumps({**shape.to_config(), "dropout": 0.1, "use_loss_mask": False}))
    half = len(tensors) // 2
    parts = [dict(list(tensors.items())[:half]), {**dict(list(tensors.items())[half:]), **buffers}]
    for number, part in enumerate(parts):
        save_file(part, tmp_path / f"part-{number}.safetensors")
    index = {"weight_map": {name: f"part-{number}.safetensors" for number, part in enumerate(parts) for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    module = load_model(tmp_path, dtype)
    assert module.shape == shape
    save_model(module, tmp_path / "again")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == tensors.keys() and read_shape(tmp_path / "again") == shape
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_adapters_change_what_they_name_on_disk(tmp_path: Path) -> None:
    module = build(ODD)
    save_model(module, tmp_path / "base")
    generator, pairs, wanted = torch.Generator().manual_seed(4), {}, load_file(tmp_path / "base" / "model.safetensors")
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"):
        rows, columns = wanted[f"{name}.weight"].shape
        down, up = (torch.randn(size, generator=generator) for size in ((2, columns), (rows, 2)))
        pairs |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
        wanted[f"{name}.weight"] = wanted[f"{name}.weight"] + 2.0 * up @ down  # lora_alpha / r
    save_file(pairs, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4}))
    merge_adapter(module, tmp_path)
    save_model(module, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert max((found[name] - tensor).abs().max() for name, tensor in wanted.items()) <= 1e-6


@pytest.mark.parametrize(("count", "sizes"), [
    (2, DENSE), (4, DENSE), (2, MIXTURE), pytest.param(4, MIXTURE, marks=pytest.mark.slow)])
def test_tensor_parallel_ranks_cut_interleaved_heads_rightly(count: int, sizes: dict[str, Any], tmp_path: Path) -> None:
    """Each reads its heads from a folder; logits are the formulas', gradients those of one rank."""
    module = build(sizes, torch.float64)
    save_model(module, tmp_path / "model")
    wanted = models_ranks.results(module, replace(Packed.of(models_ranks.LENGTHS), z_loss=models_ranks.Z_LOSS), True)
    ids = models_ranks.batch()["tokens"].tolist()
    expected, first = [], 0
    for length in models_ranks.LENGTHS:
        expected.append(reference(tmp_path / "model", ids[first:first + length], dtype=torch.float64))
        first += length
    arguments = {"is_tied": True, "weighted": True, "architecture": "yuan", "folder": str(tmp_path / "model"),
                 **{key: value for key, value in sizes.items() if key != "initializer_range"}}
    for found in run_ranks("models_ranks:tensor_parallel", arguments, count, log_folder=tmp_path, threads=1, timeout=120):
        assert np.abs(found["logits"] - torch.cat(expected).numpy()).max() <= 1e-12
        assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-11)
        assert found["gradients"].keys() == wanted["gradients"].keys()
        for name, gradient in wanted["gradients"].items():
            assert np.abs(found["gradients"][name] - gradient).max() <= 1e-11, name
            assert (found["weights"][name] == module.get_parameter(name).detach().numpy()).all(), name


@pytest.mark.parametrize(("parts", "row_tokens", "is_compiled"), [
    ([5, 16, 1, 10], 0, False), ([6, 10, 3, 13], 32, False), ([15, 1, 16], 16, False),
    pytest.param([6, 10, 3, 13], 32, True, marks=pytest.mark.slow)])
def test_context_parallel_ranks_filter_across_their_border(parts: list[int], row_tokens: int, is_compiled: bool,
                                                           tmp_path: Path) -> None:
    changes = {"filter_crosses_documents": row_tokens > 0}
    module = models_ranks.build(False, "yuan", **changes)
    models_ranks.initialize(module, 7)
    wanted = models_ranks.results(module, replace(Packed.of(parts), z_loss=models_ranks.Z_LOSS, row_tokens=row_tokens), True)
    arguments = {"lengths": parts, "row_tokens": row_tokens, "architecture": "yuan", "is_compiled": is_compiled, **changes}
    for found in run_ranks("models_ranks:context_parallel", arguments, 2, log_folder=tmp_path, threads=1, timeout=120):
        assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-12)
        for name, gradient in wanted["gradients"].items():
            assert np.abs(found["gradients"][name] - gradient).max() <= 1e-12, name
        # of two blocks, forth and back: two rows and, since ranks share heads, two exchanges of these
        assert is_compiled or found["intervals"] == ["context"] * 2 * 2 * (2 + 2)


def test_flops_are_those_of_the_operators() -> None:
    """The filter's four products among them: 6 FLOP for each of its 2 H^2 weights and token."""
    module, total = build({**DENSE, "hidden_size": 64}), 48
    ids = torch.tensor(tokens(total))
    with FlopCounterMode(display=False, custom_mapping=flops.FORMULAS) as counter:
        module(ids, Packed.of([20, 28]), ids, torch.ones(total)).weighted_sum.backward()
    pairs = 20 * 21 // 2 + 28 * 29 // 2
    assert counter.get_total_flops() == module.shape.flops(total, pairs / total)
    products = {product.name: product.multiplications for product in module.shape.products()}
    assert products["lfa_in"] + products["lfa_out"] == 2 * 2 * 64 * 64


@pytest.mark.parametrize(("name", "parameters"), [
    ("yuan2-2b", 2_088_724_480), ("yuan2-51b", 51_842_105_344), ("yuan2-102b", 102_577_954_816), ("yuan2-m32", 39_942_842_368)])
def test_published_sizes_have_the_parameters_of_their_tensors(name: str, parameters: int) -> None:
    """By the table of shapes: embedding, 24 to 84 blocks, last norm."""
    shape = find_shape(name)
    hidden, inner, heads = shape.hidden_size, shape.intermediate_size, shape.query_size
    lfa = 2 * hidden * hidden + hidden // 2 + hidden + hidden
    experts = 32 * 3 * hidden * inner + 3 * 32 * hidden if name == "yuan2-m32" else 3 * hidden * inner
    block = 2 * hidden + 4 * heads * hidden + lfa + experts
    assert shape.num_hidden_layers * block + 135_040 * hidden + hidden == parameters == shape.parameters()
    with torch.device("meta"):
        module = load_architecture("yuan").build(shape)
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters


def test_a_mixtures_folder_says_what_published_ones_do(tmp_path: Path) -> None:
    config = Shape(**MIXTURE).to_config()
    assert config["moe_config"] == {"moe_num_experts": 8, "moe_top_k": 2, "ffn_hidden_size": 48, "norm_topk_prob": True,
                                    "gated_linear_unit": True} and config["use_moe"] and "num_experts" not in config
    assert find_shape("yuan2-m32").rotary_dim == 128 and find_shape("yuan2-m32").rope_theta == 40890.0
    assert find_shape("yuan2-2b").rotary_dim == 64 and find_shape("yuan2-2b").rope_theta == 10000.0
    assert new_shape("yuan", **DENSE, num_experts=4).num_experts_per_tok == 2


@pytest.mark.parametrize(("changes", "words"), [
    ({"num_key_value_heads": 2}, "each of the 4 heads of a yuan has a key head"),
    ({"partial_rotary_factor": 0.3}, "partial_rotary_factor = 0.3 of head_dim = 8"),
    ({"partial_rotary_factor": 2.0}, "partial_rotary_factor = 2.0"), ({"hidden_size": 31, "head_dim": 8}, "is odd"),
    ({"num_experts": 2, "num_experts_per_tok": 3}, "more than num_experts = 2")])
def test_a_shape_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        Shape(**{**DENSE, **changes})


@pytest.mark.parametrize(("changes", "words"), [
    ({"use_shareqk": True}, "use_shareqk = True is not supported"),
    ({"use_moe": True, "moe_config": {"moe_num_experts": 4, "gated_linear_unit": False}}, "gated_linear_unit = False of moe_c"),
    ({"use_moe": True, "moe_config": {"moe_num_experts": "four"}}, "num_experts = 'four' is not of type int"),
    ({"moe_config": [4]}, "moe_config = .* is not a table"), ({"hidden_act": "gelu"}, "only 'silu' is")])
def test_a_configuration_that_is_not_computed_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        Shape.from_config({**Shape(**DENSE).to_config(), **changes})
