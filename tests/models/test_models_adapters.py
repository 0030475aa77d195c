"""LoRA folders of PEFT are merged as PEFT merges them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from athanor.cli.models import command
from athanor.foundation.errors import ModelError
from athanor.models.adapters import merge_adapter
from athanor.models.find import load_architecture
from athanor.models.huggingface import load_model, logits, save_model
from athanor.models.initialize import initialize
from athanor.models.shapes.find import shape_class

pytestmark = [pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
              pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")]
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "initializer_range": 0.2, "max_position_embeddings": 64}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "qwen3": "all-linear"}


def base_folder(name: str, folder: Path) -> Path:
    module = load_architecture(name).build(shape_class(name)(**SIZES))
    initialize(module, 1)
    save_model(module, folder)
    return folder


def adapted(base: Path, folder: Path, targets: Any, **options: Any) -> Any:
    """The model that PEFT makes of a base and a new adapter, which goes to `folder`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=targets, **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data, std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("name", "options"), [("llama", {}), ("llama", {"use_rslora": True}), ("gpt2", {}), ("qwen3", {}),
                                               ("llama", {"rank_pattern": {"v_proj": 5}})])
def test_the_merged_model_is_the_one_that_peft_makes(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    base = base_folder(name, tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    peer = adapted(base, tmp_path / "adapter", TARGETS[name], **options)
    done = CliRunner().invoke(command, ["merge", str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"), "--json"])
    assert done.exit_code == 0, done.output
    ids = list(range(5, 25))
    found, wanted = logits(load_model(tmp_path / "merged"), ids), peer(torch.tensor([ids])).logits[0]
    assert (found - wanted).abs().max() <= 2e-5
    assert (found - logits(load_model(base), ids)).abs().max() > 0.1, "the adapter changes something"
    adapted_matrices = sum(".lora_A." in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert json.loads(done.stdout)["matrices"] == adapted_matrices * (3 if name == "gpt2" else 1) - 2 * 2 * (name == "gpt2")
    for file in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "merged" / file).read_text() == (base / file).read_text()


def test_what_is_no_plain_adapter_of_the_model_is_refused(tmp_path: Path) -> None:
    base, adapter = base_folder("llama", tmp_path / "base"), tmp_path / "adapter"
    adapted(base, adapter, ["q_proj"])
    module = load_model(base)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    config, weights = json.loads((adapter / "adapter_config.json").read_text()), load_file(adapter / "adapter_model.safetensors")

    def refuses(words: str, change: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **(change or {})}))
        save_file(weights if tensors is None else tensors, adapter / "adapter_model.safetensors")
        with pytest.raises(ModelError, match=words):
            merge_adapter(module, adapter)

    refuses("use_dora = True is not supported", {"use_dora": True})
    refuses("peft_type = 'IA3'", {"peft_type": "IA3"})
    refuses("lora_alpha = 0", {"lora_alpha": 0})
    refuses("lora_alpha = 1000", {"lora_alpha": 10**400})
    refuses("q_proj' is changed by is not finite", {"lora_alpha": 1e300})
    refuses("init_lora_weights = 'pissa_niter_4' is not supported", {"init_lora_weights": "pissa_niter_4"})
    refuses(r"are \[0, 32\] and \[32, 0\], which do not multiply", tensors={
        key: part[:0].contiguous() if "lora_A" in key else part[:, :0].contiguous() for key, part in weights.items()})
    refuses("holds 'nothing'", tensors={})
    first = min(weights)
    refuses("which is no pair", tensors={key: part for key, part in weights.items() if key != first})
    refuses(r"layers\.7.* which the model does not have", tensors={key.replace("layers.1", "layers.7"): part
                                                                   for key, part in weights.items()})
    refuses(r"changed by \[32, 8\]", tensors={key: part[:, :8].contiguous() if "lora_A" in key else part
                                             for key, part in weights.items()})
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no adapter_model"):
        merge_adapter(module, adapter)
    with pytest.raises(ModelError, match="is no adapter"):
        merge_adapter(module, base)
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters()), "nothing was changed"
    done = CliRunner().invoke(command, ["merge", str(base), str(adapter), str(base)])
    assert done.exit_code != 0 and (base / "model.safetensors").exists()
