"""`requant_eval.render.adapter_tables`: rows, sentences, and reports with nothing to show."""

from __future__ import annotations

from typing import Any

import pytest

from requant_eval.render import adapter_tables
from requant_eval.render.tables import Table


def module(layer: int, leaf: str, snr: float | None, **more: Any) -> dict[str, Any]:
    """One module's result: error of power 1 in an output of power 100."""
    adapted = {} if snr is None else {
        "signal": snr, "signal_to_noise": snr, "retention": 0.9, "output_retention": 0.8, "delta_norm": 2.0,
    }  # fmt: skip
    return {"name": f"model.layers.{layer}.{leaf}", "bits": 4, "loss": 1.0, "relative_error": 0.1, **adapted, **more}


def facts(*modules: dict[str, Any], **quantize: Any) -> dict[str, Any]:
    return {"quantize": {"modules": list(modules), **quantize}}


def test_the_map_is_layers_by_modules() -> None:
    table = adapter_tables.signal_to_noise_table(
        facts(
            module(0, "self_attn.q_proj", 20.0),
            module(0, "mlp.down_proj", 0.5),
            module(10, "self_attn.q_proj", 3.21987),
            module(2, "mlp.down_proj", 1.0),
            module(2, "mlp.up_proj", None),
        )
    )
    assert table.columns == ("layer", "q_proj", "down_proj")
    assert table.rows == (("0", "20 *", "0.5 *"), ("2", "", "1 *"), ("10", "3.22 *", "")), "in the order of the layers"


def test_the_ten_lowest_are_marked() -> None:
    table = adapter_tables.signal_to_noise_table(facts(*(module(i, "q_proj", 1.0 + i) for i in range(12))))
    assert [row[1].endswith(" *") for row in table.rows] == [True] * 10 + [False] * 2


def test_experts_of_a_layer_are_one_cell() -> None:
    found = adapter_tables.cells(
        facts(
            module(3, "mlp.experts.0.up_proj", 4.0),
            module(3, "mlp.experts.1.up_proj", 2.0),
            module(3, "mlp.experts.1.down_proj", None),
        )
    )
    assert [(c.layer, c.module, c.signal_to_noise) for c in found] == [
        (3, "mlp.experts.*.up_proj", 3.0),
        (3, "mlp.experts.*.down_proj", None),
    ]
    assert found[0].retention == pytest.approx(0.8)
    assert found[0].relative_error == pytest.approx(0.1)


def test_names_that_would_be_alike_are_written_out() -> None:
    table = adapter_tables.signal_to_noise_table(facts(module(0, "attn.c_proj", 2.0), module(0, "mlp.c_proj", 3.0)))
    assert table.columns == ("layer", "attn.c_proj", "mlp.c_proj")


def test_the_ten_worst_are_sorted() -> None:
    table = adapter_tables.worst_modules_table(
        facts(*(module(i, "q_proj", 15.0 - i) for i in range(14)), module(20, "q_proj", None))
    )
    assert [row[3] for row in table.rows] == [f"{x:g}" for x in range(2, 12)]
    assert table.rows[0] == ("model.layers.13.q_proj", "80 %", "90 %", "2", "10 %", "4")
    assert table.title.startswith("The 10 modules")


def test_what_is_said_of_the_delta() -> None:
    """Pooled by the delta's size: 0.9 of 4 and 0.5 of 16 are 0.58."""
    told = facts(module(0, "q_proj", 3.0), module(1, "q_proj", 0.5, retention=0.5, delta_norm=4.0))
    assert adapter_tables.delta_retention(told) == pytest.approx((0.9 * 4 + 0.5 * 16) / 20)
    lines = adapter_tables.delta_lines(told)
    assert "1.75 times the power" in lines[0]
    assert "0.5 times in the worst; 1 are below 1" in lines[0]
    assert lines[1].startswith("Of the adapter's delta, 58 % is in the quantized weights")
    predicted = {
        "retention": {"value": 0.61, "se": 0.01, "low": 0.59, "high": 0.63}, "modules": 21, "blocks": ["0", "15"],
        "relative_delta": 0.012,
    }  # fmt: skip
    assert (
        "61.0 % [59.0, 63.0], over 21 modules of layers 0, 15; the delta is 1.2 % of the weights"
        in (adapter_tables.delta_lines(facts(resonance=predicted))[0])
    )


def test_a_report_without_measurements_says_nothing() -> None:
    for empty in ({}, {"quantize": None}, facts(), facts(module(0, "q_proj", None))):
        assert adapter_tables.delta_lines(empty) == []
        assert adapter_tables.signal_to_noise_table(empty).rows == ()
        assert adapter_tables.worst_modules_table(empty).rows == ()
        assert adapter_tables.delta_retention(empty) is None


def test_an_untrained_delta_has_no_share() -> None:
    """signal 0: no retention is defined, the map shows 0."""
    zero = module(0, "q_proj", 0.0, retention=None, output_retention=None, delta_norm=0.0)
    assert adapter_tables.delta_retention(facts(zero)) is None
    assert adapter_tables.cells(facts(zero))[0].retention is None
    assert adapter_tables.signal_to_noise_table(facts(zero)).rows == (("0", "0 *"),)


def test_long_answers_are_cut_and_pipes_are_safe() -> None:
    item = {
        "prompt": "a | b " * 40, "answer": "yes", "given": {"adapter": "yes", "gptq": "no\nnot"},
        "right": {"adapter": True, "gptq": False},
    }  # fmt: skip
    table: Table = adapter_tables.canaries_table({"right": {"adapter": 1, "gptq": 0}, "items": [item]})
    assert table.rows[0][2:] == ("right: yes", "wrong: no not")
    assert len(table.rows[0][0]) == adapter_tables.SHOWN
    assert all(line.count("|") - line.count("\\|") == 5 for line in table.markdown().splitlines()[2:])
