"""Stage verify: headers, values, our own scores, a few tokens, real engines.

What is wrong is collected, not raised: a `Verification` lists all findings, by tensor and reason.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from requant.checkpoint.artifact import UNDO, changed_files
from requant.checkpoint.pieces import PiecewiseCheckpoint
from requant.checkpoint.reader import Checkpoint
from requant.deploy import check_headers, check_tensors, engine_processes
from requant.deploy.check_headers import HeaderCheck
from requant.deploy.check_tensors import TensorCheck
from requant.deploy.engine_processes import Engine
from requant.deploy.own_scores import NEW_TOKENS, PROMPT, score_checkpoint
from requant.deploy.scored_sample import Sample
from requant.deploy.verification import EngineResult, Verification
from requant.errors import InputError
from requant.formats.auto_round import METHOD as AUTO_ROUND
from requant.formats.quantized_format import Finding
from requant.modeling.stacked_experts import stored_pieces
from requant.quantize.module_results import ModuleRow
from requant.runtime.device import free_memory
from requant.runtime.ranks import SINGLE_PROCESS, Ranks
from requant_eval.metrics import engine_step

T = TypeVar("T")
SPEED = {"prompt": 32, "new": 17, "batch": 1, "repeat": 1}  # what an engine's tokens per second are measured on


@torch.no_grad()
def verify(
    path: str | Path,
    *,
    source: str | Path | None = None,
    solved: Mapping[str, ModuleRow] | None = None,
    text: str | None = None,
    load_in: Sequence[Engine] = (),
    deploy: Container[str] = (),
    engine_dtype: str | None = None,
    device: torch.device | None = None,
    own_device: torch.device | None = None,
    trust_remote_code: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
    doing: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Check the checkpoint in `path`; a file that cannot be read is a finding too.

    source: the model that was quantized, to compare weights with. solved: stem of a linear -> its solution's result.
    text: what is scored; default: for engines the run's own documents, if the checkpoint is of a run, else a paragraph.
    load_in: engines that must load it and give our perplexity; InputError when one is not installed.
    deploy: engines that must, if they are installed. doing: receives what is done now, in words.
    engine_dtype: of the engines; default: fp32 for transformers on a CPU, else the checkpoint's. ranks: share values.
    device: where engines run, default the CPU. own_device: where we decode and score, default `device`.
    """
    if not (path := Path(path)).is_dir():
        raise InputError(f"{path}: no such checkpoint directory")
    engines = _engines(load_in, deploy)
    done, device, original = Verification(path=path), device or torch.device("cpu"), _in_16_bit(source)
    doing("content of the files, names, shapes and configs")
    try:
        headers = check_headers.check(path, trust_remote_code=trust_remote_code)
    except InputError as error:
        done.findings += [_unreadable(path, error), *changed(path)]
        return done
    doing(f"values of {len(headers.packed)} linears" + (", each against its source" if original else ""))
    values = partial(check_share, path, source, own_device or device, solved, trust_remote_code=trust_remote_code)
    _record_checks(done, headers, ranks.call(values, first_rank_only={"headers": headers}), original)
    if done.findings:
        done.skipped.append("generation and engines: not tried on a checkpoint that is wrong")
        return done
    doing("perplexity and a few tokens, our decoding")
    own_text = Sample.load(path) if engines and text is None else None
    score = partial(score_checkpoint, done, headers, sample=own_text, text=text, trust_remote_code=trust_remote_code)
    scored = _scored(done, own_device or device, lambda d: score(device=d))
    if scored is not None:
        for engine in engines:
            doing(f"loading it in {engine}, which scores the same tokens")
            dtype = engine_dtype or serving_dtype(engine, headers.checkpoint, device)
            ask_engine(done, engine, *scored, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return done


def _engines(load_in: Sequence[Engine], deploy: Container[str]) -> list[Engine]:
    """The engines that are asked; InputError where one that must load it is not installed."""
    for engine in load_in:
        engine_processes.require(engine)
    return list(dict.fromkeys([*load_in, *engine_processes.installed(deploy)]))


def _scored(done: Verification, device: torch.device, score: Callable[[torch.device], T]) -> T | None:
    """What `score` gives on `device`, or on the CPU; None, and a finding, for a file that cannot be read."""
    try:
        return _with_cpu_fallback(device, score)
    except InputError as error:
        done.findings.append(_unreadable(done.path, error))
        return None


def changed(path: Path) -> list[Finding]:
    """The files that are not as their manifest says, as findings."""
    return [Finding(name, f"{reason}: {UNDO}") for name, reason in changed_files(path).items()]


def _unreadable(path: Path, error: InputError) -> Finding:
    """A file that cannot be read, as a finding: its name first, without the directory."""
    text = str(error).replace(f"{path}/", "").replace(f"{path}: ", "")
    where, _, reason = text.partition(": ")
    return Finding(where, reason) if reason else Finding("checkpoint", text)


def _in_16_bit(source: str | Path | None) -> Checkpoint | None:
    """The model that was quantized, if it is given; InputError for one that is quantized itself."""
    checkpoint = Checkpoint(Path(source)) if source is not None else None
    if checkpoint and checkpoint.quantization:
        raise InputError(f"{source}: is quantized itself: compare with the 16-bit model that was quantized")
    return checkpoint


@torch.no_grad()
def check_share(
    path: Path,
    source: str | Path | None,
    device: torch.device,
    solved: Mapping[str, ModuleRow] | None,
    *,
    trust_remote_code: bool,
    headers: HeaderCheck | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> list[TensorCheck]:
    """Decode this rank's share of the linears, compare it with solutions and source; the shares of all ranks.

    headers: on the first rank, which has checked them.
    """
    checked = headers or check_headers.check(path, trust_remote_code=trust_remote_code)
    original = _in_16_bit(source)
    pieces = None if original is None else PiecewiseCheckpoint(original, stored_pieces(checked.model, original))
    own = _with_cpu_fallback(
        ranks.device_of(device),
        lambda d: check_tensors.check_share(checked, pieces, d, solved=solved, rank=ranks.rank, count=ranks.count),
    )
    return ranks.all_gather_objects(own)


def _record_checks(
    done: Verification, headers: HeaderCheck, shares: Sequence[TensorCheck], source: Checkpoint | None
) -> None:
    """Copy findings and sizes of files, headers and tensors into `done`. source: what these were compared with."""
    tensors = check_tensors.joined(shares, headers, source)
    done.findings = [*headers.findings, *tensors.findings, *changed(done.path)]
    checkpoint = headers.checkpoint
    done.tensors, done.linears = len(checkpoint), tensors.linears
    done.negative_scales, done.relative_error = tensors.negative_scales, tensors.relative_error
    done.expected_bytes = headers.expected_bytes
    done.carried = headers.unplaced.counts
    if done.carried and source is None:
        held = headers.unplaced.carried_line
        done.skipped.append(f"comparison of tensors that only servers run: accepted by their names, no source: {held}")
    done.disk_bytes = sum(f.stat().st_size for f in {info.file for info in checkpoint.values()})
    if tensors.weights:
        done.bits_per_weight = 8 * sum(checkpoint[n].nbytes for n in headers.packed_names) / tensors.weights


def serving_dtype(engine: Engine, checkpoint: Checkpoint, device: torch.device) -> str:
    """The serving dtype; fp32 for MLX, and transformers on a CPU, where it is exact, unless AutoRound has none."""
    on_cpu = engine == "transformers" and device.type == "cpu"
    if engine == "mlx" or (on_cpu and checkpoint.quantization.get("quant_method") != AUTO_ROUND):
        return "float32"
    declared = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return declared if declared in ("float16", "bfloat16") else "bfloat16"


def _with_cpu_fallback(device: torch.device, work: Callable[[torch.device], T]) -> T:
    """The result of `work` on `device`, or on the CPU when the device runs out of memory."""
    if device.type == "cuda":
        try:
            return work(device)
        except torch.OutOfMemoryError:
            pass  # outside of the handler: the failed work's memory goes with its frames
        free_memory(device)
    return work(torch.device("cpu"))


def ask_engine(
    done: Verification,
    engine: Engine,
    sample: Sample,
    ours: Sequence[Sequence[float]],
    *,
    dtype: str,
    device: torch.device,
    trust_remote_code: bool,
) -> None:
    """Load the checkpoint, score and generate in one engine; append the result to `done`.

    Adds a finding when the engine refuses the checkpoint or scores it differently.
    """
    answer = engine_processes.ask(
        engine,
        done.path.absolute(),
        sample.rows,
        dtype=dtype,
        device=str(device),
        new_tokens=NEW_TOKENS,
        prompt=PROMPT,
        trust_remote_code=trust_remote_code,
        speed=SPEED,
    )
    result = _unscored(answer)
    if answer.error is not None:
        done.findings.append(Finding(answer.engine, f"does not load it: {answer.error}"))
    else:
        result.update(engine_step.step(answer.nll, ours, sample.documents))  # type: ignore[typeddict-item]
        result["difference"] = answer.difference(ours)
        result["perplexity"] = engine_processes.perplexity(answer.nll)
        result["same_tokens"] = list(answer.generated) == done.generated
        result["tokens_per_second"] = (answer.speed or {}).get("decode_tokens_per_second")
        if not answer.agrees(ours):
            reason = f"its mean -ln p is {result['difference']:+.4g} from ours, {result['tolerance']:g} is its rounding"
            done.findings.append(Finding(answer.engine, f"reads other weights ({', '.join(answer.kernels)}): {reason}"))
    result["ok"] = answer.agrees(ours)
    done.engines.append(result)


def _unscored(answer: engine_processes.Answer) -> EngineResult:
    """One engine's row before its scores are compared."""
    return {
        "engine": answer.engine,
        "dtype": answer.dtype,
        "device": answer.device,
        "kernels": list(answer.kernels),
        "versions": dict(answer.versions),
        "load_seconds": answer.load_seconds,
        "error": answer.error,
        "tolerance": answer.tolerance,
        "perplexity": None,
        "difference": None,
        "same_tokens": None,
        "tokens_per_second": None,
    }
