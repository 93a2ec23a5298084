"""Which channels and heads of timm's architectures can go as a whole: the smallest of each of its modules.

    OMP_NUM_THREADS=1 python benchmarks/groups.py [--records output/groups.jsonl] [--modules resnet regnet]

Each is built with random weights; its groups are found in a forward pass and tried in double precision (the columns
that read half of the channels are zeroed, the rows that make them are changed at random, and no output may move; then
the other half). Half of every family is then removed by a ticket, rows and columns, and the output must be that of the
columns alone. A line a model goes to the records, and a second call goes on where the first stopped. Printed: Markdown,
as kept in results/groups.md.
"""

import argparse
import copy
import gc
import importlib
import json
import platform
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch

from timm_tickets.core.errors import SettingError
from timm_tickets.sparse.subnet import Subnet
from timm_tickets.structure.find import find_groups, images_for
from timm_tickets.structure.groups import Groups, halves
from timm_tickets.structure.verify import outputs, randomised

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
zoo: Any = importlib.import_module("test_zoo")  # the tests choose the smallest
SMALLEST, build = zoo.SMALLEST, zoo.build


def removed(model: torch.nn.Module, groups: Groups) -> tuple[float, float]:
    """With half of every family gone: largest change of an output against the columns alone, and weights left."""
    model = randomised(copy.deepcopy(model).double().eval())
    images = images_for(copy.deepcopy(model).float()).double()
    gone = next(halves(groups))
    found = []
    for reads_only in (True, False):
        work = copy.deepcopy(model)
        Subnet(work, tuple(groups.shapes)).set_mask_(groups.mask(gone, reads_only))
        found.append(outputs(work, images))
    change = (found[0] - found[1]).abs().max() / found[0].abs().max()
    masks = groups.mask(gone).values()
    return float(change), sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def record(module: str, classifier: bool) -> dict[str, Any]:
    """What was found in the smallest architecture of a module, in JSON types."""
    name = SMALLEST[module]
    model, began = build(name, 0), time.perf_counter()
    row = {"module": module, "name": name, "parameters": sum(p.numel() for p in model.parameters())}
    try:
        groups = find_groups(model, classifier=classifier)
    except SettingError as error:
        return row | {"error": str(error), "wall": time.perf_counter() - began}
    row |= {"groups": len(groups), "families": len(groups.families), "share": groups.share()}
    row |= {"heads": sum(one.count for one in groups.families if one.kind == "head")}
    row |= {"tried": groups.difference, "seconds": groups.seconds}
    row |= {"left": Counter(why.split(" by ")[0] for _, why in groups.left).most_common(4)}
    if len(groups):
        row["difference"], row["kept"] = removed(model, groups)
    return row | {"wall": time.perf_counter() - began}


def table(rows: list[dict[str, Any]]) -> None:
    good = [row for row in rows if row.get("groups") and max(row["tried"], row["difference"]) < 1e-9]
    share, kept = (sorted(row[key] for row in good) for key in ("share", "kept"))
    worst = max(max(row["tried"], row["difference"]) for row in good)
    print(
        f"{len(good)} of {len(rows)} modules have groups, each of which held. Of the prunable weights a median of ",
        end="",
    )
    print(
        f"{share[len(share) // 2]:.2f} lie in them, at least {share[0]:.2f}; with half of each family gone a ", end=""
    )
    print(f"median of {kept[len(kept) // 2]:.2f} stay. Largest difference {worst:.1g} of the largest output; ", end="")
    print(f"longest {max(row['seconds'] for row in good):.0f} s of one core.\n")
    print("| module | architecture | M parameters | groups (heads) | families | of the weights ", end="")
    print("| half gone, kept | difference | s | in no group |\n|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        size = f"| {row['module']} | {row['name']} | {row['parameters'] / 1e6:.1f} "
        if "error" in row:
            print(f"{size}| | | | | | {row['wall']:.0f} | {row['error']} |")
            continue
        change = f"{max(row['tried'], row['difference']):.1g}" if row["groups"] else ""
        kept = f"{row['kept']:.2f}" if row["groups"] else ""
        why = "; ".join(f"{cause} ({count})" for cause, count in row["left"])
        print(f"{size}| {row['groups']:,} ({row['heads']}) | {row['families']} | {row['share']:.2f} | {kept} ", end="")
        print(f"| {change} | {row['seconds']:.0f} | {why} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=Path("output/groups.jsonl"))
    parser.add_argument("--modules", nargs="*", default=list(SMALLEST))
    parser.add_argument("--classifier", action="store_true", help="the columns of the classifier may go too")
    args = parser.parse_args()
    args.records.parent.mkdir(parents=True, exist_ok=True)
    lines = args.records.read_text().splitlines() if args.records.is_file() else []
    rows = {row["module"]: row for row in map(json.loads, lines)}
    with args.records.open("a") as file:
        for module in args.modules:
            if module not in rows:
                rows[module] = record(module, args.classifier)
                file.write(json.dumps(rows[module]) + "\n")
                file.flush()
                gc.collect()
    print(f"{date.today()}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}\n")
    table([rows[module] for module in args.modules])


if __name__ == "__main__":
    main()
