"""Rows of training data: windows of documents, or packed conversations, each a pure function of its sample number.

A row is {"tokens": int32[S+1], "weight": float32[S], "starts": int32[k]}: inputs are tokens[:-1], targets tokens[1:];
weight[j] counts the prediction of tokens[j+1]; `starts` are the offsets at which a document begins (the first is 0).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from athanor.data.lineage import open_manifest
from athanor.data.order import locate
from athanor.data.packing import pack
from athanor.data.shards import Shard
from athanor.data.text.chat import ChatTemplate, check_messages
from athanor.data.text.tokenizer import tokenizer_hash
from athanor.foundation.errors import AthanorError, DataError
from athanor.foundation.run_folder import hash_value, read_jsonl, write_atomic

Row = dict[str, NDArray[Any]]
Split = Literal["train", "evaluation"]
Placed = tuple[str, list[dict[str, Any]]]  # "<file> line <number>", and the conversation there


class RowSource(Protocol):
    """Rows that can be had by number."""

    count: int

    def row(self, index: int) -> Row: ...

    def origin(self, index: int) -> dict[str, Any]: ...


class Rows:
    """An endless, mixed and shuffled sequence of rows; in the evaluation split, one pass in the order of the file."""

    def __init__(self, sources: Sequence[RowSource], weights: Sequence[float], seed: int, shuffled: bool,
                 fingerprint: str, dropped: int = 0, silent: int = 0) -> None:
        self.sources, self.weights, self.seed, self.shuffled = sources, weights, seed, shuffled
        self.fingerprint = fingerprint  # hash of all that the rows depend on
        self.dropped, self.silent = dropped, silent  # conversations too long for a row, and those with nothing to learn
        self.count = sum(source.count for source in sources)  # rows of one epoch

    @property
    def left_out(self) -> str:
        """Which conversations are in no row, as half a sentence; empty when all are in one."""
        parts = {"too long for a row": self.dropped, "without an answer to learn from": self.silent}
        return " and ".join(f"{count} {why}" for why, count in parts.items() if count)

    def take(self, first_sample: int, count: int) -> list[Row]:
        """Rows of samples [first_sample, first_sample + count); sample numbers go on growing over epochs."""
        if self.count == 0:
            raise DataError("there are no rows to take")
        return [source.row(row) for source, row in self._places(first_sample, count)]

    def origins(self, first_sample: int, count: int) -> list[dict[str, Any]]:
        """Where the same rows come from: their sample and source, and what that knows of them."""
        places = self._places(first_sample, count)
        return [{"sample": first_sample + i, **source.origin(row)} for i, (source, row) in enumerate(places)]

    def _places(self, first_sample: int, count: int) -> list[tuple[RowSource, int]]:
        samples = np.arange(first_sample, first_sample + count, dtype=np.int64)
        if not self.shuffled:
            return [(self.sources[0], int(sample)) for sample in samples % self.count]
        source, row = locate(samples, [source.count for source in self.sources], self.weights, self.seed)
        return [(self.sources[s], int(r)) for s, r in zip(source, row, strict=True)]


class Windows:
    """Consecutive windows of S + 1 tokens over a shard's stream; the last token of one is the first of the next."""

    def __init__(self, shard: Shard, seq_len: int, pad_id: int, keep_rest: bool, name: str = "evaluation") -> None:
        self.shard, self.seq_len, self.pad_id, self.name = shard, seq_len, pad_id, name
        targets = max(0, len(shard.tokens) - 1)
        self.count = -(-targets // seq_len) if keep_rest else targets // seq_len

    def row(self, index: int) -> Row:
        length = self.seq_len + 1
        begin = index * self.seq_len
        tokens = np.full(length, self.pad_id, dtype=np.int32)
        window = self.shard.tokens[begin:begin + length]
        tokens[:len(window)] = window
        first, last = np.searchsorted(self.shard.starts, [begin, begin + len(window)])
        begins = self.shard.starts[first:last] - begin
        weight = np.ones(self.seq_len, dtype=np.float32)
        weight[begins[begins > 0] - 1] = 0.0  # what follows the end of a document cannot be known
        weight[len(window) - 1:] = 0.0
        if len(window) < length:
            begins = np.append(begins, len(window))
        starts = np.unique(np.append(begins[begins < self.seq_len], 0))
        return {"tokens": tokens, "weight": weight, "starts": starts.astype(np.int32)}

    def origin(self, index: int) -> dict[str, Any]:
        """The source's name, the first and last document that a row has tokens of, and its tokens [first, end) there."""
        begin = index * self.seq_len
        end = min(begin + self.seq_len + 1, len(self.shard.tokens))
        first, last = np.searchsorted(self.shard.starts, [begin, end - 1], side="right") - 1
        return {"source": self.name, "documents": [int(first), int(last)], "tokens": [begin, end]}


@dataclass(frozen=True)
class Coded:
    """Conversations as tokens, one after another: `mask` is 1 where the assistant speaks, `starts` has an end as well."""

    tokens: NDArray[np.int32]
    mask: NDArray[np.uint8]
    starts: NDArray[np.int64]

    def conversation(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Ids and mask of one."""
        place = slice(*self.starts[index:index + 2])
        return self.tokens[place], self.mask[place]


class Conversations:
    """Conversations packed into rows of S tokens; only what the assistant says has weight, and without that there is no row."""

    def __init__(self, coded: Coded, seq_len: int, pad_id: int, name: str) -> None:
        self.coded, self.seq_len, self.pad_id, self.name = coded, seq_len, pad_id, name
        begins, ends = coded.starts[:-1], coded.starts[1:]
        counted = np.append(0, np.cumsum(coded.mask, dtype=np.int64))  # of the tokens before each
        answers = counted[ends] - counted[np.minimum(begins + 1, ends)]  # nothing predicts the first token
        self.packed, too_long = pack(np.where(answers > 0, ends - begins, 0).tolist(), seq_len)
        self.dropped, self.silent = len(too_long), int((answers == 0).sum())
        self.count = len(self.packed)

    def row(self, index: int) -> Row:
        tokens = np.full(self.seq_len + 1, self.pad_id, dtype=np.int32)
        weight = np.zeros(self.seq_len, dtype=np.float32)
        starts, place = [], 0
        for conversation in self.packed[index]:
            ids, mask = self.coded.conversation(conversation)
            starts.append(place)
            tokens[place:place + len(ids)] = ids
            weight[place:place + len(ids) - 1] = mask[1:]
            place += len(ids)
        if place < self.seq_len:
            starts.append(place)
        return {"tokens": tokens, "weight": weight, "starts": np.asarray(starts, dtype=np.int32)}

    def origin(self, index: int) -> dict[str, Any]:
        """What the conversations are of, and the numbers of those in a row."""
        return {"source": self.name, "conversations": [int(number) for number in self.packed[index]]}


def open_rows(data_folder: Path, data: str, seq_len: int, seed: int, split: Split = "train") -> Rows:
    """Open the rows of a data folder.

    `data` is "documents" (windows of the token stream), "pairs" (what the build made from functions), or the path of a
    JSONL file of {"messages": […]}. The evaluation split of documents is the held-out stream, of pairs the held-out
    functions; of a conversation file it is the same share of it, chosen by content hash.
    Raises DataError when there is not a single row to train on.
    """
    data_folder = Path(data_folder)
    manifest = open_manifest(data_folder)
    identity = {"manifest": manifest["hash"], "data": data, "seq_len": seq_len, "seed": seed, "split": split}
    if data == "documents":
        return _document_rows(data_folder, manifest, seq_len, seed, split, identity)
    if split == "train" and data == "pairs" and not manifest["pairs"]:
        raise DataError(f"'pairs' are made from Python functions with docstrings, and {data_folder} has none; give the stage a "
                        "JSONL file of conversations as its data, or leave it out")
    rows = _conversation_rows(data_folder, manifest, data, seq_len, seed, split, identity)
    if split == "train" and rows.count == 0:
        need = (f"give it a larger seq_len than {seq_len}" if rows.dropped else
                "in one at least a message of the role 'assistant' must follow another" if rows.silent else
                "the file is empty, or all in it was held out for evaluation; give it more")
        raise DataError(f"'{data}' has no conversation to train on ({rows.left_out or 'none is left out'}): {need}")
    return rows


def _document_rows(folder: Path, manifest: dict[str, Any], seq_len: int, seed: int, split: Split,
                   identity: dict[str, Any]) -> Rows:
    pad_id = int(manifest["pad_id"])
    if split == "evaluation":
        windows = Windows(Shard(folder / "evaluation"), seq_len, pad_id, keep_rest=True)
        return Rows([windows], [1.0], seed, False, hash_value(identity))
    sources, weights = [], []
    for name, source in manifest["sources"].items():
        prefix = folder / source["bin"].removesuffix(".bin")
        windows = Windows(Shard(prefix), seq_len, pad_id, keep_rest=False, name=name)
        if windows.count == 0:
            raise DataError(f"source '{name}' has {source['tokens']} tokens, fewer than one row of {seq_len}; "
                            "give it more text or a smaller seq_len")
        sources.append(windows)
        weights.append(float(source["weight"]))
    return Rows(sources, weights, seed, True, hash_value(identity | {"weights": weights}))


def _conversation_rows(folder: Path, manifest: dict[str, Any], data: str, seq_len: int, seed: int, split: Split,
                       identity: dict[str, Any]) -> Rows:
    template = ChatTemplate.load(folder / "tokenizer")
    texts = {"manifest": manifest["hash"], "data": data, "split": split}
    if data == "pairs":
        conversations: Iterable[Placed] = _pairs(folder, split)
    else:
        share = float(manifest["evaluation_share"])
        conversations = [(where, messages) for where, messages in read_conversations(Path(data))
                         if _is_held_out(messages, share) == (split == "evaluation")]
        texts["data"] = hash_value([messages for _, messages in conversations])
        identity = identity | {"data": texts["data"]}
    of = hash_value(texts | {"template": template.hash, "tokenizer": tokenizer_hash(folder / "tokenizer")})
    coded = _encode(folder / "conversations" / f"{of[:16]}.npz", template, conversations)
    packed = Conversations(coded, seq_len, template.tokenizer.pad_id, data)
    return Rows([packed], [1.0], seed, split == "train", hash_value(identity | {"template": template.hash}), packed.dropped,
                packed.silent)


def _pairs(folder: Path, split: Split) -> Iterator[Placed]:
    file = folder / ("pairs.jsonl" if split == "train" else "functions.jsonl")
    for number, row in enumerate(read_jsonl(file), 1):
        yield f"{file} line {number}", row["messages"] if split == "train" else [
            {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["body"]}]


def _encode(file: Path, template: ChatTemplate, conversations: Iterable[Placed]) -> Coded:
    """Conversations as tokens, from a file that the first process to make them leaves for the ranks and for later runs."""
    with contextlib.suppress(OSError, EOFError, ValueError, KeyError, BadZipFile), np.load(file) as held:  # its sums are checked
        return Coded(held["tokens"], held["mask"], held["starts"])
    both = list(_rendered(template, conversations))
    made = Coded(np.fromiter(chain.from_iterable(ids for ids, _ in both), np.int32),
                 np.fromiter(chain.from_iterable(mask for _, mask in both), np.uint8),
                 np.cumsum([0, *(len(ids) for ids, _ in both)], dtype=np.int64))
    content = BytesIO()
    np.savez(content, tokens=made.tokens, mask=made.mask, starts=made.starts)
    with contextlib.suppress(OSError, AthanorError):  # where nothing can be written, each makes them for itself
        write_atomic(file, content.getvalue())
    return made


def _rendered(template: ChatTemplate, conversations: Iterable[Placed]) -> Iterator[tuple[list[int], list[int]]]:
    for where, messages in conversations:
        try:
            yield template.render_with_mask(messages)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None


def check_conversations(file: Path, key: str, template: ChatTemplate) -> None:
    """Raise DataError for what is no conversation, roles that the template refuses, and a file in which nobody answers."""
    first: dict[tuple[str, ...], Placed] = {}  # by roles and their order, which are what a template refuses
    for where, messages in read_conversations(file, key):
        first.setdefault(tuple(message["role"] for message in messages), (where, messages))
    if not any("assistant" in roles for roles in first):
        raise DataError(f"{key} = '{file}' has no message of the role 'assistant', so there is nothing to learn from it")
    deque(_rendered(template, first.values()), maxlen=0)


def read_conversations(file: Path, key: str = "data") -> Iterator[Placed]:
    """The place and `messages` of each line of the JSONL that `key` names; DataError names what is no file or conversation."""
    if not file.is_file():
        what = "does not exist" if not file.exists() and (file.suffix == ".jsonl" or "/" in str(file)) else "is not a file"
        raise DataError(f"{key} = '{file}' {what}; allowed: documents, pairs, or the path of a JSONL of conversations")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file} line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON: {error}") from None
            if not isinstance(row, dict) or "messages" not in row:
                raise DataError(f'{where} must be an object with "messages"')
            check_messages(row["messages"], where)
            yield where, row["messages"]


def _is_held_out(messages: list[dict[str, Any]], share: float) -> bool:
    digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2.0**64
