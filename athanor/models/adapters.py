"""LoRA adapters in the folders of PEFT: added to the weights of the model that they were trained beside."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from athanor.foundation.errors import ModelError
from athanor.foundation.run_folder import read_json
from athanor.models.decoder import Decoder
from athanor.models.stored import stored

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# what would need more than a sum of products, and the values that need none
PLAIN: dict[str, tuple[Any, ...]] = {"peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None),
                                     "modules_to_save": (None, []), "alpha_pattern": (None, {}), "lora_bias": (False, None),
                                     "layer_replication": (None, []), "target_parameters": (None, []),
                                     # others, such as pissa, take what the adapter begins with from the base's weights
                                     "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal")}


@torch.no_grad()
def merge_adapter(module: Decoder, folder: Path) -> int:
    """Add `lora_alpha` / r x B A of every adapted matrix to a whole model's weights, in fp32; returns how many there are.

    Raises ModelError for a folder that is no plain LoRA, and for matrices that the model does not have, before any is changed.
    """
    folder = Path(folder)
    config, pairs = _read_config(folder), _read_pairs(folder)
    changes: list[tuple[Tensor, Tensor]] = []
    parameters = dict(module.named_parameters())
    for group in stored(module):
        found = {tensor: tensor.removesuffix(".weight") for tensor in group.tensors if tensor.removesuffix(".weight") in pairs}
        if not found:
            continue
        parts = {tensor: torch.zeros(group.shape) for tensor in group.tensors}
        for tensor, name in found.items():
            parts[tensor] = _product(name, *pairs.pop(name), config, group.shape, folder)
        changes += [(parameters[name], group.take(name, parts.__getitem__)) for name in group.rows]
    if pairs:
        raise ModelError(f"{folder / WEIGHTS} adapts '{min(pairs)}', which the model does not have; is it its base?")
    for parameter, change in changes:
        parameter.copy_(parameter.float() + change)
    return len(changes)


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} is no adapter: it has no {CONFIG}")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise ModelError(f"{folder / CONFIG} is not a table")
    for key, values in PLAIN.items():
        if config.get(key, values[0]) not in values:
            raise ModelError(f"{folder / CONFIG}: {key} = {config[key]!r} is not supported, only {values[0]!r} is; merge it "
                             "where it was trained: PeftModel.from_pretrained(…).merge_and_unload().save_pretrained('NEW')")
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha <= sys.float_info.max:
        raise ModelError(f"{folder / CONFIG}: lora_alpha = {alpha!r} is not a number above 0")
    return config


def _read_pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A [r, in] and B [out, r] in fp32, by the name of the matrix on disk."""
    try:
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise ModelError(f"{folder} has no {WEIGHTS}; weights in a pickle are not read") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / WEIGHTS} is not a readable safetensors file: {error}") from error
    pairs = {}
    for key in list(tensors):
        if key.endswith(DOWN) and key.startswith(PREFIX) and (up := key.removesuffix(DOWN) + UP) in tensors:
            pairs[key.removeprefix(PREFIX).removesuffix(DOWN)] = tensors.pop(key).float(), tensors.pop(up).float()
    if tensors or not pairs:
        raise ModelError(f"{folder / WEIGHTS} holds '{min(tensors, default='nothing')}', which is no pair {DOWN[1:]} and "
                         f"{UP[1:]} of a matrix")
    return pairs


def _product(name: str, down: Tensor, up: Tensor, config: dict[str, Any], shape: tuple[int, ...], folder: Path) -> Tensor:
    """What is added to a tensor of this shape on disk."""
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != len(down) or not len(down):
        raise ModelError(f"{folder / WEIGHTS}: the parts of '{name}' are {list(down.shape)} and {list(up.shape)}, which do not "
                         "multiply")
    rank = len(down)
    change = up @ down * (config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank))
    if not change.isfinite().all():
        raise ModelError(f"{folder / WEIGHTS}: what '{name}' is changed by is not finite")
    change = change.t() if config.get("fan_in_fan_out") else change
    if tuple(change.shape) != tuple(shape):
        raise ModelError(f"{folder / WEIGHTS}: '{name}' is changed by {list(change.shape)}, but the model has "
                         f"{list(shape)} there")
    return change
