"""Builds a data folder from a recipe's sources: read, filter, deduplicate, split, tokenise, write; whole or not at all."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from athanor.data.deduplicate import EVALUATION_SIMILARITY, TRAINING_SIMILARITY, MinHasher, content_hash, most_similar, repeated
from athanor.data.documents import Decision, Document, read_documents
from athanor.data.filtering import load_filters
from athanor.data.funnel import Funnel
from athanor.data.pairs import find_functions, make_pair
from athanor.data.shards import ShardWriter
from athanor.data.sources import inputs_of, scan
from athanor.data.store import Entry, Parts
from athanor.data.text.chat import template_hash
from athanor.data.text.tokenizer import Tokenizer, copy_tokenizer, tokenizer_hash, train_tokenizer
from athanor.foundation.errors import DataError, RecipeError
from athanor.foundation.recipe import Recipe
from athanor.foundation.run_folder import folder_renamed_last, hash_file, hash_value, sweep, write_json

Progress = Callable[[str, float, float], None]  # step, done, total (bytes)
EXACT, NEAR = "exact duplicate", "near-duplicate of an evaluation document"
TOKENIZER_BYTES = 256 << 20  # text that the tokenizer learns from, at most
ENCODE_BYTES = 1 << 20  # text encoded at once
UNTRAINED = ("documents/", "decisions/", "funnel.json")  # files that training does not read


class Build:
    """One build: the folder that grows, the seconds of each step, and what is known of each document."""

    def __init__(self, recipe: Recipe, folder: Path, progress: Progress | None) -> None:
        self.recipe, self.folder = recipe, folder
        self.progress = progress or (lambda step, done, total: None)
        self.seconds = dict.fromkeys(("read", "filter", "deduplicate", "tokenizer", "encode", "pairs", "write"), 0.0)
        self.funnel = Funnel()
        self.parts = Parts(folder)
        self.filters = load_filters()
        self.hashes: dict[str, bytes] = {}
        self.given: Tokenizer | None = None

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] += time.perf_counter() - begin

    def read_and_filter(self) -> None:
        """Read all sources into parts; every filter judges every document, the first to object gives the reason."""
        sizes = scan(self.recipe)
        total, done = float(sizes["bytes"]), 0.0
        for source in self.recipe.data.source:
            documents = read_documents(source, self.given)
            while True:
                with self.timed("read"):
                    item = next(documents, None)
                if item is None:
                    break
                verdicts: dict[str, Decision] = {}
                if isinstance(item, Document):
                    with self.timed("filter"):
                        verdicts = {name: judge(item) for name, judge in self.filters.items()}
                with self.timed("write"):
                    entry = self.parts.add(item, verdicts)
                self.funnel.enter(source.name, entry.size_bytes)
                if isinstance(item, Document):
                    self._apply(entry, item.text, verdicts)
                else:
                    self._drop("read", entry, entry.reason, "")
                done += item.length if source.kind not in ("parquet", "tokens") else entry.size_bytes
                self.progress("read and filter", min(done, total), total)
            self._check_left(source.name)
        with self.timed("write"):
            self.parts.flush()

    def deduplicate(self) -> None:
        """Drop exact duplicates, hold documents out by their hash, drop what is too like one of those."""
        signatures, kept = [], []
        hasher = MinHasher()
        total = float(sum(entry.size_bytes for entry in self.parts.entries if not entry.reason))
        done = 0.0
        seen: set[bytes] = set()
        for part in self.parts.texts():
            for entry, text in part:
                digest = content_hash(text)
                if digest in seen:
                    self._drop("deduplicate", entry, EXACT, text)
                else:
                    seen.add(digest)
                    self.hashes[entry.doc_id] = digest
                    signatures.append(hasher.signature(text))
                    kept.append(entry)
                done += entry.size_bytes
                self.progress("deduplicate", done, total)
        held_out = choose_evaluation([self.hashes[entry.doc_id] for entry in kept], self.recipe.data.evaluation_share)
        for entry, is_held_out in zip(kept, held_out, strict=True):
            entry.split = "evaluation" if is_held_out else "train"
        self._drop_near(kept, np.stack(signatures), np.asarray(held_out))
        for source in self.recipe.data.source:
            self._check_left(source.name, "train")

    def make_tokenizer(self) -> Tokenizer:
        """Train the tokenizer on training documents, unless one was given."""
        if self.given is None:
            assert self.recipe.data.vocab_size is not None, "checked before the build began"
            train_tokenizer(self._tokenizer_texts(), self.recipe.data.vocab_size).save(self.folder / "tokenizer")
        return Tokenizer.load(self.folder / "tokenizer")

    def encode(self, tokenizer: Tokenizer) -> dict[str, dict[str, int]]:
        """Write token shards, the lineage of their sequences, and the held-out texts; tokens per split and source."""
        counts: dict[str, dict[str, int]] = {}
        total = float(sum(entry.size_bytes for entry in self.parts.entries if not entry.reason))
        done = 0.0
        with contextlib.ExitStack() as stack:
            writers: dict[str, ShardWriter] = {}
            lineage: dict[str, TextIO] = {}
            for name in ["evaluation", *(f"train-{source.name}" for source in self.recipe.data.source)]:
                writers[name] = stack.enter_context(ShardWriter(self.folder / name, tokenizer.vocab_size))
                lineage[name] = stack.enter_context((self.folder / f"{name}.lineage.jsonl").open("w", encoding="utf-8"))
                counts[name] = {"documents": 0, "tokens": 0, "bytes": 0}
            held_out = stack.enter_context((self.folder / "evaluation.jsonl").open("w", encoding="utf-8"))
            for batch in _batches(self.parts.texts()):
                with self.timed("encode"):
                    coded = tokenizer.encode_batch([text for _, text in batch])
                with self.timed("write"):
                    for (entry, text), ids in zip(batch, coded, strict=True):
                        name = "evaluation" if entry.split == "evaluation" else f"train-{entry.source}"
                        writers[name].append([tokenizer.bos_id, *ids, tokenizer.eos_id])
                        _write_line(lineage[name], {"doc_id": entry.doc_id, "source": entry.source, "uri": entry.uri,
                                                    "offset": entry.offset, "length": entry.length})
                        for unit, amount in (("documents", 1), ("tokens", len(ids) + 2), ("bytes", entry.size_bytes)):
                            counts[name][unit] += amount
                        if entry.split == "evaluation":
                            _write_line(held_out, {"doc_id": entry.doc_id, "source": entry.source, "uri": entry.uri,
                                                   "text": text})
                        done += entry.size_bytes
                self.progress("encode", done, total)
        return counts

    def write_pairs(self) -> dict[str, int]:
        """Write pairs.jsonl from training code and functions.jsonl from held-out code; how many of each."""
        counts = {"pairs": 0, "functions": 0}
        with (self.folder / "pairs.jsonl").open("w", encoding="utf-8") as pairs, \
                (self.folder / "functions.jsonl").open("w", encoding="utf-8") as functions:
            for part in self.parts.texts():
                for entry, text in part:
                    for function in find_functions(text) if entry.uri.endswith(".py") else ():
                        place = {"doc_id": entry.doc_id, "uri": entry.uri, "line": function.line}
                        if entry.split == "evaluation":
                            _write_line(functions, {
                                **place, "name": function.name, "prompt": function.messages[0]["content"],
                                "header": function.header, "body": function.body, "before": function.before,
                                "after": function.after, "indent": function.indent})
                            counts["functions"] += 1
                        elif (messages := make_pair(function)) is not None:
                            _write_line(pairs, {"messages": messages, **place})
                            counts["pairs"] += 1
        return counts

    def _apply(self, entry: Entry, text: str, verdicts: dict[str, Decision]) -> None:
        objections = [(name, verdict) for name, verdict in verdicts.items() if not verdict.keep]
        if objections:
            name, verdict = objections[0]
            self._drop("filter", entry, verdict.reason, text, {"filter": name, "value": verdict.value,
                                                               "threshold": verdict.threshold,
                                                               "only_this_filter": len(objections) == 1})
            return
        for name, verdict in verdicts.items():
            self.funnel.sample_near(name, verdict, entry.doc_id, _facts(entry), text)

    def _drop(self, stage: str, entry: Entry, reason: str, text: str, facts: dict[str, Any] | None = None) -> None:
        entry.reason, entry.split = reason, ""
        self.funnel.drop(stage, reason, entry.source, entry.size_bytes)
        self.funnel.sample("dropped", reason, 0.0, entry.doc_id, {**_facts(entry), **(facts or {})}, text)

    def _drop_near(self, kept: list[Entry], signatures: Any, held_out: Any) -> None:
        training = np.flatnonzero(~held_out)
        evaluation = np.flatnonzero(held_out)
        match = most_similar(signatures[training], signatures[evaluation])
        for row, other, similarity in zip(training, match.other, match.similarity, strict=True):
            entry = kept[row]
            decision = Decision(bool(similarity < EVALUATION_SIMILARITY), float(similarity), EVALUATION_SIMILARITY, NEAR)
            facts = {"like": kept[evaluation[other]].uri if other >= 0 else None}
            entry.values["near_duplicate"] = decision.value
            if not decision.keep:
                self._drop("deduplicate", entry, NEAR, "", {**facts, "value": decision.value, "threshold": decision.threshold})
            elif other >= 0:
                self.funnel.sample_near("near_duplicate", decision, entry.doc_id, {**_facts(entry), **facts}, "")
        stays = np.asarray([row for row in training if not kept[row].reason], dtype=np.int64)
        alike = repeated(signatures[stays], TRAINING_SIMILARITY)
        self.near_within = {"threshold": TRAINING_SIMILARITY, "documents": int(alike.sum()),
                            "bytes": sum(kept[row].size_bytes for row in stays[alike])}

    def _check_left(self, source: str, split: str = "") -> None:
        if not any(entry.source == source and not entry.reason and entry.split == split for entry in self.parts.entries):
            held_out = sum(entry.source == source and entry.split == "evaluation" for entry in self.parts.entries)
            where = [self.funnel.reasons(source), f"{held_out} held out for evaluation" if held_out else ""]
            raise DataError(f"source '{source}': no document is left to train on "
                            f"({', '.join(filter(None, where)) or 'it holds no document'})")

    def _tokenizer_texts(self) -> Iterator[str]:
        """Training texts; of more than TOKENIZER_BYTES, the documents with the smallest hashes."""
        training = [entry for entry in self.parts.entries if entry.split == "train"]
        total = sum(entry.size_bytes for entry in training)
        limit = min(1.0, TOKENIZER_BYTES / max(1, total)) * 2.0**64
        done = 0.0
        for part in self.parts.texts():
            for entry, text in part:
                if entry.split == "train" and int.from_bytes(self.hashes[entry.doc_id][8:], "big") <= limit:
                    yield text
                done += entry.size_bytes
                self.progress("train tokenizer", min(done, float(total)), float(total))


def build(recipe: Recipe, data_folder: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Build `data_folder` from a recipe and return its manifest.

    `progress(step, done_bytes, total_bytes)` is called often. The folder appears whole, under a temporary name until
    then. Raises DataError when a source is missing or nothing of it is left, RecipeError when the vocabulary is open.
    """
    scan(recipe)  # what is missing is found before anything is written
    if recipe.data.vocab_size is None and recipe.data.tokenizer is None:
        raise RecipeError("data.vocab_size is open: `athanor plan` chooses it; or give it, or data.tokenizer")
    data_folder = Path(data_folder).resolve()
    if data_folder.is_dir() and any(data_folder.iterdir()) and not (data_folder / "manifest.json").is_file():
        raise DataError(f"{data_folder} holds something else than built data, which a build would replace; give another folder")
    if data_folder.parent.exists():
        sweep(data_folder.parent, data_folder.name)
    inputs = inputs_of(recipe)
    with folder_renamed_last(data_folder) as folder:
        work = Build(recipe, folder, progress)
        if recipe.data.tokenizer is not None:
            work.given = copy_tokenizer(Path(recipe.data.tokenizer), folder / "tokenizer")
        work.read_and_filter()
        with work.timed("deduplicate"):
            work.deduplicate()
        with work.timed("tokenizer"):
            tokenizer = work.make_tokenizer()
        counts = work.encode(tokenizer)
        with work.timed("pairs"):
            functions = work.write_pairs()
        with work.timed("write"):
            work.parts.write_decisions([*work.filters, "near_duplicate"])
            write_json(folder / "funnel.json", _funnel(work, counts, functions))
            files = _hash_files(folder)
        manifest = {**_manifest(work, tokenizer, counts, functions, files), "inputs": inputs}
        write_json(folder / "manifest.json", manifest)
    return manifest


def choose_evaluation(hashes: list[bytes], share: float) -> list[bool]:
    """Which documents are held out: those whose hash is below `share`, or the smallest one when that is none.

    The choice depends on a document's content alone, except that one of at least two is always held out.
    """
    chosen = [int.from_bytes(digest[:8], "big") < share * 2.0**64 for digest in hashes]
    if share > 0 and len(hashes) > 1:
        if not any(chosen):
            chosen[hashes.index(min(hashes))] = True
        elif all(chosen):
            chosen[hashes.index(max(hashes))] = False
    return chosen


def _manifest(work: Build, tokenizer: Tokenizer, counts: dict[str, dict[str, int]], functions: dict[str, int],
              files: dict[str, str]) -> dict[str, Any]:
    data, folder = work.recipe.data, work.folder / "tokenizer"
    sources = {source.name: {**counts[f"train-{source.name}"], "bin": f"train-{source.name}.bin", "weight": source.weight,
                             "kind": source.kind, "path": source.path, "read": work.funnel.entered(source.name)}
               for source in data.source}
    training = {name: digest for name, digest in files.items() if not name.startswith(UNTRAINED)}
    identity = {"files": training, "weights": {name: source["weight"] for name, source in sources.items()},
                "evaluation_share": data.evaluation_share}
    total = {unit: sum(count[unit] for count in counts.values()) for unit in ("documents", "tokens", "bytes")}
    return {"schema": 1, "hash": hash_value(identity), "vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id,
            "tokenizer_hash": tokenizer_hash(folder), "template_hash": template_hash(folder),
            "sources": sources, "evaluation": counts["evaluation"], "evaluation_share": data.evaluation_share, **functions,
            "bytes_per_token": total["bytes"] / (total["tokens"] - 2 * total["documents"]), "seconds": work.seconds,
            "files": files}


def _funnel(work: Build, counts: dict[str, dict[str, int]], functions: dict[str, int]) -> dict[str, Any]:
    for part in work.parts.texts():
        for entry, text in part:
            work.funnel.sample("kept", entry.split, 0.0, entry.doc_id, _facts(entry), text)
    return {**work.funnel.as_dict(), "splits": counts, "near_duplicates_within_training": work.near_within, **functions}


def _hash_files(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): hash_file(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def _facts(entry: Entry) -> dict[str, Any]:
    return {"source": entry.source, "uri": entry.uri, "bytes": entry.size_bytes}


def _batches(parts: Iterator[list[tuple[Entry, str]]]) -> Iterator[list[tuple[Entry, str]]]:
    for part in parts:
        batch: list[tuple[Entry, str]] = []
        size = 0
        for entry, text in part:
            batch.append((entry, text))
            size += entry.size_bytes
            if size >= ENCODE_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def _write_line(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
