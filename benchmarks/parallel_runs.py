"""Wall time of COLT's search rounds by `parallel: runs` on several processes against one process, one thread each.

    python benchmarks/parallel_runs.py [--epochs 4] [--pairs 3] [--processes 2] [--card] [--set KEY=VALUE ...]

Without --card it is done on CPUs; with it the processes share the cards there are, by deterministic algorithms.
Searches on one and on several processes alternate, so that what else the machine does hits both. Timed is each round,
from its first process beginning a run to its last one having gathered every end; start-up and the ticket's own training
are left out. Printed: seconds of all rounds together, and the ratio, as a Markdown table. The two tickets have to be
equal.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

SETTINGS = ["pruner.name=colt", "pruner.partitions=2", "pruner.prune_rate=0.4", "pruner.sparsity=0.8", "controls=[]"]


def timed_search(overrides: list[str], record: Path) -> None:
    """In a process of its own: search, and write down when each round of this process began and ended."""
    import io

    from rich.console import Console

    import timm_tickets as tt
    from timm_tickets.pruning.pruner import Pruner

    rounds: list[tuple[float, float]] = []
    original: Any = Pruner._round

    def timed(self: Any, requests: Any) -> Any:
        began = time.time()  # the same clock in all processes of a machine
        ends = yield from original(self, requests)
        rounds.append((began, time.time()))
        return ends

    Pruner._round = timed
    result = tt.search("digits_imp", overrides, console=Console(file=io.StringIO()))
    told = {"rounds": rounds, "fingerprint": result.ticket.fingerprint}
    record.with_name(f"{record.name}.{os.environ.get('RANK', '0')}").write_text(json.dumps(told))


def measure(processes: int, overrides: list[str], card: bool) -> tuple[list[float], str]:
    """Seconds of each round, and the ticket's fingerprint."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if card else {"ACCELERATE_USE_CPU": "true"})
    with tempfile.TemporaryDirectory() as place:
        record = Path(place) / "times"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(launch if processes > 1 else []), __file__, "--record", str(record)]
        for one in [*overrides, f"output={place}/run"]:
            command += ["--set", one]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        told = [json.loads(path.read_text()) for path in sorted(Path(place).glob("times.*"))]
    assert len(told) == processes
    assert len({one["fingerprint"] for one in told}) == 1
    by_round = list(zip(*(one["rounds"] for one in told), strict=True))
    seconds = [max(end for _, end in one) - min(began for began, _ in one) for one in by_round]
    return seconds, told[0]["fingerprint"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--card", action="store_true")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.record is not None:
        return timed_search(args.set, args.record)
    overrides = [*SETTINGS, f"training.epochs={args.epochs}", "training.deterministic=true", *args.set]
    import timm
    import torch

    versions = f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"
    device = torch.cuda.get_device_name() if args.card else "cpu"
    print(f"{date.today()}, {versions}, {device}, {os.cpu_count()} cores, 1 thread a process, {' '.join(overrides)}\n")
    print(f"| pair | load before | rounds | s, 1 process | s, {args.processes} processes | ratio | same ticket |")
    print("|---|---|---|---|---|---|---|")
    ratios = []
    for pair in range(1, args.pairs + 1):
        load = os.getloadavg()[0]
        (one, first), (two, second) = (measure(count, overrides, args.card) for count in (1, args.processes))
        ratios.append(sum(one) / sum(two))
        same = "yes" if first == second else "NO"
        row = f"| {pair} | {load:.1f} | {len(one)} | {sum(one):.1f} | {sum(two):.1f} | {ratios[-1]:.2f} | {same} |"
        print(row, flush=True)
    print(f"\nmedian ratio {statistics.median(ratios):.2f} of {args.processes}")


if __name__ == "__main__":
    main()
