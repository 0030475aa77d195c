"""What the machines are: `cluster.toml`, and the accelerators we know by name."""

from __future__ import annotations

import math
import tomllib
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from athanor.foundation.errors import UserError, did_you_mean
from athanor.foundation.run_folder import write_atomic
from athanor.foundation.toml import toml_value
from athanor.foundation.units import format_share

SCHEMA = 2
QUIET = 0.9  # of the processor time that was wanted; with less of it, rates are those of a busy machine
ACCELERATORS = Path(__file__).parent / "accelerators"


@dataclass
class ClusterSpec:
    """A cluster as the planner sees it. SI units; rates are those of one device while all devices work.

    Tables are lists of rows; `COLUMNS` names their columns. What was not measured is empty, never guessed.
    """

    accelerator: str
    device_type: str  # cpu or cuda
    devices: int
    per_node: int
    threads_per_device: int
    memory_bytes: float  # of one device
    peak_flops: dict[str, float]  # FLOP/s by dtype; measured ones are the best matmul rate seen while all ranks worked
    memory_bytes_per_second: float
    matmul: list[list[Any]] = field(default_factory=list)
    attention: list[list[Any]] = field(default_factory=list)
    elementwise: list[list[Any]] = field(default_factory=list)
    optimizer: list[list[Any]] = field(default_factory=list)
    steps: list[list[Any]] = field(default_factory=list)  # whole ones, which parts are held against
    overhead_seconds: dict[str, float] = field(default_factory=dict)  # per launched operation
    collectives: dict[str, list[list[Any]]] = field(default_factory=dict)
    jitter: list[list[Any]] = field(default_factory=list)
    disk: dict[str, float] = field(default_factory=dict)
    python: dict[str, float] = field(default_factory=dict)
    startup_seconds: dict[str, float] = field(default_factory=dict)
    processor_share: float | None = None  # of what measuring wanted; the rest went to other processes
    host: str = ""
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    source: str = "measured"
    price_per_device_hour: float | None = None
    network_bytes_per_second: float | None = None  # of one device, to other nodes
    schema: int = SCHEMA

    def write(self, path: Path) -> None:
        """Write `cluster.toml`; `read_cluster` gives an equal value back."""
        write_atomic(path, to_toml(self))


COLUMNS = {
    "matmul": ("dtype", "form", "m tokens", "k in", "n out", "FLOP/s"),
    "attention": ("dtype", "matrices", "seq_len", "head_dim", "forward s", "backward s"),
    "elementwise": ("dtype", "operation", "elements", "s"),
    "optimizer": ("tensors", "elements", "s"),
    "steps": ("dtype", "vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "tokens", "seq_len", "dp_shard", "tp",
              "s", "s in collectives"),
    "jitter": ("s of work", "slowest / mean - 1"),
    "collectives": ("bytes", "s"),
}
WORDS = {"dtype", "form", "operation"}
MAY_BE_0 = {"s in collectives"}  # of the columns of `steps`


def to_toml(spec: ClusterSpec) -> str:
    """The text of `cluster.toml`: plain values first, then tables of numbers, a row per line."""
    lines = ["# What `athanor check` found. SI units (seconds, bytes, FLOP); all devices worked while each was measured."]
    tables: list[str] = []
    for item in fields(spec):
        value = getattr(spec, item.name)
        if value is None:
            continue
        if item.name == "collectives":
            tables += [f"\n[collectives]  # {', '.join(COLUMNS['collectives'])}"]
            tables += [line for name, rows in value.items() for line in _rows(name, rows)]
        elif isinstance(value, dict):
            tables += [f"\n[{item.name}]", *(f"{key} = {toml_value(_short(entry))}" for key, entry in value.items())]
        elif isinstance(value, list):
            lines += [f"\n# {', '.join(COLUMNS[item.name])}", *_rows(item.name, value)]
        else:
            lines.append(f"{item.name} = {toml_value(_short(value))}")
    return "\n".join(lines + tables) + "\n"


def _rows(name: str, rows: list[list[Any]]) -> list[str]:
    return [f"{name} = [", *(f"  {toml_value([_short(value) for value in row])}," for row in rows), "]"]


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) and not value.is_integer() else value


def read_cluster(path: Path) -> ClusterSpec:
    """Read and check a `cluster.toml`. Raises UserError naming the file, the key and what is allowed."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; `athanor check --out {path}` measures this machine") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    return from_dict(raw, str(path))


def from_dict(raw: dict[str, Any], file: str) -> ClusterSpec:
    """Check a parsed `cluster.toml` key by key."""
    known = {item.name: item for item in fields(ClusterSpec)}
    if raw.get("schema") == 1 and isinstance(raw.get("steps", []), list):  # whose steps had no column `tp`
        steps = [[*row[:9], 1, *row[9:]] if isinstance(row, list) else row for row in raw.get("steps", [])]
        raw = {**raw, "schema": SCHEMA, "steps": steps}
    if raw.get("schema") != SCHEMA:
        raise UserError(f"{file}: schema is {raw.get('schema')!r}, this version reads {SCHEMA}; run `athanor check` again")
    for key in raw:
        if key not in known:
            raise UserError(f"{file}: unknown key '{key}'; {did_you_mean(key, known)}")
    for name, item in known.items():
        if name not in raw:
            if item.default is MISSING and item.default_factory is MISSING:
                raise UserError(f"{file}: '{name}' is missing")
            continue
        _check(name, str(item.type), raw[name], file)
    spec = ClusterSpec(**raw)
    if spec.device_type not in ("cpu", "cuda"):
        raise UserError(f"{file}: device_type is '{spec.device_type}'; {did_you_mean(spec.device_type, ['cpu', 'cuda'])}")
    if spec.devices < 1 or spec.per_node < 1:
        raise UserError(f"{file}: devices and per_node must be at least 1")
    return spec


def _check(name: str, kind: str, value: Any, file: str) -> None:
    """Refuse a value of the wrong type, and numbers that are negative or not finite."""
    if kind.startswith("list"):
        _check_rows(name, COLUMNS[name], value, file)
    elif name == "collectives":
        for key, rows in _table(name, value, file).items():
            _check_rows(f"collectives.{key}", COLUMNS["collectives"], rows, file)
    elif kind == "dict[str, float]":
        for key, entry in _table(name, value, file).items():
            _check_number(f"{name}.{key}", entry, file)
    elif kind == "dict[str, str]":
        _table(name, value, file)
    elif kind == "str":
        if not isinstance(value, str):
            raise UserError(f"{file}: '{name}' is {value!r}, a text is expected")
    elif kind == "int":
        if type(value) is not int:
            raise UserError(f"{file}: '{name}' is {value!r}, a whole number is expected")
    else:
        _check_number(name, value, file)


def _table(name: str, value: Any, file: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{file}: '{name}' is {value!r}, a table is expected")
    return value


def _check_number(name: str, value: Any, file: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise UserError(f"{file}: '{name}' is {value!r}, a number of at least 0 is expected")


def _check_rows(name: str, columns: tuple[str, ...], rows: Any, file: str) -> None:
    form = ", ".join(columns)
    if not isinstance(rows, list):
        raise UserError(f"{file}: '{name}' is {rows!r}, rows of ({form}) are expected")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or len(row) != len(columns):
            raise UserError(f"{file}: row {number} of '{name}' is {row!r}, ({form}) is expected")
        for column, value in zip(columns, row, strict=True):
            if column in WORDS:
                if not isinstance(value, str):
                    raise UserError(f"{file}: row {number} of '{name}': {column} is {value!r}, a text is expected")
            else:
                _check_number(f"{name}[{number}].{column}", value, file)
                if name == "steps" and not value and column not in MAY_BE_0:
                    raise UserError(f"{file}: 'steps[{number}].{column}' is 0, a number above 0 is expected")


def busy_note(spec: ClusterSpec) -> str | None:
    """The warning that belongs beside all that rests on measurements of a busy machine; None when it was quiet, or unknown."""
    if spec.processor_share is None or spec.processor_share >= QUIET:
        return None
    return (f"the machine was busy when it was measured: other processes had {format_share(1 - spec.processor_share, 0)} of the "
            "processor time that was wanted, so rates and forecasts may be far off; `athanor check` again when it is quiet")


def accelerator_names() -> dict[str, str]:
    """Every name and alias of a known accelerator -> the file's name."""
    out = {}
    for path in sorted(ACCELERATORS.glob("*.toml")):
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        for name in (path.stem, *raw.get("aliases", [])):
            out[name] = path.stem
    return out


def load_accelerator(name: str) -> dict[str, Any]:
    """The facts of a known accelerator, each with its source: {key: {"value", "source"}}.

    Raises UserError with the nearest name for an unknown one: an unknown accelerator has no peak, so no MFU.
    """
    names = accelerator_names()
    by_lower = {alias.lower(): stem for alias, stem in names.items()}
    stem = by_lower.get(name.lower())
    if stem is None:
        raise UserError(f"accelerator '{name}' is unknown; {did_you_mean(name, set(names.values()))}")
    raw = tomllib.loads((ACCELERATORS / f"{stem}.toml").read_text(encoding="utf-8"))
    return {"name": stem, **{key: value for key, value in raw.items() if isinstance(value, dict)}}


def check_precision(name: str, precision: str) -> None:
    """Raises UserError for a precision that a known accelerator does not compute in, by its table, with those that it does."""
    facts = load_accelerator(name)
    peaks = ["fp16", *(key[5:-6] for key in facts if key.startswith("peak_"))]  # fp16 is as fast as bf16
    known = facts["precisions"]["value"].split() if "precisions" in facts else sorted(peaks)
    if precision not in known:
        raise UserError(f"{name} is known to compute in {', '.join(known)}, not in {precision}")


def with_devices(spec: ClusterSpec, devices: int | None) -> ClusterSpec:
    """The same machine with fewer devices; more than were measured are refused, since nobody knows their rates."""
    if devices is None or devices == spec.devices:
        return spec
    if devices > spec.devices:
        raise UserError(f"cluster.devices is {devices}, but {spec.devices} were measured on {spec.host or spec.accelerator}")
    return replace(spec, devices=devices, per_node=min(devices, spec.per_node))
