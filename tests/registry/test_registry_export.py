"""What is exported is what transformers loads, and it computes what our own model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from athanor.data.text.tokenizer import train_tokenizer
from athanor.models.decoder import Decoder
from athanor.models.huggingface import load_model, logits, save_model
from athanor.models.initialize import initialize
from athanor.models.shapes.decoder import DecoderShape
from athanor.registry.store import Registry, copy_model

TEXT = "def area(width, height):\n    return width * height\n"


@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_model_gives_the_same_logits_in_transformers(registry: Registry, tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = train_tokenizer(iter([TEXT]), 300)
    shape = DecoderShape(tokenizer.vocab_size, 64, 96, 2, 4, 2, max_position_embeddings=64, tie_word_embeddings=tied)
    module = Decoder(shape)
    initialize(module, 0)
    save_model(module, tmp_path / "trained")
    tokenizer.save(tmp_path / "trained")
    card = registry.import_folder(tmp_path / "trained", "m")
    assert card.parameters == shape.parameters() and card.architecture == "LlamaForCausalLM"
    copy_model(registry.folder(card), card, tmp_path / "out")
    ids = [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = theirs(torch.tensor([ids])).logits[0].detach()
    ours = logits(load_model(tmp_path / "trained"), ids)
    assert found.shape == ours.shape and float((found - ours).abs().max()) <= 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT).input_ids == ids
    theirs.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    again = registry.import_folder(tmp_path / "theirs", "theirs")
    assert again.parameters == card.parameters, "a folder that transformers wrote can be registered as well"
    assert float((logits(load_model(registry.folder(again)), ids) - ours).abs().max()) == 0.0
