"""A folder's tokenizer as the tables that llama.cpp reads from a GGUF file. No torch.

Byte-level BPE is its kind `gpt2`, with merges and the name of how text is cut first. SentencePiece's BPE is `llama`: pieces with
scores, of which neighbours join that make the piece of the highest score; its unigram is `t5`. Kinds of pieces have the same
numbers in SentencePiece and in GGUF.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from athanor.foundation import pieces
from athanor.foundation.errors import ModelError
from athanor.registry.tokens import read_object, special_id, template_source, token_ids

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
NO_SCORE = -10000.0  # of what no text becomes
UNNORMALISED = "llama.cpp does not normalise texts as this tokenizer does, so some become other tokens there"
SPACED = "llama.cpp puts a space behind each of this tokenizer's own symbols, so texts that have them become other tokens there"
NO_BYTES = "llama.cpp writes what is no piece of a unigram tokenizer as unknown, and not as bytes, so rare signs are lost there"

# A text, cut as llama.cpp's pre-tokenizers cut it (their expressions: llama.cpp, src/llama-vocab.cpp, 2026): a tokenizer that
# cuts it in the same places goes by that name.
CUTS = {
    "smaug-bpe": "It|'s| we|'LL| | |123|45| x|_y|+=|1|;\n\n|\t| return|(café| 中文|)!!\r\n| \n|  | end|.| " + "a" * 50 + "|  ",
    "qwen2": "It|'s| we|'LL| | |1|2|3|4|5| x|_y|+=|1|;\n\n|\t| return|(café| 中文|)!!\r\n| \n|  | end|.| " + "a" * 50 + "|  ",
    "deepseek-v3": "It|'s| we|'LL|  |123|45| x|_y|+=|1|;\n\n|\t| return|(caf|é| |中文|)!!\r\n| \n|  | end|.| " + "a" * 50 + "|  ",
    "gpt-2": "It|'s| we|'|LL| | 12345| x|_|y|+=|1|;|\n\n\t| return|(|café| 中文|)!!|\r\n \n  | end|.| " + "a" * 50 + "|  ",
    "smollm": "It|'s| we|'|LL|  |1|2|3|4|5| x|_|y|+=|1|;|\n\n\t| return|(|café| 中文|)!!|\r\n \n  | end|.| " + "a" * 50 + "|  "}
UNCUT = "superbpe"  # cuts numbers alone, where merges hardly ever join what `data build` cuts as below
OWN_CUT = "It|'s| we|'LL|  |123|45| x|_y|+=|1|;\n|\n\t |return|(café| 中文|)!!\r\n |\n   |end|.| " + "a" * 40 + f"|{'a' * 10}|  "
PROBE = CUTS["gpt-2"].replace("|", "")
UNMERGED = {"smaug-bpe": "llama-bpe"}  # which cuts alike, and takes a word that is in the vocabulary as it is


@dataclass
class Tables:
    """A vocabulary by ids, its kinds of tokens (those of SentencePiece), and what else a kind of tokenizer needs."""

    model: str  # gpt2, llama, t5
    tokens: dict[int, str]
    kinds: dict[int, int]
    adds_bos: bool
    pre: str = "default"
    scores: dict[int, float] | None = None
    merges: list[str] | None = None
    has_prefix: bool | None = None  # a space before every text
    joins_spaces: bool | None = None
    characters: bytes = b""
    has_raw_symbols: bool = False  # that are looked for in a text before its spaces become signs
    names: dict[str, str] = field(default_factory=dict)  # of special tokens, where the folder names none
    notes: list[str] = field(default_factory=list)


def write_tokenizer(writer: Any, folder: Path, vocab_size: int) -> list[str]:
    """Write the tables; returns what a user of the file must know, a sentence each. Raises ModelError for other kinds."""
    content = read_object(folder, "tokenizer.json")
    made = _tables(folder, content)
    _check(folder, made, vocab_size)
    writer.add_tokenizer_model(made.model)
    writer.add_tokenizer_pre(made.pre)
    raw = {i for i, kind in made.kinds.items() if made.has_raw_symbols and kind == pieces.USER_DEFINED}
    names = {i: token.replace(pieces.SPACE, " ") if i in raw else token for i, token in made.tokens.items()}
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    writer.add_token_types([made.kinds.get(i, pieces.UNUSED) for i in range(vocab_size)])
    if made.scores is not None:
        writer.add_token_scores([made.scores.get(i, NO_SCORE) for i in range(vocab_size)])
    if made.merges is not None:
        writer.add_token_merges(made.merges)
    ids = {token: index for index, token in made.tokens.items()}
    for key, write in (("bos_token", writer.add_bos_token_id), ("eos_token", writer.add_eos_token_id),
                       ("pad_token", writer.add_pad_token_id)):
        index = special_id(folder, key, ids)
        if (index := ids.get(made.names.get(key, "")) if index is None else index) is not None:
            write(index)
    unknown = [index for index, kind in made.kinds.items() if kind == pieces.UNKNOWN]
    if unknown:
        writer.add_unk_token_id(unknown[0])
    writer.add_add_bos_token(made.adds_bos)
    writer.add_add_eos_token(False)  # which some kinds would do unless told
    if made.has_prefix is not None:
        writer.add_add_space_prefix(made.has_prefix)
    if made.joins_spaces is not None:
        writer.add_remove_extra_whitespaces(made.joins_spaces)
    if made.characters:
        writer.add_precompiled_charsmap(made.characters)
    template = template_source(folder)
    if template is not None:
        writer.add_chat_template(template)
    return made.notes


def _tables(folder: Path, content: dict[str, Any]) -> Tables:
    model = content.get("model") or {}
    is_bpe = model.get("type") == "BPE"
    if is_bpe and "ByteLevel" in json.dumps(content.get("decoder")):
        return _of_bytes(folder, content)
    if (folder / pieces.FILE).is_file():
        return _of_pieces(folder, content, pieces.read_pieces(folder / pieces.FILE))
    if is_bpe and model.get("byte_fallback") and pieces.SPACE in json.dumps(_before(content), ensure_ascii=False):
        return _of_merges(folder, content)
    raise ModelError(f"{folder} cannot be written as GGUF: its tokenizer is neither byte-level BPE nor SentencePiece's BPE in a "
                     f"tokenizer.json, nor a {pieces.FILE}")


def _of_bytes(folder: Path, content: dict[str, Any]) -> Tables:
    _check_readable(folder, content)
    ids = token_ids(folder)
    pre, notes = pre_tokenizer(content)
    if (content.get("normalizer") or {}).get("type", "NFC") != "NFC":  # which changes few texts
        notes.append(UNNORMALISED)
    tokens = {index: token for token, index in ids.items()}
    return Tables("gpt2", tokens, dict.fromkeys(tokens, pieces.NORMAL) | _added_kinds(content), _adds_bos(folder, content, ids),
                  pre, merges=[" ".join(pair) for pair in _merges(content)], notes=notes)


def _of_merges(folder: Path, content: dict[str, Any]) -> Tables:
    """SentencePiece's BPE as the tokenizers library keeps it: the sooner a piece is merged, the higher is its score."""
    _check_readable(folder, content)
    model, ids = content["model"], token_ids(folder)
    merges, scores = _merges(content), dict.fromkeys(ids.values(), 0.0)
    for rank, (left, right) in reversed(list(enumerate(merges))):
        scores[ids[left + right]] = -float(rank)
    tokens = {index: token for token, index in ids.items()}
    kinds = {index: pieces.UNKNOWN if token == model.get("unk_token") else pieces.BYTE if BYTE_PIECE.fullmatch(token) else
             pieces.NORMAL for index, token in tokens.items()}
    added = {index: kind for index, kind in _added_kinds(content).items() if kinds[index] != pieces.UNKNOWN}
    notes, own = [], [tokens[index] for index, kind in (kinds | added).items() if kind == pieces.NORMAL]
    if len(merges) < sum(piece[:i] in ids and piece[i:] in ids for piece in own for i in range(1, len(piece))):
        notes.append("llama.cpp joins any two pieces that make a third, and this tokenizer only those it was trained to join, so "
                     "some texts become other tokens there")
    steps = _before(content)
    if {step.get("type") for step in steps} - {"Sequence", "Prepend", "Replace", "Metaspace", None}:
        notes.append(UNNORMALISED)
    has_prefix = any(step.get("type") == "Prepend" or step.get("prepend_scheme") in ("first", "always") or
                     (step.get("type") == "Metaspace" and step.get("add_prefix_space") is True) for step in steps)
    return Tables("llama", tokens, kinds | added, _adds_bos(folder, content, ids), scores=scores, has_prefix=has_prefix,
                  notes=notes)


def _of_pieces(folder: Path, content: dict[str, Any], held: pieces.Pieces) -> Tables:
    """SentencePiece's own file; tokens that other files add come after the pieces, or take their places."""
    if sum(kind == pieces.UNKNOWN for _, _, kind in held.pieces) != 1 or held.kind not in (pieces.UNIGRAM, pieces.BPE):
        raise ModelError(f"{folder / pieces.FILE} cannot be written as GGUF: it is no model of subwords with one unknown piece")
    tokens, scores, kinds = (dict(enumerate(column)) for column in zip(*held.pieces, strict=True))
    is_bpe = held.kind == pieces.BPE
    config = read_object(folder, "tokenizer_config.json")
    decoder = config.get("added_tokens_decoder") or {}
    names = {name: int(number) for name, number in read_object(folder, "added_tokens.json").items()}
    names |= {str(token["content"]): int(number) for number, token in decoder.items()}
    names |= {str(token["content"]): int(token["id"]) for token in content.get("added_tokens") or []}
    plain = {str(token["content"]) for token in [*decoder.values(), *(content.get("added_tokens") or [])]
             if not token.get("special")}
    for name, index in names.items():
        if kinds.get(index) != pieces.UNKNOWN:
            kinds[index] = pieces.USER_DEFINED if name in plain else pieces.CONTROL
        tokens[index] = name
        scores.setdefault(index, NO_SCORE)
    control = {piece for piece, _, kind in held.pieces if kind == pieces.CONTROL}
    has_symbols = pieces.USER_DEFINED in kinds.values()
    notes = [text for text, is_so in ((UNNORMALISED, is_bpe and bool(held.characters or held.joins_spaces)),
                                      (SPACED, has_symbols and held.has_prefix),
                                      (NO_BYTES, not is_bpe and pieces.BYTE in kinds.values())) if is_so]
    return Tables("llama" if is_bpe else "t5", tokens, kinds, bool(config.get("add_bos_token", is_bpe)), scores=scores,
                  has_prefix=held.has_prefix, joins_spaces=None if is_bpe else held.joins_spaces,
                  characters=b"" if is_bpe else held.characters,
                  has_raw_symbols=is_bpe, names={key: name for key, name in held.names.items() if name in control}, notes=notes)


def _check(folder: Path, made: Tables, vocab_size: int) -> None:
    tokens = set(made.tokens.values()) | set(token_ids(folder))
    if max(made.tokens, default=vocab_size) >= vocab_size or len(made.tokens) < len(tokens):
        raise ModelError(f"{folder} cannot be written as GGUF: its {len(tokens)} tokens have {len(made.tokens)} ids up to "
                         f"{max(made.tokens, default=0)}, and vocab_size is {vocab_size}")


def _check_readable(folder: Path, content: dict[str, Any]) -> None:
    import tokenizers

    try:
        tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises no narrower one
        raise ModelError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from None


def _merges(content: dict[str, Any]) -> list[tuple[str, str]]:
    return [(pair[0], pair[1]) for merge in content["model"]["merges"]
            for pair in [merge.split(" ", 1) if isinstance(merge, str) else merge]]


def _added_kinds(content: dict[str, Any]) -> dict[int, int]:
    return {int(token["id"]): pieces.CONTROL if token.get("special") else pieces.USER_DEFINED
            for token in content.get("added_tokens") or []}


def _before(content: dict[str, Any]) -> list[dict[str, Any]]:
    """What is done to a text before it is cut into pieces, step by step."""
    steps: list[Any] = []
    for key, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        step = content.get(key)
        steps += (step.get(inner) or [step]) if isinstance(step, dict) else []
    return [step for step in steps if isinstance(step, dict)]


def _adds_bos(folder: Path, content: dict[str, Any], ids: dict[str, int]) -> bool:
    bos = special_id(folder, "bos_token", ids)
    return bos is not None and any(ids.get(token) == bos for token in _written_first(content.get("post_processor")))


def pre_tokenizer(content: dict[str, Any]) -> tuple[str, list[str]]:
    """llama.cpp's name for how a tokenizer.json cuts and joins text, else the nearest one with a sentence that says so."""
    import tokenizers

    bare = {**content, "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [], "post_processor": None}
    cutter = tokenizers.Tokenizer.from_str(json.dumps(bare)).pre_tokenizer
    found = {0} if cutter is None else {begin for _, (begin, _) in cutter.pre_tokenize_str(PROBE)}
    wrong = {}
    for name, text in (CUTS | {UNCUT: OWN_CUT}).items():
        pieces = text.split("|")
        wrong[name] = found ^ {sum(map(len, pieces[:i])) for i in range(len(pieces))}
    name = min(wrong, key=lambda candidate: len(wrong[candidate]))
    is_unmerged = bool((content.get("model") or {}).get("ignore_merges"))
    if not wrong[name] and name != UNCUT and (name in UNMERGED or not is_unmerged):
        return UNMERGED[name] if is_unmerged else name, []
    return name, [f"llama.cpp has no pre-tokenizer that cuts and joins text as this tokenizer does; '{name}' comes nearest, so "
                  "there some texts become other tokens than in training"]


def _written_first(processor: Any) -> set[str]:
    """Special tokens that a post-processor puts before a text."""
    if not isinstance(processor, dict):
        return set()
    if processor.get("type") == "Sequence":
        return set().union(*map(_written_first, processor.get("processors") or []))
    first: Any = next(iter(processor.get("single") or []), {})
    return {first["SpecialToken"]["id"]} if isinstance(first, dict) and "SpecialToken" in first else set()
