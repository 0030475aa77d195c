"""A GGUF file opens in gguf's reader, holds the same numbers within its rounding, and computes the same in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from cutters import CUTTERS, bpe
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from athanor.cli.models import command
from athanor.data.text import tokenizer as own
from athanor.foundation.errors import ModelError, UserError
from athanor.models.find import load_architecture
from athanor.models.huggingface import load_model, logits, save_model
from athanor.models.initialize import initialize
from athanor.models.shapes.find import shape_class
from athanor.models.shapes.rope import RopeScaling
from athanor.registry.store import Registry
from athanor.registry.to_gguf import write_gguf

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

TEXTS = ["def area(width, height):\n    return width * height\n\n", "It's the engine they'LL use in 2026: 12,345 times!\n"] * 9
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 128, "initializer_range": 0.2}
SCALED = RopeScaling("llama3", 8.0, 64, 1.0, 4.0)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}), "tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "scaled": ("llama", {"rope_scaling": SCALED, "rope_theta": 500000.0}),
    "dynamic": ("llama", {"rope_scaling": RopeScaling("dynamic", 2.0)}),
    "qwen2": ("qwen2", {}), "qwen3": ("qwen3", {"head_dim": 32}),
    "mixtral": ("mixtral", {"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 32, "num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
                                "norm_topk_prob": True}),
    "gemma": ("gemma", {"head_dim": 32}), "gpt2": ("gpt2", {"num_key_value_heads": 4}),
    "deepseek_v3": ("deepseek_v3", {"num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 3, "q_lora_rank": 32,
                                    "moe_intermediate_size": 32, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
                                    "qk_rope_head_dim": 16, "v_head_dim": 24, "n_group": 4, "topk_group": 2,
                                    "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "n_shared_experts": 2,
                                    "rms_norm_eps": 1e-6})}
PARTS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm",
         "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp",
         "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps", "mlp.experts.down_proj": "ffn_down_exps",
         "block_sparse_moe.experts.w1": "ffn_gate_exps", "block_sparse_moe.experts.w3": "ffn_up_exps",
         "block_sparse_moe.experts.w2": "ffn_down_exps", "self_attn.q_a_proj": "attn_q_a", "self_attn.q_b_proj": "attn_q_b",
         "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
         "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
         "mlp.shared_experts.up_proj": "ffn_up_shexp", "mlp.shared_experts.down_proj": "ffn_down_shexp"}
GPT2 = {"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down"}
OUTER = {"transformer.wte.weight": "token_embd.weight", "transformer.wpe.weight": "position_embd.weight",
         "transformer.ln_f.weight": "output_norm.weight", "transformer.ln_f.bias": "output_norm.bias",
         "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
         "lm_head.weight": "output.weight"}



def make(folder: Path, which: str = "llama", pre: str = "smaug-bpe", **changes: Any) -> Path:
    """A folder of random weights, vectors included, with a vocabulary of 4 rows more than its tokenizer."""
    kind, sizes = SHAPES[which]
    tokenizer = bpe(pre, TEXTS)
    shape = shape_class(kind)(**{"vocab_size": tokenizer.get_vocab_size() + 4, **SIZES, **sizes, **changes})
    module = load_architecture(kind).build(shape)
    initialize(module, 0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                generator = torch.Generator().manual_seed(len(name))
                parameter.copy_(torch.empty_like(parameter).uniform_(0.5, 1.5, generator=generator))
    save_model(module, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": {"content": "</s>"},
        "chat_template": "{{ messages }}"}))
    return folder


def read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """Metadata, tensors in fp32 and their types."""
    reader = gguf.GGUFReader(file)
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}
    return ({name: field.contents() for name, field in reader.fields.items()}, tensors,
            {t.name: t.tensor_type.name for t in reader.tensors})


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row 2i of a head is the i-th of its first half, row 2i + 1 the i-th of its second."""
    size = len(rows) // heads
    order = [h * size + half * (size // 2) + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def expected(folder: Path, which: str) -> dict[str, np.ndarray]:
    """The folder's numbers under llama.cpp's names, in its order of rows, experts stacked by their numbers."""
    found: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, values in load_file(folder / "model.safetensors").items():
        if which == "gemma" and name.endswith("norm.weight"):
            values = values + 1
        if name in OUTER:
            found[OUTER[name]] = values
            continue
        _, _, layer, *inner, suffix = name.split(".")
        if which == "gpt2":
            found[f"blk.{layer}.{GPT2['.'.join(inner)]}.{suffix}"] = values.T  # there a row is an input
            continue
        if inner[-1] == "kv_b_proj":  # of every head first the rows that make its key, then those of its value
            rows = np.split(values, 4)
            found[f"blk.{layer}.attn_k_b.weight"] = np.stack([head[:32].T for head in rows])
            found[f"blk.{layer}.attn_v_b.weight"] = np.stack([head[32:] for head in rows])
            continue
        if suffix == "e_score_correction_bias":
            found[f"blk.{layer}.exp_probs_b.bias"] = values
            continue
        number = next((int(part) for part in inner if part.isdigit()), None)
        target = f"blk.{layer}.{PARTS['.'.join(part for part in inner if not part.isdigit())]}.{suffix}"
        if SHAPES[which][0] in ("llama", "mixtral") and inner[-1] in ("q_proj", "k_proj"):
            heads = 4 if inner[-1] == "q_proj" else SHAPES[which][1].get("num_key_value_heads", 2)
            values = interleaved(values, heads)
        if number is None:
            found[target] = values
        else:
            experts.setdefault(target, {})[number] = values
    return found | {target: np.stack([held[i] for i in range(len(held))]) for target, held in experts.items()}


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("which", SHAPES)
def test_tensors_are_those_of_the_folder_within_rounding(tmp_path: Path, which: str, kind: str) -> None:
    folder = make(tmp_path / "m", which)
    assert write_gguf(folder, tmp_path / "m.gguf", "m@1", kind) == []
    _, found, types = read(tmp_path / "m.gguf")
    wanted = expected(folder, which)
    assert set(wanted) == set(found) - {"rope_freqs.weight"} and ("rope_freqs.weight" in found) == (which == "scaled")
    for target, values in wanted.items():
        assert found[target].shape == values.shape
        if values.ndim == 1 or "ffn_gate_inp" in target or "position" in target:
            assert types[target] == "F32" and np.array_equal(found[target], values)
        elif kind == "f16":
            assert types[target] == "F16" and np.array_equal(found[target], values.astype(np.float16).astype(np.float32))
        else:
            groups = values.reshape(-1, 32)
            largest = np.abs(groups).max(-1, keepdims=True)
            off = np.abs(found[target].reshape(-1, 32) - groups)
            assert types[target] == "Q8_0" and (off <= largest / 127 * 0.5 + largest * 2**-10).all()


def test_mixtures_say_how_many_experts_they_have_and_ask(tmp_path: Path) -> None:
    write_gguf(make(tmp_path / "m", "mixtral"), tmp_path / "m.gguf", "m", "f16")
    fields, _, _ = read(tmp_path / "m.gguf")
    assert (fields["general.architecture"], fields["llama.expert_count"], fields["llama.expert_used_count"],
            fields["llama.feed_forward_length"]) == ("llama", 4, 2, 96)
    write_gguf(make(tmp_path / "q", "qwen3_moe"), tmp_path / "q.gguf", "q", "f16")
    fields, _, _ = read(tmp_path / "q.gguf")
    assert (fields["general.architecture"], fields["qwen3moe.expert_count"], fields["qwen3moe.expert_used_count"],
            fields["qwen3moe.expert_feed_forward_length"]) == ("qwen3moe", 12, 3, 32)
    with pytest.raises(ModelError, match="norm_topk_prob = false cannot be written as GGUF"):
        write_gguf(make(tmp_path / "n", "qwen3_moe", norm_topk_prob=False), tmp_path / "n.gguf", "n", "f16")


def test_latent_attention_says_all_that_llama_cpp_computes_it_from(tmp_path: Path) -> None:
    """Its keys as llama.cpp's own converter writes them for DeepSeek-V3: one key head, of the latent vector and what turns."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.707, "mscale_all_dim": 0.707}
    folder = make(tmp_path / "m", "deepseek_v3", num_nextn_predict_layers=1, rms_norm_eps=1e-5,
                  rope_scaling=RopeScaling.from_config(yarn, 128, "here"))
    assert any(name.startswith("model.layers.2.") for name in load_file(folder / "model.safetensors"))
    notes = write_gguf(folder, tmp_path / "m.gguf", "m", "f16")
    assert ["rms_norm_eps = 1e-05" in notes[0], "blocks that predict further tokens are left out" in notes[1]] == [True, True]
    fields, tensors, _ = read(tmp_path / "m.gguf")
    assert {int(name.split(".")[1]) for name in tensors if name.startswith("blk.")} == {0, 1}
    written = {key.removeprefix("deepseek2."): value for key, value in fields.items() if key.startswith("deepseek2.")}
    assert written.pop("rope.scaling.yarn_log_multiplier") == pytest.approx(0.0707)
    assert written.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert written == {
        "vocab_size": tensors["token_embd.weight"].shape[0], "context_length": 128, "embedding_length": 64, "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 1, "attention.key_length": 80, "attention.value_length": 64,
        "attention.key_length_mla": 48, "attention.value_length_mla": 24, "attention.q_lora_rank": 32,
        "attention.kv_lora_rank": 64, "leading_dense_block_count": 1, "expert_count": 8, "expert_used_count": 3,
        "expert_feed_forward_length": 32, "expert_shared_count": 2, "expert_group_count": 4, "expert_group_used_count": 2,
        "expert_weights_scale": 2.5, "expert_weights_norm": True, "expert_gating_func": 2, "rope.dimension_count": 16,
        "rope.freq_base": 10000.0, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32}


def test_groups_that_choose_nothing_are_left_out(tmp_path: Path) -> None:
    """llama.cpp takes no groups of one expert; the best 3 of the best 4 experts are the best 3 of all."""
    for groups, kept in ((8, 4), (4, 4)):
        file = tmp_path / f"{groups}.gguf"
        write_gguf(make(tmp_path / f"{groups}", "deepseek_v3", n_group=groups, topk_group=kept), file, "m", "f16")
        assert not [key for key in read(file)[0] if "expert_group" in key]


@pytest.mark.parametrize(("changes", "words"), [
    ({"n_shared_experts": 0}, "n_shared_experts = 0 cannot be written as GGUF for 'deepseek_v3'"),
    ({"num_hidden_layers": 27}, "num_hidden_layers = 27 with q_lora_rank = 32 cannot be written"),
    ({"rope_scaling": RopeScaling("linear", 4.0)}, "rope_type 'linear' without mscale_all_dim cannot be written"),
    ({"rope_scaling": SCALED}, "rope_type 'llama3' without mscale_all_dim cannot be written"),
    ({"rope_scaling": RopeScaling("yarn", 4.0, 32)}, "rope_type 'yarn' without mscale_all_dim cannot be written"),
    ({"rope_scaling": RopeScaling("yarn", 4.0, 32, attention_factor=1.1, mscale_all_dim=0.5)}, "only its usual numbers can")])
def test_latent_attention_as_llama_cpp_has_it_not_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        write_gguf(make(tmp_path / "m", "deepseek_v3", **changes), tmp_path / "m.gguf", "m", "f16")


def test_biases_of_routers_are_missed(tmp_path: Path) -> None:
    """llama.cpp would do without them, and choose other experts."""
    folder = make(tmp_path / "m", "deepseek_v3")
    _drop(folder, "model.layers.1.mlp.gate.e_score_correction_bias")
    with pytest.raises(ModelError, match="the weights do not fit"):
        write_gguf(folder, tmp_path / "m.gguf", "m", "f16")


def test_experts_that_are_not_all_there_are_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "mixtral")
    held = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    held[name.format(9)] = held.pop(name.format(2))
    save_file(held, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"experts of blk\.1\.ffn_down_exps\.weight are not all there"):
        write_gguf(folder, tmp_path / "m.gguf", "m", "f16")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", ["llama", "tied", "qwen2", "qwen3", "qwen3_moe"])
def test_transformers_computes_the_same_from_the_file(tmp_path: Path, which: str) -> None:
    """Its own reader undoes the order of rows, so that a wrong one, or a wrong size, shows in the logits."""
    from transformers import AutoModelForCausalLM

    known = {"qwen3": {"head_dim": 128}, "qwen3_moe": {"head_dim": 128, "moe_intermediate_size": 768}}  # to its reader
    folder = make(tmp_path / "m", which, **known.get(which, {}))
    write_gguf(folder, tmp_path / "m" / "m.gguf", "m@1", "f16")
    ids = [0, *Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXTS[0]).ids]
    ours = logits(load_model(folder), ids)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    peer = AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.gguf", dtype=torch.float32)
    theirs = peer(torch.tensor([ids])).logits[0].detach()
    assert theirs.shape == ours.shape
    assert float((theirs - ours).abs().max()) <= 5e-3 * float(ours.abs().max())
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))


def test_metadata_are_those_that_llama_cpp_asks_for(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "qwen3", "qwen2")
    write_gguf(folder, tmp_path / "m.gguf", "m@1", "q8_0")
    fields, _, _ = read(tmp_path / "m.gguf")
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    assert {key: fields[f"qwen3.{key}"] for key in ("block_count", "context_length", "embedding_length", "feed_forward_length",
            "attention.head_count", "attention.head_count_kv", "attention.key_length", "vocab_size")} == {
        "block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.key_length": 32, "vocab_size": len(vocabulary) + 4}
    assert (fields["general.architecture"], fields["general.name"], fields["general.file_type"]) == ("qwen3", "m@1", 7)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert {token: i for i, token in enumerate(tokens[:-4])} == vocabulary
    assert types[:3] == [3, 3, 1] and types[vocabulary["<tool>"]] == 4 and types[-4:] == [5] * 4, "control, normal, own, unused"
    ids = [fields[f"tokenizer.ggml.{key}"] for key in ("bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token")]
    assert ids == [0, 1, True, False] and fields["tokenizer.chat_template"] == "{{ messages }}"
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


@pytest.mark.parametrize("pre", CUTTERS)
def test_the_tokenizers_kind_is_told_by_how_it_cuts(tmp_path: Path, pre: str) -> None:
    folder = make(tmp_path / "m", pre=pre)
    assert write_gguf(folder, tmp_path / "m.gguf", "m", "f16") == []
    assert read(tmp_path / "m.gguf")[0]["tokenizer.ggml.pre"] == pre


def test_words_taken_whole_have_a_name_for_one_way_to_cut_only(tmp_path: Path) -> None:
    """llama-bpe and smaug-bpe cut alike; the first takes a word that is in the vocabulary as it is, as no other does."""
    folder = make(tmp_path / "m", pre="qwen2")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (note,) = write_gguf(folder, tmp_path / "m.gguf", "m", "f16")
    assert "joins text as this tokenizer does; 'qwen2' comes nearest" in note


def test_biases_that_llama_cpp_does_not_read_are_refused(tmp_path: Path) -> None:
    for which in ("qwen3", "qwen3_moe"):
        with pytest.raises(ModelError, match="attention_bias = true cannot be written as GGUF for 'qwen3"):
            write_gguf(make(tmp_path / which, which, attention_bias=True), tmp_path / "m.gguf", "m", "f16")


def test_a_normalizer_that_llama_cpp_leaves_out_is_told(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, "normalizer": {"type": "Lowercase"}}))
    (note,) = write_gguf(folder, tmp_path / "m.gguf", "m", "f16")
    assert "does not normalise texts as this tokenizer does" in note


def test_factors_of_scaled_positions_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    write_gguf(make(tmp_path / "m", "scaled"), tmp_path / "m.gguf", "m", "f16")
    rope = {**SCALED.to_config(), "rope_theta": 500000.0}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=128, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (np.arange(0, 16, 2) / 16)
    factors = read(tmp_path / "m.gguf")[1]["rope_freqs.weight"]
    assert len(set(factors)) > 2 and plain / factors == pytest.approx(scaled.numpy(), rel=1e-5)


def test_our_own_tokenizer_comes_with_a_sentence_and_the_verb_prints_it(tmp_path: Path, registry: Registry) -> None:
    folder = make(tmp_path / "m", vocab_size=320)
    own.train_tokenizer(iter(TEXTS), 300).save(folder)
    registry.import_folder(folder, "mine")
    arguments = ["export", "mine", str(tmp_path / "out" / "m.gguf"), "--type", "q8_0", "--json", "--registry",
                 str(registry.root)]
    printed = json.loads(CliRunner().invoke(command, arguments, catch_exceptions=False).stdout)
    assert "cuts and joins text as this tokenizer does; 'superbpe' comes nearest" in printed["notes"][0]
    assert read(tmp_path / "out" / "m.gguf")[0]["general.name"] == registry.get("mine").reference
    with pytest.raises(UserError, match=r"m\.gguf exists"):
        CliRunner().invoke(command, arguments, catch_exceptions=False)


def test_bfloat16_is_read_and_uneven_rows_are_f16(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", intermediate_size=100)
    module = load_model(folder, "bfloat16")
    save_model(module, folder)
    notes = write_gguf(folder, tmp_path / "m.gguf", "m", "q8_0")
    assert notes == ["2 matrices are F16, since their rows are no multiple of 32 numbers"]
    _, found, types = read(tmp_path / "m.gguf")
    assert types["blk.1.ffn_down.weight"] == "F16" and types["blk.1.ffn_up.weight"] == "Q8_0"
    wanted = module.state_dict()["model.layers.1.mlp.down_proj.weight"].half().float().numpy()
    assert np.array_equal(found["blk.1.ffn_down.weight"], wanted)


def _spoil(folder: Path, name: str, value: float) -> None:
    held = load_file(folder / "model.safetensors")
    held[name][0] = value
    save_file(held, folder / "model.safetensors")


def _drop(folder: Path, name: str) -> None:
    held = load_file(folder / "model.safetensors")
    del held[name]
    save_file(held, folder / "model.safetensors")


def _retoken(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] |= changes
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(("damage", "words"), [
    (lambda folder: _configure(folder, model_type="yuan"),
     "'yuan' cannot be written as GGUF: only llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, gemma, gpt2, deepseek_v3 can; "),
    (lambda folder: _configure(folder, model_type="lama"), "did you mean 'llama'"),
    (lambda folder: _spoil(folder, "model.layers.0.mlp.up_proj.weight", 7e4), "blk.0.ffn_up.weight holds values beyond 65504"),
    (lambda folder: _spoil(folder, "lm_head.weight", np.nan), "output.weight holds values beyond 65504"),
    (lambda folder: _drop(folder, "model.layers.1.mlp.up_proj.weight"), "the weights do not fit config.json"),
    (lambda folder: (folder / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": []}}'),
     "its tokenizer is neither byte-level BPE"),
    (lambda folder: _configure(folder, rope_scaling={"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0}),
     "only its usual numbers can"),
    (lambda folder: _spoil(folder, "model.norm.weight", np.inf), "output_norm.weight holds values beyond"),
    (lambda folder: _retoken(folder, merges=None), "tokenizer.json is not a tokenizer"),
    (lambda folder: _retoken(folder, merges=[["a", "b", "c"]]), "tokenizer.json is not a tokenizer"),
    (lambda folder: (folder / "tokenizer.json").write_text("[]"), "its tokenizer is neither byte-level BPE"),
    (lambda folder: make(folder, vocab_size=290), "tokens have .* ids up to .*, and vocab_size is 290"),
    (lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff"), "chat_template.jinja is not a text in UTF-8")])
def test_what_cannot_be_written_is_one_sentence_and_leaves_nothing(tmp_path: Path, damage: Any, words: str) -> None:
    folder = make(tmp_path / "m")
    damage(folder)
    with pytest.raises(ModelError, match=words) as caught:
        write_gguf(folder, tmp_path / "m.gguf", "m", "f16")
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["m"]
    shutil.rmtree(folder)


def test_without_the_package_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "m")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'athanor-llm\[gguf\]'"):
        write_gguf(folder, tmp_path / "m.gguf", "m", "f16")
