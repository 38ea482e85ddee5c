"""Starter recipe for an adapter (`requant init`), filled in from what its files record.

Reads small JSON files and no weights.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from requant.errors import InputError
from requant.recipe import adapter_record
from requant.recipe.adapter_record import BASE_CONFIG, BaseRecord
from requant_eval.escaping import one_line

FOUR_BIT_NAME = re.compile(r"bnb-?4-?bit|(?<![a-z])nf4|(?<![a-z0-9])4-?bit", re.IGNORECASE)
DECODED = ("mxfp4", "fp8", "fbgemm_fp8", "compressed-tensors")
"""quant_method of bases that a merge decodes. As `merge.base_checkpoint.FORMATS`, which would load torch."""
_FOUR_BIT = "bitsandbytes"
_FOUR_BIT_SUFFIX = re.compile(r"-(unsloth-)?bnb-4bit$", re.IGNORECASE)
GROUPS = (128, 64, 32)
SCHEMA_FILE = "requant.schema.json"
EDITOR_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}\n"
"""What tells editors of a schema beside the recipe; without that file they report an error, so it is left out."""
LENGTH = 2048  # tokens of a window, by default
Widths = Callable[[Path], Collection[int]]
"""Directory with config.json -> the inputs of the linears to quantize; none if they cannot be known."""
Positions = Callable[[Path], int | None]
"""Directory with config.json -> how many positions the model has; None if it has no limit or none is known."""


def _unknown(directory: Path) -> Collection[int]:
    return ()


def _no_limit(directory: Path) -> int | None:
    return None


def starter(
    adapter: str | Path,
    *,
    directory: str | Path = ".",
    widths: Widths = _unknown,
    positions: Positions = _no_limit,
    for_editors: bool = False,
) -> str:
    """A commented YAML recipe for a PEFT adapter.

    Args:
        adapter: directory (as seen from the current directory) or hub id.
        directory: where the recipe will be saved; local paths in it are written as seen from there.
        widths: finds the inputs that `group_size` must divide.
        positions: finds how many positions the base has, beyond which no window goes.
        for_editors: the schema will lie beside the recipe, whose first line names it.

    Raises:
        InputError: no readable adapter_config.json, no base model in it, or a base to refuse.
    """
    adapter, directory = str(adapter), Path(directory)
    file, config = adapter_record.read_adapter_config(adapter)
    base = adapter_record.read_base(file, config)
    section = _base_section(base, directory)
    if adapter_record.lacks_tokenizer(adapter, base):
        section += "  # FIXME: no tokenizer files beside this model or the adapter: copy those of training into one\n"
    size, why = _group_size(widths(base.directory) if base.directory else ())
    most = positions(base.directory) if base.directory else None
    short = most is not None and 2 <= most < LENGTH
    return _TEMPLATE.format(
        editor=EDITOR_LINE if for_editors else "",
        length=f"{most if short else LENGTH:<4}",
        positions=f"; the base has {most:,} positions" if short else "",
        summary=_summary(config),
        name=f"{_slug(adapter)}-w4{f'g{size}' if size > 0 else ''}",
        base=section,
        adapter=_quoted(_as_path(adapter, directory)),
        group=f"{size:<4}",
        why=why,
    )


def _group_size(widths: Collection[int]) -> tuple[int, str]:
    """(the largest group that divides every width, the comment's end); -1, the row, if none does."""
    if not widths:
        return GROUPS[0], "must divide the base's widths (not known here)"
    size = next((g for g in GROUPS if not any(width % g for width in widths)), -1)
    if size == GROUPS[0]:
        return size, "smaller is better and larger on disk"
    return size, f"128 does not divide the base's {min(w for w in widths if w % GROUPS[0]):,} inputs"


def _base_section(base: BaseRecord, directory: Path) -> str:
    """The lines under `base:`."""
    shown = _as_path(base.model, directory)
    lines = [f"  model: {_quoted(shown)}"]
    if not base.local and _is_path(shown):
        lines[0] += "   # FIXME: not found here (another machine's path?): write a directory or hub id"
    if base.why_no_model:
        lines.append(f"  # FIXME: {one_line(base.why_no_model)}")
    if base.revision is not None:
        lines.append(f"  revision: {_quoted(base.revision)}   # the revision recorded in the adapter")
    if base.dropped is not None:
        lines.append(f"  # revision: {one_line(base.dropped)}")
    quantized = _quantized(base.directory / BASE_CONFIG) if base.directory else None
    if quantized is None and not base.directory and FOUR_BIT_NAME.search(Path(base.model).name):
        quantized = _FOUR_BIT
    nf4 = _ON_THE_FLY if quantized is None else _DECODED.format(method=quantized)
    return "\n".join(lines) + "\n" + (_pre_quantized(base.model) if quantized == _FOUR_BIT else nf4)


def _quantized(file: Path) -> str | None:
    """The `quant_method` of a base's config.json, None of a 16-bit one; refuses those that are not read."""
    config = adapter_record.read_object(file, "download the file again")
    sections = [s for s in (config, config.get("text_config")) if isinstance(s, dict)]
    found = (s["quantization_config"] for s in sections if s.get("quantization_config") is not None)
    quantization: Any = next(found, {})
    if not isinstance(quantization, dict):
        raise InputError(
            f"{file}: quantization_config is {quantization!r:.80}, expected an object: download the file again"
        )
    if not quantization:
        return None
    method = quantization.get("quant_method")
    if method in DECODED:
        return str(method)
    if method not in (None, _FOUR_BIT):
        raise InputError(
            f"{file}: quantization_config.quant_method is {method!r}: expected bitsandbytes 4-bit, MXFP4, FP8 or a "
            "16-bit model: use the model that the adapter was trained on"
        )
    if quantization.get("load_in_4bit"):
        return _FOUR_BIT
    raise InputError(
        f"{file}: quantization_config has no load_in_4bit: true: 8-bit (LLM.int8) bases are not supported: "
        "use a 4-bit or a 16-bit model"
    )


def _pre_quantized(model: str) -> str:
    sixteen_bit = _FOUR_BIT_SUFFIX.sub("", model)
    guess = sixteen_bit if sixteen_bit != model else "owner/name"
    return _PRE_QUANTIZED.format(guess=_quoted(guess))


def _summary(config: dict[str, Any]) -> str:
    """One line on the adapter, of what its configuration has."""
    facts = [str(config.get("peft_type") or "adapter")]
    facts += [f"{label} {config[key]}" for key, label in (("r", "r"), ("lora_alpha", "alpha")) if key in config]
    facts += [label for key, label in (("use_dora", "DoRA"), ("use_rslora", "rsLoRA")) if config.get(key) is True]
    targets = config.get("target_modules")
    names = sorted(map(str, targets)) if isinstance(targets, list) else [str(targets)] if targets else []
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    line = ", ".join(facts) + (f" on {shown}" if shown else "")
    return one_line(line)


def _is_path(text: str) -> bool:
    return text.startswith(("./", "../", "/", "~"))


def _as_path(text: str, directory: Path) -> str:
    """A hub id unchanged, a path as seen from `directory`, with a prefix that marks it as one."""
    if not _is_path(text) and text not in (".", ".."):
        if adapter_record.is_hub_id(text) and not os.path.exists(text):
            return text
        text = f"./{text}"
    if text.startswith(("/", "~")) or not os.path.exists(text) or os.path.samefile(directory, "."):
        return text
    seen = os.path.relpath(text, directory)
    return seen if seen.startswith("..") else f"./{seen}"


def _slug(adapter: str) -> str:
    name = Path(os.path.expanduser(adapter)).absolute().name if adapter.strip("./") == "" else Path(adapter).name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "adapter"


def _quoted(text: str) -> str:
    """The text unquoted where YAML reads it back unchanged, else in double quotes."""
    if re.fullmatch(r"[./~]*[A-Za-z][\w./-]*/[\w./-]*[A-Za-z][\w.-]*", text, re.ASCII):
        return text
    if text.isprintable():
        return json.dumps(text, ensure_ascii=False)
    escaped = text.encode("unicode_escape").decode("ascii").replace('"', '\\"')
    return f'"{escaped}"'


_ON_THE_FLY = """\
  # adapter_config.json does not record how the base was quantized while training. These are the usual
  # QLoRA settings: compare them with the BitsAndBytesConfig of your training script. If the base was a
  # pre-quantized 4-bit checkpoint, write that as model and nf4: auto. If it was trained in 16 bit, without
  # a BitsAndBytesConfig (plain LoRA), write nf4: none in place of the section.
  nf4:                      # FIXME: as your BitsAndBytesConfig says; none (nf4: none) if training used none
    quant_type: nf4         # nf4 | fp4; bnb_4bit_quant_type (transformers' own default is fp4)
    double_quant: true      # bool; bnb_4bit_use_double_quant (transformers' own default is false)
    blocksize: 64           # 32 ... 4096, default 64; bitsandbytes' default too
    load_dtype: bfloat16    # float16 | bfloat16 | float32, default bfloat16; dtype it was loaded in
    # compute_dtype: bfloat16   # float16 | bfloat16 | float32, default load_dtype; bnb_4bit_compute_dtype
    transformers: 5         # 4 | 5, default 5; major version in training: 4 quantized single experts of MoE models too
    skip: []                # names, default []; llm_int8_skip_modules as given; a list must name lm_head too
"""

_DECODED = """\
  nf4: none                 # none | a section; none: {method} on disk, decoded to 16 bit as in training
"""

_PRE_QUANTIZED = """\
  nf4: auto                 # auto | none | a section; auto: read from the 4-bit checkpoint itself
  # original: {guess}       # 16-bit model behind it; needed for merge.onto: original and the variant original
"""

_TEMPLATE = """\
{editor}# `requant check recipe.yaml` says what is wrong before anything is computed. Paths are relative to this file.
# The adapter: {summary}
version: 1
name: {name}     # names the run directory
base:                       # the model that the adapter was trained on
{base}adapter: {adapter}
# adapters: [{{path: ./a, weight: 1.0}}, {{path: ./b, weight: 0.5}}]   # instead of adapter: LoRA deltas added up
# adapter: {{path: ./a, expert_order: auto}}   # auto | unsloth | peft: of lora_B on stacked experts

merge:
  onto: dequantized         # dequantized | original | auto (measured), default dequantized; what training saw: exact
  dtype: auto               # auto | float16 | bfloat16 | float32, default auto; the base's own
  max_shard: 5GB            # size, default 5GB; largest file of the merged checkpoint

quantize:
  bits: 4                   # 2 | 3 | 4 | 8, default 4; vLLM and SGLang load 4 and 8
  # budget: 3.5             # in place of bits: their mean over all weights, spent where measured losses are largest
  group_size: {group}          # 32 | 64 | 128 | -1, default 128; {why}
  symmetric: true           # bool, default true; vLLM and SGLang refuse false
  signed_scales: false      # bool, default false; a little better, not proven in vLLM's GPU kernels
  scale_search: hessian     # hessian | minmax, default hessian; minmax is the classic, and worse
  order: auto               # auto | natural | activation | group, default auto; the file does not show it
  correct: 0.5              # share of earlier layers' error that each layer makes up for, default 0.5; 0 is none
  sweeps: 2                 # passes of coordinate descent over the codes, default 2; 0 is plain GPTQ
  damp: auto                # auto | 0 < number < 1, default auto; raise it if a factorization fails
  dtype: auto               # auto | float16 | bfloat16, default auto; what the server will run in
  # embeddings: 8           # 8 | 4, in formats that hold them; head likewise
  experts: auto             # auto | quantize | skip, default auto; skip is 16 bit, auto asks which servers there are
  overrides: {{}}             # pattern -> settings, such as "*.down_proj": {{bits: 8}}; default none
  engine: requant           # requant (ours, the default) | gptqmodel, for what ours does not do

calibration:                # half what the model will do, half general text: keeps both
  mix:
    - data:
        path: ./train.jsonl # FIXME: text the adapter was trained on: txt, jsonl, json, csv or parquet
      format: auto          # auto | text | chat | completion, default auto; read off the columns
      share: 1.0            # number > 0, default 1.0; weight among the entries
    - data:
        dataset: Salesforce/wikitext
        config: wikitext-2-raw-v1
        split: train        # text, default train
      format: text
      share: 1.0
  samples: 128              # count, default 128; more is a little better and slower
  length: {length}              # tokens, default 2048{positions}
  seed: 0                   # count, default 0

evaluate:
  protocol: documents       # documents | gptq-2048 | llamacpp-512, default documents; the others match papers
  window: {length}              # tokens, default 2048{positions}
  sets:                     # the first one is where retention of the fine-tune is computed (in_domain)
    - name: in-domain
      data:
        path: ./heldout.jsonl   # FIXME: text of the same kind that was not trained on
      format: auto
      score: all            # all | completion, default all; completion: score answers only, not prompts
    - name: general
      data:
        dataset: Salesforce/wikitext
        config: wikitext-2-raw-v1
        split: test
      format: text
      tokens: 100000        # count, default all; enough for a narrow interval
  variants: [base, adapter, merged, rtn, gptq]   # also original; adapter is the reference
  kl: true                  # bool, default true; KL divergence from the reference
  batch: auto               # auto | count, default auto; changes no result
  stream: auto              # auto | always | never, default auto: block by block what does not fit on the device
  dtype: auto               # auto | float32 | bfloat16 | float16, default auto
  # tasks: [gsm8k, ./tasks/mine.yaml]   # default none; tasks of lm-evaluation-harness, by name or from a file
  # roads: [rtn, nf4-merge, nf4-again, gptqmodel]   # default none; other ways to ship, scored beside yours
  # task_variants: auto     # auto | names, default auto; adapter, merged and what ships
  # task_backend: transformers   # transformers | vllm, default transformers; vllm: merged and GPTQ as it runs them
  # answers: {{prompts: 20, new_tokens: auto}}   # of in-domain rows, side by side; plain text: begin: 32

# deploy: [vllm]            # default none; servers that must load the result: vllm, sglang, transformers
# heal: auto                # auto | off | {{steps: 300, ...}}: distil scales and codes after quantizing; auto: on a GPU
#                           # {{tune: [scales, codes], steps: 300}}: the codes too; 16 bytes of memory a weight
# chat_date: 2024-07-26    # default 2024-07-26; the day that chat templates write as today's
# canaries: ./canaries.jsonl  # default none; lines of prompt and answer, asked of adapter, merged and quantized
gates:                      # default none; `requant run` ends with exit code 3 or 4 unless the 95 % intervals keep all
  - {{metric: ppl_increase, set: in-domain, max: 5%}}   # also perplexity, kl, right_to_wrong, retention, agreement
  - {{metric: ppl_increase, set: general, max: 10%}}
  # - {{metric: ppl_increase, set: in-domain, max: 50%, relative_to: rtn}}   # half of what rounding to nearest costs
  # - {{metric: task, task: gsm8k, max_drop: 2 points}}   # of evaluate.tasks: points below the reference, at most

output:
  dir: runs                 # directory, default runs; relative to where requant is started
  keep: [merged, gptq]      # default both; [gptq] saves the disk space of the 16-bit model
  # track: [wandb]          # default none; wandb, mlflow, trackio, tensorboard: get the report's numbers and page
  # formats: [gptq, compressed-tensors]   # default [gptq]; also auto-round, gguf: the same codes, a directory each

device: auto                # auto | cpu | cuda | cuda:N, default auto
trust_remote_code: false    # bool, default false; runs Python from the model repository
"""
