"""What every architecture of the zoo must do: compute what transformers computes, read and write its folders, and be cut."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from athanor.foundation.errors import ModelError
from athanor.inference.engine import generate
from athanor.models.context import Packed
from athanor.models.decoder import Decoder
from athanor.models.find import load_architecture
from athanor.models.huggingface import load_model, logits, read_shape, save_model
from athanor.models.initialize import initialize
from athanor.models.rehearsed import computing_like
from athanor.models.shapes.find import architectures, shape_class
from athanor.models.shapes.rope import RopeScaling
from athanor.models.stored import stored
from athanor.parallel.tensor import tensor_dim

SIZES = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
         "initializer_range": 0.1, "max_position_embeddings": 128, "head_dim": 16}
GROUPED = {"num_key_value_heads": 2}
# beside the plain model of each; what the one in front of it differs in, odd sizes included
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [{"rope_scaling": RopeScaling("linear", 4.0)}, {"rope_scaling": RopeScaling("dynamic", 2.0)},
              {"head_dim": 32, "rope_scaling": RopeScaling("llama3", 8.0, 32)},
              {"rope_scaling": RopeScaling("llama3", 8.0, 64, 1.0, 2.0), "rope_theta": 100.0},
              {"head_dim": 64, "rope_scaling": RopeScaling("yarn", 4.0, 32, attention_factor=0.1 * math.log(4) + 1)},
              {"rope_scaling": RopeScaling("yarn", 2.0, 64, beta_fast=8.0, attention_factor=1.0, truncate=False)}],
    "gemma": [{**GROUPED, "num_key_value_heads": 1, "head_dim": 24}, {"rope_theta": 300.0, "rms_norm_eps": 1e-3}],
    "gpt2": [{"tie_word_embeddings": False}, {"hidden_size": 60, "head_dim": 15, "intermediate_size": 70, "rms_norm_eps": 1e-3}],
    "mistral": [{**GROUPED, "sliding_window": 128}, {**GROUPED, "sliding_window": 9}],
    "qwen3_moe": [{"mlp_only_layers": (1,), "norm_topk_prob": True}, {"decoder_sparse_step": 2, "num_experts_per_tok": 1}],
    "deepseek_v3": [{"q_lora_rank": 0, "topk_group": 2, "v_head_dim": 24, "n_shared_experts": 2},
                    {"rope_scaling": RopeScaling("yarn", 4.0, 32, attention_factor=1.1, mscale_all_dim=0.8), "n_group": 1,
                     "topk_group": 1, "norm_topk_prob": False, "first_k_dense_replace": 0, "tie_word_embeddings": True}],
    "qwen2": [{**GROUPED, "tie_word_embeddings": True}, {**GROUPED, "rope_theta": 500.0, "rms_norm_eps": 1e-3},
              {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}],
    "qwen3": [{**GROUPED, "head_dim": 24, "tie_word_embeddings": True}, {"num_key_value_heads": 1, "attention_bias": True},
              {**GROUPED, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}],
}
SMALL = {"deepseek_v3": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "kv_lora_rank": 20,
                         "q_lora_rank": 28, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_group": 4,
                         "topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5},
         "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}}  # where defaults are large
WHOLE = "positions", "q_a_proj", "kv_a_proj_with_mqa", ".gate.", ".conv"  # matrices that every tensor-parallel rank holds
WITH_PEER = [name for name in architectures() if name != "yuan"]  # those that transformers has
CASES = [(name, seed, changes) for name in WITH_PEER
         for seed, changes in enumerate([{}, GROUPED if name not in ("gpt2", "deepseek_v3") else {}, *VARIANTS.get(name, [])])]
KINDS = [*((name, {}) for name in architectures()), ("yuan", {"num_experts": 4, "head_dim": 24}),
         ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1})]


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    """A small model whose every parameter matters: norms are not 1, biases are not 0."""
    module: Decoder = load_architecture(name).build(shape_class(name)(**{**SIZES, **SMALL.get(name, {}), **changes})).to(dtype)
    initialize(module, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return module


def tokens(count: int, seed: int) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed))


def gradients(module: Decoder) -> dict[str, Tensor]:
    """Of each tensor of a folder that is not one of a stack."""
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {group.tensors[0]: group.join([found[name] for name in group.rows]) for group in stored(module)
            if not group.is_stacked and all(found[name] is not None for name in group.rows)}


@pytest.mark.parametrize(("name", "seed", "changes"), CASES)
def test_logits_gradients_and_answers_are_those_of_transformers(name: str, seed: int, changes: dict[str, Any],
                                                                tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = build(name, seed, **changes)
    save_model(module, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(p.numel() for p in peer.parameters()) == module.shape.parameters() == sum(
        p.numel() for p in module.parameters() if p.requires_grad)
    ids, targets = tokens(40, seed), tokens(40, seed + 1)
    found, expected = module(ids, Packed.of([40])), peer(ids[None]).logits[0]
    assert expected.abs().max() > 0.5
    assert (found - expected).abs().max() <= 1e-5
    F.cross_entropy(expected, targets).backward()
    (module(ids, Packed.of([40]), targets, torch.ones(40)).weighted_sum / 40).backward()
    wanted = {key: parameter.grad for key, parameter in peer.named_parameters()}
    for key, gradient in gradients(module).items():
        wanted_gradient = wanted.get(key, wanted.get(key.replace("block_sparse_moe", "mlp")))
        away = (gradient - wanted_gradient).abs()
        if "embed_tokens" in key and module.shape.pad_token_id is not None:  # whose row gets nothing from the embedding there
            away[module.shape.pad_token_id] = 0
        assert away.max() <= 1e-5, key
    peer.generation_config.eos_token_id = None
    prompt = ids[:7].tolist()
    answer = peer.generate(ids[None, :7], max_new_tokens=64, do_sample=False)[0, 7:].tolist()
    assert generate(module, [prompt, prompt[:3]], max_new_tokens=64)[0] == answer


def test_tokens_that_a_folder_does_not_name_stay_unnamed(tmp_path: Path) -> None:
    """transformers gives a pad token's row no gradient, so one that was made up would hurt whoever trains on."""
    from transformers import AutoModelForCausalLM

    save_model(build("llama", eos_token_id=5), tmp_path / "ours")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert (peer.config.bos_token_id, peer.config.eos_token_id, peer.config.pad_token_id) == (None, 5, None)
    assert json.loads((tmp_path / "ours" / "generation_config.json").read_text()) == {"eos_token_id": 5}
    peer.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs").shape
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (None, 5, None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WITH_PEER)
def test_folders_go_both_ways_byte_by_byte(name: str, dtype: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = build(name, 3, getattr(torch, dtype))
    save_model(module, tmp_path / "ours")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype)
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    again = load_model(tmp_path / "theirs", dtype)
    assert again.shape == module.shape == read_shape(tmp_path / "ours")
    save_model(again, tmp_path / "again")
    theirs = {key: part for file in (tmp_path / "theirs").glob("*.safetensors") for key, part in load_file(file).items()}
    mine = load_file(tmp_path / "again" / "model.safetensors")
    assert theirs.keys() == mine.keys()
    for key, tensor in theirs.items():
        assert tensor.dtype == mine[key].dtype and torch.equal(tensor, mine[key]), key
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "ours" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("name", "changes"), KINDS)
def test_every_parameter_can_be_cut(name: str, changes: dict[str, Any]) -> None:
    found = load_architecture(name)
    module = build(name, **changes)
    for key, parameter in module.named_parameters():
        dim = tensor_dim(key, found.TENSOR_DIMS)
        assert dim is None or parameter.shape[dim] % 2 == 0, key
        assert dim is not None or parameter.ndim == 1 or any(word in key for word in WHOLE), key


@pytest.mark.parametrize(("name", "changes"), KINDS)
def test_documents_and_stages_are_those_of_the_whole(name: str, changes: dict[str, Any]) -> None:
    module = build(name, 1, torch.float64, **changes)
    found = load_architecture(name)
    lengths = [7, 7, 1, 20, 13]
    ids, whole = tokens(48, 5), Packed.of(lengths)
    wanted = module(ids, whole)
    alone = torch.cat([module(part, Packed.of([len(part)])) for part in ids.split(lengths)])
    assert (wanted - alone).abs().max() <= 1e-12
    with computing_like("cuda", lengths):  # in plain pieces of torch
        assert (module(ids, whole) - wanted).abs().max() <= 1e-12
    first, last = (found.build(module.shape, blocks, is_first, not is_first).double()
                   for blocks, is_first in ((range(1), True), (range(1, 3), False)))
    for stage in (first, last):
        stage.load_state_dict({key: module.state_dict()[key] for key in stage.state_dict()})
    assert (last(first(ids, whole), whole) - wanted).abs().max() <= 1e-12
    assert set(first.state_dict()) | set(last.state_dict()) == set(module.state_dict())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the tracer looks at it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the tracer instantiates functions
@pytest.mark.parametrize(("name", "changes"), KINDS)
def test_compiled_blocks_give_the_same_gradients(name: str, changes: dict[str, Any]) -> None:
    module, compiled = (build(name, 2, torch.float64, **changes) for _ in range(2))
    for block in compiled.blocks.values():
        block.compile(backend="aot_eager", fullgraph=True)
    ids = tokens(48, 2)
    for each in (module, compiled):
        each(ids, Packed.of([7, 21, 20]), ids, torch.ones(48)).weighted_sum.backward()
    for key, parameter in module.named_parameters():
        other = compiled.get_parameter(key).grad
        assert (parameter.grad is None) == (other is None) == (not parameter.requires_grad)
        assert other is None or (parameter.grad - other).abs().max() <= 1e-12, key


@pytest.mark.parametrize(("name", "other"), [("gpt2", "gpt"), ("yuan", "yuan2")])
def test_a_folder_may_go_by_another_name_of_its_architecture(name: str, other: str, tmp_path: Path) -> None:
    module = build(name)
    save_model(module, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": other}))
    assert load_model(tmp_path).shape == module.shape


def test_the_folder_of_a_base_model_is_read(tmp_path: Path) -> None:
    module = build("gpt2")
    save_model(module, tmp_path)
    tensors = {key.removeprefix("transformer."): part for key, part in load_file(tmp_path / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.bool)
    save_file(tensors, tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    assert all(torch.equal(again.get_parameter(key), parameter) for key, parameter in module.named_parameters())


@pytest.mark.parametrize("name", WITH_PEER)
def test_keys_that_a_folder_leaves_out_are_those_of_transformers(name: str) -> None:
    """Those that no tensor's shape tells, but for the ids of tokens and what only training looks at."""
    from transformers import AutoConfig

    needless = {"initializer_range", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
    own = {shape_class(name).KEYS.get(field.name, field.name): field.name for field in fields(shape_class(name))}
    config = {key: value for key, value in build(name).shape.to_config().items() if value is not None}
    usual = AutoConfig.for_model(name).to_dict()
    for key in own.keys() & config.keys() & usual.keys() - needless:
        if isinstance(config[key], bool | float) or key in ("n_group", "topk_group", "sliding_window", "mlp_only_layers"):
            rest = {other: value for other, value in config.items() if other != key} | (
                {"n_routed_experts": 16, "num_experts_per_tok": 2} if key in ("n_group", "topk_group") else {})
            shape = shape_class(name).from_config(rest)
            assert getattr(shape, own[key]) == (usual[key] or getattr(shape, own[key])), key


def test_a_mixture_whose_blocks_are_all_dense_goes_through_a_folder(tmp_path: Path) -> None:
    module = build("deepseek_v3", num_experts=256, first_k_dense_replace=3)
    save_model(module, tmp_path)
    assert torch.equal(logits(load_model(tmp_path), [1, 2, 3]), logits(module, [1, 2, 3]))


def test_a_document_beyond_learned_positions_is_refused() -> None:
    for module in (build("gpt2"), build("llama", rope_scaling=RopeScaling("dynamic", 2.0))):
        with pytest.raises(ModelError, match="a document of up to 129 tokens is longer than max_position_embeddings = 128"):
            logits(module, [1] * 129)


def test_windows_of_qwen3_moe_begin_with_the_first_block_as_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module, ids = build("qwen3_moe", use_sliding_window=True, sliding_window=5), tokens(40, 1)
    save_model(module, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_window_layers": 28}))  # as published folders say
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)(ids[None]).logits[0]
    assert (logits(load_model(tmp_path), ids) - expected).abs().max() <= 1e-5


def test_a_shape_that_cannot_be_is_refused() -> None:
    windowed = build("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=2).shape.to_config()
    kinds = ["full_attention", "full_attention", "sliding_attention"]
    assert shape_class("qwen2").from_config({**windowed, "layer_types": kinds}).window(2) == 5
    with pytest.raises(ModelError, match="are not the blocks that its other keys give a window to"):
        shape_class("qwen2").from_config({**windowed, "layer_types": kinds[::-1]})
    with pytest.raises(ModelError, match="layer_types has 3 entries, but num_hidden_layers is 4"):
        shape_class("qwen2").from_config({**windowed, "num_hidden_layers": 4, "layer_types": kinds})
    with pytest.raises(ModelError, match="num_key_value_heads = 2, head_dim = 16"):
        build("gpt2", **GROUPED)
    config = build("gpt2").shape.to_config()
    assert json.dumps(config)
    with pytest.raises(ModelError, match="activation_function = 'relu' is not supported; only 'gelu_new' is"):
        shape_class("gpt2").from_config({**config, "activation_function": "relu"})
    plain = build("llama").shape.to_config()
    for rope, words in (({"rope_type": "longrope", "factor": 2.0}, "'longrope' is not supported"),
                        ({"rope_type": "dynamic"}, "has no 'factor'"),
                        ({"rope_type": "yarm"}, "did you mean 'yarn'"), ({"rope_type": "linear"}, "has no 'factor'"),
                        ({"rope_type": "linear", "factor": 0.5}, "at least 1"),
                        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}, "has no 'high_freq_factor'"),
                        ({"rope_type": "linear", "factor": "much"}, "is not a number"),
                        ({"rope_type": "yarn"}, "has no 'factor'"), ({"rope_type": ["yarn"]}, "is not supported"),
                        ({"rope_type": "yarn", "original_max_position_embeddings": 0}, "is not a number above 0"),
                        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "neither true nor false"),
                        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 0.5}, "beta_slow at most beta_fast")):
        with pytest.raises(ModelError, match=words):
            shape_class("llama").from_config({**plain, "rope_scaling": rope})
    with pytest.raises(ModelError, match="max_position_embeddings = 'far' is not of type int"):
        shape_class("llama").from_config({**plain, "max_position_embeddings": "far", "rope_scaling": {
            "rope_type": "yarn", "original_max_position_embeddings": 64}})
    assert shape_class("llama").from_config({**plain, "rope_scaling": {"type": "longrope", "factor": 2.0}}, for_training=False)


def test_yarn_grows_by_what_its_paper_says() -> None:
    plain = build("llama").shape.to_config()
    once, twice = 0.1 * math.log(4) + 1, 0.2 * math.log(4) + 1
    for rope, factor in (({}, once), ({"mscale": 2.0, "mscale_all_dim": 1.0}, twice / once), ({"attention_factor": 1.5}, 1.5),
                         ({"mscale": 2.0}, once)):
        shape = shape_class("llama").from_config({**plain, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, **rope}})
        assert shape.rope_scaling is not None and shape.rope_scaling.attention_factor == pytest.approx(factor)
        assert shape.rope_scaling.original_max_position_embeddings == 128
