"""Text to token ids and back: byte-level BPE without a normaliser, so that every text comes back byte for byte."""

from __future__ import annotations

import codecs
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from athanor.data.text import sentencepiece
from athanor.foundation.errors import DataError
from athanor.foundation.pieces import FILE as PIECES
from athanor.foundation.run_folder import read_json, write_atomic, write_json

BEGIN, END, PAD, SYSTEM, USER, ASSISTANT = (
    "<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (BEGIN, END, PAD, SYSTEM, USER, ASSISTANT)  # ids 0 to 5
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
ENDS = "generation_config.json"
TEMPLATE = Path(__file__).with_name("chat_template.jinja")

# Where words may not join: a word with one leading space or sign, digits by threes, signs with the line end and the
# indentation after them (4 % fewer tokens of code), line ends, white space. Runs are bounded, because the cost of
# merging grows with the square of a word's length.
PATTERN = (
    r"[^\r\n\p{L}\p{N}\s]?\p{L}{1,40}"
    r"| \p{L}{1,40}"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]{1,40}(?:\r?\n[ \t]{0,80})?"
    r"|[ \t]{0,40}(?:\r?\n){1,8}[ \t]{0,80}"
    r"|\s{1,80}"
)


class Tokenizer:
    """A trained tokenizer with the ids that begin, end and pad a document."""

    def __init__(self, inner: tokenizers.Tokenizer, bos_id: int, eos_id: int, pad_id: int) -> None:
        inner.encode_special_tokens = True  # the text of a special token inside a document is ordinary text
        self.inner, self.bos_id, self.eos_id, self.pad_id = inner, bos_id, eos_id, pad_id
        self.end_ids: tuple[int, ...] = (eos_id,)  # each of which ends an answer
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        added = inner.get_added_tokens_decoder()
        self.special_ids = {token.content: index for index, token in added.items() if token.special}
        self._bytes: list[bytes] | None = None

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Open a folder with tokenizer.json, or SentencePiece's tokenizer.model, and tokenizer_config.json."""
        folder = Path(folder)
        names = _special_names(folder)
        if (folder / "tokenizer.json").is_file():
            try:
                inner = tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
            except Exception as error:  # the library raises nothing more exact
                raise DataError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from None
        elif (folder / PIECES).is_file():
            inner, usual = sentencepiece.read(folder / PIECES)
            sentencepiece.add_tokens(inner, _added_tokens(folder), str(folder))
            names = usual | names
        else:
            raise DataError(f"{folder} has no tokenizer.json; a tokenizer is a folder with tokenizer.json, or with "
                            f"{PIECES}, in it")
        eos_id = inner.token_to_id(names.get("eos_token") or "")
        if eos_id is None:
            raise DataError(f"{folder / 'tokenizer_config.json'} names no eos_token that its tokenizer.json knows")
        bos_id, pad_id = (inner.token_to_id(names.get(key) or "") for key in ("bos_token", "pad_token"))
        found = cls(inner, eos_id if bos_id is None else bos_id, eos_id, eos_id if pad_id is None else pad_id)
        found.end_ids = (eos_id, *(end for end in _model_ends(folder) if end != eos_id))
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text: nothing is added, and no text is taken for a special token."""
        ids: list[int] = self.inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The same for many texts at once, on all cores."""
        return [encoding.ids for encoding in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        text: str = self.inner.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for; special tokens stand for none."""
        if self._bytes is None:
            table = [b""] * self.vocab_size
            alphabet = _byte_alphabet() if self._is_byte_level() else None
            special = set(self.special_ids.values())
            for piece, index in self.inner.get_vocab(with_added_tokens=True).items():
                if index not in special:
                    table[index] = _piece_bytes(piece, alphabet)
            self._bytes = table
        return self._bytes

    def stream(self) -> TextStream:
        """A decoder that takes one id after another and gives out whole characters only."""
        return TextStream(self.token_bytes())

    def save(self, folder: Path) -> None:
        """Write the four files that transformers' AutoTokenizer and ChatTemplate load."""
        names = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD}
        roles = [SYSTEM, USER, ASSISTANT]
        write_atomic(folder / "tokenizer.json", self.inner.to_str(pretty=False))
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", **names, "additional_special_tokens": roles,
            "clean_up_tokenization_spaces": False, "model_max_length": 10**9})
        write_json(folder / "special_tokens_map.json", {**names, "additional_special_tokens": roles})
        write_atomic(folder / "chat_template.jinja", TEMPLATE.read_bytes())

    def _is_byte_level(self) -> bool:
        return "ByteLevel" in json.dumps(json.loads(self.inner.to_str()).get("decoder"))


class TextStream:
    """Incremental decoding: `push(id)` and, at the end, `finish()` return the text that became certain."""

    def __init__(self, token_bytes: list[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._token_bytes[token_id] if token_id < len(self._token_bytes) else b"")

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE; the same texts in the same order give the same bytes.

    The vocabulary is smaller than `vocab_size` when the texts have no more pairs to merge.
    """
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    inner.train_from_iterator(texts, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B:1", special_tokens=[(BEGIN, 0)])
    return Tokenizer(inner, 0, 1, 2)


def copy_tokenizer(source: Path, folder: Path) -> Tokenizer:
    """Put an existing tokenizer (a folder, or its tokenizer.json) into `folder` and open it."""
    source = source.parent if source.name == "tokenizer.json" else source
    opened = Tokenizer.load(source)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (source / "tokenizer.json").is_file():  # one form for all that comes after
        write_atomic(folder / "tokenizer.json", opened.inner.to_str(pretty=False))
        names = {"bos_token": opened.bos_id, "eos_token": opened.eos_id, "pad_token": opened.pad_id}
        write_json(folder / "special_tokens_map.json", {key: opened.inner.id_to_token(number) for key, number in names.items()})
    return Tokenizer.load(folder)


def tokenizer_hash(folder: Path) -> str:
    """The sha256 of tokenizer.json."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def _special_names(folder: Path) -> dict[str, str]:
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        content: Any = read_json(folder / file) if (folder / file).is_file() else {}
        if not isinstance(content, dict):
            raise DataError(f"{folder / file} must be an object with eos_token")
        for key in ("bos_token", "eos_token", "pad_token"):
            value = content.get(key)
            name = value.get("content") if isinstance(value, dict) else value
            if isinstance(name, str):
                names[key] = name
    return names


def _model_ends(folder: Path) -> list[int]:
    """What ends an answer by the generation_config.json of a model's folder, such as a turn's end beside the document's."""
    content: Any = read_json(folder / ENDS) if (folder / ENDS).is_file() else {}
    ends = content.get("eos_token_id") if isinstance(content, dict) else None
    return [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int]


def _added_tokens(folder: Path) -> dict[str, int]:
    """What stands behind the pieces of a SentencePiece model: names and ids."""
    added: dict[str, int] = {}
    for file, key in (("added_tokens.json", None), ("tokenizer_config.json", "added_tokens_decoder")):
        content: Any = read_json(folder / file) if (folder / file).is_file() else {}
        content = content if key is None else content.get(key, {})
        try:
            added |= {str(name): int(number) for name, number in content.items()} if key is None else {
                str(token["content"]): int(number) for number, token in content.items()}
        except (AttributeError, TypeError, KeyError, ValueError):
            raise DataError(f"{folder / file}: added tokens must have a name and a whole number each") from None
    return added


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, read backwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


def _piece_bytes(piece: str, alphabet: dict[str, int] | None) -> bytes:
    if alphabet is not None:
        return bytes(alphabet[c] for c in piece) if all(c in alphabet for c in piece) else piece.encode()
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()
