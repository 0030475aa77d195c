"""A tiny model in a folder, served by the real server on a free port, and the real client before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tiny_model import CONTEXT_TOKENS, texts

from athanor.data.text.tokenizer import train_tokenizer
from athanor.foundation.run_folder import RunFolder
from athanor.serve.api import Api
from athanor.serve.server import running
from athanor.serve.target import Target


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of a few thousand parameters with its tokenizer and chat template."""
    from athanor.models.huggingface import save_model
    from athanor.models.initialize import initialize
    from athanor.models.shapes.decoder import DecoderShape
    from athanor.models.zoo.llama import build

    folder = tmp_path_factory.mktemp("served") / "tiny"
    tokenizer = train_tokenizer(texts(), 400)
    tokenizer.save(folder)
    shape = DecoderShape(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=CONTEXT_TOKENS,
                         initializer_range=0.3)
    module = build(shape)
    initialize(module, 0)
    save_model(module, folder)
    return folder


@pytest.fixture(scope="session")
def served(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Api]]:
    with running(Target(model_folder, "tiny", RunFolder(tmp_path_factory.mktemp("run")))) as started:
        yield started


@pytest.fixture(scope="session")
def client(served: tuple[str, Api]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served[0] + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
