"""Is a GPTQ checkpoint what a server will take it for? Structure, values, our own decoding, a few tokens, real engines.

What is wrong is collected, not raised: a `Verification` says everything that was found, by tensor and reason.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from requant.checkpoint.model_files import write_json
from requant.checkpoint.reader import Checkpoint, read_json
from requant.checkpoint.run_directory import MANIFEST, MARKER
from requant.deploy import check_headers, check_tensors, engine_processes
from requant.deploy.check_headers import Finding
from requant.deploy.engine_processes import Answer, Engine
from requant.deploy.scored_sample import Sample
from requant.errors import InputError, StageError
from requant.evaluate import variants
from requant.formats import gptq as gptq_format
from requant.runtime.device import free_bytes, free_memory
from requant_eval.metrics import engine_step

log = logging.getLogger(__name__)
T = TypeVar("T")
PROMPT, NEW_TOKENS = 8, 8
SPEED = {"prompt": 32, "new": 17, "batch": 1, "repeat": 1}  # what an engine's tokens per second are measured on
SHOWN = 20
RESULTS = {"quantize": "verify-gptq.json", "heal": "verify-healed.json"}  # by the stage that wrote the checkpoint
SAMPLE = """\
The lighthouse keeper wrote the date at the top of the page, as he had done every evening for thirty years, and then sat
for a while without writing anything. Outside, the wind had turned to the north and the rain came in short, hard bursts
against the glass. He counted the seconds between the flashes of his own lamp, out of habit, and found them right. Two
ships had passed since noon: a freighter low in the water, and a small sailing boat that should not have been out in
such weather at all. He had watched the boat until it rounded the point. If the forecast was correct, the storm would be
over by morning, and the supply launch would bring flour, paraffin, letters and, with luck, a new pair of boots.

def count_words(text):
    words = {}
    for word in text.lower().split():
        words[word] = words.get(word, 0) + 1
    return words
"""
"""What engines score when no other text is given: prose and a little code, written for this."""


@dataclass
class Verification:
    """What was checked and what was found; `ok` when nothing is wrong.

    expected_bytes: of all tensors as the config describes them; disk_bytes: of the safetensors files. perplexity: of the
    sample by our own decoding in fp32; sample_set, sample_digest: the evaluation set it is of. skipped: checks that could
    not be made, and why.
    """

    path: Path
    findings: list[Finding] = field(default_factory=list)
    tensors: int = 0
    linears: int = 0
    bits_per_weight: float | None = None
    expected_bytes: int | None = None
    disk_bytes: int | None = None
    negative_scales: int | None = None
    relative_error: float | None = None
    sample_tokens: int = 0
    sample_set: str | None = None
    sample_digest: str | None = None
    perplexity: float | None = None
    generated: list[int] = field(default_factory=list)
    text: str | None = None
    engines: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing wrong was found."""
        return not self.findings

    def facts(self) -> dict[str, Any]:
        """JSON types, without the path."""
        raw = asdict(self)
        del raw["path"]
        return {"ok": self.ok} | raw

    def message(self) -> str:
        """The findings, one a line."""
        more = len(self.findings) - SHOWN
        lines = [f"{self.path}: {len(self.findings)} things are wrong:" if len(self.findings) > 1 else f"{self.path}:"]
        lines += [f"  {finding}" for finding in self.findings[:SHOWN]]
        return "\n".join([*lines, f"  and {more} more"] if more > 0 else lines)


@torch.no_grad()
def verify(
    path: Path, *, source: Path | None = None, text: str | None = None,
    load_in: Sequence[Engine] = (), deploy: Container[str] = (), engine_dtype: str | None = None,
    device: torch.device | None = None, own: torch.device | None = None, trust_remote_code: bool = False,
) -> Verification:  # fmt: skip
    """Check the checkpoint in `path`; what cannot be read at all is a finding too.

    source: the model that was quantized, to compare weights with. text: what is scored; default: for engines the run's
    own documents where the checkpoint is of a run, else a paragraph of ours. load_in: engines that must load it and give
    our perplexity; InputError when one is not installed. deploy: engines that must, if they are installed. engine_dtype:
    theirs; default fp32 for transformers on a CPU, else the checkpoint's own. device: where engines run, the CPU by default.
    own: where we decode and score; default: there too.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such checkpoint directory")
    for engine in load_in:
        engine_processes.require(engine)
    load_in = list(dict.fromkeys([*load_in, *engine_processes.installed(deploy)]))
    done = Verification(path)
    try:
        found = check_headers.inspect(path, trust_remote_code=trust_remote_code)
    except InputError as error:
        done.findings.append(_unreadable(path, error))
        return done
    device = device or torch.device("cpu")
    own = own or device
    seen = _where_it_fits(own, lambda d: check_tensors.check(found, Checkpoint(source) if source else None, d))
    done.findings = [*found.findings, *seen.findings]
    _sizes(done, found, seen)
    if done.findings:
        done.skipped.append("generation and engines: not tried on a checkpoint that is wrong")
        return done
    sample = Sample.kept(path) if load_in and text is None else None
    ours = _where_it_fits(own, lambda d: _run(done, found, sample, text, d, trust_remote_code))
    if ours is not None:
        scored, nll = ours
        for engine in load_in:
            dtype = engine_dtype or _engine_dtype(engine, found.checkpoint, device)
            answer = engine_processes.ask(
                engine, path.absolute(), scored.rows, dtype=dtype, device=str(device), new_tokens=NEW_TOKENS,
                prompt=PROMPT, trust_remote_code=trust_remote_code, speed=SPEED,
            )  # fmt: skip
            _judge(done, answer, nll, scored.documents)
    return done


def demand(done: Verification) -> Verification:
    """The verification itself if it is `ok`; raises StageError with its findings otherwise."""
    if not done.ok:
        raise StageError(done.message())
    return done


def remember(done: Verification) -> Path | None:
    """Keep the result beside a run's checkpoint, for its report; None when `path` is no artifact of a run."""
    run, manifest = done.path.absolute().parent, done.path / MANIFEST
    file = run / f"verify-{done.path.absolute().name}.json"
    if not (run / MARKER).exists() or not manifest.exists() or file.name not in RESULTS.values():
        return None
    write_json(file, {"key": read_json(manifest).get("key")} | done.facts())
    return file


def remembered(run: Path, keys: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Stage -> what `remember` kept of its checkpoint. keys: stage -> the key of the checkpoint that counts."""
    known = {stage: read_json(run / RESULTS[stage]) for stage in keys if (run / RESULTS[stage]).exists()}
    return {
        stage: {k: v for k, v in kept.items() if k != "key"}
        for stage, kept in known.items()
        if kept.get("key") == keys[stage]
    }


def _unreadable(path: Path, error: InputError) -> Finding:
    """A file that cannot be read, as a finding: its name first, without the directory."""
    text = str(error).replace(f"{path}/", "").replace(f"{path}: ", "")
    where, _, reason = text.partition(": ")
    return Finding(where, reason) if reason else Finding("checkpoint", text)


def _sizes(done: Verification, found: check_headers.Structure, seen: check_tensors.Values) -> None:
    checkpoint = found.checkpoint
    done.tensors, done.linears = len(checkpoint), seen.linears
    done.negative_scales, done.relative_error = seen.negative_scales, seen.relative_error
    done.expected_bytes = found.expected_bytes
    done.disk_bytes = sum(f.stat().st_size for f in {info.file for info in checkpoint.values()})
    packed = [f"{stem}.{suffix}" for stem in found.packed for suffix in gptq_format.SUFFIXES]
    if seen.weights:
        done.bits_per_weight = 8 * sum(checkpoint[n].nbytes for n in packed) / seen.weights


def _engine_dtype(engine: Engine, checkpoint: Checkpoint, device: torch.device) -> str:
    """The serving dtype; fp32 for transformers on a CPU, where it is exact and no slower."""
    if engine == "transformers" and device.type == "cpu":
        return "float32"
    declared = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return declared if declared in ("float16", "bfloat16") else "bfloat16"


def _run(
    done: Verification, found: check_headers.Structure, sample: Sample | None, text: str | None, device: torch.device,
    trust: bool,
) -> tuple[Sample, list[list[float]]] | None:  # fmt: skip
    """Generate and score with our own decoding in fp32; (the sample, -ln p of its tokens), or None where it cannot be."""
    path = found.checkpoint.path
    need = 4 * sum(p.numel() for p in found.model.parameters())
    room = _free(device)
    if need > room and device.type == "cuda":
        device = torch.device("cpu")
        room = _free(device)
    if need > room:
        done.skipped.append(
            f"generation and engines: fp32 weights are {need / 1e9:.1f} GB, {room / 1e9:.1f} GB are free"
        )
        return None
    tokenizer: Any = _tokenizer(path, trust)
    longest = (getattr(found.model.config.get_text_config(), "max_position_embeddings", None) or 512) - NEW_TOKENS  # type: ignore
    if sample is None:
        sample = Sample((tuple(tokenizer(text or SAMPLE)["input_ids"][: min(longest, 512)]),), (0,))
    rows = [row[:longest] for row in sample.rows]
    places = variants.Places(path, path, path, path, None, {}, trust_remote_code=trust)
    model = variants.quantized(path, places, device, torch.float32)
    nll, finite = _score(model, rows, device)
    done.sample_tokens, done.sample_set, done.sample_digest = sum(map(len, nll)), sample.set, sample.digest
    if finite:
        done.perplexity = engine_processes.perplexity(nll)
        done.generated = _generate(model, rows[0][:PROMPT], device)
        done.text = tokenizer.decode(done.generated) if tokenizer is not None else None
    else:
        done.findings.append(Finding("model", "its logits hold NaN or infinity on the sample"))
    del model
    free_memory(device)
    return (replace(sample, rows=tuple(rows)), nll) if finite else None


def _where_it_fits(device: torch.device, work: Callable[[torch.device], T]) -> T:
    """What `work` gives on `device`, or on the CPU where memory runs out there."""
    if device.type == "cuda":
        try:
            return work(device)
        except torch.OutOfMemoryError:
            pass  # outside of the handler: the failed work's memory goes with its frames
        free_memory(device)
    return work(torch.device("cpu"))


def _free(device: torch.device) -> float:
    """Bytes that a model may take."""
    if device.type == "cuda":
        free_memory(device)
        return 0.9 * free_bytes(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next(0.9 * 1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _tokenizer(path: Path, trust: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust)


def _score(model: Any, rows: Sequence[Sequence[int]], device: torch.device) -> tuple[list[list[float]], bool]:
    """-ln p of every token after the first, row by row, and whether all logits are finite."""
    out: list[list[float]] = []
    for row in rows:
        ids = torch.tensor([list(row)], device=device)
        logits = model(input_ids=ids).logits[0, :-1].float()
        if not torch.isfinite(logits).all():
            return out, False
        out.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist())
    return out, True


def _generate(model: Any, prompt: Sequence[int], device: torch.device) -> list[int]:
    ids = torch.tensor([list(prompt)], device=device)
    made: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    new: list[int] = made[0, ids.shape[1] :].tolist()
    return new


def _judge(done: Verification, answer: Answer, ours: Sequence[Sequence[float]], documents: Sequence[int]) -> None:
    """Add one engine's row, and a finding when it refused the checkpoint or reads other numbers from it."""
    row: dict[str, Any] = {
        "engine": answer.engine, "dtype": answer.dtype, "device": answer.device, "kernels": list(answer.kernels),
        "versions": dict(answer.versions), "load_seconds": answer.load_seconds, "error": answer.error,
        "tolerance": engine_processes.TOLERANCE[answer.dtype], "perplexity": None, "difference": None, "same_tokens": None,
        "tokens_per_second": None,
    }  # fmt: skip
    if answer.error is not None:
        done.findings.append(Finding(answer.engine, f"does not load it: {answer.error}"))
    else:
        row |= engine_step.step(answer.nll, ours, documents)
        row["difference"] = answer.difference(ours)
        row["perplexity"] = engine_processes.perplexity(answer.nll)
        row["same_tokens"] = list(answer.generated) == done.generated
        row["tokens_per_second"] = (answer.speed or {}).get("decode_tokens_per_second")
        if not answer.agrees(ours):
            reason = f"its mean -ln p is {row['difference']:+.4g} from ours, {row['tolerance']:g} is its rounding"
            done.findings.append(Finding(answer.engine, f"reads other weights ({', '.join(answer.kernels)}): {reason}"))
    row["ok"] = answer.agrees(ours)
    done.engines.append(row)
