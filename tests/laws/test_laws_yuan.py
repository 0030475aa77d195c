"""Yuan's published cost model against the tables its authors printed."""

from __future__ import annotations

import math

import pytest

from athanor.foundation.errors import LayoutError
from athanor.laws.yuan import YuanRun, method_1, method_2

A100 = 312e12
NODE = 2 * 195e9 / 8  # 2 x 195 Gb/s in bytes/s
YUAN_1 = YuanRun(accumulation=480, micro_batch_size=1, num_hidden_layers=76, seq_len=2048, hidden_size=16384, vocab_size=53228,
                 pp=38, tp=8, dp=7, flops_per_second=0.554 * A100, network_bytes_per_second=NODE, link_bytes_per_second=520e9)
LINKS = (100e9, 200e9, 400e9)


def yuan_2(devices: int, link: float, *, pp: int, tp: int) -> YuanRun:
    """102B of table 6: 96 or 256 devices of which a link gives 85 % of its rate."""
    return YuanRun(accumulation={96: 384, 256: 144}[devices], micro_batch_size=1, num_hidden_layers=84, seq_len=4096,
                   hidden_size=8192, vocab_size=135040, pp=pp, tp=tp, dp=devices // 32, flops_per_second=0.55 * A100,
                   network_bytes_per_second=NODE, link_bytes_per_second=0.85 * link, has_lfa=True)


def test_yuan_1_takes_what_table_5_says() -> None:
    """36.666, 2.826, 2.643, 2.602 and 0.455 s: 45.192 s predicted and 46.20 s measured. F = 0.554 is rounded, hence 1e-3."""
    terms = method_1(YUAN_1, counts_attention=False)
    assert terms.compute == pytest.approx(36.666, rel=1e-3)
    assert terms.bubble == pytest.approx(2.826, rel=1e-3)
    assert (terms.pipeline, terms.tensor) == (pytest.approx(2.643, abs=5e-4), pytest.approx(2.602, abs=5e-4))
    assert terms.data_parallel == pytest.approx(0.455, abs=5e-4) and terms.optimizer == 0
    assert terms.seconds == pytest.approx(45.192, rel=1e-3)
    assert terms.seconds == pytest.approx(46.20, rel=0.0235), "2.2 % below what was measured, as the paper says"


def test_attention_was_left_out_of_table_5() -> None:
    """With 1 + S/6H = 1 + 1/48 as derived, compute is 37.40 s and the sum nearer to the 46.20 s that were measured."""
    terms, printed = method_1(YUAN_1), method_1(YUAN_1, counts_attention=False)
    assert terms.compute / printed.compute == pytest.approx((1 + 1 / 48) / (1 + 1 / (6 * 16384)))
    assert abs(terms.seconds - 46.20) < abs(printed.seconds - 46.20)


def test_45_percent_counts_recomputation() -> None:
    """The talk's 45 %: T0's share x F/peak = 44.95 %, of 96 = 4/3 x 72 FLOPs; without recomputation three quarters of it."""
    terms = method_1(YUAN_1, counts_attention=False)
    assert terms.compute / terms.seconds * 0.554 == pytest.approx(0.4495, abs=5e-4)
    assert YUAN_1.parameters == pytest.approx(245.73e9, rel=2e-4)


@pytest.mark.parametrize(("devices", "printed"), [(96, (239.06, 238.40, 238.10)), (256, (101.22, 100.92, 100.81))])
def test_method_2_of_table_6(devices: int, printed: tuple[float, ...]) -> None:
    for link, seconds in zip(LINKS, printed, strict=True):
        assert method_2(yuan_2(devices, link, pp=32, tp=1)).seconds == pytest.approx(seconds, rel=8e-4)


@pytest.mark.parametrize(("devices", "printed", "without"), [
    (96, (584.28, 405.45, 316.32), 0.008), (256, (224.10, 156.64, 123.21), 0.027)])
def test_method_1_of_table_6(devices: int, printed: tuple[float, ...], without: float) -> None:
    """0.01 % at 200 and 400 GB/s, 0.3 % at 100 GB/s, where method 2 falls short too.

    Without a sharded optimizer, as the formula of method 1 is printed, it falls short by up to 0.8 and 2.7 %.
    """
    for link, seconds, tolerance in zip(LINKS, printed, (3e-3, 2e-4, 2e-4), strict=True):
        run = yuan_2(devices, link, pp=4, tp=8)
        assert method_1(run, is_link_two_way=True, shards_optimizer=True).seconds == pytest.approx(seconds, rel=tolerance)
        assert -without < method_1(run, is_link_two_way=True).seconds / seconds - 1 < -0.005


def test_terms_add_up_and_vanish_where_nothing_is_exchanged() -> None:
    alone = method_1(YuanRun(**{**vars(YUAN_1), "pp": 1, "tp": 1, "dp": 1}))
    assert (alone.bubble, alone.tensor, alone.optimizer, alone.data_parallel) == (0, 0, 0, 0)
    terms = method_1(YUAN_1)
    assert terms.seconds == pytest.approx(math.fsum(vars(terms).values()))
    with pytest.raises(LayoutError, match="no tensor parallelism, but tp = 8"):
        method_2(YUAN_1)
