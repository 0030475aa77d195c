"""Single formulas of the datasheet's costs against counts that were made in another way."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from athanor.cost.calibrate import coefficients
from athanor.cost.case import Case, case_of
from athanor.cost.datasheet import KERNELS, Datasheet, machine_of
from athanor.cost.memory import Footprint
from athanor.cost.runs import NUMBERS, WORDS, Run, describe
from athanor.models.shapes.find import find_shape
from athanor.planner.estimate import estimate

FIRST = np.zeros(1)


def case(model: str, **changes: float) -> Case:
    ones = "pp", "chunks", "dp", "shard", "cp", "tp", "ep", "micro_batch_size", "num_microbatches"
    none = "zero", "is_sequence_parallel", "is_scattered", "recompute"
    run: dict[str, Any] = dict.fromkeys(ones, 1) | dict.fromkeys(none, 0)
    run |= {"seq_len": 4096, "weight_bytes": 2, "product_bytes": 2}
    return case_of([find_shape(model)], run | changes)


def footprint(program: str = "megatron", **facts: float) -> Footprint:
    machine = machine_of([{"accelerator": "H100-80", "program": program, "kernel": "flash", **facts}])
    return Footprint(machine, coefficients("memory").mapping())


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (1, 8), (2, 8), (4, 2)])
def test_all_ranks_together_hold_the_optimizer_once(tp: int, ep: int) -> None:
    """Whatever expert parallelism does, 12 bytes of it for each parameter, without norms."""
    shape = find_shape("mixtral-8x7b")
    one = case("mixtral-8x7b", tp=tp, ep=ep, dp=16, shard=16, zero=1)
    found = footprint().states(one, FIRST)
    assert 16 * tp * found["optimizer"] == pytest.approx(12 * (shape.parameters() - shape.vectors()), rel=1e-9)
    experts = 32 * 8 * 3 * 4096 * 14336
    assert found["parameters"] == pytest.approx(2 * ((shape.parameters() - shape.vectors() - experts) / tp + experts / ep))


def test_zero_3_gathers_two_layers_and_both_ends() -> None:
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    wanted = 2 * (2 * layer + 2 * 128256 * 4096)
    for zero, shard, size in ((3, 8, wanted), (2, 8, 0), (3, 1, 0)):
        found = footprint("fsdp").states(case("llama-3-8b", dp=8, shard=shard, zero=zero), FIRST)
        assert found["gathered"] == pytest.approx(size)


@pytest.mark.parametrize(("domains", "times"), [(2, 1), (2, 3), (3, 2), (4, 4)])
def test_a_token_travels_once_to_each_domain_that_its_experts_are_in(domains: int, times: int) -> None:
    """All ways to choose `times` of the domains, each as likely; on a network that takes all the time."""
    machine = machine_of([{"accelerator": "H100-80", "program": "megatron-core", "kernel": "flash", "nic_gbps": 1e-3}])
    values = coefficients("time").mapping()
    ways = list(itertools.product(range(domains), repeat=times))
    others = sum(len(set(way) - {0}) for way in ways) / len(ways)
    took = Datasheet(machine, values).exchange(*(np.array([number]) for number in (100.0, 2e6, float(times), 8.0 * domains, 1.0)))
    assert took == pytest.approx(100 * 2e6 * others / (1e6 / 8 * values["network"]), rel=1e-3)


def test_context_ranks_gather_keys_and_values_twice_and_reduce_their_gradients() -> None:
    machine = machine_of([{"accelerator": "H100-80", "program": "megatron-core", "kernel": "flash"}])
    values = coefficients("time").mapping() | {"latency": 0.0, "knee": 0.0, "context": 1.0}
    size = 2 * 65536 * 8 * 128 * 2  # bytes of keys and values of a row
    took = Datasheet(machine, values).context(case("llama-3-8b", cp=4, seq_len=65536))
    factor = np.prod([value for name, value in values.items() if name in ("context.megatron-core", "context.hopper")])
    assert took == pytest.approx(3 * size * 3 / 4 / (450e9 * values["scale_up"]) * factor, rel=1e-3)


def test_full_recomputation_makes_everything_but_the_head_once_more() -> None:
    shape = find_shape("llama-3-8b")
    found = estimate(shape, "H100-80 devices=8", "dp_shard=8 seq_len=8192 recompute=full")
    head = 6 * 4096 * 128256 / shape.flops(1.0, 4096.5)
    assert found["hfu"] / found["mfu"] == pytest.approx(1 + (1 - head) / 3, rel=1e-4)
    some = estimate(shape, "H100-80 devices=8", "dp_shard=8 seq_len=8192 recompute=selective")
    attention = 6 * 32 * 2 * 4096 * 4096.5 / shape.flops(1.0, 4096.5)
    assert some["hfu"] / some["mfu"] == pytest.approx(1 + attention / 3, rel=1e-4)


def row(**changes: Any) -> Run:
    words = dict.fromkeys(WORDS, "") | {"model": "llama-3-8b", "gpu": "A100-80"}
    numbers = dict.fromkeys(NUMBERS, np.nan) | {"seq": 4096, "global_batch_seqs": 64, "n_gpus": 8, "tp": 1, "pp": 2,
                                                "micro_batch": 1}
    given = {name: value for name, value in changes.items() if name in words}
    return Run("T-1", "", "ok", words | given, numbers | {name: value for name, value in changes.items() if name in numbers},
               np.nan, np.nan)


def test_words_of_a_row_choose_kernel_and_schedule() -> None:
    kernels = {"flash_attention_v1": "flash1", "torch": "eager", "fused": "fused", "flash_attention2": "flash"}
    found = describe([row(attn_kernel=name, framework="Megatron-LM") for name in kernels])[1]
    assert [KERNELS[int(kernel)] for kernel in found.kernel] == list(kernels.values())
    dual, plain = (describe([row(framework=name)])[0] for name in ("HAI-LLM", "NeMo"))
    assert (dual.chunks, plain.chunks) == (2, 1)
    sheet = Datasheet(machine_of([{"accelerator": "A100-80", "program": "megatron", "kernel": "flash"}]),
                      coefficients("time").mapping())
    slower = replace(sheet.machine, kernel=np.array([KERNELS.index("flash1")]))
    assert Datasheet(slower, coefficients("time").mapping()).attention(plain) > sheet.attention(plain)
