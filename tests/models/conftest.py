"""One thread for torch, nothing compiled left behind, and small random models next to transformers' own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from athanor.models.decoder import Decoder
from athanor.models.initialize import initialize
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.mixtral import Shape
from athanor.models.zoo import llama, mixtral


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """The tracer keeps at most 8 variants of a function, whichever test they came from."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def small(dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    """A model of some thousand parameters with grouped queries and noticeable logits."""
    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "initializer_range": 0.1, "max_position_embeddings": 512, **changes}
    module = llama.build(DecoderShape(**sizes)).to(dtype)
    initialize(module, 1)
    return module


def mixture(dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    """A small model whose feed-forward layers are mixtures; its experts lie apart by more than rounding."""
    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "initializer_range": 0.1, "max_position_embeddings": 512, "num_experts": 8, **changes}
    module = mixtral.build(Shape(**sizes)).to(dtype)
    initialize(module, 1)
    return module


@pytest.fixture(name="mixture")
def _mixture() -> Any:
    return mixture


@pytest.fixture(name="small")
def _small() -> Any:
    return small
