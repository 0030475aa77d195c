"""One model, one cluster, one layout, as they are written on a command line, and what a step of them takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from athanor.cluster.spec import accelerator_names, check_precision, load_accelerator, read_cluster
from athanor.cost.calibrate import mappings
from athanor.cost.case import FULL, NONE, PLACES, SELECTIVE, Case, case_of
from athanor.cost.datasheet import KERNELS, PROGRAMS, SCATTERING, Datasheet, accelerator, machine_of, usual_kernel
from athanor.cost.memory import GIB, Footprint
from athanor.cost.step import price
from athanor.foundation.errors import LayoutError, UserError, did_you_mean
from athanor.foundation.layout import Layout, check_batch, check_experts, check_model, resolve
from athanor.foundation.schedules import DEFAULT_SCHEDULE, cut, find_schedule, stages_of
from athanor.foundation.units import read_count
from athanor.models.shapes.decoder import DecoderShape
from athanor.planner.named import check_network, facts_of
from athanor.planner.stages import block_seconds, memory_by_block, memory_of, plain, simulated

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
RECOMPUTE = {"none": NONE, "selective": SELECTIVE, "full": FULL}
PRODUCT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "fp4": 0.5}
WORDS: dict[str, tuple[str, ...]] = {"recompute": tuple(RECOMPUTE), "precision": tuple(PRODUCT_BYTES), "program": PROGRAMS,
                                     "kernel": KERNELS, "pipeline_schedule": (), "split": ()}
LAYOUT_KEYS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(AXES, (1, 10**6)), "micro_batch_size": (1, 10**6), "num_microbatches": (1, 10**6), "seq_len": (1, 10**9),
    "global_batch_tokens": (1, 10**12), "stages_per_rank": (1, 1000), "zero": (0, 3), "sequence_parallel": (0, 1)}
MOST_STAGES = 1000
CLUSTER_KEYS: dict[str, tuple[float, float]] = {"devices": (1, 10**6), "per_node": (1, 10**6), "nic_gbps": (0.001, 1e6),
                                                "memory_gib": (0.001, 1e6)}


@dataclass(frozen=True)
class Cluster:
    """A known accelerator, how many of them (None: as many as the layout asks for), and what is said of their links."""

    accelerator: str
    devices: int | None
    facts: Mapping[str, float]


def read_words(text: str, numbers: Mapping[str, tuple[float, float]], words: Mapping[str, tuple[str, ...]],
               what: str) -> dict[str, Any]:
    """The values of a text of key=value pairs; numbers lie between two ends, and are whole where these are.

    Raises LayoutError for an unknown key or value, with the nearest, and for a key that is given twice.
    """
    out: dict[str, Any] = {}
    for part in text.split():
        key, _, value = part.partition("=")
        if key not in (*numbers, *words):
            raise LayoutError(f"{what}: unknown key '{key}'; {did_you_mean(key, (*numbers, *words))}")
        if key in out:
            raise LayoutError(f"{what}: {key} is given twice")
        if key in words:
            if words[key] and value not in words[key]:
                raise LayoutError(f"{what}: {key} is '{value}'; {did_you_mean(value, words[key])}")
            out[key] = value
            continue
        try:
            out[key] = float(read_count(value))
        except ValueError:
            out[key] = math.nan
        if part != "dp_shard=-1":
            _check(what, part, out[key], numbers[key])
    return out


def _check(what: str, said: str, value: float, ends: tuple[float, float]) -> None:
    (least, most), is_whole = ends, isinstance(ends[0], int)
    if not least <= value <= most or (is_whole and value % 1):
        raise LayoutError(f"{what}: {said}; a {'whole ' if is_whole else ''}number from {least:g} to {most:,.0f} is expected")


def read_cluster_words(text: str) -> Cluster:
    """A cluster.toml, or an accelerator's name and key=value pairs ("H100-80 devices=2048 per_node=8 nic_gbps=400")."""
    if text.endswith(".toml"):
        spec = read_cluster(Path(text))
        if spec.device_type == "cpu":
            raise UserError(f"{text} is of processors, for which `athanor plan RECIPE` plans; here an accelerator is "
                            "expected: " + ", ".join(sorted(set(accelerator_names().values()))))
        name = load_accelerator(spec.accelerator)["name"]
        facts = facts_of(spec)
        for key, value in {**facts, "devices": spec.devices}.items():
            _check(text, f"{key}={value:g}", value, CLUSTER_KEYS[key])
        return Cluster(name, spec.devices, facts)
    name, _, rest = text.strip().partition(" ")
    name = load_accelerator(name)["name"]
    found = read_words(rest, CLUSTER_KEYS, {}, f"cluster '{text}'")
    devices = found.pop("devices", None)
    check_network(name, found.get("nic_gbps"), found.get("per_node", accelerator(name).get("scale_up_devices", 8)))
    return Cluster(name, None if devices is None else int(devices), found)


def read_layout(text: str, shape: DecoderShape, cluster: Cluster) -> tuple[Case, dict[str, Any]]:
    """The configuration that a layout's key=value pairs describe, and all values with those that were left out.

    Raises LayoutError for unknown keys, and for degrees or batches that contradict the cluster, the model or each other.
    """
    found = read_words(text, LAYOUT_KEYS, WORDS, "layout")
    layout = Layout(**{axis: int(found[axis]) for axis in AXES if axis in found})
    if layout.dp_shard != -1 or cluster.devices:
        layout = resolve(layout, cluster.devices or layout.world_size)
    else:
        raise LayoutError("layout: dp_shard=-1 needs a cluster with a number of devices")
    seq_len = int(found.get("seq_len", min(4096, shape.max_position_embeddings)))
    check_model(layout, shape, seq_len, vocab_size=0)  # which is filled up to what tp divides
    check_experts(layout, getattr(shape, "num_experts", 0))
    micro = int(found.get("micro_batch_size", 1))
    count = int(found.get("num_microbatches", 0 if layout.pp == 1 else 4 * layout.pp))
    batch = int(found.get("global_batch_tokens", seq_len * micro * max(1, count) * layout.data_ranks))
    _, held = check_batch(global_batch_tokens=batch, seq_len=seq_len, micro_batch_size=micro, data_ranks=layout.data_ranks,
                          tp=layout.tp)
    if found.get("num_microbatches", held) != held:
        raise LayoutError(f"layout: num_microbatches={count}, but global_batch_tokens makes {held} of them")
    count = held
    split = _split(found["split"]) if "split" in found else []
    loops = int(found.get("stages_per_rank", len(split) // layout.pp if len(split) > layout.pp else 0))
    schedule = found.get("pipeline_schedule", "Interleaved1F1B" if loops > 1 else DEFAULT_SCHEDULE)
    loops = _loops(schedule, loops, layout.pp, shape.num_hidden_layers)
    if split:
        cut(layout.pp, schedule, shape.block_costs(seq_len / 2), split)
    precision = found.get("precision", "bf16")
    zero = found.get("zero", 0.0 if layout.dp_shard == 1 else 1.0 if layout.pp > 1 else 3.0)
    program = found.get("program", "megatron-core")
    filled = {**{axis: getattr(layout, axis) for axis in AXES}, "micro_batch_size": micro, "num_microbatches": count,
              "seq_len": seq_len, "global_batch_tokens": micro * count * seq_len * layout.data_ranks,
              "pipeline_schedule": schedule, "stages_per_rank": loops, "zero": int(zero), "precision": precision,
              "recompute": found.get("recompute", "none"),
              "sequence_parallel": int(found.get("sequence_parallel", layout.tp > 1)),
              "program": program, "kernel": found.get("kernel", usual_kernel(program)),
              **({"split": split} if split else {})}
    run = {axis: filled[axis] for axis in ("pp", "cp", "tp", "ep", "zero", "seq_len", "micro_batch_size", "num_microbatches")}
    is_scattered = filled["sequence_parallel"] or filled["program"] in SCATTERING
    run |= {"dp": layout.data_ranks, "shard": layout.dp_shard * layout.cp, "chunks": loops, "schedule": PLACES[schedule],
            "is_sequence_parallel": filled["sequence_parallel"],
            "is_scattered": float(is_scattered), "recompute": RECOMPUTE[filled["recompute"]],
            "weight_bytes": max(2.0, PRODUCT_BYTES[precision]), "product_bytes": PRODUCT_BYTES[precision]}
    return case_of([shape], run), filled


def _split(text: str) -> list[int]:
    """Blocks of each stage, of "10,12,12,14" or "2x12,14" (two stages of 12). Raises LayoutError for anything else."""
    out: list[int] = []
    for part in text.split(","):
        count, _, blocks = part.rpartition("x")
        if not (blocks.isdecimal() and (count or "1").isdecimal() and int(count or 1) <= MOST_STAGES):
            raise LayoutError(f"layout: split={text}; blocks of each stage are expected, such as 10,12,12,14 or 3x10,8")
        out += [int(blocks)] * int(count or 1)
    return out


def _loops(schedule: str, given: int, pp: int, layers: int) -> int:
    """Stages of a pipeline rank; `given` 0: left out. Raises LayoutError for more than the schedule or the model has."""
    usual, placement = stages_of(schedule), find_schedule(schedule).placement
    if given and pp > 1 and given != usual and placement != "looped":
        raise LayoutError(f"layout: stages_per_rank={given}, but {schedule} has {usual} on a rank; leave it out, or give "
                          "pipeline_schedule=Interleaved1F1B")
    loops = given or usual
    if pp > 1 and pp * loops > layers:
        raise LayoutError(f"layout: pp={pp} with {loops} stages on a rank makes {pp * loops} stages, more than the {layers} "
                          f"blocks of the model; at most {layers // pp} stages fit on a rank")
    return loops if pp > 1 else 1


def estimate(shape: DecoderShape, cluster_text: str, layout_text: str, file: Path | None = None) -> dict[str, Any]:
    """Seconds, rates, memory of each pipeline rank in GiB and the accounts of one step (seconds of an average device)."""
    cluster = read_cluster_words(cluster_text)
    case, filled = read_layout(layout_text, shape, cluster)
    check_precision(cluster.accelerator, filled["precision"])
    machine = machine_of([{**cluster.facts, "accelerator": cluster.accelerator, "program": filled["program"],
                           "kernel": filled["kernel"], "product_bytes": PRODUCT_BYTES[filled["precision"]]}])
    time, memory = mappings(file)
    rates, footprint = Datasheet(machine, time), Footprint(machine, memory)
    priced = price(case, rates)
    ranks, devices = np.arange(filled["pp"], dtype=np.float64), float(case.devices[0])
    bytes_of, seconds, accounts = memory_of(footprint, case, ranks), float(priced.seconds[0]), plain(priced)
    peak = footprint.peak(case)
    if split := filled.get("split"):
        costs = block_seconds(shape, case, priced)
        pipeline = cut(filled["pp"], filled["pipeline_schedule"], costs, split)
        accounts, seconds = simulated(priced, case, pipeline, costs, float(rates.own()[0]))
        rest, each = memory_by_block(footprint, case, ranks, len(costs))
        held = [sum(len(pipeline.blocks[stage]) for stage in pipeline.stages_of(rank)) for rank in range(filled["pp"])]
        bytes_of = rest + each * np.array(held)
        peak = bytes_of.max()
    mfu = accounts["useful"] / seconds
    return {"accelerator": cluster.accelerator, "devices": int(devices), "layout": filled, "step_seconds": seconds,
            "tokens_per_second_per_device": filled["global_batch_tokens"] / seconds / devices, "mfu": mfu,
            "hfu": mfu * float(case.computed_flops()[0] / case.model_flops()[0]),
            "memory_gib": [float(size) / GIB for size in bytes_of],
            "out_of_memory_probability": float(np.broadcast_to(footprint.odds(peak), 1)[0]), "accounts": accounts}
