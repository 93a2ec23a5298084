"""Recipes as a stranger might send them. Run as a program it loads many and says how that went, as JSON.

    python hostile_recipes.py FOLDER COUNT

COUNT recipes are made in FOLDER. Each has to load, or be refused with a SettingError that repeats nothing of a file
outside the recipe's folder, nothing of the environment, and no control character.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

import yaml
from hostile_files import ESC, peak

SECRET = "hunter2-5f1e"
DIGITS = "9" * 5000
VALUES = [
    *(
        "${oc.env:SECRET}",
        "${oc.env:SECRET,x}",
        "${oc.decode:'${oc.env:SECRET}'}",
        "a${oc.env:HOME}b",
        "${oc.create:{}}",
    ),
    *("${oc.dict.keys:training}", "${oc.select:training.lr}", "${ oc.env:SECRET }", "${oc.${x}:SECRET}", "${training}"),
    *(
        "${training.epochs}",
        "${name}",
        "${source}${source}",
        "x_${name}",
        "${nothing}",
        "${.epochs}",
        "${name",
        "$name",
    ),
    *("${" * 3000, "${a" * 3000 + "}" * 3000, "\\${oc.env:SECRET}", "$${oc.env:SECRET}", "${training.lr.x}", "???"),
    *(DIGITS, "-" + DIGITS, "0x" + "f" * 5000, "0b" + "1" * 9000, "1:" * 4000 + "1", "1_" * 4000, "1e999999", ".nan"),
    *(
        "!!int ''",
        "!!float ''",
        "!!bool x",
        "!!timestamp x",
        "!!binary x",
        "!!null 3",
        "!!python/object/apply:os.abort []",
    ),
    *(
        "!!python/object/apply:pathlib.Path [/etc]",
        "!!set {a, b}",
        "!!omap [a: 1]",
        "2001-01-01",
        "!x y",
        "&a [*a]",
        "*b",
    ),
    *(
        f'"{json.dumps(ESC)[1:-1]}"',
        '"\\e[2J\\r"',
        '"\\u202egnp"',
        "[red]",
        "'" + "x" * 9999 + "'",
        "'" + "y" * 11_000 + "'",
    ),
    *(
        "[" * 30 + "]" * 30,
        "[" * 9000,
        "{" * 9000,
        "- " * 9000,
        "? " * 9000,
        "{a: " * 15 + "1" + "}" * 15,
        "[1, 2]",
        "{}",
    ),
    *(
        "null",
        "true",
        "3",
        "-1",
        "0.5",
        "{name: imp}",
        "digits_imp",
        "*x",
        "<<: *x",
        "{<<: {epochs: 2}}",
        "{1: 2}",
        "{[1]: 2}",
    ),
    *(
        "[" + "1," * 12_000 + "]",
        str(2**32),
        str(2**63),
        str(2**64 - 1),
        str(2**64),
        "\x00",
        "{? {a: 1} : 2}",
        "|\n  a\n  b",
    ),
]
BASES = [
    "digits_imp",
    "digits_im",
    "beside.yaml",
    "below/one.yaml",
    "../outside.yaml",
    "/etc/passwd",
    "link.yaml",
    "x" * 5000,
]
BASES += [
    "../outside",
    "below/../../outside.yaml",
    "main.yaml",
    "~/.ssh/id",
    "beside.txt",
    "loop.yaml",
    '"\\0"',
    "3",
    "[a]",
]
KEYS = ["name", "seed", "source", "output", "model", "data", "pruner", "training", "retrain", "extends", "nothing"]
KEYS += ["parallel", "controls", "processes_per_run", '"\\e[2J"', "? [1, 2]\n", "<<", "1", "null", "x" * 2000]
FINE = ["seed: ${training.epochs}", "source: of ${name}", "extends: beside.yaml", "training: {epochs: 3, lr: 1e-2}"]
FINE += ["training: &t {epochs: 3}", "data: {mean: [0.1, 0.2, 0.3]}", "output: out/${name}", "retrain: {epochs: 1}"]
DEEP = [
    "training.lr",
    "training.epochs",
    "training.opt_args",
    "model.model",
    "model.model_kwargs",
    "model.gp",
    "data.mean",
]
DEEP += [
    "pruner.name",
    "pruner.seed",
    "pruner.sparsity",
    "retrain.tweaks",
    "retrain.tweaks.x",
    "data.classes",
    "a.b",
    "a..b",
]
DEEP += [".", "a[0]", "model.model_kwargs." + ".".join("a" * 15), ".".join("a" * 300), "training"]


def forged(generator):
    """The text of a recipe, and overrides."""
    tree = {
        "name": "main",
        "model": {"model": "test_resnet"},
        "pruner": {"name": "imp", "sparsity": 0.5},
        "training": {},
    }
    lines = []
    for _ in range(generator.choice([1, 1, 2, 3])):
        key, value = generator.choice(KEYS), generator.choice(VALUES)
        part = generator.choice(["training", "pruner", "model", "data", "retrain"])
        kind = generator.randrange(12)
        if kind < 2:
            tree.pop(key, None)
            lines.append(f"{key}: {value}")
        elif kind == 2:
            tree.pop(part, None)
            inner = generator.choice(["lr", "epochs", "name", "seed", "model", "tweaks", "opt_args", "mean", "classes"])
            lines.append(f"{part}:\n  {inner}: {value}")
        elif kind == 3:
            lines.append(f"extends: {generator.choice(BASES)}")
        elif kind == 4:
            levels = generator.choice([3, 8, 40])
            lines.append("a0: &a0 [x, x, x, x]")
            lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
        elif kind == 5:
            lines += [f"b{i}: ${{b{i + 1}}}${{b{i + 1}}}" for i in range(40)] + ["b40: x"]
        elif kind > 6:
            lines.append(generator.choice(FINE))
        else:
            lines.append(generator.choice([value, "---", "...", "\t", "a: b: c", ": :", "name: twice", "- 1"]))
    text = yaml.safe_dump(tree, sort_keys=False) + "\n".join(lines) + "\n"
    data = text.encode(errors="replace")
    if generator.random() < 0.1:
        place = generator.randrange(len(data))
        data = (
            data[:place] + generator.choice([b"\xff", b"\x00", b"\x1b[2J", b"\xe2\x80\xae", b"'", b'"']) + data[place:]
        )
    if generator.random() < 0.02:
        data += b"# " + b"x" * 2_000_000
    overrides = []
    if generator.random() < 0.3:
        overrides.append(
            f"{generator.choice([*KEYS, *DEEP])}{generator.choice(['=', '=', ''])}{generator.choice(VALUES)}"
        )
    return data, overrides


def outside(folder):
    """Files that a recipe in folder/inside may not read, and some that it may."""
    inside = folder / "inside"
    (inside / "below").mkdir(parents=True, exist_ok=True)
    secret = f"source: {SECRET}\n{SECRET}: 1\nname: outside\n"
    (folder / "outside.yaml").write_text(secret)
    (inside / "beside.yaml").write_text("extends: digits_imp\nname: beside\n")
    (inside / "beside.txt").write_text(f"{SECRET}:x:0:0\n{SECRET} 'a\n")
    (inside / "below" / "one.yaml").write_text("extends: digits_imp\nname: below\n")
    for name, target in (("link.yaml", folder / "outside.yaml"), ("loop.yaml", inside / "loop.yaml")):
        (inside / name).unlink(missing_ok=True)
        (inside / name).symlink_to(target)
    return inside / "main.yaml"


def main(folder, number):
    os.environ["SECRET"] = SECRET
    import timm_tickets as tt

    path, generator = outside(folder), random.Random(0)
    tt.load_recipe("digits_imp")
    result = {"files": 0, "loaded": 0, "refused": 0, "slowest": 0.0, "memory": 0}
    for _ in range(number):
        data, overrides = forged(generator)
        path.write_bytes(data)
        before, begin = peak(reset=True), time.perf_counter()
        try:
            recipe = tt.load_recipe(path, overrides)
            told = recipe.to_yaml() + recipe.hash
            result["loaded"] += 1
        except tt.SettingError as error:
            told = str(error)
            assert len(told) <= 4096, told[:5000]
            result["refused"] += 1
        except BaseException:
            print(data[:3000], overrides, file=sys.stderr)
            raise
        assert SECRET not in told, (data, overrides, told)
        assert all(c.isprintable() or c == "\n" for c in told), (data, overrides, told)
        result["files"] += 1
        result["slowest"] = max(result["slowest"], round(time.perf_counter() - begin, 2))
        result["memory"] = max(result["memory"], peak() - before)
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
