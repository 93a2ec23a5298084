#!/usr/bin/env bash
# What only a card can show, within 25 minutes on a bare machine with one card and no network.
#
#     benchmarks/on_card.sh --data DIR [--wheels DIR] [--out DIR] [--work DIR] [--minutes 9]
#     benchmarks/on_card.sh --rehearse        # the same on CPUs, everything tiny; no card, no data needed
#     benchmarks/on_card.sh --packages        # the packages to bring, with the versions that are installed here
#
# Call it again, with the same words, until it says that all is done. A call ends itself after --minutes. Parts that are
# done are not run again; one that was cut short goes on where it was. Each part has a limit of its own: one that has
# used it up waits until the others have had their turn.
#
# Bring:
# - this repository; the script is called anywhere in it, and writes below --work only (output/on_card, which git
#   ignores): keep that folder between calls;
# - Python 3.10 or later with torch and torchvision as `python3`, or as PYTHON says, with pip;
# - --wheels DIR, where packages are missing: they are unpacked below --work. On a machine that has them, and a network:
#     benchmarks/on_card.sh --packages | xargs pip download --no-deps --only-binary :all: --dest wheels \
#       --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64
#   They may come in several calls;
# - --data DIR, CIFAR-10: image folders DIR/train/CLASS/*.png and DIR/test/CLASS/*.png, or files DIR/*.npz with x_train
#   (n, 32, 32, 3) uint8, y_train, x_test, y_test, of which each may hold a part. It may come in several calls too: until
#   all 60,000 images are there, only the parts that need them wait.
#
# Left in --out (by default $OUT, else WORK/tables), after each part: on_card.md with the versions and what became of
# each part, search_speed.md, search_speed_large.md, papers.md, shared_card.md, and in two files, as a machine may give
# few back, logs.txt and rows.txt with all that the tables are made of. Exit code: 0 all is done, 3 some of it is left for
# another call, 1 something has failed (the same command tries it again).
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}

packages() { # what the package and its tests need, and what that needs, but torch and what comes with it
  cd "$repository"
  "$python" - <<'PYTHON'
import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

there = re.compile("torch$|torchvision$|triton|nvidia|cuda")
waiting = [*tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]]
waiting += ["pytest", "hypothesis", "torch-pruning"]
found = {}
while waiting:
    needed = Requirement(waiting.pop())
    name = needed.name.lower().replace("_", "-")
    if name in found or there.match(name) or not (needed.marker is None or needed.marker.evaluate({"extra": ""})):
        continue
    one = distribution(name)
    found[name] = one.version
    waiting += one.requires or ()
print(*(f"{name}=={version}" for name, version in sorted(found.items())), sep="\n")
PYTHON
}

data= wheels= minutes=9 rehearse= work=$repository/output/on_card out=${OUT:-}
while [ $# -gt 0 ]; do
  case $1 in
    --data) data=$2; shift ;;
    --wheels) wheels=$2; shift ;;
    --out) out=$2; shift ;;
    --work) work=$2; shift ;;
    --minutes) minutes=$2; shift ;;
    --rehearse) rehearse=yes ;;
    --packages) packages; exit ;;
    *) echo "error: '$1' is not known; see the top of $0" >&2; exit 2 ;;
  esac
  shift
done
for folder in "$data" "$wheels"; do
  [ -z "$folder" ] || [ -d "$folder" ] || { echo "error: '$folder' is no folder" >&2; exit 2; }
done
[ -n "$data$rehearse" ] || { echo "error: --data is not given; see the top of $0" >&2; exit 2; }
out=${out:-$work/tables}
mkdir -p "$work/state" "$work/results" "$out"
absolute() { [ -z "$1" ] || (cd "$1" && pwd); }
data=$(absolute "$data") wheels=$(absolute "$wheels") work=$(absolute "$work") out=$(absolute "$out")
deadline=$((SECONDS + minutes * 60 - 50)) # what is stopped has this long to save
export PYTHONPATH="$work/site:$repository" OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} PYTHONUNBUFFERED=1
cd "$repository"

# What is missing

if [ -n "$wheels" ] && [ "$(ls "$wheels")" != "$(cat "$work/state/wheels" 2>/dev/null)" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$work/site" "$wheels"/*.whl
  ls "$wheels" >"$work/state/wheels"
fi
needed="torch torchvision timm accelerate huggingface_hub safetensors constriction pydantic omegaconf yaml typer rich"
needed="$needed lazy_loader matplotlib packaging sklearn scipy jinja2 psutil pytest hypothesis torch_pruning"
missing=$("$python" -c "
import sys
from importlib.util import find_spec
print(*(name for name in sys.argv[1:] if find_spec(name) is None))" $needed)
if [ -n "$missing" ]; then
  echo "error: missing here: $missing; bring them with --wheels (see the top of $0)" >&2
  exit 1
fi
if [ -z "$rehearse" ] && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "error: torch sees no card here; --rehearse does without" >&2
  exit 1
fi

images() { # puts CIFAR-10 together as image folders; whether it is whole
  "$python" - "$data" "$work/data/cifar10" "$rehearse" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
from PIL import Image

source, target, rehearse = Path(sys.argv[1] or "."), Path(sys.argv[2]), sys.argv[3]
wanted = {"train": 200, "test": 50} if rehearse else {"train": 50_000, "test": 10_000}
if all((source / split).is_dir() for split in wanted) and not target.exists():
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.resolve())
packed = sorted(source.glob("*.npz")) if not target.is_symlink() else []
for split, count in wanted.items():
    done = target / f"{split}.done"
    if target.is_symlink() or done.exists():
        continue
    parts = [np.load(one) for one in packed]
    parts = [(one[f"x_{split}"], one[f"y_{split}"]) for one in parts if f"x_{split}" in one]
    if rehearse and not parts:
        noise = np.random.default_rng(0)
        parts = [(noise.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), np.arange(count) % 10)]
    if sum(len(labels) for _, labels in parts) < count:
        continue
    number = 0
    for pixels, labels in parts:
        for image, label in zip(pixels, labels.reshape(-1)):
            place = target / split / f"{int(label):03d}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number:05d}.png")
            number += 1
    done.touch()
found = {split: sum(1 for _ in (target / split).glob("*/*.png")) for split in wanted}
print(", ".join(f"{split} {found[split]:,} of {count:,}" for split, count in wanted.items()))
sys.exit(any(found[split] < count for split, count in wanted.items()))
PYTHON
}

# The parts

versions=$("$python" -c "
import datetime, platform, accelerate, timm, torch
card = torch.cuda.get_device_name() + ', CUDA ' + torch.version.cuda if torch.cuda.is_available() else 'no card'
print(f'{datetime.date.today()}, {card}, torch {torch.__version__}, timm {timm.__version__}, accelerate '
      f'{accelerate.__version__}, Python {platform.python_version()}')")
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1 || true)

report() { # on_card.md, and everything that is to be kept, in --out
  {
    echo "# On a card"
    echo
    echo "\`benchmarks/on_card.sh\`${rehearse:+, a rehearsal on CPUs: its figures mean nothing}"
    echo
    echo "$versions${driver:+, driver $driver}"
    echo
    echo "| part | state | seconds | its last line |"
    echo "|---|---|---|---|"
    for name in "${names[@]}"; do
      last=$(grep . "$work/state/$name.log" 2>/dev/null | tail -1 | tr '|' '/' | cut -c1-150 || true)
      echo "| $name | $(cat "$work/state/$name.is" 2>/dev/null || echo not begun) | $(used "$name") | $last |"
    done
  } >"$work/on_card.md"
  cp "$work"/*.md "$work"/results/*.md "$out" 2>/dev/null || true
  tail -n +1 -v "$work"/state/*.log "$work"/*.log >"$out/logs.txt" 2>/dev/null || true # the searches' own are the latter
  tail -n +1 -v "$work"/*.jsonl "$work"/results/*.json >"$out/rows.txt" 2>/dev/null || true
}

used() { cat "$work/state/$1.used" 2>/dev/null || echo 0; }

# NAME MINUTES COMMAND...: run it, unless it is done, within its limit and the call's; the word MINUTES becomes what is left
part() {
  local name=$1 limit=$(($2 * 60)) state=$work/state/$1 left began code=0
  shift 2
  [ -e "$state.done" ] || [[ " $tried " = *" $name "* ]] && return
  left=$((deadline - SECONDS))
  if [ "$turn" = own ]; then
    grep -q failed "$state.is" 2>/dev/null && return # in an earlier call: after all others
    limit=$((limit - $(used "$name")))
    left=$((limit < left ? limit : left))
  fi
  [ "$left" -ge 20 ] || return 0
  echo "== $name: at most $left s"
  began=$SECONDS
  echo running >"$state.is"
  timeout --signal="${stop:-TERM}" --kill-after=40 "$left" "${@/#MINUTES/$(awk "BEGIN {print ($left - 30) / 60}")}" >>"$state.log" 2>&1 || code=$?
  echo $(($(used "$name") + SECONDS - began)) >"$state.used"
  case $code in
    0) echo done | tee "$state.done" >"$state.is" ;;
    3 | 124 | 137 | 143) echo "cut short, to be continued" >"$state.is" ;;
    *)
      echo "failed with exit code $code" >"$state.is"
      tried="$tried $name" # another time, not in this call
      ;;
  esac
  echo "== $name: $(cat "$state.is")"
  report
}

tests() { # NAME MINUTES WHICH: tests marked cuda, in the files that have any; interrupted, pytest tells what has failed
  stop=INT part "$1" "$2" "$python" -m pytest -o addopts= -W default -v --tb=short -ra -m cuda -k "$3" \
    $(grep -l "mark\.cuda" "$repository"/tests/test_*.py)
}

speed() { # NAME MINUTES WORDS...
  local name=$1
  part "$name" "$2" "$python" benchmarks/search_speed.py --out "$work/$name.md" "${@:3}"
}

paper() { # NAME MINUTES RECIPE WORDS...
  part "$1" "$2" "$python" benchmarks/papers.py --minutes MINUTES --work "$work" --results "$work/results" \
    --data-dir "$work/data" --only "${@:3}"
}

if [ -n "$rehearse" ]; then
  tiny=(--size tiny --repeats 1 --methods imp jackpot)
  cases=("${tiny[@]}") large=("${tiny[@]}") share=(--epochs 1 --pairs 1)
  paper=(--set training.epochs=1 --set training.batch_size=32 --set data.workers=0 --set model.model=test_resnet)
  paper+=(--set data.img_size=32)
  cs=("${paper[@]}" --set pruner.rewind=2it) colt=("${paper[@]}" --set pruner.sparsity=0.4)
else
  cases=(--size small medium) large=(--size large) share=(--card --epochs 30 --pairs 1)
  paper=(--set training.amp=true --set training.amp_dtype=bfloat16)
  cs=("${paper[@]}") colt=("${paper[@]}" --set pruner.sparsity=0.9)
fi
whole=yes
images || whole=
[ -n "$whole" ] || echo "CIFAR-10 is not whole: papers wait until the rest of it is brought"
all=(tests_fp32 tests_bf16 tests_fp16 tests_others search_speed search_speed_large paper_cs paper_colt shared_card)
names=("${all[@]}") tried=
for turn in own rest; do
  tests tests_fp32 2 fp32
  tests tests_bf16 1 bf16
  tests tests_fp16 1 fp16
  tests tests_others 2 "not (fp32 or bf16 or fp16)"
  speed search_speed 4 "${cases[@]}"
  if [ -n "$whole" ]; then
    paper paper_cs 4 continuous_sparsification_cifar10_resnet20 "${cs[@]}"
    paper paper_colt 7 colt_cifar10_resnet18 "${colt[@]}"
  fi
  speed search_speed_large 2 "${large[@]}"
  part shared_card 2 bash -o pipefail -c '"$0" benchmarks/parallel_runs.py "${@:2}" | tee "$1/shared_card.md"' \
    "$python" "$work" "${share[@]}"
done
report
cat "$work/on_card.md"
failed= left=
for name in "${all[@]}"; do
  [ -e "$work/state/$name.done" ] && continue
  left=yes
  grep -q failed "$work/state/$name.is" 2>/dev/null && failed=yes
done
[ -z "$failed" ] || { echo "something has failed: see the logs in $out; the same command tries it again"; exit 1; }
[ -z "$left" ] || { echo "not all is done; the same command continues"; exit 3; }
echo "all is done; the tables are in $out"
