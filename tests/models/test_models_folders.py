"""Model folders: what is written is read back bit by bit, and what does not fit is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from athanor.foundation.errors import ModelError
from athanor.models.decoder import Decoder
from athanor.models.find import load_architecture
from athanor.models.huggingface import load_model, logits, read_shape, save_model
from athanor.models.shapes.decoder import DecoderShape

Build = Callable[..., Decoder]


@pytest.fixture
def folder(small: Build, tmp_path: Path) -> Path:
    save_model(small(), tmp_path)
    return tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_folder_comes_back_bit_by_bit(small: Build, tmp_path: Path, dtype: torch.dtype) -> None:
    module = small(dtype)
    save_model(module, tmp_path)
    again = load_model(tmp_path, str(dtype).removeprefix("torch."))
    assert again.shape == module.shape == read_shape(tmp_path)
    for name, parameter in module.named_parameters():
        assert torch.equal(again.state_dict()[name], parameter)
        assert torch.equal(load_file(tmp_path / "model.safetensors")[name], parameter)
    assert torch.equal(logits(again, [1, 2, 3]), logits(module, [1, 2, 3]))


def test_transformers_own_folders_are_read(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "rope_theta": 700.0, "eos_token_id": [5, 6]}
    peer = LlamaForCausalLM(LlamaConfig(**sizes))
    peer.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    module = load_model(tmp_path)
    assert module.shape.rope_theta == 700.0 and module.shape.eos_token_id == 5
    ids = list(range(30))
    assert (logits(module, ids) - peer(torch.tensor([ids])).logits[0]).abs().max() <= 1e-5


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(3)
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:100].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError) as error:
        load_model(folder)
    for part in ("model.norm.weight is missing", "model.layers.0.mlp.up_proj.bias is surplus",
                 "lm_head.weight is [100, 64] and should be [200, 64]"):
        assert part in str(error.value)


def test_wrong_folders_are_refused(folder: Path, small: Build) -> None:
    weights = folder / "model.safetensors"
    for changes, words in (({"model_type": "lama"}, "did you mean 'llama'"), ({"hidden_act": "gelu"}, "'silu'"),
                           ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"), ({"hidden_size": "wide"}, "hidden_size"),
                           ({"num_key_value_heads": 3}, "does not divide")):
        before = (folder / "config.json").read_text()
        change_config(folder, **changes)
        with pytest.raises(ModelError, match=words):
            load_model(folder)
        (folder / "config.json").write_text(before)
    with pytest.raises(ModelError, match="did you mean 'float32'"):
        load_model(folder, "float23")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="safetensors"):
        load_model(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="save_pretrained"):
        load_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="no weights"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        load_model(folder)


@pytest.mark.parametrize(("changes", "words"), [
    ({"num_key_value_heads": -1}, "num_key_value_heads = -1"), ({"head_dim": -2}, "head_dim = -2"),
    ({"rope_theta": 0.0}, "rope_theta"), ({"rms_norm_eps": -1.0}, "rms_norm_eps"), ({"rope_scaling": "linear"}, "not a table"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"), ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
    ({"model_type": "../../x"}, "unknown model_type"), ({"model_type": "os.path"}, "unknown model_type"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"), ({"hidden_size": 10**18}, "impossible size"),
    ({"vocab_size": 10**10}, r"should be \[10000000000, 64\]")])
def test_a_config_that_cannot_be_is_refused_before_memory_is_taken(folder: Path, changes: dict[str, Any], words: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=words):
        load_model(folder)


def test_odd_tensors_and_indices_are_refused(folder: Path) -> None:
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    tensors = load_file(weights)
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"].to(torch.int8)}, weights)
    with pytest.raises(ModelError, match=r"model\.norm\.weight is of type I8"):
        load_model(folder)
    save_file({f"x.{name}": tensor for name, tensor in tensors.items()}, weights)
    with pytest.raises(ModelError, match=r"and \d+ more"):
        load_model(folder)
    for content in ("[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}'):
        index.write_text(content)
        with pytest.raises(ModelError, match="no 'weight_map' that names a file"):
            load_model(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight is not in model\.safetensors"):
        load_model(folder)


def test_a_tied_folder_may_hold_the_head_as_well(small: Build, tmp_path: Path) -> None:
    module = small(tie_word_embeddings=True)
    save_model(module, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    assert torch.equal(logits(load_model(tmp_path), [1, 2]), logits(module, [1, 2]))


def test_logits_are_of_the_tokens_of_one_document(small: Build) -> None:
    module = small()
    assert torch.equal(logits(module, torch.tensor([1, 2, 3])), logits(module, [1, 2, 3]))
    for ids in ([], [200], [-1], [[1, 2]]):
        with pytest.raises(ModelError, match="token ids of one document are expected, from 0 to 199"):
            logits(module, ids)


def test_architectures_are_found_by_name() -> None:
    shape = DecoderShape(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    module = load_architecture("llama")
    names = [name for name, _ in module.build(shape).named_parameters()]
    assert all(sum(name.endswith(end) for end in module.TENSOR_DIMS if end != "norm.weight" or name == "model.norm.weight") == 1
               for name in names)
    assert load_architecture("athanor.models.zoo.llama") is module
    with pytest.raises(ModelError, match="did you mean 'llama'"):
        load_architecture("llamma")
    with pytest.raises(ModelError, match="cannot be imported"):
        load_architecture("no.such.thing")
    with pytest.raises(ModelError, match="lacks 'build'"):
        load_architecture("athanor.models.context")
    with pytest.raises(ModelError, match="odd"):
        DecoderShape(vocab_size=64, hidden_size=6, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
