import json

import pytest
import yaml
from support import hostile_recipes, started

import timm_tickets as tt
from timm_tickets.config.schema import explain, json_schema
from timm_tickets.data.datasets import Data
from timm_tickets.training.build import build_model


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
        ("seed=4294967296", ["seed: 4294967296", "less than 4294967296"]),
        ("data.split_seed=4294967296", ["data.split_seed", "less than 4294967296"]),
        ("data.input_img_mode=rgb", ["data.input_img_mode", "'rgb' is no mode of PIL's"]),
        ("data.unreadable=1", ["data.unreadable", "less than 1"]),
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


FOLLOWING = ["training.epochs=3", "seed=7", "model.in_chans=1"]


@pytest.mark.parametrize("again", ["yaml", "loaded"])
def test_what_follows_another_setting_still_does_when_the_recipe_is_read_again(tmp_path, again):
    recipe = tt.load_recipe("digits_imp")
    plain = yaml.safe_load(recipe.to_yaml())
    assert not {"epochs", "seed"} & plain["pruner"].keys()  # nobody has chosen them
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    source = tmp_path / "again.yaml" if again == "yaml" else recipe
    moved = tt.load_recipe(source, FOLLOWING)
    assert moved == tt.load_recipe("digits_imp", FOLLOWING)
    assert (moved.pruner["epochs"], moved.pruner["seed"]) == (3, 7)
    assert (moved.data.in_chans, moved.data.input_img_mode) == (1, "L")
    back = tt.load_recipe(moved, ["model.in_chans=3"])
    assert (back.data.in_chans, back.data.input_img_mode) == (3, "RGB")
    assert moved.hash == tt.load_recipe("digits_imp", [*FOLLOWING, "pruner.epochs=3", "pruner.seed=7"]).hash
    chosen = tt.load_recipe("digits_imp", ["pruner.epochs=15", "pruner.seed=0", "data.input_img_mode=RGB"])
    (tmp_path / "again.yaml").write_text(chosen.to_yaml())
    kept = tt.load_recipe(tmp_path / "again.yaml" if again == "yaml" else chosen, FOLLOWING)
    assert (kept.pruner["epochs"], kept.pruner["seed"], kept.data.input_img_mode) == (15, 0, "RGB")


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_every_seed_that_is_accepted_works(seed):
    recipe = tt.load_recipe("digits_imp", [f"seed={seed}", f"data.split_seed={seed}", "data.img_size=32"])
    assert len(Data(recipe.data)._val) == 144
    build_model(recipe, 10)


def test_the_hash_follows_what_decides_the_result():
    recipe = tt.load_recipe("digits_imp")
    free = ["output=/elsewhere", "training.checkpoint_interval=3", "data.unreadable=0.5"]
    assert tt.load_recipe("digits_imp", free).hash == recipe.hash
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
    by_name = {one["properties"]["name"]["const"]: one for one in schema["properties"]["pruner"]["anyOf"]}
    assert sorted(by_name) == tt.list_pruners()
    assert by_name["imp"]["properties"]["prune_rate"]["default"] == 0.2
    assert schema["additionalProperties"] is False
    keys = set(yaml.safe_load(tt.load_recipe("digits_imp").to_yaml()))
    assert keys | {"extends", "controls"} == set(schema["properties"])  # nobody has chosen any


def keys_of(schema, at=""):
    for key, one in schema.get("properties", {}).items():
        yield f"{at}{key}", one
        yield from keys_of(one, f"{at}{key}.")
    for key, one in schema.get("$defs", {}).items():
        yield from keys_of(one, f"{key}.")
    for one in schema.get("anyOf", ()):
        yield from keys_of(one, at)


def test_every_key_of_a_recipe_and_every_setting_is_explained():
    found = list(keys_of(json_schema()))
    assert len(found) > 290
    assert [key for key, one in found if not one.get("description")] == []
    own = (*map(tt.get_method, tt.list_pruners()), *map(tt.get_tweak, tt.list_tweaks()))
    missing = [(cls.name, key) for cls in own for key, one in cls.__pydantic_fields__.items() if not one.description]
    assert missing == []


def test_every_key_of_a_recipe_can_be_asked_for():
    schema = json_schema()
    parts = {one["$ref"].rpartition("/")[2]: key for key, one in schema["properties"].items() if "$ref" in one}
    told = explain("*")
    for key, one in keys_of(schema):
        first, dot, rest = key.partition(".")
        asked = parts.get(first, first) + dot + rest
        assert any(one["description"][:20] in setting.about for setting in told if setting.name == asked)


def test_the_schema_has_the_tweaks_by_name_or_as_a_list():
    tweaks = json_schema()["$defs"]["RetrainSettings"]["properties"]["tweaks"]["anyOf"]
    assert sorted(tweaks[0]["properties"]) == tweaks[1]["items"]["enum"] == tt.list_tweaks()
    assert tweaks[0]["properties"]["label_smoothing"]["additionalProperties"] is False


def test_the_schema_asks_for_a_whole_recipe_only_where_it_extends_none():
    schema = json_schema()
    assert "required" not in schema
    assert schema["if"] == {"not": {"required": ["extends"]}}
    whole = schema["then"]
    assert set(whole["required"]) == {"model", "pruner"}
    assert whole["properties"] == {"model": {"required": ["model"]}, "pruner": {"required": ["name", "sparsity"]}}


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_recipe_without_a_name_has_its_file_s_and_not_its_base_s(tmp_path):
    write(tmp_path, mine="extends: digits_imp\ntraining: {epochs: 2}\n")
    recipe = tt.load_recipe(tmp_path / "mine.yaml")
    assert (recipe.name, str(recipe.folder)) == ("mine", "output/mine")
    assert tt.load_recipe(tmp_path / "mine.yaml", ["name=other"]).name == "other"


def test_a_recipe_extends_another_one(tmp_path):
    write(
        tmp_path,
        child="extends: digits_imp\nname: child\npruner: {prune_rate: 0.5}\ntraining: {epochs: 2}\n",
        grandchild="extends: child.yaml\nname: grandchild\ntraining: {lr: 0.3}\n",
    )
    base, child = tt.load_recipe("digits_imp"), tt.load_recipe(tmp_path / "child.yaml")
    assert (child.name, child.training.epochs, child.pruner["epochs"], child.pruner["prune_rate"]) == (
        "child",
        2,
        2,
        0.5,
    )
    assert (child.model, child.data, child.source) == (base.model, base.data, base.source)
    assert child.training.model_copy(update={"epochs": base.training.epochs}) == base.training
    assert "extends" not in child.to_yaml()
    (tmp_path / "again.yaml").write_text(child.to_yaml())
    assert tt.load_recipe(tmp_path / "again.yaml") == child
    grandchild = tt.load_recipe(tmp_path / "grandchild.yaml", ["training.epochs=4"])
    assert (grandchild.training.lr, grandchild.training.epochs, grandchild.pruner["prune_rate"]) == (0.3, 4, 0.5)


def test_an_extending_recipe_with_another_pruner_keeps_only_what_every_pruner_has(tmp_path):
    write(tmp_path, child="extends: digits_imp\nname: child\npruner: {name: random, scope: layerwise}\n")
    pruner = tt.load_recipe(tmp_path / "child.yaml").pruner
    assert (pruner["name"], pruner["sparsity"], pruner["scope"]) == ("random", 0.95, "layerwise")
    assert "prune_rate" not in pruner


def test_another_architecture_drops_the_first_ones_own_arguments(tmp_path):
    write(
        tmp_path,
        base="extends: digits_imp\nname: base\nmodel: {model: cifar_resnet20, model_kwargs: {width: 2}}\n",
        same="extends: base.yaml\nname: same\nmodel: {model_kwargs: {shortcut: conv}}\n",
        other="extends: base.yaml\nname: other\nmodel: {model: cifar_conv2, model_kwargs: {bias: false}}\n",
    )
    assert tt.load_recipe(tmp_path / "same.yaml").model.model_kwargs == {"width": 2, "shortcut": "conv"}
    assert tt.load_recipe(tmp_path / "other.yaml").model.model_kwargs == {"bias": False}
    assert tt.load_recipe(tmp_path / "base.yaml", ["model.model=test_vit"]).model.model_kwargs == {}
    assert tt.load_recipe(tmp_path / "base.yaml", ["model.in_chans=1"]).model.model_kwargs == {"width": 2}


def test_extending_what_is_not_there_or_in_a_circle_is_refused(tmp_path):
    write(
        tmp_path,
        lost="extends: digits_im\nname: lost\n",
        none="extends: 3\nname: none\n",
        itself="extends: itself.yaml\nname: itself\n",
        one="extends: two.yaml\nname: one\n",
        two="extends: one.yaml\nname: two\n",
        mixed="extends: digits_imp\nname: mixed\npruner: {name: random}\nmodel: [1]\n",
    )
    for name, words in {
        "lost": "extends: 'digits_im' is unknown; did you mean 'digits_imp'",
        "none": "extends: 3",
        "itself": "itself.yaml -> itself.yaml goes round",
        "one": "one.yaml -> two.yaml -> one.yaml goes round",
        "mixed": "over digits_imp is not a recipe",
    }.items():
        with pytest.raises(tt.SettingError) as error:
            tt.load_recipe(tmp_path / f"{name}.yaml")
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.rotation=15"], "data: rotation: 15 needs crop_padding"),
        (["data.crop_padding=4", "data.aa=rand-m9", "data.reprob=0.1"], "cannot be had with aa, reprob"),
        (["data.crop_padding=-1"], "data.crop_padding"),
        (["data.crop_padding=4", "data.rotation=200"], "data.rotation"),
    ],
)
def test_augmentations_that_exclude_each_other_are_refused(overrides, words):
    with pytest.raises(tt.SettingError) as error:
        tt.load_recipe("digits_imp", overrides)
    assert words in str(error.value)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Loads a recipe of these lines; the environment and the folder above have what it may not read."""
    monkeypatch.setenv("SECRET", hostile_recipes.SECRET)
    path = hostile_recipes.outside(tmp_path)

    def load(*lines, overrides=()):
        path.write_text("\n".join(["name: main", *lines]))
        return tt.load_recipe(path, overrides)

    return load


@pytest.mark.parametrize(
    ("value", "resolver"),
    [
        ("${oc.env:SECRET}", "oc.env"),
        ("${oc.env:SECRET,none}", "oc.env"),
        ("a ${ oc.env:SECRET} b", "oc.env"),
        ("${oc.decode:'${oc.env:SECRET}'}", "oc.decode"),
        ("${oc.create:{}}", "oc.create"),
        ("${oc.${name}:SECRET}", None),
        ("${${name}}", None),
        ("${training.epochs", None),
        ("\\${oc.env:SECRET}", "oc.env"),
    ],
)
@pytest.mark.parametrize("way", ["file", "override", "extended"])
def test_resolvers_are_refused_by_name(recipe, tmp_path, value, resolver, way):
    line = f'source: "{value}"'.replace("\\", "\\\\")
    (tmp_path / "inside" / "beside.yaml").write_text(line if way == "extended" else "extends: digits_imp")
    lines = ["extends: beside.yaml", *([line] if way == "file" else [])]
    with pytest.raises(tt.SettingError, match="recipes may refer to other settings") as error:
        recipe(*lines, overrides=[f"source={value}"] if way == "override" else ())
    assert hostile_recipes.SECRET not in str(error.value)
    assert resolver is None or f"but not to resolvers, such as '{resolver}'" in str(error.value)


def test_references_to_other_settings_stay(recipe):
    lines = (
        "extends: digits_imp",
        "seed: ${training.epochs}",
        "source: of ${name}, ${model.model}",
        "output: o/${name}",
    )
    found = recipe(*lines, overrides=["training.epochs=7", "training.warmup_epochs=${training.epochs}"])
    assert (found.seed, found.training.warmup_epochs) == (7, 7)
    assert (found.source, str(found.output)) == ("of main, test_resnet", "o/main")


@pytest.mark.parametrize(
    "lines",
    [
        ["source: ${nothing}"],
        ["source: ${training}"],
        ["source: ${training.lr.x}"],
        ["source: ${name}", "name: ${source}"],
        ["output: ${source}", "source: a ${name}"],
        ["source: '" + "${output}" * 1000 + "'", "output: " + "x" * 5000],
        [f"b{i}: ${{b{i + 1}}}${{b{i + 1}}}" for i in range(40)],
    ],
)
def test_references_that_lead_nowhere_or_grow_are_refused(recipe, lines):
    with pytest.raises(tt.SettingError, match=r"a reference names one setting|grows to more than|found duplicate key"):
        recipe("extends: digits_imp", *lines)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("../outside.yaml", "lies outside the folder"),
        ("below/../../outside.yaml", "lies outside the folder"),
        ("link.yaml", "lies outside the folder"),
        ("/etc/passwd", "lies outside the folder"),
        ("../outside", "lies outside the folder"),
        ("loop.yaml", "'loop.yaml' is unknown"),
        ("beside.txt", "'beside.txt' is unknown"),
        ("x" * 5000, "... (4,880 more)' is unknown"),
        ('"\\0.yaml"', "control character"),
        ("nothing.yaml", "or the path of a .yaml file beside this one"),
    ],
)
def test_extends_stays_in_its_folder(recipe, base, words):
    with pytest.raises(tt.SettingError) as error:
        recipe(f"extends: {base}")
    assert words in str(error.value)
    assert hostile_recipes.SECRET not in str(error.value)
    assert len(str(error.value)) < 4096


def test_extends_beside_and_below_and_shipped(recipe):
    assert recipe("extends: beside.yaml").training == recipe("extends: below/one.yaml").training
    assert recipe("extends: digits_imp").name == "main"


@pytest.mark.parametrize(
    "text",
    [
        f"{hostile_recipes.SECRET}: [",
        f"{hostile_recipes.SECRET} 'a\n: b",
        f"{hostile_recipes.SECRET}:x:0\n{hostile_recipes.SECRET}:y:1",
        f"*{hostile_recipes.SECRET}",
        f"a: !{hostile_recipes.SECRET} b",
        f"{hostile_recipes.SECRET}: 1\n{hostile_recipes.SECRET}: 2",
        f"%{hostile_recipes.SECRET}\n---\na: 1",
        f'a: "\\{hostile_recipes.SECRET}"',
        f"a: !!int {hostile_recipes.SECRET}",
        f"- {hostile_recipes.SECRET}",
    ],
)
def test_what_is_no_recipe_is_not_repeated(recipe, tmp_path, text):
    """A file beside the recipe, which its reader may not know: the message has the place, not the words."""
    (tmp_path / "inside" / "beside.yaml").write_text(text)
    with pytest.raises(tt.SettingError, match=r"beside\.yaml is not a recipe: ") as error:
        recipe("extends: beside.yaml")
    assert hostile_recipes.SECRET not in str(error.value)


LAUGHS = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (LAUGHS, "YAML node expansion exceeds the configured limit of 10000"),
        (["a: " + "[" * 400_000], "20 deep"),
        (["- " * 400_000], "not"),
        (["a: [" + "1," * 20_000 + "]"], "more than 10,000 keys and values"),
        (["a: " + "1:" * 100_000 + "1"], "more than 10,000 characters"),
        (["# " + "x" * 2**20], "more than 1,048,576 bytes"),
        (["source: " + "${" * 4000], "recipes may refer"),
        (["seed: " + "9" * 5000], "line 2, column 7: a number has more than 1,000 digits"),
        (["seed: 0x" + "f" * 5000], "a number has more than 1,000 digits"),
        (["seed: 0x" + "f" * 500], "numbers end at 2^64 - 1"),
        (["seed: 18446744073709551616"], "numbers end at 2^64 - 1"),
        (["training: {epochs: -18446744073709551616}"], "numbers end at 2^64 - 1"),
        (["a: !!int ''"], "a value that cannot be read"),
        (["a: !!timestamp x"], "a value that cannot be read"),
        (["a: !!python/object/apply:pathlib.Path [/etc]"], "a PosixPath is not plain data"),
        (["a: !!binary aGk="], "a bytes is not plain data"),
        (["1: 2"], "1 is not a name"),
        (['source: "\\e[2J"'], "a control character"),
        (["source: \u202egnp"], "a control character"),
        (["x" * 1000 + ": 1"], "more)' is unknown"),
        (["training: " + "x" * 3000], "more)' is not valid"),
        (["retrain: {tweaks: [" + "x" * 3000 + "]}"], "retrain.tweaks"),
    ],
)
def test_a_recipe_out_of_bounds_is_refused_in_a_short_message(recipe, lines, words):
    with pytest.raises(tt.SettingError) as error:
        recipe(*lines)
    assert words in str(error.value)
    assert len(str(error.value)) < 4096
    assert all(c.isprintable() or c == "\n" for c in str(error.value))


@pytest.mark.parametrize(
    "override",
    [
        "seed=" + "9" * 5000,
        "seed=0x" + "f" * 5000,
        "a=" + "[" * 400_000,
        "a" + ".a" * 3000 + "=1",
        "a=!!int ''",
        "a.=: :",
    ],
)
def test_an_override_out_of_bounds_is_refused(override):
    with pytest.raises(tt.SettingError, match="--set: ") as error:
        tt.load_recipe("digits_imp", [override])
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("count", [100, pytest.param(300, marks=pytest.mark.slow)])
def test_hostile_recipes_load_or_are_refused(tmp_path, count):
    out = started.run(hostile_recipes.__file__, tmp_path, count)
    assert out.returncode == 0, out.stderr
    result = json.loads(out.stdout)
    assert result["loaded"] + result["refused"] == result["files"] == count
    assert result["loaded"] > count / 30
    assert result["refused"] > count * 2 / 3
    assert result["memory"] < 64 * 2**20
