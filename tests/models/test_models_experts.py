"""Mixtures of experts against transformers' Mixtral, against plain loops over tokens, and across folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from athanor.foundation.errors import ModelError
from athanor.inference.engine import Engine, Sampling, generate
from athanor.models import experts as experts_module
from athanor.models.context import Packed
from athanor.models.decoder import Decoder
from athanor.models.experts import multiply, multiply_by_loop
from athanor.models.huggingface import load_model, load_weights, logits, save_model
from athanor.models.initialize import initialize
from athanor.models.shapes.mixtral import Shape
from athanor.models.shapes.mixture import MixtureShape
from athanor.models.zoo import mixtral

Build = Callable[..., Decoder]
SIZES = [{}, {"num_experts": 5, "num_experts_per_tok": 3, "tie_word_embeddings": True}, {"num_experts_per_tok": 1},
         {"num_experts": 1, "num_experts_per_tok": 1, "intermediate_size": 30}]


def batch(count: int) -> tuple[Tensor, Tensor]:
    ids, targets = torch.randint(0, 200, (2, count), generator=torch.Generator().manual_seed(0))
    return ids, targets


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def of_peer(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names what transformers keeps with gate and up joined."""
    split = {}
    for name, tensor in found.items():
        if name.endswith("gate_up_proj"):
            for part, each in zip(("gate_proj.weight", "up_proj.weight"), tensor.chunk(2, 1), strict=True):
                split[name.replace("gate_up_proj", part)] = each
        else:
            split[name + ".weight" if name.endswith("down_proj") else name] = tensor
    return split


@pytest.mark.parametrize("changes", SIZES)
def test_logits_gradients_and_folders_are_those_of_transformers(mixture: Build, tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    module = mixture(**changes)
    save_model(module, tmp_path / "ours")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", experts_implementation="eager")
    ids, targets = batch(40)
    found, expected = module(ids, Packed.of([40])), peer(ids[None]).logits[0]
    assert type(peer).__name__ == "MixtralForCausalLM" and expected.abs().max() > 0.5
    assert (found - expected).abs().max() <= 1e-5
    F.cross_entropy(expected, targets).backward()
    (module(ids, Packed.of([40]), targets, torch.ones(40)).weighted_sum / 40).backward()
    ours, theirs = gradients(module), of_peer(gradients(peer))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) <= 1e-5
    peer.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    assert again.shape == module.shape
    save_model(again, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (tmp_path / "ours" / "model.safetensors").read_bytes()


def test_a_published_configuration_is_counted_as_published(mixture: Build) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = Shape.from_config({"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                               "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
                               "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02, "sliding_window": None})
    assert shape.rope_theta == 1e6  # what transformers takes when a Mixtral's configuration says nothing
    assert shape.parameters() == 46_702_792_704  # 93.4 GB of bf16, the size of its published files
    module = mixture()
    small = module.shape
    assert small.parameters() == sum(p.numel() for p in module.parameters())
    peer = MixtralForCausalLM(MixtralConfig(**small.to_config(), attn_implementation="eager", experts_implementation="eager"))
    with FlopCounterMode(display=False) as counter:
        peer(batch(64)[0][None]).logits.sum().backward()
    assert counter.get_total_flops() == pytest.approx(small.flops_full(64, 64), rel=0.01)


@pytest.mark.parametrize("is_normalised", [True, False])
def test_a_mixture_is_the_weighted_sum_of_each_tokens_experts(is_normalised: bool) -> None:
    shape = MixtureShape(vocab_size=10, hidden_size=16, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
                         num_experts=6, moe_intermediate_size=12, norm_topk_prob=is_normalised, initializer_range=0.5)
    module = Decoder(shape).double()
    initialize(module, 3)
    assert shape.parameters() == sum(p.numel() for p in module.parameters())
    layer = module.blocks["0"].mlp
    x = torch.randn(9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gate, up, down = (each.weight for each in (layer.experts.gate_proj, layer.experts.up_proj, layer.experts.down_proj))
    assert gate.shape == up.shape == (6, 12, 16) and down.shape == (6, 16, 12)
    for token, found in zip(x, layer(x, Packed.of([9])), strict=True):
        probabilities = (layer.gate.weight @ token).softmax(0)
        best = probabilities.argsort(descending=True)[:2]
        answers = sum(probabilities[e] * (down[e] @ (F.silu(gate[e] @ token) * (up[e] @ token))) for e in best)
        assert (found - answers / (probabilities[best].sum() if is_normalised else 1)).abs().max() <= 1e-12


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [9, 0, 0, 0]])
def test_grouped_kernels_and_the_loop_agree(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On small integers, whose sums bfloat16 holds exactly."""
    calls, grouped = [], F.grouped_mm
    monkeypatch.setattr(experts_module.F, "grouped_mm", lambda *a, **k: (calls.append(1), grouped(*a, **k))[1])
    generator = torch.Generator().manual_seed(0)
    x, weight, flowing = (torch.randint(-2, 3, size, generator=generator).bfloat16().requires_grad_()
                          for size in ((9, 16), (4, 24, 16), (9, 24)))
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    out, expected = multiply(x, weight, ends), multiply_by_loop(x, weight, ends)
    assert len(calls) == 1 and torch.equal(out, expected)
    wanted = torch.autograd.grad(expected, (x, weight), flowing)
    for a, b in zip(torch.autograd.grad(out, (x, weight), flowing), wanted, strict=True):
        assert torch.equal(a, b)
    assert [bool(part.any()) for part in wanted[1]] == [count > 0 for count in counts]


def test_the_loop_takes_what_grouped_kernels_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(experts_module.F, "grouped_mm")
    for dtype, rows, width in ((torch.float64, 5, 16), (torch.bfloat16, 5, 15), (torch.bfloat16, 0, 16)):
        x, weight = torch.ones(rows, width, dtype=dtype).requires_grad_(), torch.ones(2, 3, width, dtype=dtype).requires_grad_()
        out = multiply(x, weight, torch.tensor([rows, rows], dtype=torch.int32))
        out.sum().backward()
        assert (out == width).all() and (weight.grad[0] == rows).all() and (weight.grad[1] == 0).all()
    torch.library.opcheck(multiply_by_loop, (x.detach().double(), weight.detach().double(), torch.zeros(2, dtype=torch.int32)))


def test_bfloat16_trains_like_float32(mixture: Build) -> None:
    """With all experts chosen: else rounding sends tokens elsewhere."""
    exact, coarse = mixture(num_experts_per_tok=8), mixture(torch.bfloat16, num_experts_per_tok=8)
    exact.load_state_dict({name: p.float() for name, p in coarse.state_dict().items()})
    ids, targets = batch(60)
    for module in (exact, coarse):
        module(ids, Packed.of([60]), targets, torch.full((60,), 1 / 60)).weighted_sum.backward()
    for name, wanted in gradients(exact).items():
        assert F.cosine_similarity(gradients(coarse)[name].float().flatten(), wanted.flatten(), dim=0) > 0.99, name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:.*should not be instantiated")  # by the tracer
@pytest.mark.parametrize(("dtype", "top", "tolerance"), [
    (torch.float64, 2, 1e-12), (torch.float32, 2, 1e-5), (torch.bfloat16, 8, 0.05)])  # rounding must send no token elsewhere
def test_compiled_blocks_are_one_graph_with_the_same_gradients(mixture: Build, dtype: torch.dtype, top: int,
                                                               tolerance: float) -> None:
    module, compiled = mixture(dtype, num_experts_per_tok=top), mixture(dtype, num_experts_per_tok=top)
    for block in compiled.blocks.values():
        assert block.is_one_graph
        block.compile(backend="aot_eager", fullgraph=True)
    for lengths in ([7, 20, 21], [24, 24]):
        ids, targets = batch(48)
        for each in (module, compiled):
            each(ids, Packed.of(lengths), targets, torch.full((48,), 1 / 48)).weighted_sum.backward()
    found = gradients(compiled)
    assert all((found[name] - wanted).norm() <= tolerance * wanted.norm() for name, wanted in gradients(module).items())


def test_the_engine_answers_with_the_logits_of_the_packed_pass(mixture: Build, tmp_path: Path) -> None:
    save_model(mixture(), tmp_path)
    module = load_model(tmp_path, "float64")
    prompt = batch(12)[0].tolist()
    engine = Engine(module, 4096)
    for seed in (None, 2):
        if seed is not None:
            initialize(module, seed)
            engine.load_weights(seed)
        request = engine.submit(prompt, Sampling(10))
        engine.drain()
        whole = logits(module, prompt + request.token_ids).log_softmax(-1)
        for place, (token, logp) in enumerate(zip(request.token_ids, request.logprobs, strict=True), len(prompt) - 1):
            assert token == whole[place].argmax() and logp == pytest.approx(whole[place, token].item(), abs=1e-9)
    together = generate(module, [prompt, prompt[:3]], 8)
    assert together == [generate(module, [each], 8)[0] for each in (prompt, prompt[:3])]


def test_stages_of_a_pipeline_read_their_own_experts(mixture: Build, tmp_path: Path) -> None:
    whole = mixture()
    save_model(whole, tmp_path)
    parts = [mixtral.build(whole.shape, layers, is_first=layers.start == 0, is_last=layers.start == 1)
             for layers in (range(1), range(1, 2))]
    for part in parts:
        load_weights(part, tmp_path)
        assert all(torch.equal(whole.state_dict()[name], weight) for name, weight in part.state_dict().items())
    ids, context = batch(20)[0], Packed.of([20])
    assert torch.equal(parts[1](parts[0](ids, context), context), whole(ids, context))


def test_folders_that_do_not_fit_are_refused_by_their_names_on_disk(mixture: Build, tmp_path: Path) -> None:
    save_model(mixture(), tmp_path)
    weights, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(weights)
    lost = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    save_file({"x" if name == lost else name: tensor for name, tensor in tensors.items()}, weights)
    with pytest.raises(ModelError, match=f"{lost} is missing; x is surplus"):
        load_model(tmp_path)
    for changes, words in (({"num_local_experts": 10**9}, "num_experts = 1000000000"),
                           ({"sliding_window": 4}, "sliding_window = 4"),
                           ({"num_local_experts": 1}, "num_experts_per_tok = 2 is more than num_experts = 1"),
                           ({"num_local_experts": "x"}, "num_local_experts = 'x' is not of type int"),
                           ({"num_local_experts": 0}, "it must be at least 1")):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ModelError, match=words):
            load_model(tmp_path)
    for changes, words in (({"moe_intermediate_size": 3}, "the width of an expert"),
                           ({"norm_topk_prob": False}, "norm_topk_prob = false")):
        with pytest.raises(ModelError, match=words):
            mixture(**changes)
    assert Shape.from_config(config) == mixture().shape and "num_experts" not in config


def test_what_experts_add_to_the_residual_stream_begins_smaller(mixture: Build) -> None:
    weights = dict(mixture().named_parameters())
    for name, deviation in (("up_proj", 0.1), ("down_proj", 0.05)):  # 0.1 / sqrt(2 x 2 layers)
        assert weights[f"model.layers.0.mlp.experts.{name}.weight"].std().item() == pytest.approx(deviation, rel=0.02)
