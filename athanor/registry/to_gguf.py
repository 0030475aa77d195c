"""A model folder as one GGUF file for llama.cpp: its names, its order of rotary rows, its kinds of tokenizer. No torch.

Names come from the package `gguf`. llama.cpp turns neighbouring channels in the architecture `llama` and channels half a
head apart in the Qwens, while Hugging Face folders always have the latter; so the rows of q and k change places for `llama`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from athanor.foundation.errors import ModelError, UserError
from athanor.foundation.run_folder import disk_errors
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.find import load_shape
from athanor.models.shapes.rope import RopeScaling
from athanor.registry.model_folder import Entry, read_tensors
from athanor.registry.tokens import read_object, special_id, template_source, token_ids

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}  # model_type -> gguf.MODEL_ARCH
TYPES = {"f16": "F16", "q8_0": "Q8_0"}
BLOCK = 32  # numbers that share a scale in Q8_0
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}

# A text, cut as llama.cpp's pre-tokenizers cut it (their expressions: llama.cpp, src/llama-vocab.cpp, 2026): a tokenizer that
# cuts it in the same places goes by that name.
CUTS = {
    "llama-bpe": "It|'s| we|'LL| | |123|45| x|_y|+=|1|;\n\n|\t| return|(café| 中文|)!!\r\n| \n|  | end|.| " + "a" * 50 + "|  ",
    "qwen2": "It|'s| we|'LL| | |1|2|3|4|5| x|_y|+=|1|;\n\n|\t| return|(café| 中文|)!!\r\n| \n|  | end|.| " + "a" * 50 + "|  ",
    "gpt-2": "It|'s| we|'|LL| | 12345| x|_|y|+=|1|;|\n\n\t| return|(|café| 中文|)!!|\r\n \n  | end|.| " + "a" * 50 + "|  ",
    "smollm": "It|'s| we|'|LL|  |1|2|3|4|5| x|_|y|+=|1|;|\n\n\t| return|(|café| 中文|)!!|\r\n \n  | end|.| " + "a" * 50 + "|  "}
PROBE = CUTS["gpt-2"].replace("|", "")


def write_gguf(folder: Path, target: Path, name: str, kind: str) -> list[str]:
    """Write matrices as `kind` (f16 or q8_0) and vectors as F32, tensor by tensor, renamed into place last.

    Returns what a user of the file must know, a sentence each. Raises ModelError for what llama.cpp has no name for.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("GGUF files need the package gguf; install it with: pip install 'athanor-llm[gguf]'")
    import gguf

    shape = load_shape(folder)
    tensors = dict(_named(folder, shape))
    if target.exists():
        raise UserError(f"{target} exists; export needs a new file")
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[_architecture(shape)])
    notes = _write_tokenizer(writer, folder, shape)
    _write_sizes(writer, shape, name, kind)
    types = {own: _type(entry.shape, kind) for own, (entry, _) in tensors.items()}
    uneven = sum(TYPES[kind] != kept and len(tensors[own][0].shape) > 1 for own, kept in types.items())
    if uneven:
        notes.append(f"{uneven} matrices are F16, since their rows are no multiple of {BLOCK} numbers")
    for own, (entry, _) in tensors.items():
        quant = gguf.GGMLQuantizationType[types[own]]
        size, wide = gguf.GGML_QUANT_SIZES[quant]
        writer.add_tensor_info(own, entry.shape, np.dtype(np.float32), math.prod(entry.shape) // size * wide, quant)
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
            for own, (entry, heads) in tensors.items():
                writer.write_tensor_data(_converted(own, _read(entry, heads), types[own]))
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
        raise ModelError(f"'{shape.MODEL_TYPE}' cannot be written as GGUF: only {', '.join(ARCHITECTURES)} can, no mixture of "
                         "experts; --format huggingface writes any")
    return gguf.MODEL_ARCH[ARCHITECTURES[shape.MODEL_TYPE]]


def _named(folder: Path, shape: DecoderShape) -> Iterator[tuple[str, tuple[Entry, int]]]:
    """llama.cpp's name of each tensor, where it lies, and how many heads' rows change places (0: none do)."""
    import gguf

    architecture = _architecture(shape)
    names = gguf.get_tensor_name_map(architecture, shape.num_hidden_layers)
    found = 0
    for name, entry in read_tensors(folder).items():
        if name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and shape.tie_word_embeddings):
            continue
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None or entry.dtype not in DTYPES:
            why = "llama.cpp has no name for it" if own is None else f"it is of type {entry.dtype}, not {', '.join(DTYPES)}"
            raise ModelError(f"{folder}: {name} cannot be written as GGUF: {why}")
        heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}.get(name.split(".")[-2], 0)
        found += math.prod(entry.shape)
        yield own, (entry, heads if architecture == gguf.MODEL_ARCH.LLAMA else 0)
    if found != shape.parameters():
        raise ModelError(f"{folder}: the weights do not fit config.json: {found} numbers, and {shape.parameters()} are expected")


def _read(entry: Entry, heads: int) -> np.ndarray:
    raw = np.memmap(entry.file, DTYPES[entry.dtype], "r", entry.begin, tuple(entry.shape))
    values = (raw.astype(np.uint32) << 16).view(np.float32) if entry.dtype == "BF16" else raw.astype(np.float32)
    if heads:
        halves = values.reshape(heads, 2, entry.shape[0] // heads // 2, *entry.shape[1:])
        values = halves.swapaxes(1, 2).reshape(entry.shape)
    return values


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
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    scaling = shape.rope_scaling
    if scaling is None or scaling.rope_type == "llama3":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType[scaling.rope_type.upper()])
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.rope_type == "yarn":
        usual = {"rope_type": "yarn", "factor": scaling.factor,
                 "original_max_position_embeddings": scaling.original_max_position_embeddings}
        if scaling != RopeScaling.from_config(usual, shape.max_position_embeddings, "yarn"):
            raise ModelError(f"yarn with {scaling.to_config()} cannot be written as GGUF; only its usual numbers can")
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)


def _rope_factors(shape: DecoderShape) -> np.ndarray | None:
    """What each pair of channels' angle is divided by under `llama3` [head_dim / 2]; None for other kinds."""
    scaling = shape.rope_scaling
    if scaling is None or scaling.rope_type != "llama3":
        return None
    wavelengths = 2 * np.pi * shape.rope_theta ** (np.arange(0, shape.head_dim, 2) / shape.head_dim)
    turns = scaling.original_max_position_embeddings / wavelengths
    kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clip(0, 1)
    return np.asarray(1 / (kept + (1 - kept) / scaling.factor), np.float32)


def _write_tokenizer(writer: Any, folder: Path, shape: DecoderShape) -> list[str]:
    """The tokenizer's tables; returns a sentence when llama.cpp cuts text otherwise."""
    import gguf

    content, ids = read_object(folder, "tokenizer.json"), token_ids(folder)
    if (content.get("model") or {}).get("type") != "BPE" or "ByteLevel" not in json.dumps(content.get("decoder")):
        raise ModelError(f"{folder} cannot be written as GGUF: its tokenizer is not byte-level BPE in a tokenizer.json, as those "
                         "of Llama 3, Qwen and ours are; pieces of SentencePiece are not exported")
    _check_tokenizer(folder, content, ids, shape.vocab_size)
    pre, notes = pre_tokenizer(content)
    if (content.get("normalizer") or {}).get("type", "NFC") != "NFC":  # which changes few texts
        notes.append("llama.cpp does not normalise texts as this tokenizer does, so some become other tokens there")
    added = {token["content"]: token for token in content.get("added_tokens") or []}
    by_id = {index: token for token, index in ids.items()}
    kinds = [gguf.TokenType.UNUSED if i not in by_id else gguf.TokenType.NORMAL if by_id[i] not in added else
             gguf.TokenType.CONTROL if added[by_id[i]].get("special") else gguf.TokenType.USER_DEFINED
             for i in range(shape.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(shape.vocab_size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]])
    bos = special_id(folder, "bos_token", ids)
    for index, write in ((bos, writer.add_bos_token_id), (special_id(folder, "eos_token", ids), writer.add_eos_token_id),
                         (special_id(folder, "pad_token", ids), writer.add_pad_token_id)):
        if index is not None:
            write(index)
    writer.add_add_bos_token(bos is not None and by_id[bos] in _written_first(content.get("post_processor")))
    template = template_source(folder)
    if template is not None:
        writer.add_chat_template(template)
    return notes


def _check_tokenizer(folder: Path, content: dict[str, Any], ids: dict[str, int], vocab_size: int) -> None:
    import tokenizers

    try:
        tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises no narrower one
        raise ModelError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from None
    if max(ids.values(), default=vocab_size) >= vocab_size or len(set(ids.values())) < len(ids):
        raise ModelError(f"{folder} cannot be written as GGUF: its {len(ids)} tokens have {len(set(ids.values()))} ids up to "
                         f"{max(ids.values(), default=0)}, and vocab_size is {vocab_size}")


def pre_tokenizer(content: dict[str, Any]) -> tuple[str, list[str]]:
    """llama.cpp's name for how a tokenizer.json cuts text, else the nearest one with a sentence that says so."""
    import tokenizers

    bare = {**content, "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [], "post_processor": None}
    cutter = tokenizers.Tokenizer.from_str(json.dumps(bare)).pre_tokenizer
    found = {0} if cutter is None else {begin for _, (begin, _) in cutter.pre_tokenize_str(PROBE)}
    wrong = {}
    for name, text in CUTS.items():
        pieces = text.split("|")
        wrong[name] = found ^ {sum(map(len, pieces[:i])) for i in range(len(pieces))}
    name = min(wrong, key=lambda candidate: len(wrong[candidate]))
    if not wrong[name]:
        return name, []
    return name, [f"llama.cpp has no pre-tokenizer that cuts text as this tokenizer does; '{name}' comes nearest, so there some "
                  "texts become other tokens than in training"]


def _written_first(processor: Any) -> set[str]:
    """Special tokens that a post-processor puts before a text."""
    if not isinstance(processor, dict):
        return set()
    if processor.get("type") == "Sequence":
        return set().union(*map(_written_first, processor.get("processors") or []))
    first: Any = next(iter(processor.get("single") or []), {})
    return {first["SpecialToken"]["id"]} if isinstance(first, dict) and "SpecialToken" in first else set()
