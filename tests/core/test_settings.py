"""Settings as text become what the fields of a configuration want, and what is wrong names its field and value."""
from dataclasses import MISSING, fields

import pytest
from trl import SFTConfig

from tirlab.config.tir_config import TIRConfig
from tirlab.core.settings import SettingError, check_ranges, field_types, read_settings, read_value, read_values
from tirlab.eval.settings import EvalSettings


@pytest.mark.parametrize("config", [TIRConfig, SFTConfig, EvalSettings])
def test_every_default_is_read_from_its_own_text(config):
    types = field_types(config)
    for f in fields(config):
        default = None if f.default is MISSING else getattr(f.default, "value", f.default)
        if types.get(f.name) == str | bool: continue   # false is "no" there
        if f.init and default is not None: assert read_value(f.name, str(default), types[f.name]) == default, f.name


@pytest.mark.parametrize("field,text,value", [
    ("learning_rate", "1e-6", 1e-6), ("trace", "No", False), ("accuracy_band", "[0.2, 0.8]", [0.2, 0.8]), ("reward_weights", "2", [2.0]), ("delta", "null", None), ("report_to", "none", "none"),
    ("report_to", "[wandb, tensorboard]", ["wandb", "tensorboard"]), ("vllm_servers", "[http://a:1,http://b:2]", ["http://a:1", "http://b:2"]), ("model_init_kwargs", '{"a": 1e-6}', {"a": 1e-6}),
    ("deepspeed", "zero2.json", "zero2.json"), ("optim", "sgd", "sgd"), ("lr_scheduler_type", "cosine", "cosine"), ("include_num_input_tokens_seen", "all", "all"), ("max_steps", 3, 3), ("gamma", 1, 1.0),
])
def test_text_and_yaml_become_the_type_of_the_field(field, text, value):
    assert read_values({field: text}, field_types(TIRConfig)) == {field: value}


@pytest.mark.parametrize("field,text", [
    ("gamma", "much"), ("max_steps", "1e3"), ("max_steps", 1.5), ("trace", "maybe"), ("accuracy_band", "[0.1"), ("optim", "foo"), ("model_init_kwargs", "abc"), ("model_init_kwargs", "[1]"), ("gama", "1"),
])
def test_what_is_wrong_names_its_field_and_value(field, text):
    with pytest.raises(SettingError) as e: read_values({field: text}, field_types(TIRConfig))
    assert e.value.field == field and e.value.value == text and field in str(e.value)


@pytest.mark.parametrize("words,field", [(["gamma"], None), (["gama=1"], "gama"), (["n=1", "n=2"], "n"), (["n="], "n"), (["config=/tmp"], "config"), (["=x"], "")])
def test_words_that_mean_nothing_are_refused(words, field):
    with pytest.raises(SettingError) as e: read_settings(words, ["gamma", "n"])
    assert e.value.field == field


def test_a_word_wins_over_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("n: 3\ngamma: 0.9\n")
    assert read_settings([f"config={tmp_path}/a.yaml", "n=4"], ["gamma", "n"]) == {"gamma": 0.9, "n": "4"}


def test_ranges_refuse_what_is_no_number_in_them():
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(SettingError) as e: check_ranges({"rate": value}, {"rate": (0, 1e9)})
        assert e.value.field == "rate"
    check_ranges({"rate": 0.5, "other": None}, {"rate": (0, 1e9), "other": (0, 1)})
