"""Mutated texts: recipes, rows of every kind of file, chat templates."""

from __future__ import annotations

import csv
import gzip
import io
import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from ruamel.yaml import YAML

from campaigns import judges
from campaigns.cases import Bench, Case, linked, make_strange, merge_with, perhaps_strange
from campaigns.mutations import DEEP, HUGE, changed_bytes, changed_tree, to_json

VALUES = (  # of a recipe, as YAML
    "yes", "~", "!!python/object:os.system x", "!!binary x", "&a [*a]", "{a: *b}", "2024-01-01", "'\\x00'", '"\\0"',
    "*x", "&x y",
    "!!python/none", "|", ">", "- a", "a: b: c", '"unterminated', "[1, 2", "${env:HOME}", "${env:HF_TOKEN}", "${env:",
    "${", "\U0001f600",
    "\u202e", '"\\e[31m"', "@x", "`x`", "%x", "1_000", "0o17", "017", "1:30", ".5", "5.", "+5", "=", "<<", "null",
    "./", "/", "//", ".", "..",
    "~/x", "1e3", "4.0", "[4]", "{bits: 4}", "1e400", ".nan", "-.inf", "9" * HUGE, "'" + "x" * 10_000 + "'",
    "/dev/zero", "!!set {a}",
    "2147483648", "-1", "0", "true", "hf://a/b", "http://127.0.0.1:9/x", "../../../etc/passwd",
)  # fmt: skip
KEYS = (  # of --set
    "quantize.bits", "name", "base.model", "evaluate.sets.0.data.path", "evaluate.sets.9.name", "calibration.samples",
    "heal", "heal.steps",
    "gates", "gates.0.max", 'quantize.overrides."*.x".bits', "a.b.c", "", "=", "quantize..bits", "output.dir",
    "adapter.revision", "device",
    "merge.dtype", "calibration.mix", "evaluate.window", "version", "calibration.length", "quantize.group_size",
    "evaluate.variants",
    "base.original", "output.shard_size", "\x1b[2J", "evaluate.sets.-1.name",
)  # fmt: skip
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
)


def _recipe_text(bench: Bench) -> str:
    """The recipe as YAML, with absolute paths."""
    document: Any = YAML(typ="safe").load(bench.shop.recipe)
    absolute = json.loads(json.dumps(document).replace('"./', f'"{bench.shop.project}/'))
    absolute["output"] = {"dir": str(bench.folder / "runs")}
    text = io.StringIO()
    YAML(typ="safe").dump(absolute, text)
    return text.getvalue()


def recipe(bench: Bench) -> Case:
    """A recipe with other values, lines or bytes, or with `--set`."""
    rng, text, more = bench.rng, _recipe_text(bench), []
    kind = rng.choice(("tree", "tree", "tree", "line", "line", "bytes", "set", "laughs"))
    if kind == "tree":
        made, label = changed_tree(YAML(typ="safe").load(text), rng)
        data = to_json(made)
    elif kind == "line":
        data, label = _changed_line(text, rng)
    elif kind == "bytes":
        data, label = changed_bytes(text.encode(), rng)
    elif kind == "set":
        key, value = rng.choice(KEYS), rng.choice((*VALUES, "4", "'", "[" * 500, "[" * 100_000, "\udc80"))
        data, more, label = text.encode(), ["--set", f"{key}={value}"], f"--set {key}={value[:40]!r}"
    else:
        data, label = (text + LAUGHS).encode(), "aliases of aliases"
    file = bench.folder / "recipe.yaml"
    file.write_bytes(data)
    label = perhaps_strange(bench, file, f"{kind}: {label}")
    return Case(argv=["check" if rng.random() < 0.03 else "merge", file, *more], label=label)


def _changed_line(text: str, rng: Random) -> tuple[bytes, str]:
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    kind = rng.choice(("value", "value", "value", "twice", "gone", "indent", "tab", "swap"))
    if kind == "value" and ":" in lines[at]:
        lines[at] = f"{lines[at].split(':')[0]}: {rng.choice(VALUES)}"
    elif kind == "twice":
        lines.insert(at, lines[at])
    elif kind == "gone":
        del lines[at]
    elif kind == "indent":
        lines[at] = " " * rng.randrange(9) + lines[at].strip()
    elif kind == "tab":
        lines[at] = "\t" + lines[at]
    else:
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"), f"{kind} {lines[min(at, len(lines) - 1)][:50]!r}"


# --- rows ---

STRANGE_ROWS: dict[str, bytes] = {
    "long line": (json.dumps({"text": "word " * 400_000}) + "\n").encode(),
    "null rows": b'{"text": null}\n' * 30,
    "types": b'{"text": 3}\n{"text": [1]}\n{"text": {"a": 1}}\n{"text": true}\n' * 30,
    "deep row": b'{"text": ' + b"[" * DEEP[2] + b"]" * DEEP[2] + b"}\n",
    "nested text": b'{"text": {"text": "a"}}\n' * 50,
    "unicode": '{"text": "\u202e\U0001f600\\u0000 e\u0301 \ufdd0"}\n'.encode() * 100,
    "long field": b"text\n" + b'"' + b"x" * 300_000 + b'"\n',
    "nul field": b"text\na\x00b\n" * 30,
    "open quote": b'text\n"unterminated\n' * 30,
    "many columns": (",".join(f"c{i}" for i in range(5000)) + "\n1,2\n").encode(),
    "empty columns": b",,\n,,\n",
    "roles": b'{"messages": [{"role": "evil", "content": "x"}]}\n' * 30,
    "messages": b'{"messages": "x"}\n{"messages": 3}\n{"messages": [3]}\n{"messages": [{}]}\n' * 10,
    "surrogate": b'{"text": "\\ud800 lone"}\n' * 50,
    "big number": b'{"text": ' + b"9" * HUGE + b"}\n",
    "control": b'{"text": "a\tb\x01"}\n',
    "ids": b'{"input_ids": [1,2,3]}\n' * 5,
    "big ids": b'{"input_ids": [1,-2,999999999999999999999]}\n' * 5,
    "key twice": b'{"text": "a", "text": "b"}\n' * 50,
    "escape in a key": b'{"\\u001b[2J": "a"}\n' * 50,
}
WHERE = ("calibration__data__path", "calibration__data__path", "evaluate__sets__0__data__path", "canaries")


def _rows_file(rows: list[dict[str, Any]], suffix: str) -> bytes:
    if suffix == "json":
        return json.dumps(rows).encode()
    if suffix == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    if suffix == "txt":
        return "\n".join(str(next(iter(r.values()))) for r in rows).encode()
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def rows(bench: Bench) -> Case:
    """A file of texts: JSON lines, JSON, CSV, plain text or Parquet."""
    rng, key = bench.rng, bench.rng.choice(WHERE)
    suffix = rng.choice(("jsonl", "jsonl", "json", "csv", "txt", "parquet"))
    good = [json.loads(line) for line in (bench.shop.project / "train.jsonl").read_text().splitlines()]
    if key == "canaries":
        good = [{"prompt": f"p {i}", "answer": "a"} for i in range(5)]
    file = bench.folder / f"rows.{suffix}"
    if suffix == "parquet":
        data, label = _parquet(good, rng)
    elif rng.random() < 0.4:
        kind = rng.choice(tuple(STRANGE_ROWS))
        data, label = STRANGE_ROWS[kind], kind
    elif suffix == "jsonl" and rng.random() < 0.5:
        made, label = changed_tree(good, rng)
        data = b"".join(to_json(r) + b"\n" for r in made) if isinstance(made, list) else to_json(made)
    else:
        data, label = changed_bytes(_rows_file(good, suffix), rng)
    if rng.random() < 0.15:
        file, (data, label) = file.with_name(f"{file.name}.gz"), _packed(data, label, rng)
    file.write_bytes(data)
    label = perhaps_strange(bench, file, f"for {key}: {label}")
    judge = (lambda: judges.strict_json_lines(file)) if file.suffix == ".jsonl" else None
    return Case(argv=merge_with(bench, **{key: file}), label=label, judge=judge)


@cache
def _bomb(unit: bytes) -> bytes:
    """200 MB of one piece in less than one."""
    return gzip.compress(b'{"text": [' + unit * (2 * 10**8 // len(unit)), 1, mtime=0)


def _packed(data: bytes, label: str, rng: Random) -> tuple[bytes, str]:
    """The bytes as gzip, damaged now and then, or what unpacks to far more."""
    if rng.random() < 0.3:
        unit = rng.choice((b"[],", b"{},", b'"a",', b"1,", b"\n", b"a"))
        return _bomb(unit), f"gzip of 200 MB of {unit!r}"
    packed = gzip.compress(data, 1, mtime=0)
    if rng.random() < 0.3:
        packed, more = changed_bytes(packed, rng)
        return packed, f"gzip {more} of {label}"
    return packed + (packed if rng.random() < 0.2 else b""), f"gzip of {label}"


def _parquet(good: list[dict[str, Any]], rng: Random) -> tuple[bytes, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind, sink = rng.choice(("flip", "cut", "numbers", "nested", "bytes", "null")), io.BytesIO()
    columns = {"numbers": [1, 2, 3], "nested": [{"a": 1}], "bytes": [b"\xff\xfe", None], "null": [None]}
    pq.write_table(pa.table({"text": columns[kind] * 30}) if kind in columns else pa.Table.from_pylist(good), sink)
    made = bytearray(sink.getvalue())
    if kind == "cut":
        made = made[: rng.randrange(len(made))]
    elif kind == "flip":
        for _ in range(rng.choice((1, 5, 50))):
            made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    return bytes(made), f"parquet {kind}"


# --- chat templates ---

TEMPLATES: tuple[Any, ...] = (
    "{{ ''.__class__.__mro__ }}", "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
    "{{ cycler.__init__.__globals__.os.system('true') }}", "{% import 'os' as os %}", "{{ x",
    "{{ raise_exception('no') }}",
    "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ messages[99].content }}", "{{ undefined_thing.a }}",
    "{{ 'a' * 10000000000 }}",
    "{{ 1/0 }}", 3, [], {"a": 1}, [{"name": "default", "template": "{{ messages }}"}],
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages.append(1) }}", "{% include '/etc/passwd' %}", "{{ '%c'|format(-1) }}", "{{ messages|map('x')|list }}",
    "{% set x = namespace(a=0) %}{% for i in range(99999) %}{% for j in range(99999) %}{% set x.a = 1 %}{% endfor %}{% endfor %}",
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ messages[0].content }}",
    "{% set x = namespace(a='aa') %}{% for i in range(60) %}{% set x.a = x.a ~ x.a %}{% endfor %}{{ x.a|length }}",
    "{{ messages|tojson(indent=10**9) }}", "{{ strftime_now('%Y' * 10**7) }}", "{{ 10 ** 10 ** 8 }}",
    "{{ [0] * 10**10 }}", "\x1b[2J{{ x.y }}", "",
    "{{ raise_exception('\x1b[2J\n\nok') }}", "{{ '{:>9999999999}'.format(1) }}", "{{ messages|center(10**10) }}",
    "{{ 'a'.join(range(10**9)) }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{{ range(10**9)|list }}", "(" * 5000, "{{ " + "(" * 5000,
)  # fmt: skip


def template(bench: Bench) -> Case:
    """A base whose chat template is strange, and rows of messages to render with it."""
    rng, base = bench.rng, bench.shop.project / "base"
    made: Any = rng.choice(TEMPLATES)
    if rng.random() < 0.2 and isinstance(made, str):
        made = changed_bytes(b"{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", rng)[0].decode(
            "utf-8", "replace"
        )
    if isinstance(made, str) and rng.random() < 0.5:
        files = {"chat_template.jinja": made.encode("utf-8", "surrogatepass")}
    else:
        config = json.loads((base / "tokenizer_config.json").read_text())
        files = {"tokenizer_config.json": to_json(config | {"chat_template": made})}
    folder = linked(base, bench.folder / "base", files)
    first = [{"role": "system", "content": "be kind"}] if rng.random() < 0.5 else []
    talk = [*first, {"role": "user", "content": "question " * 20}, {"role": "assistant", "content": "answer " * 30}]
    texts: Path = bench.folder / "chat.jsonl"
    texts.write_text((json.dumps({"messages": talk}) + "\n") * 40)
    label = f"template {str(made)[:70]!r}"
    if rng.random() < 0.03:
        name = next(iter(files))
        label = f"{name} is a {make_strange(folder / name, rng)}"
    return Case(argv=merge_with(bench, base__model=folder, calibration__data__path=texts), label=label)


MAKERS = ((recipe, 20), (rows, 12), (template, 5))
