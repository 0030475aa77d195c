"""Blocks that predict further tokens compute what DeepSeek-V3's report says, and lie in folders as its own do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_models_zoo import SIZES, build, tokens
from torch import Tensor

from athanor.foundation.errors import ModelError
from athanor.inference.engine import generate
from athanor.models import fp8
from athanor.models.context import Packed
from athanor.models.huggingface import load_model, load_weights, read_shape, save_model
from athanor.models.prediction import Predicting, ahead
from athanor.models.rehearsed import computing_like
from athanor.models.shapes.deepseek_v3 import mtp_weight
from athanor.models.zoo import deepseek_v3
from athanor.parallel.tensor import tensor_dim

BLOCKS = SIZES["num_hidden_layers"]
LENGTHS = [9, 1, 2, 16, 3, 9]
WEIGHT = 0.3


def predicting(seed: int = 0, dtype: torch.dtype = torch.float32, depths: int = 2, **changes: Any) -> Predicting:
    module = build("deepseek_v3", seed, dtype, num_nextn_predict_layers=depths, **changes)
    assert isinstance(module, Predicting)
    return module


def columns(seed: int, total: int = sum(LENGTHS)) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and weights, some of them 0."""
    ids, targets = tokens(total, seed), tokens(total, seed + 1)
    weights = (torch.rand(total, generator=torch.Generator().manual_seed(seed)) < 0.8).float()
    for begin, end in zip(_starts(), [*_starts()[1:], total], strict=True):
        targets[begin:end - 1] = ids[begin + 1:end]
    return ids, targets, weights


def _starts() -> list[int]:
    return [sum(LENGTHS[:n]) for n in range(len(LENGTHS))]


def context(lengths: Sequence[int] = LENGTHS, weight: float = WEIGHT) -> Packed:
    return replace(Packed.of(lengths), mtp_weight=weight)


class Report:
    """Section 2.2 of the report, document by document, over transformers' blocks; formulas (21) to (25).

    transformers reads the further blocks as if they were ordinary ones of a deeper model.
    """

    def __init__(self, folder: Path, depths: int) -> None:
        from transformers import AutoModelForCausalLM

        config = json.loads((folder / "config.json").read_text())
        deeper = folder / "deeper"
        deeper.mkdir()
        (deeper / "config.json").write_text(json.dumps(
            {**config, "num_hidden_layers": BLOCKS + depths, "num_nextn_predict_layers": 0}))
        (deeper / "model.safetensors").symlink_to(folder / "model.safetensors")
        self.peer = AutoModelForCausalLM.from_pretrained(deeper, attn_implementation="eager")
        self.eps = config["rms_norm_eps"]
        self.own = {name: tensor.requires_grad_() for name, tensor in load_file(folder / "model.safetensors").items()
                    if name.endswith(("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"))}
        assert len(self.own) == 4 * depths

    def losses(self, ids: Tensor, weights: Tensor) -> list[tuple[Tensor, float]]:
        """Of t_0 … t_N, whose prediction weighs weights [N]: sum and count of the model's own losses, then of every depth."""
        model, last = self.peer.model, len(ids) - 1
        hidden = model.embed_tokens(ids[:last])[None]
        for layer in model.layers[:BLOCKS]:
            hidden = self._run(layer, hidden)
        hidden = model.norm(hidden)
        found = [self._loss(hidden, ids[1:], weights)]
        for depth, layer in enumerate(model.layers[BLOCKS:], 1):
            if last <= depth:
                break
            embedded = model.embed_tokens(ids[depth:last])[None]
            prefix = f"model.layers.{BLOCKS + depth - 1}."
            hidden = self._norm(hidden[:, :last - depth], f"{prefix}hnorm")
            joined = torch.cat([self._norm(embedded, f"{prefix}enorm"), hidden], 2) @ self.own[f"{prefix}eh_proj.weight"].t()
            hidden = self._norm(self._run(layer, joined), f"{prefix}shared_head.norm")
            found.append(self._loss(hidden, ids[depth + 1:], weights[depth:]))
        return found

    def _run(self, layer: Any, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1])[None]
        mask = torch.full((hidden.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        return layer(hidden, attention_mask=mask, position_ids=positions,  # type: ignore[no-any-return]
                     position_embeddings=self.peer.model.rotary_emb(hidden, positions))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.own[f"{name}.weight"]

    def _loss(self, hidden: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, float]:
        each = F.cross_entropy(self.peer.lm_head(hidden)[0], labels, reduction="none")
        return (each * weights).sum(), float(weights.sum())


@pytest.mark.parametrize(("seed", "depths", "changes"), [(0, 1, {}), (1, 2, {"q_lora_rank": 0, "v_head_dim": 24}), (
    2, 3, {"tie_word_embeddings": True})])
def test_losses_and_gradients_are_those_of_the_report(seed: int, depths: int, changes: dict[str, Any], tmp_path: Path) -> None:
    module = predicting(seed, depths=depths, **changes)
    save_model(module, tmp_path)
    report = Report(tmp_path, depths)
    ids, targets, weights = columns(seed)
    losses: list[list[tuple[Tensor, float]]] = [[] for _ in range(1 + depths)]
    for begin, length in zip(_starts(), LENGTHS, strict=True):
        whole = torch.cat([ids[begin:begin + length], targets[begin + length - 1:begin + length]])
        for depth, loss in enumerate(report.losses(whole, weights[begin:begin + length])):
            losses[depth].append(loss)
    sums = [torch.stack([summed for summed, _ in each]).sum() for each in losses]
    count = len(ids)  # the report divides every depth by the same T
    wanted = (sums[0] + WEIGHT / depths * torch.stack(sums[1:]).sum()) / count
    wanted.backward()
    scored = module(ids, context(), targets, weights)
    (scored.weighted_sum / count).backward()
    assert scored.weighted_sum.item() / count == pytest.approx(wanted.item(), abs=1e-5)
    assert -(scored.logp * weights).sum().item() / count == pytest.approx(sums[0].item() / count, abs=1e-5)
    assert scored.mtp is not None and not scored.mtp[0].requires_grad
    assert scored.mtp[0].item() / count == pytest.approx(sum(each.item() for each in sums[1:]) / count, abs=1e-5)
    assert scored.mtp[1].item() == sum(number for each in losses[1:] for _, number in each)
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}
    theirs = {**dict(report.peer.named_parameters()), **report.own}
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.abs().max() > 0, name
        if ".experts." in name:
            both = theirs[f"{name.rpartition('experts.')[0]}experts." + ("down_proj" if "down" in name else "gate_up_proj")].grad
            expected = both if "down" in name else both.chunk(2, 1)["up_proj" in name]
        else:
            expected = theirs[name].grad
        assert (gradient - expected).abs().max() <= 1e-5, name


def test_transformers_drafts_with_the_blocks_of_our_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads them only when asked, and then refuses to leave any tensor out."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    module = predicting(4, depths=1)
    save_model(module, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids, targets = tokens(20, 4), tokens(20, 5)
    targets[:-1] = ids[1:]
    expected = peer(ids[None]).logits[0]
    assert (module(ids, Packed.of([20])) - expected).abs().max() <= 1e-5
    monkeypatch.setattr(peer, "_keys_to_ignore_on_load_unexpected", [rf"model\.layers\.{BLOCKS}.*"])  # 61 if published
    drafting = MtpModel.from_pretrained(peer)
    hidden = peer.model(ids[None]).last_hidden_state
    further = drafting.forward_layer(0, hidden[:, :-1], torch.arange(1, 20)[None], None, input_ids=ids[None, 1:])
    wanted = F.cross_entropy(peer.lm_head(further)[0], targets[1:], reduction="sum")
    scored = module(ids, context([20]), targets, torch.ones(20))
    assert scored.mtp[0].item() / 19 == pytest.approx(wanted.item() / 19, abs=1e-5) and scored.mtp[1].item() == 19


def test_documents_weigh_by_themselves_and_labels_end_with_them() -> None:
    module = predicting(1, torch.float64)
    ids, targets, weights = columns(7)
    with torch.no_grad():
        found = module(ids, context(), targets, weights)
        alone = [module(*each[:1], context([len(each[0])]), *each[1:])
                 for each in zip(*(column.split(LENGTHS) for column in (ids, targets, weights)), strict=True)]
        assert found.weighted_sum.item() == pytest.approx(sum(each.weighted_sum.item() for each in alone), rel=1e-13)
        assert found.mtp[0].item() == pytest.approx(sum(each.mtp[0].item() for each in alone), rel=1e-13)
        full = module(ids, context(), targets, torch.ones(len(ids)))
        assert full.mtp[1].item() == sum(max(0, length - depth) for length in LENGTHS for depth in (1, 2))
        with computing_like("cuda", LENGTHS):  # in plain pieces of torch
            pieces = module(ids, context(), targets, weights)
        assert pieces.weighted_sum.item() == pytest.approx(found.weighted_sum.item(), rel=1e-13)
        targets[:-1][weights[:-1] == 0] = 5  # what weighs nothing is an embedding all the same
        assert module(ids, context(), targets, weights).mtp[0].item() != found.mtp[0].item()


def test_a_column_is_shifted_within_documents() -> None:
    packed = Packed.of([3, 1, 4])
    column = torch.arange(10, 18)
    assert ahead(column, packed).tolist() == [11, 12, 0, 0, 15, 16, 17, 0]
    assert ahead(ahead(column, packed), packed).tolist() == [12, 0, 0, 0, 16, 17, 0, 0]


def test_nobody_but_training_computes_them() -> None:
    """Answers, logits and scores are to the bit those of the model without these blocks."""
    module = predicting(2)
    plain = deepseek_v3.build(module.shape.answering())  # type: ignore[arg-type]
    plain.load_state_dict({key: tensor for key, tensor in module.state_dict().items() if key in plain.state_dict()})
    for block in module.further:
        block.register_forward_pre_hook(lambda *_: pytest.fail("it was computed"))
    ids, targets, weights = columns(2)
    with torch.no_grad():
        assert torch.equal(module(ids, context()), plain(ids, context()))
        assert torch.equal(module(ids, context(), targets).logp, plain(ids, context(), targets).logp)
        scored = module(ids, context(weight=0.0), targets, weights)
        assert scored.mtp is None and scored.weighted_sum == plain(ids, context(), targets, weights).weighted_sum
    prompt = ids[:5].tolist()
    assert generate(module.eval(), [prompt], 20) == generate(plain.eval(), [prompt], 20)
    assert list(module.blocks) == list(plain.blocks)


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_has_the_published_names_and_comes_back_byte_by_byte(tmp_path: Path, tied: bool) -> None:
    module = predicting(3, torch.bfloat16, tie_word_embeddings=tied)
    assert module.shape.parameters() == sum(p.numel() for p in module.parameters() if p.requires_grad)
    save_model(module, tmp_path / "ours")
    held = load_file(tmp_path / "ours" / "model.safetensors")
    for number in (BLOCKS, BLOCKS + 1):
        of_block = {name.removeprefix(f"model.layers.{number}."): tensor for name, tensor in held.items()
                    if name.startswith(f"model.layers.{number}.")}
        before = f"model.layers.{BLOCKS - 1}."
        ordinary = {name.removeprefix(before) for name in held if name.startswith(before)}
        assert set(of_block) == ordinary | {"enorm.weight", "hnorm.weight", "eh_proj.weight", "embed_tokens.weight",
                                            "shared_head.norm.weight", "shared_head.head.weight"}
        assert torch.equal(of_block["embed_tokens.weight"], held["model.embed_tokens.weight"])
        head = held["model.embed_tokens.weight" if tied else "lm_head.weight"]
        assert torch.equal(of_block["shared_head.head.weight"], head)
    again = load_model(tmp_path / "ours", "bfloat16")
    assert again.shape == module.shape == read_shape(tmp_path / "ours")
    save_model(again, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "ours" / "model.safetensors").read_bytes()
    save_file(dict(reversed(held.items())), tmp_path / "ours" / "model.safetensors")  # as others may order it
    save_model(load_model(tmp_path / "ours", "bfloat16"), tmp_path / "again")
    theirs = load_file(tmp_path / "again" / "model.safetensors")
    assert theirs.keys() == held.keys() and all(torch.equal(theirs[name], tensor) for name, tensor in held.items())


def test_copies_may_be_missing_and_must_not_differ(tmp_path: Path) -> None:
    module = predicting(3)
    save_model(module, tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    copies = [f"model.layers.{BLOCKS}.embed_tokens.weight", f"model.layers.{BLOCKS + 1}.shared_head.head.weight"]
    save_file({name: tensor for name, tensor in held.items() if name not in copies}, tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    assert all(torch.equal(again.get_parameter(name), parameter) for name, parameter in module.named_parameters())
    for name, words in ((copies[0], r"embed_tokens\.weight is no copy of model\.embed_tokens\.weight"),
                        (copies[1], r"shared_head\.head\.weight is no copy of lm_head\.weight")):
        other = held[name].clone()
        other[3, 2] += 1
        save_file({**held, name: other}, tmp_path / "model.safetensors")
        with pytest.raises(ModelError, match=words):
            load_model(tmp_path)
    save_file({**held, copies[0]: held[copies[0]][:5].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"embed_tokens\.weight is \[5, 64\] and should be \[200, 64\]"):
        load_model(tmp_path)
    del held[f"model.layers.{BLOCKS + 1}.eh_proj.weight"]
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"model\.layers\.{BLOCKS + 1}\.eh_proj\.weight is missing"):
        load_model(tmp_path)


def test_a_folder_that_transformers_saved_without_them_is_read(tmp_path: Path) -> None:
    """It keeps the key in config.json, and no tensor."""
    from transformers import AutoModelForCausalLM

    module = predicting(5)
    save_model(module, tmp_path / "ours")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["num_nextn_predict_layers"] == 2
    again = load_model(tmp_path / "theirs")
    assert again.shape == module.shape.answering() == read_shape(tmp_path / "theirs") and not again.shape.prediction_blocks()
    ids = tokens(30, 5)
    assert torch.equal(again(ids, Packed.of([30])), module(ids, Packed.of([30])))


@pytest.mark.parametrize("tied", [False, True])
def test_stages_are_the_whole_and_each_reads_its_part(tmp_path: Path, tied: bool) -> None:
    module = predicting(6, torch.float64, tie_word_embeddings=tied)
    save_model(module, tmp_path)
    parts = [deepseek_v3.build(module.shape, blocks, is_first, not is_first).double()
             for blocks, is_first in ((range(2), True), (range(2, BLOCKS), False))]
    for part in parts:
        load_weights(part, tmp_path)
    ids, targets, weights = columns(6)
    with torch.no_grad():
        wanted = module(ids, context(), targets, weights)
        found = parts[1](parts[0](ids, context()), context(), targets, weights)
    assert torch.equal(found.weighted_sum, wanted.weighted_sum) and torch.equal(found.mtp[0], wanted.mtp[0])
    assert set(parts[0].state_dict()) & set(parts[1].state_dict()) == {"model.embed_tokens.weight"}
    assert set(parts[0].state_dict()) | set(parts[1].state_dict()) == set(module.state_dict())
    for key, parameter in module.named_parameters():
        dim = tensor_dim(key, deepseek_v3.TENSOR_DIMS)
        assert (dim is None) == (parameter.ndim == 1 or any(word in key for word in (
            "q_a_proj", "kv_a_proj_with_mqa", ".gate.", "eh_proj"))), key


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the tracer looks at it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the tracer instantiates functions
def test_compiled_blocks_give_the_same_gradients() -> None:
    module, compiled = (predicting(2, torch.float64) for _ in range(2))
    for block in (*compiled.blocks.values(), *compiled.further):
        block.compile(backend="aot_eager", fullgraph=True)
    ids, targets, weights = columns(2)
    for each in (module, compiled):
        each(ids, context(), targets, weights).weighted_sum.backward()
    for key, parameter in module.named_parameters():
        other = compiled.get_parameter(key).grad
        assert (parameter.grad is None) == (not parameter.requires_grad)
        assert other is None or (parameter.grad - other).abs().max() <= 1e-12, key


def test_eight_bits_reach_them_too() -> None:
    module = predicting(1, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, q_lora_rank=32, kv_lora_rank=48,
                        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
    fp8.convert(module)
    parts = [part for part in module.modules() if hasattr(part, "linear")]
    assert all(part.linear is fp8.linear for part in parts) and sum(part in module.further for part in parts) == 2


def test_a_coefficient_without_blocks_is_refused() -> None:
    assert mtp_weight(None, predicting().shape, "x") == 0.3 and mtp_weight(0.1, predicting().shape, "x") == 0.1
    plain = build("llama").shape
    assert mtp_weight(None, plain, "x") is None
    with pytest.raises(ModelError, match=r"stage\.a\.mtp_weight = 0\.1, but the model has no blocks that predict further tokens"):
        mtp_weight(0.1, plain, "stage.a.mtp_weight")
