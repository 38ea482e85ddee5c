"""Steps as CUDA graphs: the numbers of launched kernels, resumed too.

Models that cannot be captured run without.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from heal import test_codes
from heal.test_stage import model_of, quantized
from torch.utils._python_dispatch import TorchDispatchMode

from requant.heal import student, teacher
from requant.heal.captured_steps import CapturedSteps, one_sequence_a_window
from requant.heal.end_to_end import EndToEndLoss
from requant.heal.trainer import Trainer
from requant.runtime import cuda_graph

SETTINGS = replace(test_codes.CODES, tune=("scales", "codes", "norms"), steps=6)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return quantized(tmp_path_factory.mktemp("captured"), tie_word_embeddings=True)


def trainer_of(pair: tuple[Path, Path], device: torch.device, *, captured: bool) -> Trainer:
    text = test_codes.sample()
    dtype = teacher.product_dtype(device)
    taught = teacher.ResidentTeacher(model_of(pair[0]).to(device), text.windows, device)
    pupil = student.load(pair[1], device=device, dtype=dtype, tune=SETTINGS.tune, original=pair[0])
    loss = EndToEndLoss(pupil, taught, text, device)
    return Trainer(
        pupil, loss, loss.measure, SETTINGS, train=text.train, choosing=text.choosing, judging=text.judging,
        micro_batch=4, captured=CapturedSteps(loss) if captured else None,
    )  # fmt: skip


def values(trained: Trainer) -> list[torch.Tensor]:
    return [v.offset.detach().cpu() for v in trained.student.trainable]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_numbers_are_those_of_launched_kernels(
    pair: tuple[Path, Path], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU: of a model that cannot be captured, after it has run to find that out."""
    asked: list[str] = []

    class Refuses:
        def __init__(self, function: object, *inputs: torch.Tensor, device: torch.device) -> None:
            asked.append(str(function))
            function(*inputs)  # type: ignore[operator]
            raise RuntimeError("operation not permitted when stream is capturing")

    if device == "cpu":
        monkeypatch.setattr(cuda_graph, "CudaGraph", Refuses)
    found = []
    for captured in (False, True):
        trained = trainer_of(pair, torch.device(device), captured=captured)
        curve = trained.run(None)
        found.append((curve.train, values(trained)))
    assert len(asked) == (2 if device == "cpu" else 0)
    if device == "cuda":
        assert isinstance(trained.captured._gradient, cuda_graph.CudaGraph)  # type: ignore[union-attr]
        assert isinstance(trained.captured._refresh, cuda_graph.CudaGraph)  # type: ignore[union-attr]
    first, tolerance = (0.0, 0.0) if device == "cpu" else (1e-5, 0.02)  # Adam divides by how small gradients are
    (launched, offsets), (replayed, captured_offsets) = found
    assert launched[0] == pytest.approx(replayed[0], rel=first)
    assert launched == pytest.approx(replayed, rel=tolerance)
    if device == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(offsets, captured_offsets, strict=True))


class Waits(TorchDispatchMode):
    """Raises where a value is asked for, for which a program would wait for its device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{func} in a step")
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_its_device(pair: tuple[Path, Path]) -> None:
    trained = trainer_of(pair, torch.device("cpu"), captured=True)
    assert trained.captured
    inputs = trained.captured.loss.inputs(range(4))
    with Waits(), one_sequence_a_window():
        trained.captured._add(16, *inputs)
        trained.student.refresh()
    assert all(bool(v.offset.grad.any()) for v in trained.student.trainable if v.offset.grad is not None)


@pytest.mark.gpu
def test_resumed_steps_end_at_the_same_values(pair: tuple[Path, Path], tmp_path: Path) -> None:
    cuda = torch.device("cuda")
    whole = trainer_of(pair, cuda, captured=True)
    whole.run(tmp_path / "whole", "key")

    def stop(done: int, *_: object) -> None:
        if done == SETTINGS.steps // 2 + 1:
            raise KeyboardInterrupt

    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        trainer_of(pair, cuda, captured=True).run(state, "key", stop)
    resumed = trainer_of(pair, cuda, captured=True)
    resumed.run(state, "key")
    assert resumed.curve.train == whole.curve.train
    assert all(torch.equal(a, b) for a, b in zip(values(resumed), values(whole), strict=True))
