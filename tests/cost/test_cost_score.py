"""Predictions of published runs: what they may depend on, how good they are, and what a broken table is told."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from athanor.cli.plan_calibrate import command as calibrate
from athanor.cli.plan_score import command as plan_score
from athanor.cost.calibrate import FILE, coefficients, own_factor, tables
from athanor.cost.case import Array, Case
from athanor.cost.datasheet import Datasheet, Machine
from athanor.cost.memory import Footprint
from athanor.cost.runs import MEASURED, NAMES, NUMBERS, WORDS, Run, read_runs
from athanor.cost.score import Fitting, predict, ranking, score
from athanor.cost.step import price
from athanor.foundation.errors import UserError

TABLE = Path(__file__).parents[2] / "benchmarks/data/published_runs.csv.gz"
Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return read_runs(TABLE)


@pytest.fixture(scope="module")
def card(runs: list[Run]) -> dict[str, Any]:
    return score(runs, predict(runs))


@pytest.fixture(scope="module")
def some() -> Rows:
    """Every 40th row of the table, as text."""
    with gzip.open(TABLE, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))[::40]


def write(path: Path, rows: Rows) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def priced(path: Path) -> Array:
    found = predict(read_runs(path))
    return np.stack([found.seconds, found.memory_bytes, found.out_of_memory])


def test_predictions_do_not_look_at_what_was_measured(tmp_path: Path, some: Rows) -> None:
    plain = priced(write(tmp_path / "plain.csv", some))
    measured = ("id", "source", "group", "notes", "step_time_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu_pct",
                "confidence", "mem_gib_per_gpu", "tflops_std", "mfu_std_pct", "status", "mfu_or_hfu", "flops_formula_note")
    hidden = [row | dict.fromkeys(measured, "") | {"id": f"x-{i}"} for i, row in enumerate(some)]
    np.testing.assert_array_equal(priced(write(tmp_path / "hidden.csv", hidden)), plain)
    np.testing.assert_allclose(priced(write(tmp_path / "turned.csv", some[::-1]))[:, ::-1], plain, rtol=1e-12)
    assert np.isfinite(plain[0]).mean() > 0.9


def test_the_report_card_stays_as_good(card: dict[str, Any]) -> None:
    """Fitted to these rows; benchmarks/planner.py leaves models and sources out."""
    assert card["macro_error"] <= 0.09 and card["median_error"] <= 0.06 < card["constant_mfu_error"]
    assert {name: entry["mean_error"] for name, entry in card["sources"].items() if name in ("KOR", "SC21", "SC21Z", "HAG")} == (
        pytest.approx({"KOR": 0, "SC21": 0, "SC21Z": 0, "HAG": 0}, abs=0.08))
    assert card["ranking"]["tau"] >= 0.75 and card["ranking"]["regret"] <= 0.045
    assert card["out_of_memory"]["accuracy"] >= 0.95 and card["out_of_memory"]["recall"] >= 0.96
    assert card["memory"]["mean_error"] <= 0.09
    assert card["coverage"]["dense"] >= 0.97 and card["coverage"]["mixture"] >= 0.95


def test_priors_alone_beat_a_constant_mfu(runs: list[Run]) -> None:
    time, memory = (coefficients(table) for table in ("time", "memory"))
    found = score(runs, predict(runs, time.mapping(time.priors), memory.mapping(memory.priors)))
    assert found["macro_error"] < 0.2 < found["constant_mfu_error"]


@pytest.fixture(scope="module")
def fitting(runs: list[Run]) -> Fitting:
    return Fitting.of([run for run in runs if run.status in ("ok", "oom")])


def test_every_second_stands_in_one_account(fitting: Fitting) -> None:
    found = price(fitting.case, Datasheet(fitting.machine, coefficients("time").mapping()))
    assert len(found.seconds) > 1900
    assert sum(found.accounts.values()) == pytest.approx(found.seconds, rel=1e-9)
    useful = fitting.case.model_flops() / fitting.machine.product_flops / fitting.case.devices
    assert found.accounts["useful"] == pytest.approx(useful, rel=1e-12)
    for name, seconds in found.accounts.items():
        assert name == "kernel" or (np.broadcast_to(seconds, found.seconds.shape) >= -1e-9 * found.seconds).all(), name


@pytest.mark.parametrize("field", ["peak_flops", "product_flops", "memory_bytes_per_second", "scale_up", "network"])
def test_a_faster_machine_is_never_slower(fitting: Fitting, field: str) -> None:
    values = coefficients("time").mapping()
    machine = fitting.machine
    better = type(machine)(**{**vars(machine), field: 2 * getattr(machine, field)})
    slow, fast = (price(fitting.case, Datasheet(each, values)).seconds for each in (machine, better))
    assert (fast <= slow * (1 + 1e-9)).all() and (fast < slow * 0.999).any()


@pytest.mark.parametrize(("field", "change"), [("recompute", lambda case: 0 * case.recompute + 1.0),
                                               ("shard", lambda case: 2 * case.shard)])
def test_recomputing_and_sharding_never_take_more_memory_for_states(
        fitting: Fitting, field: str, change: Callable[[Case], Any]) -> None:
    footprint = Footprint(fitting.machine, coefficients("memory").mapping())
    other = type(fitting.case)(**{**vars(fitting.case), field: change(fitting.case)})
    kinds = ("activations",) if field == "recompute" else ("parameters", "gradients", "optimizer")
    first = np.zeros(1)
    before, after = footprint.kinds(fitting.case, first), footprint.kinds(other, first)
    for kind in kinds:
        assert (after[kind] <= before[kind] * (1 + 1e-9)).all(), kind


def test_models_left_out_are_predicted_as_well(runs: list[Run], fitting: Fitting) -> None:
    """A fifth of the models by coefficients fitted to the others; benchmarks/planner.py does it for each fifth."""
    key = [f"{run.source} {run.words['model']}" for run in fitting.runs]
    fold = {name: number % 5 for number, name in enumerate(sorted(set(key)))}
    held = np.array([fold[name] == 0 for name in key])
    rest, own = fitting.take(~held), fitting.take(held)
    found = score(own.runs, predict(own.runs, rest.time(), rest.memory()))
    assert found["macro_error"] <= 0.10 and found["median_error"] <= 0.07 and found["out_of_memory"]["recall"] >= 0.96


def timed(case: Case, machine: Machine, **changes: Any) -> Array:
    """Seconds of the work of a layer forward, of each kind, with some fields changed."""
    work = Datasheet(machine, coefficients("time").mapping()).work(replace(case, **changes))
    return np.stack([np.broadcast_to(work.block[kind][0], work.recomputed.shape) for kind in ("attention", "launch", "matmul")])


def chosen(fitting: Fitting, identity: str) -> tuple[Case, Machine]:
    rows = fitting.take(np.array([run.id == identity for run in fitting.runs]))
    return rows.case, rows.machine


def test_softmax_is_fused_for_multiples_of_four_matrices_and_heads_of_multiples_of_eight(fitting: Fitting) -> None:
    """BLM-0027: 64 heads of 224 over 8 ranks, a micro-batch of 4 rows, 2,048 tokens each, without flash attention."""
    case, machine = chosen(fitting, "BLM-0027")
    (attention, launch, _), odd = timed(case, machine), timed(case, machine, micro_batch_size=case.micro_batch_size / 16)
    assert case.heads / case.tp == 8 and odd[0] * 16 > 1.5 * attention and odd[1] > launch  # 2 matrices for softmax
    narrow = timed(case, machine, key_size=case.key_size - 4)[0]
    products = 4 * case.tokens * 8 * (case.key_size - 4 + case.value_size) * case.mean_context / (312e12 / 16)
    assert (narrow > products).all() and (narrow < 1.3 * products).all()  # of an A100 without tensor cores


def test_launches_grow_with_the_products_of_a_layer(fitting: Fitting) -> None:
    """BREC-0001 (latent attention, shared experts) launches more than the same layer without what its shared experts do."""
    case, machine = chosen(fitting, "BREC-0001")
    fewer = timed(case, machine, uses=np.where((case.copies == 1) & (case.inputs != case.hidden), 0.0, case.uses))
    assert timed(case, machine)[1] > 1.05 * fewer[1]


def test_a_last_round_of_few_tiles_costs_a_whole_one(fitting: Fitting) -> None:
    """108 multiprocessors of an A100 and tiles of 128 x 256: 27 x 4 tiles take a round, 28 x 4 two."""
    machine = chosen(fitting, "BLM-0027")[1]
    sheet = Datasheet(machine, coefficients("time").mapping() | {"m0": 1e-9, "n0": 1e-9, "k0": 1e-9})
    one, two = (sheet.matmul(np.array([256.0 * rows]), np.array([512.0]), np.ones(1), np.ones(1)) for rows in (27, 28))
    assert one == pytest.approx(2 * 256 * 27 * 512, rel=1e-6) and two > 1.2 * one


def test_gradients_beside_their_parameters_are_added_in_passes_of_their_own(fitting: Fitting) -> None:
    """BLM-0087: blocks of 12 x 13,824^2 parameters and a head of 250,680 x 13,824 on 4 ranks of an A100's 2 TB/s."""
    case, machine = chosen(fitting, "BLM-0087")
    values = coefficients("time").mapping() | {"accumulate": 10.0}

    def backward(machine: Machine, count: float) -> list[Array]:
        work = Datasheet(machine, values).work(replace(case, num_microbatches=np.array([count])))
        return [part["elementwise"][1] for part in (work.block, work.ends)]

    one, two, many = (backward(machine, count) for count in (1.0, 2.0, 1e12))
    for found, half, first, held in zip(many, two, one, (12 * 13824**2 / 4, 250680 * 13824 / 4), strict=True):
        assert found - first == pytest.approx(10 * held / 2e12) and half - first == pytest.approx((found - first) / 2)
    within = replace(machine, program=0 * machine.program + Datasheet.program("megatron-core"))
    assert backward(within, 1.0) == backward(within, 64.0)


def test_torchtitan_computes_half_of_the_products_again(fitting: Fitting) -> None:
    case, machine = chosen(fitting, "TITAN-0001")
    work = Datasheet(machine, coefficients("time").mapping()).work(case)
    products, between = work.block["matmul"][0], work.block["elementwise"][0]
    assert work.recomputed == pytest.approx(products / 2 + between)


def test_recent_mixtures_keep_short_states(fitting: Fitting) -> None:
    """Megatron-Bridge's recipe of Moonlight: gradients and both moments in bf16, weights of the optimizer in fp32."""
    case, machine = chosen(fitting, "BREC-0001")
    kinds = Footprint(machine, coefficients("memory").mapping()).kinds(case, np.zeros(1))
    assert kinds["gradients"] == pytest.approx(kinds["parameters"])
    assert kinds["optimizer"] < 4.01 * kinds["parameters"]


def test_regret_is_what_the_chosen_layout_loses() -> None:
    def run(seconds: float) -> Run:
        return Run("T-1", "one", "ok", {}, {}, seconds, np.nan)

    runs = [run(seconds) for seconds in (4.0, 2.0, 3.0, 5.0, 6.0, 7.0, 8.0)]
    said = np.array([4.0, 2.5, 2.0, 5.0, 6.0, 7.0, 8.0])  # 3.0 is chosen; one of 21 pairs is the wrong way round
    found = ranking(runs, said, np.ones(7, bool))
    assert found["regret"] == pytest.approx(0.5) and found["tau"] == pytest.approx(19 / 21)
    missing = ranking(runs, np.full(7, np.inf), np.ones(7, bool))
    assert missing["regret"] == pytest.approx(3.0)  # not covered: as the worst of its group


def test_a_few_own_runs_are_believed_by_half() -> None:
    assert own_factor(np.ones(2), np.full(2, 4.0)) == pytest.approx(2.0)
    assert own_factor(np.ones(0), np.ones(0)) == 1.0


def test_calibrating_writes_a_file_that_is_read_back(tmp_path: Path, some: Rows) -> None:
    slower = [row | {"step_time_s": str(2 * float(row["step_time_s"]))} for row in some if row["step_time_s"]]
    table, out = write(tmp_path / "own.csv", slower), tmp_path / "own.toml"
    done = CliRunner().invoke(calibrate, [str(table), "--out", str(out), "--own", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    count = said["rows"]
    assert said["time"]["own"] == pytest.approx(2 ** (count / (count + 2)), rel=0.15)
    assert tables(out)["time"]["own"]["value"] == pytest.approx(said["time"]["own"], rel=1e-3)
    assert tables(out)["memory"] == tables()["memory"]
    cards = [json.loads(CliRunner().invoke(plan_score, [str(table), "--json", *extra]).stdout)
             for extra in ([], ["--coefficients", str(out)])]
    assert cards[1]["summary"]["median_error"] < 0.5 * cards[0]["summary"]["median_error"]
    row = cards[0]["rows"][0]
    assert list(row) == ["id", "covered", "why_not", "predicted_step_seconds", "predicted_memory_gib",
                         "out_of_memory_probability"]


@pytest.mark.parametrize(("change", "words"), [
    ({"layers": "many"}, r"row 2 .*column 'layers': 'many' is not a number"),
    ({"hidden": "nan"}, "column 'hidden'"), ({"seq": "-1"}, "column 'seq'"), ({"vocab": "inf"}, "column 'vocab'"),
    ({"seq": "1e300"}, "from 0 to 1,000,000,000")])
def test_wrong_cells_are_named(tmp_path: Path, some: Rows, change: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_runs(write(tmp_path / "wrong.csv", [some[0] | change]))


def test_every_column_that_is_read_stands_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "planner.md").read_text()
    table = text.split("### Columns of a table of runs")[1].split("\n### ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(name.strip(" `") for row in rows for name in row.split(",")) == sorted({*NAMES, *WORDS, *NUMBERS, *MEASURED})


def test_missing_columns_and_files_are_named(tmp_path: Path, some: Rows) -> None:
    short = [{name: value for name, value in row.items() if name != "kv_heads"} for row in some[:2]]
    with pytest.raises(UserError, match="has no column 'kv_heads'"):
        read_runs(write(tmp_path / "short.csv", short))
    with pytest.raises(UserError, match="does not exist"):
        read_runs(tmp_path / "nothing.csv")
    lines = write(tmp_path / "short.csv", some[:2]).read_text().splitlines()
    for text, words in (("", "is empty; its first line"), (lines[0], "names columns and has no rows"),
                        ("\n".join(f"{line},tp" for line in lines), "2 columns 'tp'")):
        (tmp_path / "odd.csv").write_text(text)
        with pytest.raises(UserError, match=words):
            read_runs(tmp_path / "odd.csv")
    raw = bytearray(TABLE.read_bytes())
    for at in (20, 3000, len(raw) // 2):
        (tmp_path / "odd.csv.gz").write_bytes(raw[:at] + bytes(255 - byte for byte in raw[at:at + 50]) + raw[at + 50:])
        with pytest.raises(UserError):
            read_runs(tmp_path / "odd.csv.gz")


def test_a_byte_order_mark_and_zeros_that_tell_nothing_change_no_prediction(tmp_path: Path, some: Rows) -> None:
    row = next(row for row in some if row["id"].startswith("VTS"))
    blank = row | {"nic_gbps_per_gpu": "", "gpu_mem_gib": "", "step_time_s": ""}
    plain = priced(write(tmp_path / "plain.csv", [blank]))
    zeros = blank | {"nic_gbps_per_gpu": "0", "gpu_mem_gib": "0", "step_time_s": "0"}
    marked = write(tmp_path / "zeros.csv", [zeros])
    marked.write_bytes(b"\xef\xbb\xbf" + marked.read_bytes())
    assert np.array_equal(priced(marked), plain) and np.isfinite(plain).all()
    assert score(runs := read_runs(marked), predict(runs))["rows"] == 0


@pytest.mark.parametrize(("old", "new"), [("value = ", "worth = "), ("value = ", 'value = "a" # '), ("value = ", "value = -")])
def test_damaged_coefficients_are_named(tmp_path: Path, old: str, new: str) -> None:
    (tmp_path / "c.toml").write_text(FILE.read_text().replace(f'"matmul" = {{ {old}', f'"matmul" = {{ {new}', 1))
    with pytest.raises(UserError, match=r"matmul|no file of coefficients"):
        coefficients("time", tmp_path / "c.toml")


def test_a_table_of_any_name_gives_coefficients_that_are_read(tmp_path: Path, some: Rows) -> None:
    table = write(tmp_path / 'a "b" \\.csv', [row | {"id": f'"{row["id"]}'} for row in some if row["step_time_s"]][:3])
    CliRunner().invoke(calibrate, [str(table), "--own", "--out", str(tmp_path / "c.toml")], catch_exceptions=False)
    assert '"b"' in tables(tmp_path / "c.toml")["fitted_to"]


def test_a_known_model_goes_by_its_name_however_spelled_unless_the_row_gives_other_sizes(tmp_path: Path, some: Rows) -> None:
    row = next(row for row in some if row["id"].startswith("MBR") and row["micro_batch"]) | {
        "vpp": "", "recompute": "none", "precision": "bf16"} | dict.fromkeys(
        ("tp", "pp", "cp", "ep"), "1") | {"dp": "", "n_gpus": "64", "global_batch_seqs": "512", "micro_batch": "1"}
    sizes = dict.fromkeys(("params_B", "layers", "hidden", "heads", "kv_heads", "ffn_hidden", "vocab", "moe_experts", "moe_topk",
                           "moe_ffn_hidden", "shared_expert_ffn", "dense_layers"), "")
    names = ("llama-3-8b", "Llama 3 8B", "LLAMA3_8b (seq 8k)", "GPT_OSS_120B", "Nemotron-H 56B", "llama-4-8b")
    other = row | sizes | {"model": "llama-3-8b", "layers": "32", "hidden": "2048", "heads": "32", "vocab": "1000"}
    seconds = priced(write(tmp_path / "named.csv", [*(row | sizes | {"model": name} for name in names), other]))[0]
    assert seconds[0] == seconds[1] == seconds[2] > 2 * seconds[6] and np.isfinite(seconds[:5]).all() and np.isnan(seconds[5])


@pytest.mark.parametrize(("change", "words"), [
    ({"gpu": "A100-8O"}, "unknown; did you mean 'A100-80'"), ({"n_gpus": "7"}, "are not the 7 devices"),
    ({"model": "nobody's", "layers": ""}, "layers are blank"), ({"seq": ""}, "seq is blank"), ({"tp": "0"}, "tp = 0"),
    ({"model": "nobody's", "heads": "0"}, "heads are blank or 0"), ({"tp": "1.5"}, "must be whole numbers"),
    ({"model": "nobody's", "hidden": "3"}, "hidden = 3 is less than heads"), ({"layers": "20000"}, "has 20000 blocks; at most")])
def test_rows_that_cannot_be_priced_say_why(tmp_path: Path, some: Rows, change: dict[str, str], words: str) -> None:
    row = next(row for row in some if row["id"].startswith("VTS"))
    (why,) = predict(read_runs(write(tmp_path / "odd.csv", [row | change]))).why_not
    assert words in why
    other = row | {"gpu": "Z9"}
    both = predict(read_runs(write(tmp_path / "odd.csv", [other, row | change]))).why_not
    assert both[1] == why and both[0].startswith("accelerator 'Z9' is unknown"), "each row says its own reason"
