"""Starter recipe for an adapter (`requant init`), filled in from adapter_config.json.

Reads two small JSON files and no weights.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from requant.errors import InputError

_FOUR_BIT_NAME = re.compile(r"bnb-?4-?bit|(?<![a-z])nf4|(?<![a-z0-9])4-?bit", re.IGNORECASE)
_FOUR_BIT_SUFFIX = re.compile(r"-(unsloth-)?bnb-4bit$", re.IGNORECASE)
_CONFIG = "adapter_config.json"


def starter(adapter: str) -> str:
    """A commented YAML recipe for a PEFT adapter, to be saved in the current directory.

    Args:
        adapter: directory (as seen from the current directory) or hub id.

    Raises:
        InputError: no readable adapter_config.json, no base model in it, or a base to refuse.
    """
    config_file = _config_file(adapter)
    config = _json_object(config_file)
    model = config.get("base_model_name_or_path")
    if not isinstance(model, str) or not model:
        found = "is missing" if model is None else f"is {model!r}"
        raise InputError(
            f"{config_file}: base_model_name_or_path {found}: expected the hub id or directory of the "
            "model that was fine-tuned: write it there"
        )
    revision = config.get("revision")
    return _TEMPLATE.format(
        summary=_summary(config),
        name=_slug(adapter),
        base=_base_section(model, revision if isinstance(revision, str) and revision else None),
        adapter=_quoted(_as_path(adapter)),
    )


def _config_file(adapter: str) -> Path:
    """The adapter's configuration, downloaded if `adapter` is a hub id."""
    directory = Path(os.path.expanduser(adapter))
    if os.path.isdir(directory):
        if not (directory / _CONFIG).is_file():
            raise InputError(
                f"{directory / _CONFIG}: no such file: expected the directory that PEFT's save_pretrained "
                "wrote (in a training run, often its last checkpoint-N folder)"
            )
        return directory / _CONFIG
    if os.path.exists(directory):
        raise InputError(f"{adapter}: is a file: expected the directory that holds {_CONFIG}")
    if adapter.startswith((".", "/", "~")) or adapter.count("/") != 1:
        raise InputError(f"{adapter}: no such directory: expected a PEFT directory or a hub id (owner/name)")
    return _download(adapter)


def _download(adapter: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(adapter, _CONFIG))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{adapter}: neither a directory here nor an adapter that can be read from the hub ({reason}): "
            "check the name, the network and, for a private repository, HF_TOKEN"
        ) from error


def _json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        message = f"{file}:{error.lineno}: not valid JSON: {error.msg}: save the file again from PEFT"
        raise InputError(message) from error
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{file}: cannot be read as text: {error}: save the file again from PEFT") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, got {type(value).__name__}: save the file again from PEFT")
    return value


def _base_section(model: str, revision: str | None) -> str:
    """The lines under `base:`."""
    path = Path(os.path.expanduser(model))
    local = os.path.isdir(path)
    shown = _as_path(model)
    lines = [f"  model: {_quoted(shown)}"]
    if not local and _is_path(shown):
        lines[0] += "   # FIXME: not found here (another machine's path?): write a directory or hub id"
    if revision is not None and not _is_path(shown):
        lines.append(f"  revision: {_quoted(revision)}   # the revision recorded in the adapter")
    four_bit = _is_four_bit(path) if local else None
    if four_bit is None:
        four_bit = bool(_FOUR_BIT_NAME.search(path.name))
    return "\n".join(lines) + "\n" + (_pre_quantized(model) if four_bit else _ON_THE_FLY)


def _is_four_bit(directory: Path) -> bool | None:
    """Whether a local model is a bitsandbytes 4-bit checkpoint; None if it has no config.json."""
    file = directory / "config.json"
    if not file.is_file():
        return None
    quantization = _json_object(file).get("quantization_config")
    if quantization is None:
        return False
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in (None, "bitsandbytes"):
        raise InputError(
            f"{file}: quantization_config.quant_method is {method!r}: expected bitsandbytes 4-bit or a "
            "16-bit model: use the model that the adapter was trained on"
        )
    if isinstance(quantization, dict) and quantization.get("load_in_4bit"):
        return True
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
    return "".join(character if character.isprintable() else " " for character in line)


def _is_path(text: str) -> bool:
    return text.startswith(("./", "../", "/", "~"))


def _as_path(text: str) -> str:
    """A hub id unchanged, a path with a prefix that marks it as one."""
    if _is_path(text) or text in (".", ".."):
        return text
    local = os.path.exists(text) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", text, re.ASCII)
    return f"./{text}" if local else text


def _slug(adapter: str) -> str:
    name = Path(os.path.expanduser(adapter)).absolute().name if adapter.strip("./") == "" else Path(adapter).name
    return (re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "adapter") + "-w4g128"


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
  # pre-quantized 4-bit checkpoint, write that as model and nf4: auto.
  nf4:
    quant_type: nf4         # nf4 | fp4; bnb_4bit_quant_type (transformers' own default is fp4)
    double_quant: true      # bool; bnb_4bit_use_double_quant (transformers' own default is false)
    blocksize: 64           # 32 ... 4096, default 64; bitsandbytes' default too
    load_dtype: bfloat16    # float16 | bfloat16 | float32, default bfloat16; dtype it was loaded in
    transformers: 5         # 4 | 5, default 5; major version in training: 4 quantized single experts of MoE models too
    skip: []                # names, default []; llm_int8_skip_modules as given; a list must name lm_head too
"""

_PRE_QUANTIZED = """\
  nf4: auto                 # auto | a section; auto: read from the 4-bit checkpoint itself
  # original: {guess}       # 16-bit model behind it; needed for merge.onto: original and the variant original
"""

_TEMPLATE = """\
# `requant check recipe.yaml` says in seconds what is wrong. Paths are relative to this file.
# The adapter: {summary}
version: 1
name: {name}     # names the run directory
base:                       # the model that the adapter was trained on
{base}adapter: {adapter}
# adapters: [{{path: ./a, weight: 1.0}}, {{path: ./b, weight: 0.5}}]   # instead of adapter: LoRA deltas added up

merge:
  onto: dequantized         # dequantized | original, default dequantized; what training saw: exact
  dtype: auto               # auto | float16 | bfloat16 | float32, default auto; the base's own
  max_shard: 5GB            # size, default 5GB; largest file of the merged checkpoint

quantize:
  bits: 4                   # 2 | 3 | 4 | 8, default 4; vLLM and SGLang load 4 and 8
  group_size: 128           # 32 | 64 | 128 | -1, default 128; smaller is better and larger on disk
  symmetric: true           # bool, default true; vLLM and SGLang refuse false
  signed_scales: false      # bool, default false; a little better, not proven in vLLM's GPU kernels
  scale_search: hessian     # hessian | minmax, default hessian; minmax is the classic, and worse
  order: auto               # auto | natural | activation | group, default auto; the file does not show it
  correct: 0.5              # share of earlier layers' error that each layer makes up for, default 0.5; 0 is none
  sweeps: 2                 # passes of coordinate descent over the codes, default 2; 0 is plain GPTQ
  damp: auto                # auto | 0 < number < 1, default auto; raise it if a factorization fails
  dtype: auto               # auto | float16 | bfloat16, default auto; what the server will run in
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
  length: 2048              # tokens, default 2048
  seed: 0                   # count, default 0

evaluate:
  protocol: documents       # documents | gptq-2048 | llamacpp-512, default documents; the others match papers
  window: 2048              # tokens, default 2048
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

# deploy: [vllm]            # default none; servers that must load the result: vllm, sglang, transformers
# heal: auto                # auto | off | {{steps: 150, ...}}: distil the scales after quantizing; auto: on a GPU
# canaries: ./canaries.jsonl  # default none; lines of prompt and answer, asked of adapter, merged and quantized
gates:                      # default none; `requant run` ends with exit code 3 or 4 unless the 95 % intervals keep all
  - {{metric: ppl_increase, set: in-domain, max: 5%}}   # also perplexity, kl, right_to_wrong, retention, agreement
  - {{metric: ppl_increase, set: general, max: 10%}}
  - {{metric: ppl_increase, set: in-domain, max: 50%, relative_to: rtn}}   # half of what rounding to nearest costs

output:
  dir: runs                 # directory, default runs; relative to where requant is started
  keep: [merged, gptq]      # default both; [gptq] saves the disk space of the 16-bit model

device: auto                # auto | cpu | cuda | cuda:N, default auto
trust_remote_code: false    # bool, default false; runs Python from the model repository
"""
