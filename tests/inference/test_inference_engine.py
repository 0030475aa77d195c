"""The engine against transformers' generate, against itself one by one, and against the training forward pass."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from athanor.foundation.errors import UserError
from athanor.inference.cache import PAGE_TOKENS
from athanor.inference.engine import Engine, Sampling, context_tokens, generate, open_engine
from athanor.inference.sampling import choose
from athanor.inference.scheduler import Request
from athanor.models.context import Packed
from athanor.models.decoder import Decoder
from athanor.models.huggingface import save_model
from athanor.models.initialize import initialize
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.find import architectures, new_shape


def model(dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    sizes = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 256, **changes}
    module = Decoder(DecoderShape(**sizes)).to(dtype)
    initialize(module, 0)
    return module


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 120) for _ in range(draw.choice([1, 5, 15, 16, 17, 40]))] for _ in range(count)]


@pytest.mark.parametrize("architecture", architectures())
def test_each_architecture_says_how_long_a_text_may_be(architecture: str, tmp_path: Path) -> None:
    """Under whatever key its config.json has it."""
    shape = new_shape(architecture, vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                      num_attention_heads=2, max_position_embeddings=77)
    (tmp_path / "config.json").write_text(json.dumps(shape.to_config()))
    assert context_tokens(tmp_path) == 77


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 4}])
def test_greedy_answers_are_those_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    module = model(**changes)
    save_model(module, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path)
    peer.generation_config.eos_token_id = None
    asked = prompts(4)
    for prompt, found in zip(asked, generate(module, asked, 64), strict=True):
        ids = torch.tensor([prompt])
        wanted = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        assert found == wanted[0, len(prompt):].tolist()


@pytest.mark.parametrize("cache_tokens", [4096, 6 * PAGE_TOKENS])
def test_many_at_once_are_the_same_as_one_by_one(cache_tokens: int) -> None:
    """Also when pages run out, and requests are put back and begin anew."""
    module, draw = model(torch.float64), random.Random(1)
    asked = [(prompt, Sampling(draw.randrange(1, 40), temperature=draw.choice([0.0, 0.7, 1.3]), top_p=draw.choice([1.0, 0.8]),
                               top_k=draw.choice([0, 20]), seed=i, stop_token_ids=(7,))) for i, prompt in enumerate(prompts(9))]
    engine = Engine(module, cache_tokens)
    preempted = 0
    original = engine.scheduler.preempt

    def preempt(request: Request) -> None:
        nonlocal preempted
        preempted += 1
        assert request is engine.scheduler.running[-1], "the youngest makes room, or the oldest might never end"
        original(request)

    engine.scheduler.preempt = preempt  # type: ignore[method-assign]
    together, finished = [], []
    for prompt, sampling in asked:
        together.append(engine.submit(prompt, sampling))
        finished += engine.step()
    finished += engine.drain()
    assert Counter(map(id, finished)) == Counter(map(id, together))
    assert (preempted > 0) == (cache_tokens < 4096)
    assert engine.pool.free == engine.pool.count
    for (prompt, sampling), request in zip(asked, together, strict=True):
        single = Engine(module, 4096)
        alone = single.submit(prompt, sampling)
        single.drain()
        assert request.token_ids == alone.token_ids
        assert request.logprobs == pytest.approx(alone.logprobs, abs=1e-9)
        stopped = request.token_ids[-1] == 7
        assert request.finish_reason == ("stop" if stopped else "length")
        assert 7 not in request.token_ids[:-1] and (stopped or len(request.token_ids) == sampling.max_new_tokens)


def test_log_probabilities_are_those_of_training() -> None:
    module = model(initializer_range=0.1)
    engine = Engine(module, 4096)
    requests = [engine.submit(prompt, Sampling(30, temperature=0.8, top_k=5, seed=i)) for i, prompt in enumerate(prompts(8))]
    engine.drain()
    sequences = [request.prompt + request.token_ids for request in requests]
    for request, sequence, scored in zip(requests, sequences, engine.score(sequences), strict=True):
        ids = torch.tensor(sequence)
        packed = module(ids[:-1], Packed.of([len(ids) - 1]), ids[1:], torch.ones(len(ids) - 1)).logp
        assert scored.shape == (len(sequence) - 1,)
        assert np.abs(scored - packed.numpy()).max() <= 1e-5
        assert np.abs(np.array(request.logprobs) - scored[len(request.prompt) - 1:]).max() <= 1e-5


def test_scores_do_not_depend_on_order_or_company(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("athanor.inference.engine.SCORE_TOKENS", 50)
    engine = Engine(model(torch.float64), 64)
    sequences = [*prompts(20), [], [5]]
    together = engine.score(sequences)
    for sequence, found in zip(sequences, together, strict=True):
        assert len(found) == max(0, len(sequence) - 1)
        assert np.abs(found - engine.score([sequence])[0]).max(initial=0) <= 1e-12


def test_the_ends_of_sequences_score_as_the_whole_does_and_greedy_ones_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("athanor.inference.engine.SCORE_TOKENS", 50)
    module = model(torch.float64)
    engine = Engine(module, 1024)
    asked = prompts(12)
    answers = generate(module, asked, 6)
    sequences, counts = [], []
    for number, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
        wrong = [*answer[:3], (answer[3] + 1) % 120, *answer[4:]]
        sequences.append(prompt + (wrong if number % 3 == 0 else answer))
        counts.append(2 if number % 3 == 1 else 6)
    found = engine.score_ends(sequences, counts)
    assert [is_likeliest for _, is_likeliest in found] == [number % 3 != 0 for number in range(12)]
    for (logp, _), whole, count in zip(found, engine.score(sequences), counts, strict=True):
        assert logp == pytest.approx(whole[-count:].sum(), abs=1e-9)


def test_cancelled_requests_leave_nothing_behind() -> None:
    draw = random.Random(2)
    engine = Engine(model(num_hidden_layers=1), 40 * PAGE_TOKENS)
    kept = engine.submit([3, 4, 5], Sampling(40))
    live: list[Request] = []
    for number in range(1000):
        live.append(engine.submit([3 + number % 100] * draw.randrange(1, 40), Sampling(draw.randrange(1, 30))))
        if number % 9 == 0:
            engine.step()
        if draw.random() < 0.97 and live:
            engine.cancel(live.pop(draw.randrange(len(live))))
    for request in live:
        engine.cancel(request)
        engine.cancel(request)
    engine.drain()
    assert engine.is_idle and engine.pool.free == engine.pool.count
    assert len(set(engine.pool.take(engine.pool.count))) == engine.pool.count
    alone = generate(engine.model, [[3, 4, 5]], 40)[0]
    assert kept.finish_reason == "length" and kept.token_ids == alone


def test_a_callback_hears_every_token_and_may_cancel() -> None:
    engine = Engine(model(), 4096)
    heard: list[tuple[int, float]] = []

    def listen(token: int, logp: float) -> None:
        heard.append((token, logp))
        if len(heard) == 5:
            engine.cancel(request)
            engine.cancel(other)

    request = engine.submit([9, 8], Sampling(50), listen)
    other = engine.submit([9, 9], Sampling(50))
    finished = engine.drain()
    assert request.finish_reason == other.finish_reason == "cancelled"
    assert list(zip(request.token_ids, request.logprobs, strict=True)) == heard and len(heard) == 5
    assert request in finished and engine.pool.free == engine.pool.count


def test_new_weights_are_used_from_the_next_step() -> None:
    module = model()
    engine = Engine(module, 4096, weights_version=1)
    request = engine.submit([5, 6, 7], Sampling(20))
    for _ in range(6):
        engine.step()
    before = list(request.token_ids)
    initialize(module, 99)
    engine.load_weights(2)
    engine.drain()
    assert engine.weights_version == 2 and request.token_ids[:len(before)] == before
    assert request.token_ids[len(before):] == generate(module, [[5, 6, 7, *before]], 20 - len(before))[0]


def test_tokens_are_drawn_by_their_probability() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]]).expand(4000, 5)
    plain = (logits[0] / 0.7).softmax(-1)

    def shares(**limits: Any) -> torch.Tensor:
        requests = [Request([1], Sampling(1, temperature=0.7, seed=i, **limits)) for i in range(len(logits))]
        tokens, logprobs = choose(logits, requests)
        assert logprobs == pytest.approx(logits[0].log_softmax(-1)[tokens].tolist())
        return torch.bincount(torch.tensor(tokens), minlength=5) / len(logits)

    for limits, allowed in (({}, [0, 1, 2, 3, 4]), ({"top_k": 2}, [1, 2]), ({"top_p": 0.5}, [2]), ({"top_p": 0.95}, [1, 2, 4]),
                            ({"top_k": 1, "top_p": 0.99}, [2])):
        wanted = torch.zeros(5).index_copy_(0, torch.tensor(allowed), plain[allowed])
        assert (shares(**limits) - wanted / wanted.sum()).abs().max() < 4 * math.sqrt(0.25 / len(logits)), limits


def test_top_p_stops_where_it_is_reached() -> None:
    requests = [Request([1], Sampling(1, temperature=1.0, top_p=0.5, seed=seed)) for seed in range(20)]
    assert set(choose(torch.zeros(20, 2), requests)[0]) == {0}, "the first of two equal halves is all of 0.5"


def test_prompts_are_prefilled_within_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("athanor.inference.scheduler.PREFILL_TOKENS", 20)
    engine = Engine(model(), 4096)
    for length in (30, 8, 12, 1):
        engine.submit([1] * length, Sampling(5))
    assert [[len(request.prompt) for request in engine.scheduler.admit()] for _ in range(3)] == [[30], [8, 12], [1]]


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-40, 5e-324])
def test_a_tiny_temperature_draws_the_likeliest(temperature: float) -> None:
    tokens, logprobs = choose(torch.tensor([[0.0, 1.0, 3.0, 2.0]]), [Request([1], Sampling(1, temperature=temperature))])
    assert tokens == [2] and math.isfinite(logprobs[0])


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    engine = Engine(model(), 100)
    for tokens, sampling, words in (
            ([], Sampling(5), "empty"), ([1, 120], Sampling(5), "vocabulary of 120"), ([-1], Sampling(5), "vocabulary"),
            ([1] * 200, Sampling(57), "max_position_embeddings is 256"), ([1] * 100, Sampling(20), "cache holds 112"),
            ([1], Sampling(0), "max_new_tokens = 0"), ([1], Sampling(5, temperature=-1.0), "temperature"),
            ([1], Sampling(5, temperature=math.nan), "temperature"), ([1], Sampling(5, top_p=0.0), "top_p"),
            ([1], Sampling(5, top_k=-1), "top_k")):
        with pytest.raises(UserError, match=words):
            engine.submit(tokens, sampling)
    with pytest.raises(UserError, match="too long"):
        engine.score([[1] * 258])
    assert engine.is_idle and engine.pool.free == engine.pool.count
    save_model(engine.model, tmp_path)
    opened = open_engine(tmp_path, cache_tokens=512)
    first, second = (e.submit([1] * 40, Sampling(20)) for e in (opened, engine))
    opened.drain()
    engine.drain()
    assert first.token_ids == second.token_ids
