"""Other people's engines in environments of their own, kept between runs, and small models to put the same questions to.

ATHANOR_DRILLS_CACHE names the folder that keeps them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from athanor.inference.engine import generate
from athanor.models.decoder import Decoder
from athanor.models.experts import Router, SigmoidRouter
from athanor.models.find import load_architecture
from athanor.models.huggingface import logits, save_model
from athanor.models.initialize import initialize
from athanor.models.shapes.find import shape_class
from athanor.models.shapes.rope import RopeScaling

HERE = Path(__file__).parent
NEW_TOKENS = 32
CONTEXT_TOKENS = 128
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "max_position_embeddings": CONTEXT_TOKENS, "initializer_range": 0.12}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
SHORT = CONTEXT_TOKENS // 4  # that a stretched context was first trained with
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}), "llama, tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama, rope llama3": ("llama", {"rope_scaling": RopeScaling("llama3", 8.0, SHORT, 1.0, 4.0), "rope_theta": 500000.0}),
    "llama, rope linear": ("llama", {"rope_scaling": RopeScaling("linear", 4.0)}),
    "llama, rope yarn": ("llama", {"rope_scaling": RopeScaling.from_config(
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SHORT}, CONTEXT_TOKENS, "here")}),
    "mistral": ("mistral", {}), "qwen2": ("qwen2", {}), "qwen3": ("qwen3", {"head_dim": 64}),
    "mixtral": ("mixtral", EXPERTS),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 32, "moe_intermediate_size": 96, "norm_topk_prob": True}),
    "gemma": ("gemma", {"head_dim": 64, "num_key_value_heads": 1}),
    "gpt2, own head": ("gpt2", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "gpt2": ("gpt2", {"num_key_value_heads": 4}),
    "deepseek_v3": ("deepseek_v3", {"num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 3, "q_lora_rank": 48,
                                    "moe_intermediate_size": 96, "kv_lora_rank": 512, "qk_nope_head_dim": 64,
                                    "qk_rope_head_dim": 64, "v_head_dim": 64, "n_group": 4, "topk_group": 2,
                                    "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True})}
LATENT = {**MODELS["deepseek_v3"][1], "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16,
          "rms_norm_eps": 1e-6}
NARROW = {  # such as vLLM does not take
    "deepseek_v3, narrow": ("deepseek_v3", {**LATENT, "q_lora_rank": 0, "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
                                            "routed_scaling_factor": 1.0, "n_shared_experts": 2,
                                            "num_nextn_predict_layers": 1}),
    "deepseek_v3, rope yarn": ("deepseek_v3", {**LATENT, "tie_word_embeddings": True, "rope_scaling": RopeScaling.from_config(
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SHORT, "mscale": 0.707, "mscale_all_dim": 0.707},
        CONTEXT_TOKENS, "here")})}

EMBEDDING = {"gemma": 0.1, "gpt2": 0.2}  # else a head that is the embedding repeats the token it is given


def environment(requirement: str, unwanted: Sequence[str] = (), **variables: str) -> Path:
    """The Python of an environment that has the requirement, made once; skips where pip cannot install it.

    What is `unwanted` is taken out again; `variables` go into pip's environment.
    """
    cache = Path(os.environ.get("ATHANOR_DRILLS_CACHE") or Path.home() / ".cache" / "athanor-drills")
    folder = cache / requirement.replace("==", "-")
    python, installed = folder / "bin" / "python", folder / "installed"
    if not installed.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        steps = [["install", requirement], *([["uninstall", "--yes", *unwanted]] if unwanted else [])]
        for step in steps:
            made = subprocess.run([str(python), "-m", "pip", "--disable-pip-version-check", *step],
                                  env={**os.environ, **variables}, capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"{requirement} cannot be installed: {(made.stderr.strip() or 'pip says nothing').splitlines()[-1]}")
        installed.touch()
    return python


def ask(python: Path, script: str, folder: Path, job: dict[str, Any], **variables: str) -> dict[str, Any]:
    """What a script of this folder answers to a job, in another environment. Fails with its last words."""
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run([str(python), str(HERE / script), str(folder)], env={**os.environ, "PYTHONPATH": "", **variables},
                          capture_output=True, text=True)
    assert done.returncode == 0, f"{script}: " + "\n".join((done.stdout + done.stderr).strip().splitlines()[-40:])
    found: dict[str, Any] = json.loads((folder / "answers.json").read_text())
    return found


def random_model(name: str, vocab_size: int, folder: Path) -> Decoder:
    """A model of MODELS or NARROW whose every parameter matters, in numbers that F16 holds exactly, and its folder."""
    kind, sizes = (MODELS | NARROW)[name]
    module: Decoder = load_architecture(kind).build(shape_class(kind)(vocab_size=vocab_size, **{**SIZES, **sizes}))
    initialize(module, 1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
            if name in EMBEDDING and ".embed_" in key:
                parameter.mul_(EMBEDDING[name])
            parameter.copy_(parameter.half().float())
    save_model(module, folder)
    return module.requires_grad_(False).eval()


def random_prompts(vocab_size: int) -> list[list[int]]:
    """Token ids of all lengths that leave room for an answer."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, CONTEXT_TOKENS - NEW_TOKENS, (128,), generator=generator).tolist()
    return [torch.randint(3, vocab_size - 8, (length,), generator=generator).tolist() for length in lengths]


def clear_answers(module: Decoder, prompts: list[list[int]], gap: float, wanted: int) -> tuple[list[list[int]], list[list[int]]]:
    """Of the prompts the first `wanted` that we answer without a near tie, and our answers.

    Each of an answer's tokens is the likeliest by at least `gap`, as a share of the logits' standard deviation there;
    no token is a `gap`'s fifth from going to another expert.
    """
    found: list[tuple[list[int], list[int]]] = []
    for prompt, answer in zip(prompts, generate(module, prompts, NEW_TOKENS), strict=True):
        rows = logits(module, [*prompt, *answer])[len(prompt) - 1:-1]
        best = rows.topk(2).values
        assert rows.argmax(-1).tolist() == answer, "the cache and the whole sequence agree"
        apart = ((best[:, 0] - best[:, 1]) / rows.std(-1)).min()
        if apart >= gap and nearest_routes(module, [*prompt, *answer]) >= gap / 5:
            found.append((prompt, answer))
    assert len(found) >= wanted, f"{len(found)} of {len(prompts)} answers are clear"
    return [prompt for prompt, _ in found[:wanted]], [answer for _, answer in found[:wanted]]


def nearest_routes(module: Decoder, sequence: list[int]) -> float:
    """How near the last expert of a token comes to the next one, at worst, as a share of the deviation of what they are chosen
    by; so for groups of experts."""
    nearest: list[float] = []

    def note(rows: Tensor, count: int, spread: Tensor) -> None:
        if count < rows.shape[1]:
            best = rows.topk(count + 1).values
            nearest.append(float(((best[:, -2] - best[:, -1]) / spread).min()))

    def look(router: Router | SigmoidRouter, inputs: tuple[Tensor, Any], outputs: object) -> None:
        rows = F.linear(inputs[0], router.weight)
        if isinstance(router, Router):
            note(rows, router.top, rows.std(-1))
            return
        shape, rows = router.shape, rows.sigmoid() + router.e_score_correction_bias
        groups = rows.unflatten(1, (shape.n_group, -1))
        sums = groups.topk(min(2, groups.shape[2])).values.sum(-1)
        note(sums, shape.topk_group, rows.std(-1))
        is_kept = torch.zeros_like(sums).scatter(1, sums.topk(shape.topk_group).indices, 1) > 0
        note(groups.masked_fill(~is_kept.unsqueeze(2), -math.inf).flatten(1), shape.num_experts_per_tok, rows.std(-1))

    hooks = [part.register_forward_hook(look) for part in module.modules() if isinstance(part, (Router, SigmoidRouter))]
    logits(module, sequence)
    for hook in hooks:
        hook.remove()
    return min(nearest, default=math.inf)
