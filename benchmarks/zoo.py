"""What may be pruned in every architecture that timm lists, and which of them it covers least.

    python benchmarks/zoo.py [--records output/zoo.jsonl] [--names '*']

Models are built on the meta device, where no weight takes memory; one that cannot be is built for real. A line a model
goes to the records, and a second call goes on where the first stopped. Covered is the share of the parameters outside
the classifier, which is left alone by choice. Printed: Markdown, as kept in results/zoo.md.
"""

import argparse
import gc
import json
import platform
import time
from collections import Counter, defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch

from timm_tickets.sparse.prunable import classifier_names, inspect_model

ENOUGH = 0.9
PLAIN = ("convolution", "linear", "vector")


def build(name: str) -> tuple[torch.nn.Module, str]:
    try:
        with torch.device("meta"):
            return timm.create_model(name), "meta"
    except (RuntimeError, NotImplementedError):  # a constructor that computes with its weights
        return timm.create_model(name), "real"


def record(name: str) -> dict[str, Any]:
    """What was found in one architecture: counts of parameters, in JSON types."""
    began = time.perf_counter()
    model, device = build(name)
    parts = inspect_model(model)
    modules = dict(model.named_modules())
    left: Counter[str] = Counter()
    raw: dict[str, set[str]] = defaultdict(set)
    for part in parts:
        if part.why_not:
            left["classifier" if part.why_not == "classifier" else part.kind] += part.size
        if part.kind not in PLAIN:
            layer, _, leaf = part.name.rpartition(".")
            raw[part.kind].add(f"{type(modules[layer]).__name__}.{leaf}")
    return {
        "name": name,
        "device": device,
        "total": sum(part.size for part in parts),
        "prunable": sum(part.size for part in parts if not part.why_not),
        "layers": sum(not part.why_not for part in parts),
        "left": dict(left),
        "raw": {kind: sorted(names) for kind, names in raw.items()},
        "classifier": list(classifier_names(model)),
        "unknown_classifier": [head for head in classifier_names(model) if head not in modules],
        "seconds": round(time.perf_counter() - began, 2),
    }


def covered(row: dict[str, Any]) -> float:
    return row["prunable"] / (row["total"] - row["left"].get("classifier", 0))


def table(rows: list[dict[str, Any]]) -> None:
    shares = sorted(covered(row) for row in rows)
    heads = Counter(len(row["classifier"]) for row in rows)
    print(f"{len(rows)} architectures; {sum(row['device'] == 'meta' for row in rows)} built on the meta device.")
    print(f"Covered: median {shares[len(shares) // 2]:.4f}, least {shares[0]:.4f}, ", end="")
    print(f"below {ENOUGH}: {sum(share < ENOUGH for share in shares)}.")
    print("Of all parameters, the classifier counted: median ", end="")
    print(f"{sorted(row['prunable'] / row['total'] for row in rows)[len(rows) // 2]:.4f}.")
    print(f"Classifier modules named: {', '.join(f'{n} in {count}' for n, count in sorted(heads.items()))}; ", end="")
    wrong = [row["name"] for row in rows if row["unknown_classifier"]]
    print(f"naming one that is not there: {', '.join(wrong) or 'none'}.\n")
    print("| architecture | parameters | prunable | covered | left alone |\n|---|---|---|---|---|")
    for row in sorted(rows, key=covered):
        if covered(row) < ENOUGH:
            rest = row["total"] - row["left"].get("classifier", 0)
            why = [f"{kind} {n / rest:.1%}" for kind, n in Counter(row["left"]).most_common() if kind != "classifier"]
            counts = f"{row['total']:,} | {row['prunable']:,} | {covered(row):.1%}"
            print(f"| {row['name']} | {counts} | {', '.join(why[:3])} |")
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for kind, names in row["raw"].items():
            found[kind].update(names)
    print("\nWhat is neither a convolution's or linear layer's weight nor a plain vector, and in how many models:\n")
    print("| taken for | parameters |\n|---|---|")
    for kind, names in sorted(found.items()):
        print(f"| {kind} | {', '.join(f'{name} {count}' for name, count in names.most_common())} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=Path("output/zoo.jsonl"))
    parser.add_argument("--names", default="*")
    args = parser.parse_args()
    names = timm.list_models(args.names)
    args.records.parent.mkdir(parents=True, exist_ok=True)
    lines = args.records.read_text().splitlines() if args.records.is_file() else []
    rows = {row["name"]: row for row in map(json.loads, lines)}
    with args.records.open("a") as file:
        for name in names:
            if name not in rows:
                rows[name] = record(name)
                file.write(json.dumps(rows[name]) + "\n")
                file.flush()
                gc.collect()
    print(f"{date.today()}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}\n")
    table([rows[name] for name in names])


if __name__ == "__main__":
    main()
