"""The search against brute force and foundation's checks, its simulation against the closed form, its answers, its refusals."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from athanor.cli.plan import command
from athanor.cost.pipeline import simulate
from athanor.foundation.errors import AthanorError, LayoutError, UserError
from athanor.foundation.layout import Layout, check_batch, check_experts, check_model, resolve
from athanor.foundation.schedules import SCHEDULES, check_pipeline, cut
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.deepseek_v3 import Shape
from athanor.models.shapes.find import find_shape
from athanor.planner import answers, explain
from athanor.planner.estimate import RECOMPUTE, estimate, read_cluster_words
from athanor.planner.finalists import Finalist, finalists, refine
from athanor.planner.search import MICRO_BATCHES, Task, sweep
from athanor.planner.stages import step_seconds

SMALL = DecoderShape(vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=12, num_attention_heads=16,
                     num_key_value_heads=4, max_position_embeddings=2048)
LARGE = DecoderShape(vocab_size=128256, hidden_size=12288, intermediate_size=32768, num_hidden_layers=96, num_attention_heads=96,
                     num_key_value_heads=8, max_position_embeddings=8192)
PREDICTING = Shape(vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=12, num_attention_heads=16,
                   tie_word_embeddings=True, first_k_dense_replace=99, num_nextn_predict_layers=1)


def task(shape: DecoderShape = SMALL, devices: int = 16, rows: int = 48, seq_len: int = 1024, cluster: str = "A100-80",
         **more: Any) -> Task:
    return Task(shape, read_cluster_words(cluster), devices, rows * seq_len, seq_len, **more)


def check(one: Task, layout: Layout, values: dict[str, Any], stages: int) -> int:
    """All of foundation's checks; returns the number of micro-batches."""
    shape = one.shape
    resolve(layout, one.devices)
    check_model(layout, shape, one.seq_len, vocab_size=0)
    check_experts(layout, getattr(shape, "num_experts", 0))
    _, count = check_batch(global_batch_tokens=one.global_batch_tokens, seq_len=one.seq_len, data_ranks=layout.data_ranks,
                           micro_batch_size=values["micro_batch_size"], tp=layout.tp)
    schedule = "Interleaved1F1B" if values["stages_per_rank"] > 1 else "1F1B"
    check_pipeline(layout, schedule, stages=stages, num_microbatches=count, is_compiled=True, recompute=values["recompute"])
    return count


@pytest.mark.parametrize("shape", [SMALL, find_shape("qwen3-30b-a3b")], ids=["dense", "mixture"])
def test_the_grid_is_every_layout_that_foundation_allows_and_no_other(shape: DecoderShape) -> None:
    one = task(shape, recompute=("none", "full"))
    grid = sweep(one)
    names = ("tp", "pp", "chunks", "cp", "ep", "dp", "micro_batch_size")
    found = set(zip(*(grid.columns[name].astype(int).tolist() for name in names), strict=True))
    expected, sizes = set(), range(1, 17)
    for tp, pp, cp in itertools.product(sizes, (*sizes,), (1, 2, 4)):
        if 16 % (tp * pp * cp) or tp > 8:
            continue
        dp = 16 // (tp * pp * cp)
        for chunks, ep, micro in itertools.product((1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 48), (1, 2, 4, 8, 16), MICRO_BATCHES):
            if (pp == 1 and chunks > 1) or pp * chunks > shape.num_hidden_layers:
                continue
            values = {"micro_batch_size": micro, "stages_per_rank": chunks, "recompute": "none"}
            try:
                check(one, Layout(pp, 1, dp, cp, tp, ep), values, pp * chunks)
                expected.add((tp, pp, chunks, cp, ep, dp, micro))
            except LayoutError:
                continue
    assert found == expected and len(found) > 100
    rows = zip(*(grid.columns[name].astype(int).tolist() for name in (*names, "shard", "zero", "num_microbatches")), strict=True)
    for tp, pp, chunks, cp, ep, dp, micro, shard, zero, count in set(rows):
        values = {"micro_batch_size": micro, "stages_per_rank": chunks, "recompute": "none"}
        assert check(one, Layout(pp, dp * cp // shard, shard // cp, cp, tp, ep), values, pp * chunks) == count
        assert zero == 0 or shard > 1


def test_every_finalist_is_legal_and_its_accounts_are_its_step() -> None:
    one = task(find_shape("llama-3-70b"), 512, 1024, 4096, "H100-80")
    found = finalists(sweep(one), count=20)
    assert found == sorted(found, key=lambda final: final.seconds)
    for final in found:
        assert check(one, final.layout, final.values, len(final.split)) == final.values["num_microbatches"]
        cut(final.layout.pp, final.schedule, [1.0] * 80, final.split if final.layout.pp > 1 else None)
        assert sum(final.split) == 80 and len(final.memory_bytes) == final.layout.pp
        assert sum(final.accounts.values()) == pytest.approx(final.seconds) and min(final.accounts.values()) > -1e-9
        assert max(final.memory_bytes) <= one.cap_bytes * (1 + 1e-9) and final.odds <= one.most_odds + 1e-9
        book = final.book(one)
        assert abs(book.accounts["unattributed"]) < 1e-6 * book.device_seconds
        assert book.derived()["mfu"] == pytest.approx(final.mfu)


def test_the_sweep_is_what_estimate_says_of_each_layout_alone() -> None:
    grid = sweep(task())
    for index in np.linspace(0, len(grid) - 1, 40).astype(int):
        row = grid.row(index)
        recompute = next(name for name, code in RECOMPUTE.items() if code == row["recompute"])
        shard = row["shard"] / row["cp"]
        loops = f"stages_per_rank={row['chunks']:.0f}" if row["chunks"] > 1 else ""
        words = (f"pp={row['pp']:.0f} dp_replicate={row['dp'] / shard:.0f} dp_shard={shard:.0f} cp={row['cp']:.0f} "
                 f"tp={row['tp']:.0f} micro_batch_size={row['micro_batch_size']:.0f} seq_len=1024 global_batch_tokens=49152 "
                 f"zero={row['zero']:.0f} recompute={recompute} sequence_parallel={row['is_sequence_parallel']:.0f} {loops}")
        alone = estimate(SMALL, "A100-80 devices=16", words)
        assert alone["step_seconds"] == pytest.approx(grid.seconds[index])
        if row["pp"] <= 3:  # else the fullest of all ranks, where the grid looks at three
            assert max(alone["memory_gib"]) * 2**30 == pytest.approx(grid.peak[index])
    fitting = [i for i in range(len(grid)) if grid.peak[i] <= grid.task.cap_bytes]
    assert grid.seconds[grid.best()[0]] == min(grid.seconds[i] for i in fitting)


def test_the_cap_is_where_the_probability_is_what_was_asked_for() -> None:
    for odds in (0.01, 0.1, 0.5):
        one = task(most_odds=odds)
        log_odds = float(one.footprint.log_odds(np.array([one.cap_bytes]))[0])
        assert 1 / (1 + np.exp(-log_odds)) == pytest.approx(odds)


@pytest.mark.parametrize(("schedule", "pp", "loops", "times", "split"), [
    ("1F1B", 4, 1, 64, None), ("1F1B", 3, 1, 31, None), ("1F1B", 5, 1, 47, [3, 2, 2, 2, 3]), ("Interleaved1F1B", 4, 3, 48, None),
    ("Interleaved1F1B", 3, 2, 36, [1, 2, 3, 2, 2, 2]), ("Interleaved1F1B", 6, 2, 35, None),
    ("GPipe", 4, 1, 50, None), ("ZBVZeroBubble", 3, 2, 31, [1, 2, 3, 2, 2, 2]),
    ("DualPipeV", 4, 2, 45, [1, 1, 2, 2, 2, 1, 1, 2]), ("InterleavedZeroBubble", 3, 2, 36, None), ("LoopedBFS", 3, 2, 40, None)])
@pytest.mark.parametrize("send", [0.0, 0.2])
def test_rounds_that_repeat_are_as_long_as_those_simulated(schedule: str, pp: int, loops: int, times: int,
                                                           split: list[int] | None, send: float) -> None:
    pipeline = cut(pp, schedule, [1.0] * 12, split or [12 // (pp * loops)] * (pp * loops))
    busy = np.array([len(held) for held in pipeline.blocks]) + np.eye(len(pipeline.blocks))[-1] * 0.7
    whole = simulate(pipeline, busy / 3, busy / 3, busy / 3, send, times, is_blocking=True).seconds
    assert step_seconds(pipeline, busy, (1 / 3, 1 / 3), send, times) == pytest.approx(whole, rel=1e-9)


def test_simulation_replaces_the_closed_form_and_stays_near_it() -> None:
    grid = sweep(task(LARGE, 1024, 2048, 4096, "H100-80"))
    for index in grid.best(30, grid.is_even):
        assert refine(grid, index).seconds == pytest.approx(grid.seconds[index], rel=0.01)
    for index in grid.best(30, ~grid.is_even):
        assert grid.seconds[index] * 0.98 < refine(grid, index).seconds < grid.seconds[index] * 1.3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_of_the_grid_is_priced_as_it_is_simulated(schedule: str) -> None:
    grid = sweep(task(LARGE, 1024, 2048, 4096, "H100-80", recompute=("none", "full"), schedules=(schedule,)))
    rel = 0.04 if SCHEDULES[schedule].placement == "v" else 0.005  # a V's turn is no hop, and its last rank has no head
    several = grid.is_even & (grid.columns["pp"] > 1)
    chosen = grid.best(25, several)
    assert len(chosen) == 25
    for index in chosen:
        final = refine(grid, index)
        assert final.schedule == schedule and final.seconds == pytest.approx(grid.seconds[index], rel=rel)


@pytest.mark.parametrize("shape", [SMALL, PREDICTING], ids=["plain", "predicting further tokens"])
def test_the_grid_of_all_schedules_is_what_each_takes(shape: DecoderShape) -> None:
    one = task(shape, 8, 32, recompute=("none", "selective"), schedules=tuple(SCHEDULES))
    columns = sweep(one).columns
    rows = zip(*(columns[name].astype(int).tolist() for name in ("pp", "chunks", "num_microbatches", "schedule")),
               columns["recompute"].tolist(), strict=True)
    found, expected = {row for row in rows if row[0] > 1}, set()
    names = {code: name for name, code in RECOMPUTE.items()}
    for pp, chunks, times, recompute in {(row[0], row[1], row[2], row[4]) for row in found}:
        for place, schedule in enumerate(SCHEDULES):
            try:
                cut(pp, schedule, [1.0] * 12, [12 - pp * chunks + 1] + [1] * (pp * chunks - 1))
                check_pipeline(Layout(pp=pp), schedule, stages=pp * chunks, num_microbatches=times, is_compiled=False,
                               recompute=names[recompute], embedding_uses=shape.embedding_uses())
                expected.add((pp, chunks, times, place, recompute))
            except LayoutError:
                continue
    all_of_them = {place for place, row in enumerate(SCHEDULES.values()) if shape == SMALL or not row.splits_backward}
    assert found == expected and {row[3] for row in found} == all_of_them


def test_schedules_rank_as_they_do_in_theory() -> None:
    """Same bubble of GPipe and 1F1B with more memory of GPipe; LoopedBFS as Interleaved1F1B; splitting the backward pass waits
    less, for which each rank keeps as much as the first of 1F1B does (Qi et al. 2024), and a V's first holds the head as well."""
    words = "pp=4 seq_len=1024 num_microbatches=16 micro_batch_size=1 pipeline_schedule="
    found = {name: estimate(SMALL, "A100-80 devices=4", words + name) for name in SCHEDULES if name != "DualPipeV"}
    bubbles = {name: one["accounts"]["bubble"] for name, one in found.items()}
    assert bubbles["GPipe"] == pytest.approx(bubbles["1F1B"]) and bubbles["LoopedBFS"] == bubbles["Interleaved1F1B"]
    assert bubbles["ZBVZeroBubble"] < bubbles["InterleavedZeroBubble"] < bubbles["Interleaved1F1B"] < bubbles["1F1B"]
    memory = {name: one["memory_gib"] for name, one in found.items()}
    assert memory["GPipe"][0] > memory["1F1B"][0] == memory["InterleavedZeroBubble"][0]
    assert memory["GPipe"][2] > memory["ZBVZeroBubble"][2] == memory["InterleavedZeroBubble"][2] > memory["1F1B"][2]
    assert memory["ZBVZeroBubble"][0] > memory["InterleavedZeroBubble"][0]


def equal_stages(grid: Any, index: int) -> Any:
    row = grid.row(index)
    ranks = np.arange(row["pp"])
    return sum(grid.task.footprint.kinds(grid.task.case({k: np.array([v]) for k, v in row.items()}), ranks).values())


def test_stages_are_cut_where_equal_ones_do_not_fit() -> None:
    one = task(LARGE, 512, 1024, 8192, "A100-80", recompute=("none",))
    grid = sweep(one)
    columns = grid.columns
    divides = (columns["chunks"] == 1) & (columns["pp"] > 3) & (96 % columns["pp"] == 0)
    tight = np.flatnonzero(divides & ~grid.fits & (grid.peak < 1.1 * one.cap_bytes))
    saved = []
    for index in tight:
        try:
            saved.append((refine(grid, int(index)), equal_stages(grid, int(index))))
        except LayoutError:
            continue
    assert saved, "some layout must fit with unequal stages only"
    for final, equal in saved:
        assert len(set(final.split)) > 1 and equal.max() > one.cap_bytes >= max(final.memory_bytes)
        assert final.split[0] < final.split[-2]  # the first rank keeps the most micro-batches
    loose = np.flatnonzero(divides & grid.fits)[:20]
    for index in loose:
        final = refine(grid, int(index))
        if len(set(final.split)) == 1:
            assert final.memory_bytes == pytest.approx(equal_stages(grid, int(index)))


def test_llama_3_405b_is_laid_out_about_as_it_was() -> None:
    """Llama 3 (arXiv 2407.21783, table 4): TP 8 x PP 16 x DP 128 on 16,384 H100, 16 M tokens, 41 % MFU."""
    one = task(find_shape("llama-3-405b"), 16384, 2048, 8192, "H100-80 per_node=8 nic_gbps=400")
    best, *others = finalists(sweep(one))
    near = min(final.seconds for final in [best, *others] if final.layout.tp == 8)
    assert near <= 1.01 * best.seconds, "TP 8 is among the best; TP 4 with rows cut over CP 8 ties with it"
    assert 0.35 <= best.mfu <= 0.5 and best.values["recompute"] == "none"
    as_it_was = estimate(one.shape, "H100-80 devices=16384 nic_gbps=400", "tp=8 pp=16 dp_shard=128 seq_len=8192 zero=2 "
                         "global_batch_tokens=16777216 pipeline_schedule=Interleaved1F1B stages_per_rank=7")
    assert as_it_was["mfu"] == pytest.approx(0.41, rel=0.15)
    assert best.seconds <= as_it_was["step_seconds"]


def test_what_if_changes_one_choice_and_says_what_it_costs() -> None:
    grid = sweep(task(find_shape("llama-3-70b"), 256, 1024, 4096, "H100-80"))
    best = finalists(grid)[0]
    index, changes = best.index, explain.what_if(grid, best)
    row = grid.row(index)
    assert len({(change.choice, change.value) for change in changes}) == len(changes)
    for change in (one for one in changes if one.choice == "micro_batch_size"):
        match = np.logical_and.reduce([grid.columns[name] == row[name] for name in (
            "tp", "pp", "chunks", "cp", "zero", "recompute", "is_sequence_parallel")] + [
                grid.columns["micro_batch_size"] == float(change.value), grid.columns["shard"] == row["shard"]])
        assert match.sum() == 1
        if not change.fits:
            assert change.memory_gib == pytest.approx(float(grid.peak[match][0]) / 2**30)
        assert change.relative == pytest.approx(refine(grid, int(np.flatnonzero(match)[0])).seconds / best.seconds - 1)
    assert all(change.relative >= 0 for change in changes if change.fits), "nothing that fits beats the best"
    sentences = explain.reasons(grid, index, changes)
    assert {"tp", "recompute", "micro_batch_size"} <= set(sentences)
    assert sentences["tp"].startswith(f"{row['tp']:.0f}: ") and ("slower" in sentences["tp"] or "fit" in sentences["tp"])
    slow = explain.Change("tp", "4", 0.06, 50.0, True)
    tight = explain.Change("tp", "4", -0.03, 97.2, False)
    assert str(slow) == "4 is 6.0 % slower" and str(tight) == "4 does not fit (97 GiB; else 3.0 % faster)"


def test_the_waterfall_ends_at_the_step() -> None:
    final: Finalist = finalists(sweep(task()), count=4)[0]
    rows = explain.waterfall(final)
    assert rows[0][0] == "useful" and rows[-1][3] == pytest.approx(final.seconds)
    assert sum(row[2] for row in rows) == pytest.approx(1.0)


def test_devices_network_methods_and_cost() -> None:
    one = task(find_shape("llama-3-8b"), 64, 512, 4096, "H100-80 nic_gbps=200")
    grid = sweep(one)
    first = finalists(grid)[0]
    others = answers.with_devices(one)
    sizes = sorted([(grid, first), *((other, answers.best_of(other)) for other in others)], key=lambda size: size[0].task.devices)
    worth = answers.devices_worth(sizes)
    assert [row["devices"] for row in worth] == [16, 32, 64, 128]
    for few, many in itertools.pairwise(worth):
        assert many["step_seconds"] < few["step_seconds"] and many["device_seconds_per_token"] >= few["device_seconds_per_token"]
    twice = answers.network_twice(grid, first)
    assert twice["nic_gbps"] == 400 and 0 <= twice["saved"] < 0.5
    methods = {row["method"]: row for row in answers.compare_methods(grid)}
    for name, row in methods.items():
        layout = row["layout"]
        assert row["step_seconds"] >= 0.99 * min(final.seconds for final in finalists(grid)), name
        assert layout["cp"] == layout["ep"] == layout["stages_per_rank"] == 1
    assert methods["FSDP"]["layout"]["zero"] == 3 and methods["FSDP"]["layout"]["tp"] == methods["FSDP"]["layout"]["pp"] == 1
    assert methods[answers.METHODS[1]]["layout"]["tp"] == 1 < methods[answers.METHODS[1]]["layout"]["pp"]
    paid = answers.cost(one, 2.0, 512 * 4096 * 1000, 3.0)
    assert paid["days"] == pytest.approx(2000 / 86400) and paid["device_hours"] == pytest.approx(64 * 2000 / 3600)
    assert paid["money"] == pytest.approx(3 * 64 * 2000 / 3600) and paid["most_energy_joules"] == pytest.approx(700 * 64 * 2000)
    assert paid["pd_6nd"] == pytest.approx(6 * one.shape.parameters() * 512 * 4096 * 1000 / 8.64e19)


def test_the_front_is_what_nothing_beats() -> None:
    one = task()
    sizes = [(grid, answers.best_of(grid)) for grid in [sweep(one), *answers.with_devices(one)]]
    points = answers.front(sizes)
    for point in points:
        for grid, _ in sizes:
            if grid.task.devices <= point["devices"]:
                better = grid.fits & grid.is_even & (grid.peak / 2**30 < point["memory_gib"] * (1 - 1e-9)) & (
                    grid.seconds < point["step_seconds"] * (1 - 1e-9))
                assert not better.any()
    assert min(row["step_seconds"] for row in points) <= min(best.seconds for _, best in sizes if best)


ASK = ["search", "--model", "llama-3-8b", "--cluster", "H100-80 devices=64", "--global-batch-tokens", "2097152",
       "--seq-len", "4096"]


def test_the_command_prints_one_document_and_writes_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = [*ASK, "--compare", "--tokens", "1e12", "--price", "2", "--html", str(page), "--json"]
    found = json.loads(CliRunner().invoke(command, arguments, catch_exceptions=False).stdout)
    first = found["layouts"][0]
    assert {"step_seconds", "tokens_per_second_per_device", "mfu", "hfu", "memory_gib", "out_of_memory_probability", "accounts",
            "layout", "book"} <= set(first)
    assert found["configurations"] > found["fitting"] > 0 and found["seconds"] > 0
    assert first["step_seconds"] * first["tokens_per_second_per_device"] * 64 == pytest.approx(2097152)
    assert first["book"]["device_seconds"] == pytest.approx(64 * first["step_seconds"])
    assert len(found["layouts"]) == 5 and found["what_if"] and len(found["worth"]) == 4
    assert found["cost"]["money"] == pytest.approx(2 * found["cost"]["device_hours"])
    text = page.read_text()
    assert "<script" not in text and "Time, memory and devices" in text and "dp_shard=" in text and text.count("<svg") == 2
    said = CliRunner().invoke(command, ASK, catch_exceptions=False)
    assert said.stdout == "" and "From the ideal step" in said.stderr and "twice the network" in said.stderr


@pytest.mark.parametrize(("change", "words"), [
    (["--devices", "0"], "devices"), (["--global-batch-tokens", "2097153"], "nearest is 2097152"),
    (["--recompute", "ful"], "full"), (["--precision", "bf61"], "bf16"), (["--schedule", "1f1b"], "did you mean '1F1B'"),
    (["--program", "megatron_core"], "megatron-core"),
    (["--cluster", "H100-8"], "H100"), (["--model", "llama-3-9b"], "llama-3-8b"), (["--most-oom", "1.5"], "between 0 and 1"),
    (["--tokens", "-1"], "above 0"), (["--model", "llama-3-405b", "--devices", "8"], "it fits on"),
    (["--devices", "61"], "devices have one"), (["--cluster", "A100-80"], "on how many A100-80"),
    (["--devices", "1000000000"], "1,000,000 at most"), (["--global-batch-tokens", str(4096 * 10**12)], "at most"),
    (["--cluster", "H100-80 devices=8 nic_gbps=0"], "nic_gbps=0"), (["--tokens", "1e300"], "tokens = 1e"),
    (["--seq-len", "4095"], "nearest is"), (["--global-batch-tokens", "-4096"], "above 0")])
def test_wrong_input_is_refused_in_a_sentence(change: list[str], words: str) -> None:
    with pytest.raises(AthanorError, match=words) as error:
        CliRunner().invoke(command, [*ASK, *change], catch_exceptions=False)
    assert "\n" not in str(error.value)


def test_what_is_needed_is_enough() -> None:
    one = task(find_shape("llama-3-70b"), 8, 512, 4096, "A100-80")
    grid = sweep(one)
    assert not grid.fits.any() and not finalists(grid)
    said = answers.needed(grid)
    devices = int(said.rsplit("it fits on ")[-1].split()[0])
    assert sweep(replace(one, devices=devices)).fits.any()
    with pytest.raises(UserError, match="nothing fits on 8 A100-80"):
        raise UserError(said)


@pytest.mark.slow
def test_100_000_layouts_of_96_layers_take_seconds() -> None:
    grid = sweep(task(LARGE, 10240, 2560, 8192, "H100-80"))
    assert len(grid) >= 100_000 and grid.took < 6  # 2 s are wanted on a quiet core
    assert sweep(task(LARGE, 100_000, 20_000, 4096, "H100-80")).took < 20


YUAN_LAYOUT = ("tp=8 pp=38 dp_replicate=7 seq_len=2048 global_batch_tokens=6881280 recompute=full sequence_parallel=0 "
               "program=megatron kernel=fused")


def test_yuan_1_is_forecast_within_5_percent_of_what_was_measured() -> None:
    """46.20 s a step in table 5 of Yuan 2.0 (arXiv:2311.15786); no step time of it is among the runs of the fit."""
    shape = find_shape(Path(__file__).parents[2] / "recipes" / "yuan-1.0.toml")
    found = estimate(shape, "A100-80 devices=2128 per_node=8 nic_gbps=50", YUAN_LAYOUT)
    assert found["layout"]["num_microbatches"] == 480
    assert found["step_seconds"] == pytest.approx(46.20, rel=0.05)
    assert found["hfu"] / found["mfu"] == pytest.approx(4 / 3, rel=0.01) and found["hfu"] == pytest.approx(0.445, rel=0.05)
    one = Task(shape, read_cluster_words("A100-80 nic_gbps=50"), 2128, 6881280, 2048, recompute=("full",), program="megatron",
               kernel="fused")
    grid = sweep(one)
    wanted = {"tp": 8, "pp": 38, "dp": 7, "chunks": 1, "cp": 1, "micro_batch_size": 1, "zero": 0, "is_sequence_parallel": 0}
    index = np.flatnonzero(np.logical_and.reduce([grid.columns[name] == value for name, value in wanted.items()]))
    assert len(index) == 1
    as_it_was = refine(grid, int(index[0]))
    assert as_it_was.seconds == pytest.approx(46.20, rel=0.05) and as_it_was.split == (2,) * 38
    assert finalists(grid, count=10)[0].seconds < as_it_was.seconds
    paid = answers.cost(one, 46.20, 180e9, None)
    assert paid["days"] == pytest.approx(14.0, rel=0.005) and paid["pd_6nd"] == pytest.approx(3072, abs=1)
    assert paid["money"] is None
