"""`requant.adapters.setting_types`: a setting of the wrong type is refused by its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import pico
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from requant.adapters import peft_directory
from requant.adapters.kinds import KINDS
from requant.adapters.unsupported import COMMON
from requant.errors import InputError

KEYS = sorted(COMMON.union(*(kind.settings for kind in KINDS.values())))
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 3), st.sampled_from([10**400, 0.5, float("nan"), float("inf")]),
        st.sampled_from(["", "yes", "(", "*", "all-linear", "none", "LORA", "SEQ_CLS", "q_proj", "\ud800", "(?P<a>x)" * 2]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["", "(", "q_proj"]), inner)),
    max_leaves=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("types") / "adapter"
    pico.train(pico.model(), path)
    (path / "kept.json").write_text((path / "adapter_config.json").read_text())
    return path


def refused(adapter: Path, **changes: Any) -> str:
    config = json.loads((adapter / "kept.json").read_text()) | changes
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        peft_directory.load(adapter)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank_pattern": [8]}, "rank_pattern is [8], expected pairs of module pattern and whole number"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern of 'q_proj' is '8', expected a whole number"),
        ({"rank_pattern": {"q_proj": -8}}, "rank_pattern of 'q_proj' is -8, expected a whole number"),
        ({"alpha_pattern": {"(q_proj": 8}}, "alpha_pattern has '(q_proj', which is no regular expression"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern of 'q_proj' is None, expected a number"),
        (
            {"target_modules": {"q_proj": 1}},
            "target_modules is {'q_proj': 1}, expected a list of module names or a reg",
        ),
        ({"target_modules": "*proj"}, "target_modules is '*proj', expected a list of module names or a regular"),
        ({"target_modules": ["q_proj", 3]}, "target_modules is ['q_proj', 3], expected a list"),
        ({"r": 0}, "r is 0, expected a whole number above 0"),
        ({"r": -4}, "r is -4, expected a whole number above 0"),
        ({"r": "16"}, "r is '16', expected a whole number above 0"),
        ({"r": True}, "r is True, expected a whole number above 0"),
        ({"lora_alpha": None}, "lora_alpha is None, expected a number"),
        ({"lora_alpha": float("nan")}, "NaN is no JSON number"),
        ({"lora_alpha": 10**400}, "a number of 401 digits"),
        ({"lora_alpha": 1e300}, "lora_alpha is 1e+300, expected a number"),
        ({"lora_alpha": 0}, "lora_alpha is 0: the adapter would change nothing"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', expected true or false"),
        ({"use_rslora": "false"}, "use_rslora is 'false', expected true or false"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', expected a list of module names"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is ['0'], expected a list of layer numbers"),
        ({"layers_to_transform": "0"}, "layers_to_transform is '0', expected a list of layer numbers"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path is ['a'], expected text"),
        ({"trainable_token_indices": "5"}, "trainable_token_indices is '5', expected a list of token ids"),
        ({"peft_type": ["LORA"]}, "peft_type is ['LORA'], which is unknown here"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS': a classifier of texts, with a head (score, classifier)"),
        ({"task_type": "TOKEN_CLS"}, "a classifier of tokens"),
        ({"task_type": "QUESTION_ANS"}, "a model that marks the answer in a text"),
    ],
)
def test_a_setting_of_the_wrong_type_is_named(adapter: Path, changes: dict[str, Any], says: str) -> None:
    message = refused(adapter, **changes)
    assert message.startswith(f"{adapter / 'adapter_config.json'}: ")
    assert says in message


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_no_settings_end_in_another_error(adapter: Path, changes: dict[str, Any]) -> None:
    config = json.loads((adapter / "kept.json").read_text()) | changes
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    try:
        said, folds = "", len(peft_directory.load(adapter).folds)
    except InputError as error:
        said, folds = str(error), 4
    assert folds == 4
    assert not said or str(adapter) in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ("[1]", "expected a JSON object, found list"),
        ("", "not valid JSON"),
        ("\xff\xfe{", "not UTF-8 text"),
    ],
    ids=["deep list", "deep object", "list", "empty", "bytes"],
)
def test_text_that_is_no_configuration(adapter: Path, text: str, says: str) -> None:
    (adapter / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=says):
        peft_directory.load(adapter)


def test_other_tasks_are_named_and_merged(adapter: Path) -> None:
    config = json.loads((adapter / "kept.json").read_text()) | {"task_type": "FEATURE_EXTRACTION", "metadata": {"a": 1}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert peft_directory.load(adapter).notes == (
        "the adapter's task_type is FEATURE_EXTRACTION: it is merged and judged as a language model that writes text",
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_pattern": {"([a-z_.0-9]+)+!": 8}},
        {"target_modules": ".*" * 12 + "!"},
        {"exclude_modules": "(.+)+x{2}"},
        {"modules_to_save": ["(.*)*!"]},
    ],
)
def test_an_expression_that_never_ends_is_refused(adapter: Path, changes: dict[str, Any]) -> None:
    (key,) = changes
    assert f"{key} has " in refused(adapter, **changes)
    assert "takes too long on a module's name" in refused(adapter, **changes)


def test_expressions_of_trainers_are_tried_and_taken(adapter: Path) -> None:
    expression = (
        r"(?:.*?(?:language|text|model).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.(layers\.\d+\.)+x)"
    )
    config = json.loads((adapter / "kept.json").read_text()) | {"target_modules": expression}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert len(peft_directory.load(adapter).folds) == 4
