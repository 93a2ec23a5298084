import json

import pytest
import yaml

import timm_tickets as tt
from timm_tickets.recipe import json_schema


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.lrr=1", ["training", "'lrr'", "did you mean 'lr'", "momentum"]),
        ("pruner.prunerate=0.1", ["pruner", "'prunerate'", "did you mean 'prune_rate'"]),
        ("datum.x=1", ["'datum'", "did you mean 'data'"]),
        ("pruner.name=impp", ["'impp'", "did you mean 'imp'", "magnitude"]),
        ("model.model=test_resnt", ["model.model", "did you mean 'test_resnet'"]),
        ("training.opt=sgdd", ["training.opt", "did you mean 'sgd'"]),
        ("training.sched=cosin", ["training.sched", "did you mean 'cosine'"]),
        ("pruner.sparsity=1", ["pruner.sparsity", "1", "less than 1"]),
        ("pruner.sparsity=-0.1", ["pruner.sparsity", "-0.1", "greater than or equal to 0"]),
        ("pruner.rewind=2epochs", ["pruner.rewind", "2epochs"]),
        ("training.epochs=0", ["training.epochs", "greater than or equal to 1"]),
        ("training.batch_size=many", ["training.batch_size", "many"]),
        ("name=../x", ["name", "../x"]),
        ("nonsense", ["--set", "key=value"]),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_valid(override, words):
    with pytest.raises(tt.SettingError) as error:
        tt.load_recipe("digits_imp", [override])
    for word in words:
        assert word in str(error.value)


def test_several_wrong_settings_are_all_told():
    with pytest.raises(tt.SettingError) as error:
        tt.load_recipe("digits_imp", ["training.lr=-1", "data.val_fraction=2"])
    assert len(str(error.value).splitlines()) == 2


def test_overrides_defaults_and_what_the_pruner_inherits():
    recipe = tt.load_recipe("digits_imp", ["pruner.sparsity=0.5", "training.epochs=3", "seed=7"])
    assert recipe.pruner["sparsity"] == 0.5
    assert recipe.pruner["epochs"] == 3  # the training's, where the pruner has none of its own
    assert recipe.pruner["seed"] == 7
    assert recipe.pruner["rewind"] == "0ep"
    assert tt.load_recipe("digits_imp", ["pruner.epochs=2"]).pruner["epochs"] == 2


def test_the_resolved_recipe_is_a_recipe_and_means_the_same(tmp_path):
    recipe = tt.load_recipe("digits_imp")
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert tt.load_recipe(tmp_path / "again.yaml") == recipe
    assert tt.load_recipe(recipe) == recipe


def test_the_hash_follows_what_decides_the_result():
    recipe = tt.load_recipe("digits_imp")
    assert tt.load_recipe("digits_imp", ["output=/elsewhere", "training.checkpoint_interval=3"]).hash == recipe.hash
    assert tt.load_recipe("digits_imp", ["seed=1"]).hash != recipe.hash


def test_naming_another_pruner_drops_the_first_ones_own_settings():
    recipe = tt.load_recipe("digits_imp", ["pruner.name=random", "pruner.scope=layerwise"])
    assert recipe.pruner["sparsity"] == 0.95
    assert recipe.pruner["scope"] == "layerwise"
    assert "prune_rate" not in recipe.pruner
    with pytest.raises(tt.SettingError, match="'prune_rate' is unknown"):
        tt.load_recipe("digits_imp", ["pruner.name=random", "pruner.prune_rate=0.1"])


def test_yaml_is_only_data(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: !!python/object/apply:os.system ['touch /tmp/owned']\n")
    with pytest.raises(tt.SettingError, match="not a recipe"):
        tt.load_recipe(bad)
    for text in ("[1, 2]", "just text", "a: [", "name: x\n", ""):
        bad.write_text(text)
        with pytest.raises(tt.SettingError):
            tt.load_recipe(bad)


def test_unknown_recipe_names_the_shipped_ones():
    with pytest.raises(tt.SettingError, match="did you mean 'digits_imp'"):
        tt.load_recipe("digits_im")


@pytest.mark.parametrize("name", tt.list_recipes())
def test_every_shipped_recipe_resolves_under_its_own_name_with_a_source(name):
    recipe = tt.load_recipe(name)
    assert recipe.name == name
    assert recipe.source


def test_the_schema_lists_every_pruner_with_its_settings():
    schema = json.loads(json.dumps(json_schema()))
    by_name = {one["properties"]["name"]["const"]: one for one in schema["properties"]["pruner"]["oneOf"]}
    assert sorted(by_name) == tt.list_pruners()
    assert by_name["imp"]["properties"]["prune_rate"]["default"] == 0.2
    assert schema["additionalProperties"] is False
    keys = set(yaml.safe_load(tt.load_recipe("digits_imp").to_yaml()))
    assert keys == set(schema["properties"])
