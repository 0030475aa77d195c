from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from athanor.foundation.errors import RecipeError
from athanor.foundation.recipe import Recipe, document, load_recipe
from athanor.foundation.toml import toml_value

STDLIB = Path(__file__).parents[2] / "recipes" / "stdlib.toml"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_precedence_is_override_recipe_plan_default() -> None:
    recipe = load_recipe(STDLIB, ["stage.pretrain.steps=100", "model.hidden_size=64"])
    planned = recipe.with_plan({"model": {"hidden_size": 128, "num_hidden_layers": 4}, "data": {"vocab_size": 999},
                                "stage": [{"name": "pretrain", "steps": 7, "micro_batch_size": 2}]})
    stage = planned.get_stage("pretrain")
    assert (stage.steps, stage.micro_batch_size, planned.model.hidden_size, planned.model.num_hidden_layers) == (100, 2, 64, 4)
    assert planned.data.vocab_size == 4096
    keys = ("stage.pretrain.steps", "data.vocab_size", "stage.pretrain.micro_batch_size", "serve.host")
    assert [planned.origin(key) for key in keys] == ["override", "recipe", "plan", "default"]
    text = planned.annotated("model", "stage")
    assert "hidden_size = 64  # override" in text and "micro_batch_size = 2  # plan" in text and "[[stage]]" in text


@pytest.mark.parametrize(("override", "words"), [
    ("model.hiden_size=3", ["model.hiden_size", "did you mean 'hidden_size'"]),
    ("stage.pretain.steps=3", ["pretain", "did you mean 'pretrain'"]),
    ("stage.pretrain.steps=many", ["stage.pretrain.steps", "'many'", "such as 4096"]),
    ("stage.pretrain.steps=0", ["stage.pretrain.steps", "greater than or equal to 1"]),
    ("stage.pretrain.hang_seconds=0.3", ["stage.pretrain.hang_seconds", "greater than or equal to 1"]),
    ("stage.pretrain.spike_window=100000000000", ["stage.pretrain.spike_window", "less than or equal to 100000"]),
    ("data.source.stdlib.kind=pyhton", ["data.source.stdlib.kind", "did you mean 'python'"]),
    ("stage.pretrain.optimizer=adam", ["stage.pretrain.optimizer", "adamw"]),
    ("budget.pd=1", ["minutes and pd"]),
    ("stage.chat.start_from=chat", ["does not come before it"]),
    ("stage.pretrain", ["key=value"]),
    ("budget.minutes=inf", ["budget.minutes"]),
    ("seed.x=1", ["seed"]),
    ("name=a/b", ["name"]),
    ("data.source.stdlib.path=", ["data.source.stdlib.path", "at least 1 character"]),
    ("parallel.dp_shard=0", ["parallel.dp_shard", "at least 1"]),
    ("data.source.stdlib.name=../x", ["data.source", "name", "pattern"]),
    (f"name={'a' * 101}", ["name", "pattern"]),
    ("stage.chat.name=plan.toml", ["cannot be called 'plan.toml'"]),
    ("model.sizes.kv_lora_rank=wide", ["'model.sizes.kv_lora_rank' is 'wide': it must be a finite number, true or false"]),
    ("model.sizes.kv_lora_rank=nan", ["'model.sizes.kv_lora_rank' is nan: it must be a finite number"]),
    ("model.sizes.hidden_size=32", ["'model.sizes.hidden_size' has a key of its own; set model.hidden_size"]),
    ("model.sizes.architecture=1", ["set model.architecture"]),
    ("model.sizes.vocab_size=300", ["'model.sizes.vocab_size' follows from the tokenizer"]),
])
def test_bad_values_get_one_sentence(override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(STDLIB, [override])
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(write(tmp_path, "name = "))
    with pytest.raises(RecipeError, match="'data' is missing"):
        load_recipe(write(tmp_path, "name = 'x'\n[[stage]]\nname = 'a'\n"))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(bytes(range(256)))
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(binary)


def test_names_must_be_unique_and_clear_of_the_run_folder(tmp_path: Path) -> None:
    base = "name = 'x'\n[[data.source]]\nname = 's'\nkind = 'text'\n[[stage]]\nname = 'a'\n"
    with pytest.raises(RecipeError, match="two stages are called 'a'"):
        load_recipe(write(tmp_path, base + "[[stage]]\nname = 'a'\n"))
    with pytest.raises(RecipeError, match="cannot be called 'data'"):
        load_recipe(write(tmp_path, base + "[[stage]]\nname = 'data'\n"))


def test_every_field_is_documented_and_recipes_stay_small() -> None:
    rows = document()
    assert len(rows) > 60 and all(meaning for _, _, _, meaning in rows)
    assert len(STDLIB.read_text().splitlines()) <= 40
    assert isinstance(load_recipe(STDLIB), Recipe)


def test_toml_values_read_back() -> None:
    import tomllib

    value = {"a": 'quo"te\\ \n', "b": [1, 2.5, True], "c": "ü"}
    assert tomllib.loads(f"v = {toml_value(value)}")["v"] == value


def test_names_with_dots_take_overrides_and_plans(tmp_path: Path) -> None:
    text = 'name = "x"\n[data]\n[[data.source]]\nname = "v1.0"\nkind = "text"\n[[stage]]\nname = "base.1"\n'
    recipe = load_recipe(write(tmp_path, text), ["stage.base.1.steps=7", "data.source.v1.0.path=/x"])
    planned = recipe.with_plan({"stage": [{"name": "base.1", "steps": 9, "seq_len": 64}]})
    assert (planned.stage[0].steps, planned.stage[0].seq_len, planned.data.source[0].path) == (7, 64, "/x")


@pytest.mark.parametrize("value", ['a"b\\c', "line\nend\ttab\r", "\x01\x1b\x7f", "中 é"])
def test_any_text_comes_back_from_toml(value: str) -> None:
    assert tomllib.loads(f"x = {toml_value(value)}") == {"x": value}


@pytest.mark.parametrize("value", ["true", "1e3", "2.0", "'2'"])
def test_whole_numbers_are_written_as_such(tmp_path: Path, value: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('name = "x"\n[[data.source]]\nname = "a"\nkind = "text"\n[[stage]]\nname = "s"\n')
    with pytest.raises(RecipeError, match=r"'parallel\.pp' is .*pipeline stages"):
        load_recipe(file, [f"parallel.pp={value}"])
