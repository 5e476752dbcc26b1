"""Configuration: typed overrides, errors that name the nearest field, JSON both ways."""

import dataclasses
import json
import typing

import hypothesis
import pytest
from hypothesis import strategies as st

from mhcjax import config as c
from mhcjax import presets

BASE = c.preset("nano")


def get(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("total_steps", "7", 7),
        ("seed", "-3", -3),
        ("model.layers", "6", 6),
        ("model.kv_heads", "2", 2),
        ("model.kv_heads", "None", None),
        ("model.kv_heads", "none", None),
        ("schedule_steps", "none", None),
        ("optim.learning_rate", "3e-4", 3e-4),
        ("optim.learning_rate", "1", 1.0),
        ("optim.rest_rate", "none", None),
        ("model.soft_cap", "30", 30.0),
        ("model.tied", "true", True),
        ("model.tied", "False", False),
        ("model.tied", "1", True),
        ("model.tied", "0", False),
        ("model.mlp", "swiglu", "swiglu"),
        ("model.dtype", "bfloat16", "bfloat16"),
        ("model.connection.rule", "mix_first", "mix_first"),
        ("model.connection.rule", "none", None),
        ("model.connection.init", "symmetric", "symmetric"),
        ("model.connection.alpha_logit", "5", 5.0),
        ("data.corpus", "some/folder", "some/folder"),
        ("mesh.shard_params", "true", True),
        ("mesh.data", "4", 4),
    ],
)
def test_text_is_parsed_to_the_declared_type(name, text, value):
    found = get(c.override(BASE, {name: text}), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("total_steps", 7),
        ("optim.clip", 0.5),
        ("model.tied", True),
        ("model.kv_heads", None),
        ("model.mlp", "swiglu"),
    ],
)
def test_typed_values_pass(name, value):
    assert get(c.override(BASE, {name: value}), name) == value


def test_an_int_for_a_float_field_becomes_a_float():
    found = c.override(BASE, {"optim.clip": 2}).optim.clip
    assert found == 2.0 and isinstance(found, float)


def test_override_changes_only_what_it_names_and_copies():
    changes = {"model.layers": "6", "seed": "1", "model.connection.init": "balanced"}
    changed = c.override(BASE, changes)
    assert c.differences(BASE, changed) == {
        "seed": (0, 1),
        "model.layers": (4, 6),
        "model.connection.init": ("near_identity", "balanced"),
    }
    assert c.preset("nano") == BASE and c.override(BASE, {}) == BASE
    assert c.override(BASE.model, {"layers": 3}).layers == 3  # a part of it as well


def one_line(match):
    """A ValueError whose text is one line and matches."""
    return pytest.RaisesExc(ValueError, match=match, check=lambda error: "\n" not in str(error))


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("model.layer", "model.layers"),
        ("optim.learning_rates", "optim.learning_rate"),
        ("total_step", "total_steps"),
        ("model.conection.init", "model.connection.init"),
        ("mesh.shard_param", "mesh.shard_params"),
    ],
)
def test_unknown_field_suggests_the_nearest(name, nearest):
    with one_line(rf"^unknown field '{name}': did you mean {nearest}\?$"):
        c.override(BASE, {name: "1"})


def test_unknown_field_with_no_neighbour_lists_the_fields():
    with one_line(r"^unknown field 'zzzz': the fields are name, seed, total_steps, .*mesh"):
        c.override(BASE, {"zzzz": 1})


def test_a_group_is_no_field():
    with one_line(r"^unknown field 'model'"):
        c.override(BASE, {"model": c.ModelConfig()})


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("total_steps", "ten", "total_steps is 'ten': give an int"),
        ("total_steps", "7.5", "total_steps is '7.5': give an int"),
        ("total_steps", 7.5, "total_steps is 7.5: give an int"),
        ("total_steps", True, "total_steps is True: give an int"),
        ("total_steps", None, "total_steps is None: give an int"),
        ("total_steps", "none", "total_steps is 'none': give an int"),
        ("mesh.data", "x", "mesh.data is 'x': give an int"),
        ("optim.clip", "big", "optim.clip is 'big': give a float"),
        ("optim.clip", True, "optim.clip is True: give a float"),
        ("model.tied", "yes", "model.tied is 'yes': give true or false"),
        ("model.tied", 1, "model.tied is 1: give true or false"),
        ("data.corpus", 3, "data.corpus is 3: give a str"),
        ("model.mlp", "gelu", "model.mlp is 'gelu': choose one of relu2, swiglu"),
        (
            "model.connection.rule",
            "sum",
            "model.connection.rule is 'sum': choose one of add_first, mix_first",
        ),
    ],
)
def test_a_bad_value_is_one_line_with_the_fix(name, value, sentence):
    with pytest.raises(ValueError) as caught:
        c.override(BASE, {name: value})
    assert str(caught.value) == sentence


@pytest.mark.parametrize("name", sorted(c.PRESETS))
def test_json_round_trip(name):
    config = c.preset(name)
    text = c.to_json(config)
    assert c.from_json(text) == config
    assert text.endswith("}\n") and c.to_json(c.from_json(text)) == text
    names = [field for field, *_ in c.fields(config)]
    assert len(names) == len(set(names)) == len(_leaves(json.loads(text)))


def _leaves(tree):
    if not isinstance(tree, dict):
        return [tree]
    return [leaf for value in tree.values() for leaf in _leaves(value)]


# A value of each declared type, for the property below.
_VALUES = {
    int: st.integers(-(10**9), 10**9),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    str: st.text(min_size=1).filter(lambda text: text.lower() != "none"),
}


def _strategy(kind):
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_args(kind):  # X | None
        return st.none() | _strategy(next(a for a in typing.get_args(kind) if a is not type(None)))
    return _VALUES[kind]


@hypothesis.given(st.data())
def test_any_config_survives_json_and_its_own_text(data):
    drawn = {name: data.draw(_strategy(kind)) for name, kind, *_ in c.fields(BASE)}
    config = c.override(BASE, drawn)
    assert c.from_json(c.to_json(config)) == config
    as_text = {name: str(value) for name, _, value, _ in c.fields(config)}
    assert c.override(BASE, as_text) == config


def test_a_missing_field_is_named():
    tree = json.loads(c.to_json(BASE))
    del tree["model"]["layers"], tree["seed"]
    with one_line(r"^the config lacks seed, model\.layers: it was written by another version"):
        c.from_json(json.dumps(tree))
    del tree["optim"]
    with one_line(r"lacks seed, .*optim\.name, .*optim\.final_fraction"):
        c.from_json(json.dumps(tree))


def test_an_unknown_field_is_named():
    tree = json.loads(c.to_json(BASE))
    tree["model"]["width_"] = 3
    with one_line(r"^unknown field 'model\.width_': did you mean model\.width\?"):
        c.from_json(json.dumps(tree))


def test_a_field_of_the_wrong_type_is_named():
    tree = json.loads(c.to_json(BASE))
    tree["model"]["layers"] = [4]
    with one_line(r"^model\.layers is \[4\]: give an int"):
        c.from_json(json.dumps(tree))
    tree["model"]["layers"] = {"deep": 4}
    with one_line(r"^the config lacks model\.layers"):
        c.from_json(json.dumps(tree))


@pytest.mark.parametrize("text", ["", "{", "seed: 1"])
def test_what_is_not_json_is_one_line(text):
    with one_line(r"^the config is not JSON \(.*\): restore the run's config\.json"):
        c.from_json(text)


def test_json_that_is_no_object_is_one_line():
    with one_line(r"^the config is a JSON list: give an object"):
        c.from_json("[]")


def test_unknown_preset():
    with one_line(r"^unknown preset 'nona': choose one of nano, d20, gpt2_124m"):
        c.preset("nona")


def test_differences_of_equal_configs_are_none():
    assert c.differences(BASE, c.preset("nano")) == {}


def test_every_field_has_help_and_a_known_type():
    for name, kind, _, text in c.fields(BASE):
        assert text, f"{name} has no help"
        _strategy(kind)  # a KeyError names a type that override does not know


def test_configs_are_frozen_and_hashable():
    assert hash(BASE) == hash(c.preset("nano"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.seed = 1
    with pytest.raises(TypeError):
        c.PRESETS["mine"] = BASE


def test_presets_name_themselves_and_a_connection_that_exists():
    for name, config in c.PRESETS.items():
        assert config.name == name
        assert config.model.connection.preset in presets.PRESETS


def test_nano_is_what_the_design_says():
    model, data = BASE.model, BASE.data
    assert (model.layers, model.width, model.vocab) == (4, 128, 4096)
    assert (data.batch, data.length, BASE.total_steps) == (16, 128, 300)
    assert (model.connection.preset, model.connection.init) == ("mhc_n2", "near_identity")
    d20 = c.preset("d20").model
    assert (d20.layers, d20.width) == (6, 256)


@pytest.mark.parametrize(
    ("name", "outside", "inside"),
    [
        ("model.layers", 0, 1),
        ("model.kv_heads", 0, 1),
        ("data.length", 1, 2),
        ("optim.clip", -1.0, 0.0),
        ("optim.decay_fraction", 2.0, 1.0),
        ("optim.decay_fraction", -0.5, 0.0),
        ("optim.beta2", 1.5, 1.0),
        ("optim.learning_rate", float("nan"), 0.0),
        ("total_steps", -1, 0),
        ("schedule_steps", 0, 1),
    ],
)
def test_numbers_outside_their_range_are_refused_by_name(name, outside, inside):
    c.check_ranges(c.override(BASE, {name: inside}))
    with pytest.raises(ValueError, match=rf"^{name} is {outside}: give at (least|most) "):
        c.check_ranges(c.override(BASE, {name: outside}))


def test_presets_are_inside_their_ranges():
    for config in c.PRESETS.values():
        c.check_ranges(config)
