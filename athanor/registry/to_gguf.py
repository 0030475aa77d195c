"""A model folder as one GGUF file for llama.cpp: its names, its order of rotary rows, its stacks of experts. No torch.

Names come from the package `gguf`. llama.cpp turns neighbouring channels in the architecture `llama` and channels half a
head apart in the others, while Hugging Face folders have the latter; so the rows of q and k change places for `llama` (Mistral
and Mixtral go by that name too). DeepSeek-V3 turns neighbours in both. One matrix of all experts is one tensor [experts, rows,
columns]; Gemma's norms are kept there as what they multiply with, and not as what that differs from 1 by. Latent attention's
upward matrix is two there: keys' [heads, latent, channels], for queries to meet latent vectors, and values', not transposed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from athanor.foundation.errors import ModelError, UserError
from athanor.foundation.run_folder import disk_errors
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.deepseek_v3 import LATENT_EPS
from athanor.models.shapes.deepseek_v3 import Shape as LatentShape
from athanor.models.shapes.find import load_shape
from athanor.models.shapes.mixture import MixtureShape
from athanor.models.shapes.rope import MSCALES, RopeScaling
from athanor.registry.gguf_tokenizer import write_tokenizer
from athanor.registry.model_folder import Entry, read_tensors

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "mixtral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3",
                 "qwen3_moe": "QWEN3MOE", "gemma": "GEMMA", "gpt2": "GPT2",
                 "deepseek_v3": "DEEPSEEK2"}  # model_type -> gguf.MODEL_ARCH
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
EXACT = (".ffn_gate_inp.", "position_embd.")  # kept in full precision there
TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight", ".k_b_proj.weight")  # a GPT-2's rows are inputs
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
TYPES = {"f16": "F16", "q8_0": "Q8_0"}
BLOCK = 32  # numbers that share a scale in Q8_0
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class Source:
    """The tensors that one of llama.cpp's is read from (all experts' matrices, by their numbers, or a single one), how many
    heads' rows change places (0: none do), what is added, whether rows are columns there, and which rows of each of how many
    heads are taken (None: all of them)."""

    is_stacked: bool
    heads: int
    shift: float
    is_transposed: bool
    cut: tuple[int, int, int] | None  # heads, begin, end
    entries: dict[int, Entry] = field(default_factory=dict)

    @property
    def shape(self) -> list[int]:
        one = next(iter(self.entries.values())).shape
        one = [self.cut[0], self.cut[2] - self.cut[1], one[-1]] if self.cut else one
        one = [*one[:-2], one[-1], one[-2]] if self.is_transposed else one
        return [len(self.entries), *one] if self.is_stacked else one


def write_gguf(folder: Path, target: Path, name: str, kind: str) -> list[str]:
    """Write matrices as `kind` (f16 or q8_0) and vectors as F32, tensor by tensor, renamed into place last.

    Returns what a user of the file must know, a sentence each. Raises ModelError for what llama.cpp has no name for.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("GGUF files need the package gguf; install it with: pip install 'athanor-llm[gguf]'")
    import gguf

    shape = load_shape(folder)
    tensors = _named(folder, shape)
    if target.exists():
        raise UserError(f"{target} exists; export needs a new file")
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[_architecture(shape)])
    notes = write_tokenizer(writer, folder, shape.vocab_size) + _differences(shape)
    _write_sizes(writer, shape, name, kind)
    types = {own: "F32" if any(part in own for part in EXACT) else _type(source.shape, kind) for own, source in tensors.items()}
    uneven = sum(kept == "F16" != TYPES[kind] for kept in types.values())
    if uneven:
        notes.append(f"{uneven} matrices are F16, since their rows are no multiple of {BLOCK} numbers")
    for own, source in tensors.items():
        quant = gguf.GGMLQuantizationType[types[own]]
        size, wide = gguf.GGML_QUANT_SIZES[quant]
        writer.add_tensor_info(own, source.shape, np.dtype(np.float32), math.prod(source.shape) // size * wide, quant)
    factors = _rope_factors(shape)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    building = target.with_name(f".{target.name}.{os.getpid()}")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            writer.write_header_to_file(building)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for own, source in tensors.items():
                parts = [_converted(own, _read(source.entries[number], source), types[own]) for number in sorted(source.entries)]
                writer.write_tensor_data(np.stack(parts) if source.is_stacked else parts[0])
            if factors is not None:
                writer.write_tensor_data(factors)
            writer.close()
            building.replace(target)
        finally:
            writer.close()
            building.unlink(missing_ok=True)
    return notes


def _architecture(shape: DecoderShape) -> Any:
    import gguf

    if shape.MODEL_TYPE not in ARCHITECTURES:
        raise ModelError(f"'{shape.MODEL_TYPE}' cannot be written as GGUF: only {', '.join(ARCHITECTURES)} can; "
                         "--format huggingface writes any")
    return gguf.MODEL_ARCH[ARCHITECTURES[shape.MODEL_TYPE]]


def _named(folder: Path, shape: DecoderShape) -> dict[str, Source]:
    """What each of llama.cpp's tensors is read from, by its name."""
    import gguf

    architecture = _architecture(shape)
    names = gguf.get_tensor_name_map(architecture, shape.num_hidden_layers)
    left_out = tuple(f"model.layers.{shape.num_hidden_layers + block}." for block in range(shape.prediction_blocks()))
    numbers, made = 0, dict[str, Source]()
    for name, entry in read_tensors(folder).items():
        if name.endswith(BUFFERS) or name.startswith(left_out) or (name == "lm_head.weight" and shape.tie_word_embeddings):
            continue
        of_expert = EXPERT.fullmatch(name)
        heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}.get(name.split(".")[-2], 0)
        for part, cut in _parts(f"{of_expert[1]}.{of_expert[3]}" if of_expert else name, shape):
            own = names.get_name(part, try_suffixes=(".weight", ".bias"))
            if own is None or entry.dtype not in DTYPES:
                why = "llama.cpp has no name for it" if own is None else f"it is of type {entry.dtype}, not {', '.join(DTYPES)}"
                raise ModelError(f"{folder}: {name} cannot be written as GGUF: {why}")
            is_shifted = architecture == gguf.MODEL_ARCH.GEMMA and own.endswith("norm.weight")
            source = made.setdefault(own, Source(of_expert is not None, heads if architecture == gguf.MODEL_ARCH.LLAMA else 0,
                                                 float(is_shifted), part.endswith(TRANSPOSED), cut))
            source.entries[int(of_expert[2]) if of_expert else 0] = entry
        numbers += math.prod(entry.shape)
    odd = [own for own, source in made.items() if len({tuple(entry.shape) for entry in source.entries.values()}) > 1
           or set(source.entries) != set(range(len(source.entries)))]
    expected = shape.answering().parameters()
    if isinstance(shape, LatentShape):  # biases that balance its routers are no parameters
        expected += shape.num_experts * max(shape.num_hidden_layers - shape.first_k_dense_replace, 0)
    if numbers != expected or odd:
        what = f"experts of {odd[0]} are not all there, or differ in shape" if odd else (
            f"{numbers} numbers, and {expected} are expected")
        raise ModelError(f"{folder}: the weights do not fit config.json: {what}")
    return made


def _parts(name: str, shape: DecoderShape) -> list[tuple[str, tuple[int, int, int] | None]]:
    """The names under which the package `gguf` knows a tensor's parts, each with its rows of every head (None: all)."""
    if not isinstance(shape, LatentShape):
        return [(name, None)]
    heads, own, size = shape.num_attention_heads, shape.qk_nope_head_dim, shape.qk_nope_head_dim + shape.v_head_dim
    if ".kv_b_proj." in name:
        return [(name.replace("kv_b", "k_b"), (heads, 0, own)), (name.replace("kv_b", "v_b"), (heads, own, size))]
    return [(name.replace("e_score_correction_bias", "e_score_correction.bias"), None)]


def _read(entry: Entry, source: Source) -> np.ndarray:
    raw = np.memmap(entry.file, DTYPES[entry.dtype], "r", entry.begin, tuple(entry.shape))
    values = (raw.astype(np.uint32) << 16).view(np.float32) if entry.dtype == "BF16" else raw.astype(np.float32)
    if source.heads:
        halves = values.reshape(source.heads, 2, entry.shape[0] // source.heads // 2, *entry.shape[1:])
        values = halves.swapaxes(1, 2).reshape(entry.shape)
    if source.cut:
        heads, begin, end = source.cut
        values = values.reshape(heads, -1, values.shape[-1])[:, begin:end]
    values = values.swapaxes(-1, -2) if source.is_transposed else values
    return values + np.float32(source.shift) if source.shift else values


def _type(shape: list[int], kind: str) -> str:
    if len(shape) < 2:
        return "F32"
    return TYPES[kind] if shape[-1] % BLOCK == 0 else "F16"


def _converted(name: str, values: np.ndarray, kind: str) -> np.ndarray:
    import gguf

    largest = {"F32": float(np.finfo(np.float32).max), "F16": 65504.0, "Q8_0": 127 * 65504.0}[kind]  # of F16, as are scales
    if not np.abs(values).max(initial=0.0) <= largest:
        raise ModelError(f"{name} holds values beyond {largest:g}, or none at all, which {kind} cannot hold")
    return np.asarray(gguf.quantize(values, gguf.GGMLQuantizationType[kind]))


def _write_sizes(writer: Any, shape: DecoderShape, name: str, kind: str) -> None:
    import gguf

    if any(0 < shape.window(layer) < shape.max_position_embeddings for layer in range(shape.num_hidden_layers)):
        raise ModelError(f"blocks that see a window of keys cannot be written as GGUF for '{shape.MODEL_TYPE}'")
    if shape.HAS_HEAD_NORMS and "attention_out" in shape.biased:
        raise ModelError(f"attention_bias = true cannot be written as GGUF for '{shape.MODEL_TYPE}': llama.cpp has no place for "
                         "the bias of o_proj there")
    if isinstance(shape, MixtureShape):
        if not shape.norm_topk_prob and not isinstance(shape, LatentShape):
            raise ModelError("norm_topk_prob = false cannot be written as GGUF: llama.cpp divides a token's gates by their sum")
        writer.add_expert_count(shape.num_experts)
        writer.add_expert_used_count(shape.num_experts_per_tok)
        writer.add_expert_feed_forward_length(shape.moe_intermediate_size)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{TYPES[kind]}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    if isinstance(shape, LatentShape):
        _write_latent(writer, shape)
    else:
        writer.add_head_count_kv(shape.num_key_value_heads)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
    (writer.add_layer_norm_rms_eps if shape.NORM_VECTORS == 1 else writer.add_layer_norm_eps)(shape.rms_norm_eps)
    if not shape.IS_ROTARY:
        return
    writer.add_rope_dimension_count(shape.rotary_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    scaling = shape.rope_scaling
    if scaling is None or scaling.rope_type in ("llama3", "dynamic"):  # as without, up to the context that is written
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType[scaling.rope_type.upper()])
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.rope_type == "yarn":
        usual = {"rope_type": "yarn", "factor": scaling.factor,
                 "original_max_position_embeddings": scaling.original_max_position_embeddings}
        if isinstance(shape, LatentShape):
            usual |= dict.fromkeys(MSCALES, scaling.mscale_all_dim)
            writer.add_rope_scaling_yarn_log_mul(0.1 * scaling.mscale_all_dim)
        if scaling != RopeScaling.from_config(usual, shape.max_position_embeddings, "yarn"):
            raise ModelError(f"yarn with {scaling.to_config()} cannot be written as GGUF; only its usual numbers can")
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)


def _write_latent(writer: Any, shape: LatentShape) -> None:
    """What llama.cpp's `deepseek2` asks for beside the usual; it sees one key head, of the latent vector and what turns."""
    import gguf

    where, scaling = f"cannot be written as GGUF for '{shape.MODEL_TYPE}'", shape.rope_scaling
    for name in ("n_shared_experts", "qk_nope_head_dim", "qk_rope_head_dim"):
        if not getattr(shape, name):
            raise ModelError(f"{name} = 0 {where}: llama.cpp wants at least 1")
    if shape.q_lora_rank and (shape.num_hidden_layers in (26, 27) or (shape.num_hidden_layers, shape.vocab_size) == (48, 128256)):
        raise ModelError(f"num_hidden_layers = {shape.num_hidden_layers} with q_lora_rank = {shape.q_lora_rank} {where}: "
                         "llama.cpp takes it for another model, without q_lora_rank")
    if scaling and scaling.rope_type != "dynamic" and not scaling.mscale_all_dim:
        raise ModelError(f"rope_type '{scaling.rope_type}' without mscale_all_dim {where}: llama.cpp scales attention otherwise")
    writer.add_head_count_kv(1)
    writer.add_key_length(shape.kv_lora_rank + shape.qk_rope_head_dim)
    writer.add_value_length(shape.kv_lora_rank)
    writer.add_key_length_mla(shape.head_dim)
    writer.add_value_length_mla(shape.v_head_dim)
    writer.add_q_lora_rank(shape.q_lora_rank)
    writer.add_kv_lora_rank(shape.kv_lora_rank)
    writer.add_leading_dense_block_count(shape.first_k_dense_replace)
    writer.add_expert_shared_count(shape.n_shared_experts)
    writer.add_expert_weights_scale(shape.routed_scaling_factor)
    writer.add_expert_weights_norm(shape.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if shape.topk_group < shape.n_group < shape.num_experts:  # else groups choose nothing, and llama.cpp stops at them
        writer.add_expert_group_count(shape.n_group)
        writer.add_expert_group_used_count(shape.topk_group)


def _differences(shape: DecoderShape) -> list[str]:
    """In what llama.cpp has another model than the folder, beside rounding, a sentence each."""
    notes = []
    if isinstance(shape, LatentShape) and shape.rms_norm_eps != LATENT_EPS:
        notes.append(f"llama.cpp adds rms_norm_eps = {shape.rms_norm_eps:g} in the norms of latent vectors too, where the model "
                     f"adds {LATENT_EPS:g}")
    if shape.prediction_blocks():
        notes.append(f"the {shape.prediction_blocks()} blocks that predict further tokens are left out")
    return notes


def _rope_factors(shape: DecoderShape) -> np.ndarray | None:
    """What each pair of channels' angle is divided by under `llama3` [head_dim / 2]; None for other kinds."""
    scaling = shape.rope_scaling
    if scaling is None or scaling.rope_type != "llama3":
        return None
    wavelengths = 2 * np.pi * shape.rope_theta ** (np.arange(0, shape.head_dim, 2) / shape.head_dim)
    turns = scaling.original_max_position_embeddings / wavelengths
    kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clip(0, 1)
    return np.asarray(1 / (kept + (1 - kept) / scaling.factor), np.float32)
