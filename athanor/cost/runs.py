"""Tables of training runs (a CSV file, a run per row): what was run, apart from what was measured, as cases to be priced."""

from __future__ import annotations

import csv
import gzip
import itertools
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from athanor.cost.case import FULL, NONE, SELECTIVE, Array, Case, case_of
from athanor.cost.datasheet import LATEST, SCATTERING, Machine, machine_of, usual_kernel
from athanor.foundation.errors import UserError
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.find import find_shape, known_shapes
from athanor.models.shapes.products import Attended, Counted, Product, feed_forward

WORDS = ("model", "gpu", "sequence_parallel", "recompute", "precision", "flash_attention", "framework", "attn_kernel",
         "gated_mlp", "tied_embed")
SIZES = ("params_B", "layers", "hidden", "ffn_hidden", "heads", "kv_heads", "vocab", "moe_experts", "moe_topk", "moe_ffn_hidden",
         "shared_expert_ffn", "dense_layers")
NUMBERS = (*SIZES, "year", "seq", "global_batch_seqs", "micro_batch", "n_gpus", "gpus_per_node",
           "tp", "pp", "vpp", "dp", "cp", "ep", "zero_stage", "nic_gbps_per_gpu", "gpu_mem_gib")
MEASURED = ("step_time_s", "mem_gib_per_gpu")
NAMES = ("id", "status", "group")
MOST = 10**9  # of any number: beyond it products overflow
PRODUCT_BYTES = {"rowwise": 2.0, "fp4": 0.5, "fp8": 1.0, "fp32": 4.0}  # rowwise fp8 was measured to gain nothing
DEGREES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # of tp, pp and micro-batch, tried where a row does not say


@dataclass(frozen=True)
class Run:
    """One row: its words and numbers (NaN where blank), and what was measured, which no prediction may look at."""

    id: str
    group: str
    status: str
    words: Mapping[str, str]
    numbers: Mapping[str, float]
    step_seconds: float
    memory_gib: float

    def number(self, name: str, default: float = math.nan) -> float:
        value = self.numbers[name]
        return default if math.isnan(value) else value

    @property
    def source(self) -> str:
        """Where it comes from, as the first part of its id says."""
        return self.id.split("-")[0]

    @property
    def is_mixture(self) -> bool:
        return self.number("moe_experts", 0) > 0


def read_runs(path: Path) -> list[Run]:
    """Read a table of runs, gzipped or not. Raises UserError naming a missing column, or the row and column of a wrong cell."""
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig", newline="") if path.suffix == ".gz" else path.open(
                encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            found = reader.fieldnames or []
            columns = (*NAMES, *WORDS, *NUMBERS, *MEASURED)
            if not found:
                raise UserError(f"{path} is empty; its first line must name the columns")
            if missing := [name for name in columns if name not in found]:
                raise UserError(f"{path} has no column {', '.join(map(repr, missing))}; cells may be blank, but no column "
                                "may be left out")
            if double := next((name for name in columns if found.count(name) > 1), None):
                raise UserError(f"{path} has {found.count(double)} columns '{double}'; one is expected")
            runs = [_read_row(row, f"{path}, row {number}") for number, row in enumerate(reader, 2)]
            if not runs:
                raise UserError(f"{path} names columns and has no rows")
            return runs
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (UnicodeDecodeError, csv.Error, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is not a CSV file: {error}") from None


def _read_row(row: dict[str, str | None], where: str) -> Run:
    if None in row or None in row.values():
        raise UserError(f"{where}: it has not as many values as there are columns")
    texts = {name: (value or "").strip() for name, value in row.items()}
    numbers = {}
    for name in (*NUMBERS, *MEASURED):
        try:
            numbers[name] = float(texts[name] or 0)
        except ValueError:
            numbers[name] = math.nan
        if not 0 <= numbers[name] <= MOST:
            raise UserError(f"{where} ({texts['id']}), column '{name}': {texts[name]!r} is not a number from 0 to {MOST:,}")
        numbers[name] = numbers[name] if texts[name] else math.nan
    return Run(texts["id"], texts["group"], texts["status"], {name: texts[name] for name in WORDS},
               {name: numbers[name] for name in NUMBERS}, *(numbers[name] for name in MEASURED))


@dataclass(frozen=True)
class Sizes(Counted):
    """A model by the sizes that a row gives."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    tie_word_embeddings: bool
    attention: Attended
    inner: int
    is_gated: bool
    dense: int
    experts: int
    top_k: float
    expert_inner: int
    shared: int

    def block_attended(self, layer: int) -> Attended:
        return self.attention

    def block_vectors(self, layer: int) -> int:
        return 2 * self.hidden_size

    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    def block_products(self, layer: int) -> list[Product]:
        hidden, each = self.hidden_size, self.attention
        width = each.heads * each.value_size
        out = [Product("qkv", hidden, width + 2 * each.key_value_heads * each.key_size, "outputs"),
               Product("attention_out", width, hidden, "inputs")]
        if not self.experts or layer < self.dense:
            return [*out, *feed_forward(hidden, self.inner, self.is_gated)]
        return [*out, Product("router", hidden, self.experts, ""),
                *feed_forward(hidden, self.expert_inner, self.is_gated, "experts_", self.top_k, self.experts),
                *(feed_forward(hidden, self.shared, self.is_gated, "shared_") if self.shared else [])]


def shape_of(run: Run) -> Counted:
    """The model of a row: a known one of its name, or what its sizes say. Raises UserError for one that neither tells."""
    known = _known(run.words["model"])
    if known and all(run.number(name, own) == own for name, own in (
            ("layers", known.num_hidden_layers), ("hidden", known.hidden_size), ("heads", known.num_attention_heads))):
        return known
    missing = [name for name in ("layers", "hidden", "heads", "vocab") if run.number(name, 0) < 1]
    if missing and run.number("params_B", 0) and not run.is_mixture and "gpt" in run.words["model"].lower():
        return _gpt_of_size(run.numbers["params_B"] * 1e9)
    if missing:
        raise UserError(f"the model's {', '.join(missing)} are blank or 0, and no shape is known by the name "
                        f"'{run.words['model']}'")
    hidden, heads = int(run.numbers["hidden"]), int(run.numbers["heads"])
    if hidden < heads:
        raise UserError(f"hidden = {hidden} is less than heads = {heads}")
    size = hidden // heads
    experts = int(run.number("moe_experts", 0))
    inner = int(run.number("ffn_hidden", 4 * hidden))
    return Sizes(int(run.numbers["vocab"]), hidden, int(run.numbers["layers"]), run.words["tied_embed"] == "y",
                 Attended(1, heads, int(run.number("kv_heads", heads)), size, size), inner, run.words["gated_mlp"] == "y",
                 int(run.number("dense_layers", 0)), experts, run.number("moe_topk", 1), int(run.number("moe_ffn_hidden", inner)),
                 int(run.number("shared_expert_ffn", 0)))


def _gpt_of_size(parameters: float) -> Counted:
    """A GPT of so many parameters, as wide for its depth as those of Narayanan et al. 2021: about 154 times."""
    hidden = max(1, round((parameters * 154 / 12) ** (1 / 3) / 1024)) * 1024
    heads = hidden // 128
    return Sizes(51200, hidden, round(parameters / (12 * hidden**2)), True, Attended(1, heads, heads, 128, 128), 4 * hidden,
                 False, 0, 0, 0.0, 0, 0)


def _known(model: str) -> DecoderShape | None:
    """A published model by its name, whatever stands between letters and digits there, and in brackets behind it."""
    names = {_spelled(name): name for name in known_shapes()}
    name = names.get(_spelled(model)) or names.get(_spelled(model.split("(")[0]))
    return find_shape(name) if name else None


def _spelled(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def program_of(framework: str, zero: float, year: float) -> str:
    """The family of programs that a framework's name, its sharding and its year point to."""
    words = framework.lower()
    for program, parts in {"jax": ("maxtext", "paxml"), "fsdp": ("fsdp", "torchtitan", "composer", "llm-foundry"),
                           "zero3": ("zero-3",), "scaling": ("aleph", "paddle"),
                           "megatron-core": ("nemo", "megatron-core", "megatron-bridge", "megascale", "hai-llm"),
                           "megatron-deepspeed": ("deepspeed",), "megatron": ("megatron", "ptd")}.items():
        if any(part in words for part in parts):
            return program
    return "fsdp" if zero == 3 else "megatron-core" if year >= 2023 else "megatron"


def kernel_of(run: Run, program: str) -> str:
    """The kind of attention kernel."""
    named, flash = run.words["attn_kernel"].lower(), run.words["flash_attention"]
    if named == "torch":
        return "eager"
    if "fused" in named:
        return "fused"
    if "v1" in named:
        return "flash1"
    is_new = program not in ("megatron-deepspeed", "zero3") and run.number("year", 2024) >= 2024
    is_flash = "flash" in named or flash == "y" or (flash == "" and is_new)
    own = "flash1" if program == "fsdp" and not is_new else usual_kernel(program)
    return own if is_flash else "fused"


def release_of(run: Run) -> float:
    """The program's release in years: as its name says ("26.04"), the middle of the row's year, or the latest."""
    found = re.search(r"\b2(\d)\.(0[1-9]|1[0-2])\b", run.words["framework"])
    return 2020 + int(found[1]) + (int(found[2]) - 0.5) / 12 if found else run.number("year", LATEST - 0.5) + 0.5


def layout_of(run: Run, tp: float, pp: float, micro: float) -> dict[str, float]:
    """Layout, batch and choices of a row under the names of `Case`. UserError when its degrees are not its devices."""
    blank = [name for name in ("seq", "global_batch_seqs", "n_gpus") if run.number(name, 0) < 1]
    if blank:
        raise UserError(f"{', '.join(blank)} is blank")
    if min(tp, pp, micro) < 1 or tp % 1 or pp % 1 or micro % 1:
        raise UserError(f"tp = {tp:g}, pp = {pp:g} and micro_batch = {micro:g} must be whole numbers of at least 1")
    zero, devices, cp = run.number("zero_stage"), run.numbers["n_gpus"], max(1.0, run.number("cp", 1))
    program = program_of(run.words["framework"], zero, run.number("year", 2024))
    if math.isnan(zero):
        zero = {"fsdp": 3.0, "zero3": 3.0, "megatron-core": 1.0}.get(program, 0.0)
    dp = run.number("dp", devices / (tp * pp * cp))
    if tp * pp * cp * dp != devices or dp < 1 or dp % 1:
        raise UserError(f"tp x pp x cp x dp = {tp:g} x {pp:g} x {cp:g} x {dp:g} are not the {devices:g} devices")
    batch = run.numbers["global_batch_seqs"]
    recompute = {"full": FULL, "selective": SELECTIVE, "none": NONE}.get(
        run.words["recompute"], FULL if program.startswith("megatron") and run.words["flash_attention"] == "n" else NONE)
    precision = run.words["precision"].lower()
    parallel = run.words["sequence_parallel"]
    chunks = run.number("vpp", 2 if "hai-llm" in run.words["framework"].lower() else 1)  # DualPipe halves the bubble
    is_new = program == "megatron-core" or (program == "megatron" and run.number("year", 2024) >= 2024)
    sequence = float(tp > 1 and (parallel == "y" or (parallel == "" and is_new)))
    return {"pp": pp, "chunks": max(1.0, chunks), "dp": dp, "shard": dp * cp, "cp": cp, "tp": tp,
            "ep": min(max(1.0, run.number("ep", 1)), tp * cp * dp), "zero": zero,
            "is_sequence_parallel": sequence, "is_scattered": float(sequence or program in SCATTERING),
            "seq_len": run.numbers["seq"], "micro_batch_size": micro, "num_microbatches": max(1.0, batch / (dp * micro)),
            "recompute": recompute, "weight_bytes": 4.0 if precision in ("fp32", "tf32") else 2.0,
            "product_bytes": next((size for word, size in PRODUCT_BYTES.items() if word in precision), 2.0)}


class NoneCovered(UserError):
    """No row of a table can be priced; `reasons` says of each why."""

    def __init__(self, reasons: list[str]) -> None:
        self.reasons = reasons
        super().__init__("no row can be priced; the first says: " + (reasons or ["there are none"])[0])


def describe(runs: Sequence[Run]) -> tuple[Case, Machine, Array, list[str]]:
    """The rows that can be priced: cases and machines, the index of each one's row, and for each row why it is not covered.

    A row with a blank degree is there once for each that it may have had.
    """
    shapes: list[Counted] = []
    columns: list[dict[str, float]] = []
    machines: list[Mapping[str, float | str]] = []
    rows: list[int] = []
    reasons = [""] * len(runs)
    seen: dict[tuple[object, ...], Counted] = {}
    for index, run in enumerate(runs):
        try:
            key = tuple(run.words[name] for name in ("model", "gated_mlp", "tied_embed")) + tuple(
                str(run.numbers[name]) for name in SIZES)
            shape = seen[key] if key in seen else seen.setdefault(key, shape_of(run))
            shape.attended()  # refused where there are too many blocks to count
            layouts = layouts_of(run)
            machine = _machine(run, layouts[0])
            machine_of([machine])
        except UserError as error:
            reasons[index] = str(error)
            continue
        count = len(layouts)
        shapes += [shape] * count
        columns += layouts
        machines += [machine] * count
        rows += [index] * count
    if not rows:
        raise NoneCovered(reasons)
    case = case_of(shapes, {name: [column[name] for column in columns] for name in columns[0]})
    return case, machine_of(machines), np.array(rows), reasons


def _machine(run: Run, layout: Mapping[str, float]) -> dict[str, float | str]:
    program = program_of(run.words["framework"], layout["zero"], run.number("year", 2024))
    given = {"per_node": run.number("gpus_per_node"), "nic_gbps": run.number("nic_gbps_per_gpu"),
             "memory_gib": run.number("gpu_mem_gib"), "product_bytes": layout["product_bytes"], "release": release_of(run),
             "is_norm_fused": float(program != "scaling" or run.words["attn_kernel"] == "" or "RMS" in run.words["attn_kernel"])}
    return {"accelerator": run.words["gpu"], "program": program, "kernel": kernel_of(run, program),
            **{name: value for name, value in given.items() if value > 0 or name == "is_norm_fused"}}  # 0 tells nothing


def layouts_of(run: Run) -> list[dict[str, float]]:
    """The layouts that a row may have had: one, unless tp, pp or the micro-batch is blank. UserError when there is none."""
    alone = (1.0,) if run.number("zero_stage") == 3 else DEGREES
    options = ([given] if not math.isnan(given := run.numbers[name]) else list(tried) for name, tried in (
        ("tp", alone), ("pp", alone), ("micro_batch", DEGREES)))
    found, error = [], None
    for tp, pp, micro in itertools.product(*options):
        try:
            layout = layout_of(run, tp, pp, micro)
        except UserError as refused:
            error = error or refused
            continue
        whole = run.numbers["global_batch_seqs"] / layout["dp"]
        if not math.isnan(run.numbers["micro_batch"]) or micro == 1 or whole % micro == 0:
            found.append(layout)
    if not found:
        raise error or UserError("no layout is possible")
    return found
