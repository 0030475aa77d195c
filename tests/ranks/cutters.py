"""Byte-level BPE that cuts text as known models' tokenizers do, and texts of many kinds to try tokenizers on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK3 = (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
             r"[!-/:-~&&[^A-Za-z]][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"
             r"|\s+(?!\S)|\s+")
FRAGMENTS = [
    "def area(width, height):\n", "    return width * height\n", "\n\n", "\t\tif x[i] != y_2:\r\n", "self.equal(f'{a!r}', \"b\")",
    " ", "  ", "     ", "\t", "\n", "\r\n", " \n ", " " * 17, "\n" * 5, "the", " quick", " brown", "Fox", "It's", "they'LL",
    "we've", "I'd", "don't", "'quoted'", "rock 'n' roll", "café", "naïve", "e\u0301tude", "Ångström", "straße", "İstanbul",
    "中文", "算力效率决定速度。", "，测试！", "日本語のテキスト", "한국어", "Русский", "العربية", "हिन्दी", "ไทย", "ελληνικά",
    "😀", "👨\u200d👩\u200d👧", "🇩🇪", "❤\ufe0f", "\u00a0", "\u2003", "\u3000", "\u200b", "\ufeff", "\u0301", "\u2028", "0", "7",
    "42", "2026", "12345", "1,234,567.89", "3.14159", "1e-9", "0x1F", "٣٤", "½", "Ⅷ", "v1.2.3", "!", "!!", "...", "…", "->", "+=",
    "===", "<!-- -->", "</s>", "<s>", "<|end|>", "<tool>", "#", "//", "/* */", "\\n", "_", "__init__", "$x", "€5", "(a)", "[b]",
    "{c: d}", "a@b.org", "http://x.org/y?z=1&w=2", "\u2581", "\u2581\u2581", "\u0007"]


def split(*patterns: str) -> Any:
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


CUTTERS = {"llama-bpe": split(LLAMA3), "smaug-bpe": split(LLAMA3), "qwen2": split(LLAMA3.replace("{1,3}", "")),
           "deepseek-v3": split(*DEEPSEEK3),
           "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
           "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                              pre_tokenizers.ByteLevel(add_prefix_space=False)])}


def bpe(pre: str, texts: Iterable[str], vocab_size: int = 300) -> Tokenizer:
    """Byte-level BPE with a begin token before every text, an end token and one that is not special."""
    found = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    found.pre_tokenizer, found.decoder = CUTTERS[pre], decoders.ByteLevel()
    found.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken("<s>", special=True), AddedToken("</s>", special=True)]))
    found.add_tokens(["<tool>"])
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return found


def mixed_texts(count: int, seed: int = 0) -> list[str]:
    """Code, prose, Chinese, emoji, numbers, signs and runs of white space in all neighbourhoods; every fourth is real code."""
    draw = random.Random(seed)
    lines = Path(random.__file__).read_text(encoding="utf-8").splitlines(keepends=True)
    found = ["", " ", "\n", *FRAGMENTS]
    while len(found) < count:
        start = draw.randrange(len(lines) - 8)
        found.append("".join(lines[start:start + draw.randint(1, 8)]) if len(found) % 4 == 0 else
                     "".join(draw.choices(FRAGMENTS, k=draw.randint(2, 12))))
    return found[:count]


def train_pieces(folder: Path, kind: str, lines: Sequence[str], vocab_size: int, **more: Any) -> Any:
    """SentencePiece's own trainer writes its tokenizer.model into the folder, in place of a tokenizer.json."""
    import sentencepiece

    source = folder / "lines.txt"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(source), model_prefix=str(folder / "tokenizer"), vocab_size=vocab_size, model_type=kind,
        hard_vocab_limit=False, minloglevel=2,
        **{"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False, **more})
    for name in ("lines.txt", "tokenizer.vocab", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
