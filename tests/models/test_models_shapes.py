"""Every architecture's arithmetic: against published counts, against transformers' modules, and against lists of tensors."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from athanor.foundation.errors import ModelError
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.find import counted, find_shape, known_shapes, load_shape, new_shape
from athanor.models.shapes.products import Attended

# of the published safetensors files, or where the sum of them is printed: model cards, papers
PUBLISHED = {
    "gpt2": 124_439_808, "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "llama-3-405b": 405_853_388_800,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-72b": 72_706_203_648, "qwen3-8b": 8_190_735_360, "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560, "mixtral-8x7b": 46_702_792_704, "bloom-176b": 176_247_271_424}
# printed rounded: (total, active) in billions
ROUNDED = {"gpt-3-175b": (174.6, 174.6), "mt-nlg-530b": (530, 530), "yuan-1.0": (245.73, 245.73),
           "deepseek-v3": (671.03, 37.6), "yuan2-2b": (2.0887, 2.0887), "yuan2-51b": (51.842, 51.842),
           "yuan2-102b": (102.578, 102.578),
           "yuan2-m32": (39.94, 3.70), "qwen3-235b-a22b": (235, 22), "mixtral-8x7b": (46.7, 12.9),
           "mixtral-8x22b": (140.6, 39.1)}
SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
PLAIN: dict[str, list[dict[str, Any]]] = {  # configurations as transformers' classes take them
    "gpt2": [{"vocab_size": 97, "n_embd": 36, "n_layer": 2, "n_head": 3, "n_positions": 50},
             {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_inner": 50, "tie_word_embeddings": False}],
    "bloom": [{"vocab_size": 97, "hidden_size": 36, "n_layer": 2, "n_head": 3}],
    "llama": [SMALL, {**SMALL, "num_key_value_heads": 2, "head_dim": 10, "tie_word_embeddings": True}],
    "mistral": [{**SMALL, "num_key_value_heads": 1, "sliding_window": 8}],
    "mixtral": [{**SMALL, "num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 3}],
    "qwen2": [{**SMALL, "num_key_value_heads": 2},
              {**SMALL, "tie_word_embeddings": True, "num_attention_heads": 2, "num_key_value_heads": 2},
              {**SMALL, "num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}],
    "qwen3": [{**SMALL, "num_key_value_heads": 2, "head_dim": 12},
              {**SMALL, "num_key_value_heads": 4, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}],
    "qwen3_moe": [{**SMALL, "num_key_value_heads": 2, "head_dim": 12, "num_experts": 6, "moe_intermediate_size": 20,
                   "num_experts_per_tok": 3, "mlp_only_layers": [1]},
                  {**SMALL, "num_hidden_layers": 5, "num_key_value_heads": 1, "head_dim": 8, "attention_bias": True,
                   "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "decoder_sparse_step": 2}],
    "deepseek_v3": [
        {**SMALL, "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 14, "qk_nope_head_dim": 10,
         "qk_rope_head_dim": 6, "v_head_dim": 9, "n_routed_experts": 8, "num_experts_per_tok": 3,
         "moe_intermediate_size": 20, "n_shared_experts": 2,
         "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
        {**SMALL, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 6,
         "qk_rope_head_dim": 4, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 10, "first_k_dense_replace": 2, "n_group": 1,
         "topk_group": 1, "tie_word_embeddings": True}]}
CASES = [(kind, config) for kind, configs in PLAIN.items() for config in configs]


def peer(kind: str, config: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(kind, **config)
    extra = {"experts_implementation": "eager"} if "experts" in str(config) else {}
    return AutoModelForCausalLM.from_config(made, attn_implementation="eager", **extra)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters_as_published(name: str) -> None:
    assert find_shape(name).parameters() == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_published_models_have_about_as_many_parameters_as_printed(name: str) -> None:
    shape, (total, active) = find_shape(name), ROUNDED[name]
    assert shape.parameters() / 1e9 == pytest.approx(total, rel=1e-3)
    assert shape.active_parameters() / 1e9 == pytest.approx(active, rel=2e-2)
    assert (shape.parameters() == shape.active_parameters()) == (total == active)


@pytest.mark.parametrize(("name", "total", "used"), [("gpt-oss-120b", 116.83, 5.13), ("gpt-oss-20b", 20.91, 3.61)])
def test_gpt_oss_has_as_many_parameters_as_its_card_says(name: str, total: float, used: float) -> None:
    """Which counts the embedding among those that a token does not use."""
    shape = find_shape(name)
    assert shape.parameters() / 1e9 == pytest.approx(total, rel=1e-3)
    assert (shape.active_parameters() - shape.embedding_parameters()) / 1e9 == pytest.approx(used, rel=2e-3)
    assert [attended.window for attended in shape.attended()] == [0, 128]
    assert find_shape("nemotron-h-56b").parameters() / 1e9 == pytest.approx(56, rel=1e-2)


def test_the_block_that_predicts_a_second_token_is_counted_as_published() -> None:
    """The repository of DeepSeek-V3 counts 684.53 B: with it, its own embedding and head, and a scale per 128 x 128 weights."""
    shape = find_shape("deepseek-v3")
    more = replace(shape, num_nextn_predict_layers=1)  # type: ignore[call-arg]
    ends = 2 * shape.vocab_size * shape.hidden_size
    assert (more.parameters() + ends) * (1 + 1 / 128**2) == pytest.approx(684.53e9, rel=2e-5)
    assert [product.times for product in more.products() if product.name == "head"] == [2.0]
    assert more.flops(1, 1) - more.flops(1, 0) == pytest.approx((shape.flops(1, 1) - shape.flops(1, 0)) * 62 / 61)
    assert sum(more.block_costs(100.0)) == pytest.approx(more.flops(1, 100.0))
    assert (shape.embedding_uses(), more.embedding_uses(), replace(more, tie_word_embeddings=True).embedding_uses()) == (0, 1, 2)
    assert len(more.block_costs(100.0)) == 61 and more.block_costs(100.0)[-1] > 2 * more.block_costs(100.0)[-2]


@pytest.mark.parametrize(("kind", "config"), CASES)
def test_parameters_are_those_of_transformers(kind: str, config: dict[str, Any]) -> None:
    shape = load_shape({"model_type": kind, **config}, for_training=False)
    with torch.device("meta"):
        module = peer(kind, config)
    assert shape.parameters() == sum(parameter.numel() for parameter in module.parameters())
    again = load_shape(json.loads(json.dumps(shape.to_config())), for_training=False)
    assert again == shape


@pytest.mark.parametrize(("kind", "config"), CASES)
def test_flops_are_those_counted_in_transformers(kind: str, config: dict[str, Any]) -> None:
    shape = load_shape({"model_type": kind, **config}, for_training=False)
    open_window = {"sliding_window": 0, "use_sliding_window": False}
    whole = replace(shape, **{key: value for key, value in open_window.items() if key in config})
    length = 24
    module = peer(kind, config)
    with FlopCounterMode(display=False) as counter:
        module(torch.arange(length)[None] % 7).logits.sum().backward()
    # a kernel without windows computes all scores
    assert counter.get_total_flops() == pytest.approx(whole.flops_full(length, length), rel=1e-4)


@pytest.mark.parametrize("name", known_shapes())
def test_every_count_is_the_sum_of_its_parts(name: str) -> None:
    shape = find_shape(name)
    tied = shape.vocab_size * shape.hidden_size if shape.tie_word_embeddings else 0
    assert shape.parameters() == (sum(product.parameters for product in shape.products()) + shape.vectors()
                                  + shape.embedding_parameters() - tied)
    assert sum(attended.layers for attended in shape.attended()) == shape.num_hidden_layers
    assert shape.products()[-1].name == "head"
    assert sum(shape.block_costs(512.5)) == pytest.approx(shape.flops(1.0, 512.5), rel=1e-12)
    assert known_shapes()[name]["source"]


def tensors_of_yuan(hidden: int, inner: int, heads_width: int, experts: int) -> dict[str, list[int]]:
    """One block's tensors by their names in a published Yuan 2.0 (and M32), written down one by one."""
    out = {"input_layernorm.weight": [hidden], "post_attention_layernorm.weight": [hidden],
           "self_attn.v_proj.weight": [heads_width, hidden], "self_attn.o_proj.weight": [hidden, heads_width],
           "self_attn.q_proj.weight": [heads_width, hidden], "self_attn.k_proj.weight": [heads_width, hidden],
           "self_attn.lf_gate.conv1.weight": [hidden // 2, hidden, 2, 1], "self_attn.lf_gate.conv1.bias": [hidden // 2],
           "self_attn.lf_gate.conv2.weight": [hidden, hidden // 2, 2, 1], "self_attn.lf_gate.conv2.bias": [hidden],
           "self_attn.lf_gate.output_layernorm.weight": [hidden]}
    if not experts:
        return out | {"mlp.up_proj.weight": [inner, hidden], "mlp.gate_proj.weight": [inner, hidden],
                      "mlp.down_proj.weight": [hidden, inner]}
    out |= {f"mlp.gate.{name}.weight": [experts, hidden] for name in ("query", "key", "value")}
    for number in range(experts):
        out |= {f"mlp.experts.{number}.w1.weight": [2 * inner, hidden], f"mlp.experts.{number}.w2.weight": [hidden, inner]}
    return out


@pytest.mark.parametrize(("name", "width", "experts"), [("yuan2-2b", 2048, 0), ("yuan2-102b", 8192, 0), ("yuan2-m32", 4096, 32)])
def test_yuan_2_holds_the_tensors_of_its_files(name: str, width: int, experts: int) -> None:
    shape = find_shape(name)
    tensors = tensors_of_yuan(shape.hidden_size, shape.intermediate_size, width, experts)
    block = sum(math.prod(sizes) for sizes in tensors.values())
    assert shape.block_parameters() == block
    assert shape.parameters() == shape.num_hidden_layers * block + 135_040 * shape.hidden_size + shape.hidden_size
    unused = sum(math.prod(sizes) for key, sizes in tensors.items() if "experts" in key) * (experts - 2) // max(1, experts)
    assert shape.active_parameters() == shape.parameters() - shape.num_hidden_layers * unused
    # two taps of H x H/2 make one product of H x H, and two of H/2 x H another
    convolutions = [p for p in shape.products() if p.name.startswith("lfa")]
    assert [(p.inputs, p.outputs, p.times, p.copies) for p in convolutions] == [(shape.hidden_size, shape.hidden_size, 1, 1)] * 2


@pytest.mark.parametrize(("length", "window"), [(64, 8), (8, 64), (64, 64), (9, 1), (33, 0)])
def test_a_window_hides_what_lies_before_it(length: int, window: int) -> None:
    seen = [min(position + 1, window or length) for position in range(length)]
    attended = Attended(1, 1, 1, 4, 4, window)
    assert attended.keys((length + 1) / 2) == pytest.approx(sum(seen) / length)
    shape = load_shape({"model_type": "mistral", **SMALL, "sliding_window": window}, for_training=False)
    matrices = 6 * sum(product.multiplications for product in shape.products())
    assert shape.flops(1, (length + 1) / 2) - matrices == pytest.approx(6 * 3 * 4 * 16 * sum(seen) / length)
    assert shape.flops_full(1, length) - matrices == pytest.approx(6 * 3 * 4 * 16 * min(length, window or length))


def test_windows_begin_where_the_configuration_says() -> None:
    shape = load_shape({"model_type": "qwen2", **PLAIN["qwen2"][2]}, for_training=False)
    assert [(attended.layers, attended.window) for attended in shape.attended()] == [(1, 0), (2, 8)]


def test_what_is_cut_divides_among_tensor_ranks() -> None:
    for product in find_shape("llama-3-405b").products():
        assert {"qkv": "outputs", "attention_out": "inputs", "gate_up": "outputs", "down": "inputs",
                "head": "outputs"}[product.name] == product.cut
    assert [p.cut for p in find_shape("mixtral-8x7b").products() if p.name == "router"] == [""]


def test_models_are_found_by_name_or_path(tmp_path: Path) -> None:
    config = {"model_type": "llama", **SMALL, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for place in (tmp_path, tmp_path / "config.json"):
        assert find_shape(place) == load_shape({"model_type": "llama", **SMALL}, for_training=False)
    with pytest.raises(ModelError, match="llama3"):
        load_shape(tmp_path)
    recipe = tmp_path / "my.toml"
    source = '[[data.source]]\nname = "a"\nkind = "text"\npath = "a.txt"\n[model]\nhidden_size = 32\nnum_hidden_layers = 3\n'
    sizes = 'intermediate_size = 48\nnum_attention_heads = 4\n[[stage]]\nname = "pretrain"\n'
    recipe.write_text(f'name = "x"\n[data]\nvocab_size = 512\n{source}{sizes}')
    assert find_shape(recipe) == load_shape({"model_type": "llama", **SMALL, "vocab_size": 512}, for_training=False)
    recipe.write_text(f'name = "x"\n[data]\n{source}{sizes}')
    with pytest.raises(ModelError, match=r"my\.toml leaves data\.vocab_size open, .*athanor plan .* choose them"):
        find_shape(recipe)
    with pytest.raises(ModelError, match="10000000 blocks"):
        load_shape({"model_type": "llama", **SMALL, "num_hidden_layers": 10**7}).parameters()
    assert find_shape("LLaMA-3-8B") == find_shape("llama-3-8b")
    with pytest.raises(ModelError, match="did you mean 'llama-3-70b'"):
        find_shape("llama-3-71b")
    with pytest.raises(ModelError, match="neither a known model"):
        find_shape("x")


@pytest.mark.parametrize(("config", "words"), [
    ({"model_type": "bloom", **SMALL}, "estimated and not trained; those that can: .*gemma, gpt2, llama"),
    ({"model_type": "products", **SMALL}, "unknown architecture")])
def test_training_refuses_what_is_only_counted(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load_shape(config)


@pytest.mark.parametrize(("config", "words"), [
    ({"model_type": "qwen4", **SMALL}, "did you mean 'qwen"), ({"model_type": "decoder", **SMALL}, "unknown model_type"),
    ({"model_type": "os.path"}, "unknown model_type"),
    ({"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 1}, "vocab_size"),
    ({"model_type": "gpt2", "vocab_size": 9, "n_embd": "wide", "n_head": 2, "n_layer": 1, "n_inner": 8}, "n_embd = 'wide'"),
    ({"model_type": "llama", **SMALL, "attention_bias": True}, "attention_bias"),
    ({"model_type": "yuan", **SMALL, "moe_config": 3}, "moe_config"), ({"model_type": "yuan", **SMALL, "hidden_size": 33}, "33"),
    ({"model_type": "yuan", **SMALL, "attention_projection_size": 30}, "attention_projection_size = 30"),
    ({"model_type": "mixtral", **SMALL, "num_local_experts": 0}, "num_experts = 0"),
    ({"model_type": "qwen3_moe", **SMALL, "mlp_only_layers": "all"}, "mlp_only_layers"),
    ({"model_type": "qwen3_moe", **SMALL, "decoder_sparse_step": 0}, "decoder_sparse_step"),
    ({"model_type": "deepseek_v3", **SMALL, "kv_lora_rank": 0}, "kv_lora_rank")])
def test_configurations_that_cannot_be_counted_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load_shape(config, for_training=False)


@pytest.mark.parametrize(("architecture", "key", "value", "words"), [
    ("deepseek_v3", "kv_lora_rank", 2.5, "model.kv_lora_rank = 2.5 is not of type int"),
    ("deepseek_v3", "kv_lora_rank", True, "is not of type int"), ("deepseek_v3", "norm_topk_prob", 1, "is not of type bool"),
    ("deepseek_v3", "kv_lora_rank", -3, "kv_lora_rank = -3; it must be at least"),
    ("deepseek_v3", "routed_scaling_factor", -2.0, "routed_scaling_factor = -2.0; it must be above 0"),
    ("deepseek_v3", "routed_scaling_factor", math.inf, "routed_scaling_factor = inf"),
    ("deepseek_v3", "head_dim", 64, "other sizes make it 192; leave it out"),
    ("deepseek_v3", "kv_lora_rnk", 3, "did you mean 'kv_lora_rank'"), ("llama", "rope_scaling", 1, "is no size"),
    ("qwen3_moe", "mlp_only_layers", 1, "is not of type tuple")])
def test_a_new_shape_refuses_a_size_of_another_kind(architecture: str, key: str, value: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        new_shape(architecture, **{**SMALL, key: value})


def test_every_known_name_belongs_to_a_counted_architecture() -> None:
    aliases = {"gpt": "gpt2", "yuan2": "yuan"}
    for config in known_shapes().values():
        assert aliases.get(config["model_type"], config["model_type"]) in counted()
    plain = load_shape({"model_type": "gpt", "vocab_size": 97, "hidden_size": 36, "num_hidden_layers": 2,
                        "num_attention_heads": 3, "max_position_embeddings": 50}, for_training=False)
    assert plain == load_shape({"model_type": "gpt2", **PLAIN["gpt2"][0]}, for_training=False)
    assert type(find_shape("llama-2-7b")) is DecoderShape
