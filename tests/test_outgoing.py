"""`requant.outgoing`: tokens and values of variables never leave, nor where things lie."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import pytest

from requant import outgoing
from requant.errors import InputError, RecipeError
from requant.outgoing import everywhere, masked, masked_stream, shared

TOKEN = "hf_" + "t0ken"  # shorter than the hub's own
SECRET = 's3cr3t "v\u00e4lue" <x>\nsecond line of it'


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No values or places of other tests, no token of this machine."""
    monkeypatch.setattr(outgoing, "_values", {})
    monkeypatch.setattr(outgoing, "_roots", set())
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in (*outgoing.TOKENS, "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variable", outgoing.TOKENS)
def test_tokens_of_the_environment(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert masked(f"Bearer-{TOKEN}") == f"Bearer-{TOKEN}"
    monkeypatch.setenv(variable, TOKEN)
    assert masked(f"x {TOKEN}, y") == "x ***, y"


def test_the_token_that_the_hub_stores(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "token").write_text("plain-word-token\n")
    outgoing._stored.cache_clear()
    assert masked("no plain-word-token here") == "no *** here"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("hf_AbCdEfGh1234 is refused", "*** is refused"),
        ("no {'Authorization': 'Bearer abc.def'}", "no {'Authorization': 'Bearer ***'}"),
        ("https://ann:pass@host/x", "https://***@host/x"),
        ("https://host:8080/x", "https://host:8080/x"),
        ("Basic settings of a recipe", "Basic settings of a recipe"),
    ],
)
def test_what_looks_like_a_token(text: str, left: str) -> None:
    assert masked(text) == left


@pytest.mark.parametrize("spell", [str, repr, json.dumps, lambda v: json.dumps(v, ensure_ascii=False)])
def test_a_value_in_every_spelling(spell: object) -> None:
    outgoing.hide("KEY", SECRET)
    shown = masked(f"a {spell(SECRET)} b")  # type: ignore[operator]
    assert "${env:KEY}" in shown
    assert "s3cr3t" not in shown
    assert "second" not in masked(" ".join(SECRET.split()))
    assert "second" not in masked("only the second line of it")


@pytest.mark.parametrize(
    "value", ["ab1", "x", "text", "merged", "0.05", "10.5%", "5GB", "cuda:0", "2024-07-26", "validation"]
)
def test_ordinary_values_are_no_secrets(value: str) -> None:
    outgoing.hide("KEY", value)
    assert masked(f"a {value} b") == f"a {value} b"


@pytest.mark.parametrize("value", ["hunter2", "s3cr", "12345678", "opensesame", "/data/secret", "org/private-model"])
def test_other_values_are(value: str) -> None:
    outgoing.hide("KEY", value)
    assert masked(f"a {value}, b") == "a ${env:KEY}, b"
    assert (value in masked(f"a{value}b")) == (len(value) < outgoing.LONG), "short ones as whole words only"


def test_places_become_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home of ann"
    monkeypatch.setenv("HOME", str(home))
    outgoing.add_root(Path("/data/my models"))
    temporary = tempfile.gettempdir()
    for text, left in {
        f"{temporary}/a/b/c.json: x": "c.json: x",
        f"{home}/models/base, {home}": "base, ~",
        "in '/data/my models/base/x.json'": "in 'x.json'",
        "/data/my models holds": "my models holds",
        f"{Path.cwd()}/runs/pico": "pico",
        f"file://{temporary}/x/y": "file://y",
        f"../{temporary}/x": f"../{temporary}/x",
        f"{temporary}x/y": f"{temporary}x/y",
        "tokens/s and 1/2": "tokens/s and 1/2",
    }.items():
        assert shared(text) == left


def test_errors_and_streams_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert str(InputError(f"no {TOKEN}")) == "no ***"
    assert RecipeError([f"a {TOKEN}", "b"]).problems == ("a ***", "b")
    stream = io.StringIO()
    print("x", TOKEN, file=masked_stream(masked_stream(stream)))
    assert stream.getvalue() == "x ***\n"


def test_everywhere_is_values_and_keys() -> None:
    assert everywhere({"a": ["b", 1, None, ("c",)], 2: {"d": 0.5}}, str.upper) == {
        "A": ["B", 1, None, ["C"]],
        2: {"D": 0.5},
    }
