"""Tokenizers of SentencePiece (`tokenizer.model`) as those of the tokenizers library: BPE and unigram."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from athanor.foundation.errors import DataError
from athanor.foundation.pieces import BPE, BYTE, CONTROL, NORMAL, SPACE, UNIGRAM, UNKNOWN, USER_DEFINED, read_pieces

NEVER = -1e6  # score of a piece that no text is


def read(file: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer of the file, and its special pieces by their names in tokenizer_config.json.

    Raises DataError for what is no SentencePiece model, or one of words or characters.
    """
    held = read_pieces(file)
    pieces, kind, names = held.pieces, held.kind, held.names
    try:
        steps: list[Any] = [_precompiled(held.characters)] if held.characters else []
    except ValueError as error:
        raise DataError(f"{file} is not a SentencePiece model: {error}") from None
    unknown = [number for number, (_, _, of) in enumerate(pieces) if of == UNKNOWN]
    if not pieces or len(unknown) != 1 or kind not in (UNIGRAM, BPE):
        raise DataError(f"{file} is not a SentencePiece model of subwords: it has {len(pieces)} pieces, {len(unknown)} of them "
                        f"for what is unknown, and model_type {kind}; 1 (unigram) and 2 (BPE) are read")
    twice = [piece for piece, count in Counter(piece for piece, _, _ in pieces).items() if count > 1]
    if twice:
        raise DataError(f"{file} is not a SentencePiece model: it has the piece {twice[0]!r} twice")
    inner = tokenizers.Tokenizer(_model(pieces, kind, unknown[0]))
    if own := sorted((piece for piece, _, of in pieces if of == USER_DEFINED), key=len, reverse=True):
        cuts = "|".join(map(re.escape, own)), _within([piece for piece, _, of in pieces if of in (CONTROL, UNKNOWN, BYTE)], inner)
        inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts])
        if kind == BPE:
            inner.model.ignore_merges = True  # no merges lead to these
    prefix = held.has_prefix
    if held.joins_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(SPACE)] if prefix else []
    inner.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    inner.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece, _, of in pieces
                              if of in (CONTROL, UNKNOWN)])
    control = {piece for piece, _, of in pieces if of == CONTROL}
    return inner, {key: name for key, name in names.items() if name in control}


def add_tokens(inner: tokenizers.Tokenizer, added: dict[str, int], where: str) -> None:
    """Tokens that stand behind the pieces, in the order of their ids. Raises DataError where ids are left out."""
    for name, number in sorted(added.items(), key=lambda item: item[1]):
        if inner.token_to_id(name) == number:
            continue
        inner.add_special_tokens([AddedToken(name, normalized=False, special=True)])
        if inner.token_to_id(name) != number:
            raise DataError(f"{where}: '{name}' has the id {number}, but {inner.token_to_id(name)} is the next one free")


def _within(names: list[str], inner: tokenizers.Tokenizer) -> str:
    """Where texts that stand alone and read like pieces that no text is are cut, so as not to be taken for them: behind the first
    token that they are made of."""
    ends = {name: inner.encode(name).offsets[0][1] for name in names if name}
    return "|".join(rf"\A{re.escape(name[:end])}(?={re.escape(name[end:])}\z)" for name, end in ends.items())


def _precompiled(charsmap: bytes) -> Any:
    """Raises ValueError for what is no table of characters."""
    try:
        return normalizers.Precompiled(charsmap)
    except Exception as error:  # the library raises no narrower one
        raise ValueError(error) from None


def _model(pieces: list[tuple[str, float, int]], kind: int, unknown: int) -> Any:
    has_bytes = any(of == BYTE for _, _, of in pieces)
    if kind == UNIGRAM:
        scores = [(piece, score if of in (NORMAL, USER_DEFINED) else NEVER) for piece, score, of in pieces]
        return models.Unigram(scores, unknown, has_bytes)
    vocab = {piece: number for number, (piece, _, _) in enumerate(pieces)}
    merges: list[tuple[float, tuple[str, str]]] = []
    for piece, score, of in pieces:
        if of == NORMAL:
            pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
            merges += [(-score, pair) for pair in sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    merges.sort(key=lambda merge: merge[0])  # the pair whose joined piece has the best score is merged first
    return models.BPE(vocab, [pair for _, pair in merges], unk_token=pieces[unknown][0], fuse_unk=True, byte_fallback=has_bytes)
