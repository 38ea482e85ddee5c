"""`requant.cli.main`: exit codes, output, and light commands that import no torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import Here
from helpers.e2e import copied, edit_json, edit_tensors, texts, visible, write_recipe, write_rows

from requant import __version__, errors
from requant import recipe as recipes
from requant.cli import exit_codes

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "numpy", "datasets"}


def requant(*arguments: str, cwd: Path, code: str = "main()") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    roots = os.pathsep.join(str(ROOT / p) for p in ("pipeline", "eval"))
    script = f"import sys; sys.argv[0] = 'requant'; from requant.cli import main; {code}"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=cwd, env=os.environ | {"PYTHONPATH": roots}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Here:
    monkeypatch.chdir(tmp_path)
    return Here(monkeypatch, capsys)


# --- light commands, in a process of their own ---


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import atexit; atexit.register(lambda: print('LOADED', *{m.split('.')[0] for m in sys.modules})); main()"
    done = requant("--help", cwd=tmp_path, code=code)
    assert done.returncode == 0
    text, _, loaded = done.stdout.partition("LOADED")
    assert not HEAVY & set(loaded.split())
    assert "typer" in loaded.split(), "the list of modules is real"
    for command in ("init", "check", "run", "sweep", "merge", "quantize", "evaluate", "report", "schema"):
        assert re.search(rf"^ +{command} ", text, re.MULTILINE), command


@pytest.mark.parametrize(
    ("command", "codes"),
    [
        ("", "0 1 2 3 4 129 130 143"),
        ("run", "0 1 2 3 4 129 130 143"),
        ("report", "0 1 2 3 4 129 130 143"),
        ("gate", "0 1 2 3 4"),
        *(
            (name, "0 1 2 129 130 143")
            for name in ("check", "sweep", "merge", "quantize", "heal", "evaluate", "verify", "push")
        ),
    ],
)
def test_help_names_the_exit_codes(here: Here, command: str, codes: str) -> None:
    assert here(*command.split(), "--help") == 0
    listed = here.out.split("Exit codes:\n")[1]
    assert re.findall(r"^ +(\d+) +\w", listed, re.MULTILINE) == codes.split(), "one line each, none folded"


def test_exit_codes_are_those_of_errors_and_gates() -> None:
    from requant_eval.render.ci import EXIT_CODES

    raised = {c.exit_code for c in (errors.RequantError, errors.InputError, errors.RecipeError, errors.StageError)}
    assert exit_codes.MEANINGS.keys() == raised | set(EXIT_CODES.values()) | {129, 130, 143}
    assert exit_codes.MEANINGS[EXIT_CODES["fail"]] == "a gate failed"
    assert exit_codes.MEANINGS[EXIT_CODES["inconclusive"]] == "a gate is inconclusive"


def test_version(tmp_path: Path) -> None:
    done = requant("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"requant {__version__}\n", "")


def test_recipe_errors_are_all_printed_and_cost_no_heavy_import(tmp_path: Path) -> None:
    text = "name: x\nbase: {model: ./base}\nadapter: ./adapter\nquantize:\n  bits: 5\n  group_sze: 64\nname: y\n"
    (tmp_path / "r.yaml").write_text(text)
    code = "import atexit; atexit.register(lambda: print(*{m.split('.')[0] for m in sys.modules})); main()"
    done = requant("run", "r.yaml", cwd=tmp_path, code=code)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert any(line.startswith("r.yaml:5: quantize.bits: 5 is not one of 2, 3, 4, 8") for line in lines)
    assert "r.yaml:6: quantize.group_sze: unknown key, did you mean 'group_size'?" in lines
    assert any(line.startswith("r.yaml:7: name:") for line in lines), "a duplicate key"
    assert any("calibration: required key is missing" in line for line in lines)
    assert any("evaluate: required key is missing" in line for line in lines)
    assert not HEAVY & set(done.stdout.split())
    assert [f.name for f in tmp_path.iterdir()] == ["r.yaml"]


# --- the rest in this process ---


def test_no_command_and_a_wrong_one(here: Here) -> None:
    assert here("frobnicate") == 2
    assert "frobnicate" in here.err
    assert here("run") == 2
    assert "RECIPE" in here.err
    assert here("run", "nothing.yaml") == 2
    assert here.err.startswith("nothing.yaml: no such file: `requant init ADAPTER -o nothing.yaml` writes one")


def test_schema_is_a_json_schema_of_the_recipe(here: Here, project: Path) -> None:
    assert here("schema") == 0
    schema = json.loads(here.out)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["required"]) == {"name", "base", "calibration", "evaluate"}
    assert schema["oneOf"] == [{"required": ["adapter"]}, {"required": ["adapters"]}]
    assert schema["additionalProperties"] is False
    assert all(schema["properties"][key] for key in recipes.Recipe.model_fields)
    references = re.findall(r'"\$ref": "#/\$defs/(\w+)"', here.out)
    assert references
    assert set(references) <= set(schema["$defs"])


def test_schema_accepts_the_recipe_and_refuses_others(here: Here, project: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from ruamel.yaml import YAML

    here("schema")
    validator = jsonschema.Draft202012Validator(json.loads(here.out))
    jsonschema.Draft202012Validator.check_schema(validator.schema)
    document = YAML(typ="safe").load(project / "recipe.yaml")
    assert list(validator.iter_errors(document)) == []
    assert list(validator.iter_errors({**document, "quantize": {"bits": 5}}))
    assert list(validator.iter_errors({**document, "quantise": {}}))


@pytest.mark.slow
def test_check_tells_what_will_happen_and_writes_nothing(here: Here, project: Path, tmp_path: Path) -> None:
    before = sorted(project.rglob("*"))
    assert here("check", str(project / "recipe.yaml")) == 0
    lines = dict(line.split(maxsplit=1) for line in here.out.splitlines() if " " in line)
    assert lines["base"] == "7 copied, 14 decoded+folded, 70 dropped"
    assert lines["adapter"] == "28 tensors, every one used: 14 LoRA, 0 replaced"
    assert "of the weights; rounding to nearest keeps 9" in lines["grid"]
    assert lines["grid"].endswith("(14 modules of layers 0, 1)")
    assert lines["quantize"].startswith("14 linears, ")
    assert lines["calibrate"] == "8 windows of 64 tokens from train.jsonl"
    assert "evaluate  in-domain: 24 documents, 744 tokens" in here.out
    takes = [line.split()[1:3] for line in here.out.splitlines() if line.startswith("takes ")]
    assert takes == [["merge", "about"], ["quantize", "about"], ["evaluate", "about"]]
    assert here.out.splitlines()[-1] == "ok"
    assert sorted(project.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_check_shows_texts_with_what_is_scored_marked(here: Here, project: Path, tmp_path: Path) -> None:
    write_rows(
        tmp_path / "qa.jsonl", [{"prompt": f"What is {i}? ", "completion": f"It is {i}!\x1b"} for i in range(20)]
    )
    qa = f"{{name: qa, data: {{path: {tmp_path / 'qa.jsonl'}}}, score: completion}}"
    assert here("check", str(project / "recipe.yaml"), "--set", f"evaluate.sets=[{qa}]", "--show-text", "2") == 0
    shown = here.out.split("text      ")[1].split("\n--- ")
    assert [s.splitlines()[0] for s in shown[1:5]] == [
        "calibration train.jsonl, document 1",
        "calibration train.jsonl, document 2",
        "evaluation qa, document 1",
        "evaluation qa, document 2",
    ]
    assert shown[1].splitlines()[1] == texts()["train"][0].splitlines()[0]
    assert shown[3].splitlines()[1] == "What is 0? \u27e6It is 0!\\x1b\u27e7", "control characters are spelled out"


@pytest.mark.slow
def test_a_long_document_is_shown_by_its_beginning(here: Here, project: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "long.jsonl", [{"text": "a long line of text\n" * 1000}] * 2)
    data = f"{{path: {tmp_path / 'long.jsonl'}}}"
    assert here("check", str(project / "recipe.yaml"), "--set", f"calibration.data={data}", "--show-text", "1") == 0
    shown = here.out.split("--- calibration long.jsonl, document 1\n")[1].split("\n--- ")[0]
    assert shown.endswith(" ... (17000 more characters)")
    assert len(shown) == 3000 + len(" ... (17000 more characters)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "warning"),
    [
        ("quantize.bits=3", "vllm does not load this: model.layers.0.self_attn.qkv_proj: no 3-bit weights"),
        ("quantize.bits=2", "vllm does not load this: model.layers.0.self_attn.qkv_proj: no 2-bit weights"),
        (
            "quantize.symmetric=false",
            "vllm does not load this: model.layers.0.self_attn.qkv_proj: no asymmetric weights",
        ),
        (
            'quantize.overrides={"*.down_proj": {bits: 8}}',
            "transformers does not load this: it ignores settings of single modules",
        ),
    ],
)
def test_check_warns_of_what_servers_refuse(here: Here, project: Path, setting: str, warning: str) -> None:
    assert here("check", str(project / "recipe.yaml"), "--set", setting) == 0
    assert [line for line in here.out.splitlines() if line.startswith("warning") and warning in line]
    assert here("check", str(project / "recipe.yaml")) == 0
    assert warning not in here.out


@pytest.mark.slow
def test_check_warns_of_another_base_name(here: Here, project: Path, tmp_path: Path) -> None:
    mine = copied(project, tmp_path / "p", "adapter")
    edit_json(mine / "adapter" / "adapter_config.json", base_model_name_or_path="meta-llama/Llama-3.1-8B")
    assert here("check", str(mine / "recipe.yaml")) == 0
    assert "warning   the adapter was trained on Llama-3.1-8B, the recipe's base is ./base:" in here.out
    assert here("check", str(project / "recipe.yaml")) == 0
    assert "the adapter was trained on" not in here.out


@pytest.mark.slow
def test_check_refuses_what_run_refuses(here: Here, project: Path, tmp_path: Path) -> None:
    """An adapter that changes nothing, a directory that cannot be made."""
    mine = copied(project, tmp_path / "p", "adapter")
    weights = mine / "adapter" / "adapter_model.safetensors"
    edit_tensors(weights, lambda t: {n: v * 0 if "lora_B" in n else v for n, v in t.items()})
    (tmp_path / "taken").write_text("a file")
    for command in ("check", "run"):
        assert here(command, str(mine / "recipe.yaml")) == 2
        assert "every LoRA delta is exactly zero: this adapter was never trained" in here.err
        assert here(command, str(project / "recipe.yaml"), "--set", f"output.dir={tmp_path / 'taken'}") == 2
        assert "taken is no directory: choose another output.dir" in here.err


@pytest.mark.slow
def test_set_reaches_the_recipe_and_has_its_checks(here: Here, project: Path) -> None:
    file = str(project / "recipe.yaml")
    assert here("check", file, "--set", "calibration.samples=4", "--set", "calibration.length=32") == 0
    assert "calibrate 4 windows of 32 tokens" in here.out
    assert here("check", file, "--set", "quantize.bits=5", "--set", "quantize.group_sze=64") == 2
    assert "quantize.bits: 5 is not one of 2, 3, 4, 8" in here.err
    assert "did you mean 'group_size'?" in here.err
    assert here.out == ""
    assert here("check", file, "--set", "quantize.bits") == 2
    assert "quantize.bits" in here.err


@pytest.mark.slow
def test_init_writes_a_recipe_that_check_accepts(here: Here, project: Path, tmp_path: Path) -> None:
    """A user's way: texts put where the recipe says, the hub's data set replaced by a file."""
    mine = copied(project, tmp_path / "p", "adapter")
    here.monkeypatch.chdir(mine)
    assert here("init", "./adapter") == 0
    assert here.err == ""
    assert "base_model_name_or_path" not in here.out
    text = here.out.replace("samples: 128", "samples: 8").replace("length: 2048", "length: 64")
    assert "group_size: 64 " in text, "128 does not divide the base's 64 inputs"
    hub = re.compile(r"dataset: Salesforce/wikitext\n +config: wikitext-2-raw-v1\n +split: (train|test)[^\n]*\n")
    assert len(hub.findall(text)) == 2
    (mine / "other.jsonl").write_text((mine / "general.jsonl").read_text().replace("1", "9"))
    text = hub.sub(lambda m: f"path: ./{'other' if m[1] == 'train' else 'general'}.jsonl\n", text)
    (mine / "mine.yaml").write_text(text)
    assert here("check", "mine.yaml") == 0
    assert here.out.endswith("ok\n")
    loaded = recipes.load(mine / "mine.yaml")
    assert loaded.base.source.resolve(loaded.directory) == str(mine / "base") or loaded.base.model == str(
        project / "base"
    )
    assert loaded.base.nf4 == "auto", "the local base is a 4-bit checkpoint"


def test_init_of_nothing(here: Here) -> None:
    assert here("init", "./nothing") == 2
    assert here.err.startswith("error: ./nothing: no such directory")
    assert here.out == ""


@pytest.mark.slow
def test_run_shows_the_report_and_the_second_says_nothing_to_do(here: Here, project: Path, tmp_path: Path) -> None:
    changes = {"evaluate.variants": ["adapter", "gptq"], "name": "shown"}
    mine = copied(project, tmp_path / "p")
    file = str(write_recipe(mine, changes))
    assert here("merge", file) == 0
    assert here.out == "merge done: runs/shown\n"
    assert here("quantize", file) == 0
    assert here.out == "quantize done: runs/shown\n"
    assert here("evaluate", file) == 0
    assert here.out == "evaluate done: runs/shown\n"
    assert here("run", file) == 0
    report = json.loads((tmp_path / "runs/shown/report.json").read_text())
    assert " ".join(here.out.split()).startswith(f"{report['verdict']['line']} {report['headline']}")
    assert here.out.endswith("report done: runs/shown\n")
    assert here.err.splitlines() == [
        "prepare: started",
        "merge: up to date",
        "quantize: up to date",
        "evaluate: up to date",
        "report: started",
    ]
    shown = here.out.removesuffix("report done: runs/shown\n")
    for command in ("run", "report"):
        assert here(command, file) == 0
        assert here.out == shown + "nothing to do: everything in runs/shown is up to date\n"


@pytest.mark.slow
def test_exit_code_1_when_the_data_is_bad(here: Here, project: Path, tmp_path: Path) -> None:
    mine = copied(project, tmp_path / "p", "adapter")
    weights = mine / "adapter" / "adapter_model.safetensors"
    edit_tensors(weights, lambda t: {n: v * float("nan") for n, v in t.items()})
    assert here("check", str(mine / "recipe.yaml")) == 2, "the rows that it samples show it"
    assert "NaN or infinity in the adapter or base weights: train or download them again" in here.err
    assert here("run", str(mine / "recipe.yaml")) == 1
    assert re.search(
        r"^error: .*: NaN or infinity in the adapter or base weights: (\d+) of \1 values \(.*, or the adapter's file\)$",
        here.err,
        re.MULTILINE,
    )
    assert "merged" not in visible(tmp_path / "runs" / "pico")


def test_exit_code_when_the_output_cannot_be_written(here: Here, project: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    assert here("run", str(project / "recipe.yaml"), "--set", "output.dir=file/runs") in (1, 2)
    assert re.fullmatch(r"prepare: started\nerror: .*file/runs.*\n", here.err)
    assert (tmp_path / "file").read_text() == "not a directory"


def test_interrupted(here: Here, project: Path) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    here.monkeypatch.setattr("requant.run.run", stop)
    assert here("run", str(project / "recipe.yaml")) == 130
    assert "the same command resumes the run" in here.err


# --- reports without a run ---

GATES = ("ppl_increase in-domain 500%", "ppl_increase in-domain -90%")


def test_gate_answers_from_the_file_alone(here: Here, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes((finished / "report.json").read_bytes())
    assert here("gate", "report.json", "--gate", GATES[0]) == 0
    assert here.out.startswith(
        "PASS: GPTQ 4-bit g32 keeps its gate: perplexity increase on in-domain at most 500 %, measured "
    )
    assert here("gate", str(finished), "--gate", GATES[0], "--gate", GATES[1], "--junit", "gates.xml") == 3
    assert here.out.startswith("FAIL: ")
    assert '<failure type="fail"' in (tmp_path / "gates.xml").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps(report | {"warnings": ["only 5 documents"]}))
    assert here("gate", "report.json", "--gate", GATES[0]) == 0
    assert here.out.splitlines()[-1] == "warning: only 5 documents"
    edges = report["sets"][0]["edges"]
    value = next(e for e in edges if (e["from"], e["to"]) == ("adapter", "gptq"))["loss_percent"]["value"]
    assert here("gate", "report.json", "--gate", f"ppl_increase in-domain {value:.6f}%") == 4
    assert here.out.startswith("INCONCLUSIVE: ")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["gates.xml", "report.json"], "reports are only read"


def test_gate_needs_gates_and_a_report(here: Here, finished: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((str(finished),), "no gates in it: add them to the recipe, or give --gate"),
        ((str(finished), "--gate", "ppl_increase in-domain"), "is not a gate: write"),
        (
            (str(finished), "--gate", "ppl_increase nowhere 5%"),
            "the report has no set 'nowhere', only in-domain, general",
        ),
        (("nothing.json",), "nothing.json: cannot be read"),
    ):
        assert here("gate", *arguments) == 2
        assert message in " ".join(here.err.split())
        assert here.out == ""
    (tmp_path / "report.json").write_text('{"schema_version": 2, "sets": []}')
    assert here("gate", "report.json", "--junit", "gates.xml") == 2
    assert "report.json: does not match the schema" in here.err
    assert not (tmp_path / "gates.xml").exists()


@pytest.mark.slow
def test_run_ends_with_the_exit_code_of_its_gates(
    here: Here, project: Path, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    file = write_recipe(copied(project, tmp_path / "p"), {"output.dir": str(ran)})
    for limit, code in (("-90%", 3), ("500%", 0)):
        gates = f"gates=[{{metric: ppl_increase, set: in-domain, max: {limit}}}]"
        assert here("run", str(file), "--set", gates, "--junit", str(tmp_path / "gates.xml")) == code
        assert here.out.endswith("report done: " + str(ran / "pico") + "\n")
        report = json.loads((ran / "pico" / "report.json").read_text())
        assert report["verdict"]["line"] in (tmp_path / "summary.md").read_text()
        assert ('failures="1"' in (tmp_path / "gates.xml").read_text()) == (code == 3)
        assert here("run", str(file), "--set", gates) == code, "also when there is nothing to do"
        assert here("gate", str(ran / "pico")) == code
    assert here("run", str(file)) == 0, "no gates, no verdict"


def test_gate_is_light(finished: Path, tmp_path: Path) -> None:
    code = "import atexit; atexit.register(lambda: print('LOADED', *{m.split('.')[0] for m in sys.modules})); main()"
    done = requant("gate", str(finished), "--gate", GATES[0], cwd=tmp_path, code=code)
    assert done.returncode == 0, done.stderr
    assert not (HEAVY - {"numpy"}) & set(done.stdout.partition("LOADED")[2].split())


def test_schema_of_reports_accepts_a_report(here: Here, finished: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert here("schema", "--report") == 0
    validator = jsonschema.Draft202012Validator(json.loads(here.out))
    report = json.loads((finished / "report.json").read_text())
    assert list(validator.iter_errors(report)) == []
    assert list(validator.iter_errors(report | {"sets": 1}))


def unexplained(page: Path) -> str:
    """A page without the explanations of words, with plain blanks."""
    return re.sub(r"</?abbr[^>]*>", "", page.read_text()).replace("\u00a0", " ")


def test_an_old_report_is_rendered_again(here: Here, tmp_path: Path) -> None:
    old = (ROOT / "tests" / "data" / "report-v1.json").read_bytes()
    (tmp_path / "report.json").write_bytes(old)
    assert here("report", "report.json") == 0
    headline = json.loads(old)["headline"]
    assert headline in " ".join(here.out.split())
    assert (tmp_path / "report.md").read_text().splitlines()[2] == headline
    assert here.out.endswith("written: report.md, report.html\n")
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "report.json").read_bytes() == old
    (tmp_path / "report.html").unlink()
    assert here("report", ".") == 0, "the directory of a run will do"
    assert headline.split(";")[0] in unexplained(tmp_path / "report.html")
    (tmp_path / "report.json").write_text('{"schema_version": 1}')
    before = (tmp_path / "report.md").read_text()
    assert here("report", "report.json") == 2
    assert "report.json: schema version 1, but KeyError('sets') is missing or damaged" in here.err
    assert (tmp_path / "report.md").read_text() == before, "nothing is overwritten"
    assert here("report", "report.json", "--set", "name=x") == 2
    assert "--set name=x: changes a recipe, and report.json is a finished report" in here.err


def test_compare_says_who_is_better_without_a_model(here: Here, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_bytes((finished / "report.json").read_bytes())
    options = ("--json", "c.json", "--markdown", "c.md", "--html", "c.html")
    assert here("compare", str(finished), "other/report.json:base", *options) == 0
    comparison = json.loads((tmp_path / "c.json").read_text())
    assert [run["name"] for run in comparison["runs"]] == ["pico", "other:base"]
    assert comparison["sets"][0]["pairs"][0]["better"] == "pico"
    assert here.out.startswith("in-domain: pico is best")
    assert (tmp_path / "c.md").read_text().startswith("in-domain: pico is best")
    assert '<p class="verdict">in-domain: pico is best' in unexplained(tmp_path / "c.html")
    assert here("compare", str(finished), "other", str(finished) + ":merged") == 0
    assert "equal" in here.out
    same = tmp_path / "same" / "pico"
    same.mkdir(parents=True)
    (same / "report.json").write_bytes((finished / "report.json").read_bytes())
    assert here("compare", str(finished), "same/pico") == 0
    assert "same/pico against" in here.out, "runs of one name are told apart by their paths"


def test_compare_refuses_other_tokens(here: Here, finished: Path, tmp_path: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    report["sets"][1]["digest"] = "0" * 64
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert here("compare", str(finished), "report.json", "--json", "c.json") == 2
    assert "set 'general':" in here.err
    assert "scored on other tokens" in here.err
    assert here("compare", str(finished)) == 2
    assert "name at least two runs" in here.err
    assert here("compare", str(finished), "nothing") == 2
    assert "nothing/report.json" in here.err or "nothing: cannot be read" in here.err
    assert not (tmp_path / "c.json").exists()
