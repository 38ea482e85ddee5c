"""Tests of `requant.run.stage_results`: what is stored has the keys that the types promise."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from requant.deploy.verification import FindingFacts, Verification, VerificationFacts
from requant.evaluate.adapter_probe import Probe, ProbeFacts
from requant.formats.quantized_format import Finding
from requant.heal.settings import HealSettings, HealSettingsFacts
from requant.merge.adapter_match import Sign, SignFacts
from requant.merge.base_weights import Nf4Settings
from requant.merge.selftest import SelfTest, SelfTestFacts
from requant.merge.stage import MergeResult
from requant.quantize.module_results import ModuleResult, ModuleRow
from requant.run.base_facts import Nf4Facts
from requant.run.check.delta_prediction import Prediction
from requant.run.stage_results import EstimateFacts, MergeFacts, PredictionFacts, SuggestedUnit
from requant.run.suggest import Candidate
from requant_eval.metrics.statistics import Estimate


@pytest.mark.parametrize(
    ("made", "stored", "added", "removed"),
    [
        (Finding, FindingFacts, set(), set()),
        (Verification, VerificationFacts, {"ok"}, {"path"}),
        (Probe, ProbeFacts, set(), set()),
        (HealSettings, HealSettingsFacts, set(), set()),
        (Sign, SignFacts, set(), set()),
        (Nf4Settings, Nf4Facts, set(), set()),
        (SelfTest, SelfTestFacts, set(), set()),
        (MergeResult, MergeFacts, {"selftest"}, set()),
        (ModuleResult, ModuleRow, set(), set()),
        (Prediction, PredictionFacts, set(), set()),
        (Estimate, EstimateFacts, set(), set()),
        (Candidate, SuggestedUnit, {"from_bits", "gain", "helps"}, {"grid"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_stored_dataclass_has_the_keys_of_its_type(
    made: Any, stored: Any, added: set[str], removed: set[str]
) -> None:
    assert stored.__annotations__.keys() == {f.name for f in fields(made)} - removed | added
