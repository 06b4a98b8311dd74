"""bench.network: what the model of bench.scaling says of a network, and the table of both. Ranks on slow networks: tests/runs/test_network.py."""

import os
from pathlib import Path

import pytest

from bench import machines, network
from bench.flops import Shape
from bench.machines import Network
from bench.network import Measured

SHAPE = Shape(layers=6, hidden=384, intermediate=1536, vocabulary=30522)
SECONDS = {"none": [1.0, 3.0, 1.5], "no": [6.0, 7.0, 8.0], "bf16": [3.5], "alone": [7.0]}


def measured(**settings: float) -> Measured:
    return Measured(network=Network(**settings), seconds=SECONDS)


def test_two_ranks_send_all_weights_once() -> None:
    slow = measured(mbit=100)
    alone = slow.predicted("alone", SHAPE)
    assert alone is not None and alone == pytest.approx(SHAPE.weights * 4 / 12.5e6)
    step, rounded = slow.predicted("no", SHAPE), slow.predicted("bf16", SHAPE)
    # The embeddings' gradient comes last; the rest overlaps with the backward pass, 2/3 of 1.5 s.
    assert step == pytest.approx(1.5 + alone - 1.0) and rounded == pytest.approx(0.5 + alone / 2)
    assert measured(mbit=200).predicted("no", SHAPE) == pytest.approx(rounded)


def test_without_a_rate_or_with_loss_nothing_is_computed() -> None:
    for other in (measured(), measured(delay_ms=1, loss=0.01), measured(mbit=100, loss=0.01)):
        assert [other.predicted(way, SHAPE) for way in ("alone", "no", "bf16")] == [None] * 3


def test_table_has_medians_the_share_and_the_gain() -> None:
    head, _, line, lossy = network.table(
        [measured(mbit=100), measured(delay_ms=1, loss=0.01)], SHAPE
    ).splitlines()
    assert "computed" in head
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        *("100 Mbit/s", "7.00", "7.27", "1.50 (1.00-3.00)", "7.00 (6.00-8.00)", "7.77"),
        *("79%", "3.50", "4.13", "2.00"),
    ]
    assert lossy.startswith("| 1 ms, 1% loss | 7.00 |  |")


def test_without_root_and_without_a_model_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert network.main(["--model_name_or_path", str(tmp_path)]) == 1
    assert "expected a BERT's folder" in capsys.readouterr().err
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(network.BenchError, match="need root"), machines.two_machines():
        pass
