"""Tickets by somebody who knows the format: lies that are mended until the file's outer layers agree with them.

    python forged_files.py FOLDER COUNT

FOLDER holds tickets of test_efficientnet with 3 classes, and state.safetensors for those that need pretrained weights;
COUNT files are forged of each. Every one has to be refused with a TicketError, or be a ticket that holds what its
fingerprint says; and whatever is then done with it works, or is refused with the model as it was. Says how that went,
as JSON.
"""

import json
import math
import os
import random
import re
import sys
import tempfile
import time
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from hostile_files import ESC, parts, peak, tensors_of, with_header
from safetensors.torch import load_file, save

STRINGS = [ESC, "a\nb\r\n", "\u202egnp.exe", "\u2066x", "\x00", "\x9b2J", "", "x" * 1_000_000, ESC * 50_000, "%s{0}"]
STRINGS += ["[red]x[/red]", "[x](http://x.y)", "<script>", "`|`", "../../etc/passwd", "é" * 2000, "\U000e0001" * 500]
NUMBERS = [0, 1, 2, 3, 512, 2**20, 300_000, 1_500_000, 2_000_000, 2**31, 2**32, 2**40, 2**47, 2**48, 2**63, 2**64 - 1]
NUMBERS += [2**64, -1, 10**4000, int("9" * 4300) + 1, 0.5, float("nan"), float("inf"), "0.5", None, True, [], {}]
TAGS = ["resnet18.a1_in1k", "test_efficientnet.r160_in1k", "test_resnet.r160_in1k", "vit_7b_patch16_dinov3.lvd1689m"]
TAGS += ["tiny_vit_21m_512.dist_in22k_ft_in1k", "naflexvit_base_patch16_gap.e300_s576_in1k", "hf-hub:a/b", "resnet18"]
TAGS += ["local-dir:/etc", "http://x.y/z.pth", "deit_tiny_distilled_patch16_224.fb_in1k", "resnetrs420.tf_in1k"]
DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int8", "bool", "complex64", "float8_e4m3fn", "object"]


def entry(header, generator):
    return generator.choice(header["layers"] + header["rest"])


def zero(header, generator):
    shape = entry(header, generator)[1]
    if shape:
        shape[generator.randrange(len(shape))] = 0


def huge(header, generator):
    shape = entry(header, generator)[1]
    shape[generator.randrange(len(shape)) if shape else slice(None)] = generator.choice(NUMBERS) if shape else [2**20]


def zero_beside_huge(header, generator):
    one = entry(header, generator)
    one[1] = [1, 0, 0, 0][: len(one[1]) or 1]
    one[1][generator.randrange(len(one[1]))] = generator.choice([300_000, 1_500_000, 2**31, 2**47])
    if len(one[1]) > 1 and 0 not in one[1]:
        one[1][0] = 0


def head_or_stem(header, generator):
    """The two shapes that decide how large a pretrained model is built."""
    for one in header["layers"] + header["rest"]:
        if one[0] in ("classifier.weight", "conv_stem.weight") and generator.random() < 0.7:
            place = 0 if one[0].startswith("classifier") else 1
            one[1] = generator.choice([one[1], [one[1][0]], [*one[1], 0], [0] * len(one[1])])
            one[1][min(place, len(one[1]) - 1)] = generator.choice([0, 1, 4, 1000, 100_000, 1_500_000, 2**40])


def transposed(header, generator):
    generator.shuffle(entry(header, generator)[1])


def masked_buffer(header, generator):
    """A mask over a buffer, a bias or the classifier, and perhaps over nothing else."""
    taken = [one for one in header["rest"] if generator.choice(["running", "bias", "classifier", "num_"]) in one[0]]
    for one in taken[: generator.choice([1, 3, 1000])]:
        header["rest"].remove(one)
        size = math.prod(one[1])
        header["layers"].append(
            [*one[:2], generator.choice([one[2], "float32"]), generator.choice([0, size, size // 2])]
        )
    if taken and generator.random() < 0.5:
        header["rest"] += [[*one[:3], "00" * 4] for one in header["layers"][: -len(taken)]]
        del header["layers"][: -len(taken)]
    if header.get("frozen"):
        header["frozen"] = None


def renamed(header, generator):
    one, other = entry(header, generator), entry(header, generator)
    names = [other[0] + "x", "running_mean", "", ".", "fc.weight", other[0].replace(".", "/"), "__class__", "a" * 999]
    one[0], other[0] = generator.choice([(other[0], one[0]), (generator.choice(names), other[0])])


def escapes(header, generator):
    """A hostile string in some place that takes one."""
    text, one = generator.choice(STRINGS), entry(header, generator)
    place = generator.randrange(8)
    if place < 3:
        one[generator.choice([0, 2, 3 if isinstance(one[-1], str) else 2])] = text
    elif place == 3 and "start" in header:
        header["start"][generator.choice(["kind", "tag", "sha256", "weights", text[:2000]])] = text
    elif place == 4:
        header["fingerprint"] = text
    elif place == 5:
        header[text[:2000]] = text
    else:
        hostile_metadata(header, generator, text)


def hostile_metadata(header, generator, text=None):
    text = generator.choice(STRINGS) if text is None else text
    strange = generator.choice([*NUMBERS, text, [text] * 3, {text[:2000]: text}, [[[[text[:10]]]]]])
    known = ["model", "pruner", "recipe", "metrics", "dense", "rounding", "versions", "origin", "start_epoch", "kept"]
    key = generator.choice([*known, text[:2000]])
    inner = [
        "architecture",
        "num_classes",
        "kwargs",
        "name",
        "dataset",
        "seed",
        "frozen",
        "start",
        "test_top1",
        text[:99],
    ]
    table = {name: generator.choice([strange, text, 1]) for name in generator.sample(inner, 4)}
    if generator.random() < 0.3:
        table["kwargs"] = {
            "checkpoint_path": "/etc/passwd",
            "pretrained_cfg_overlay": {"url": "http://x"},
            text[:99]: 1,
        }
    header["metadata"][key] = generator.choice([strange, table, table])


def dtype(header, generator):
    entry(header, generator)[2] = generator.choice(DTYPES)


def count(header, generator):
    generator.choice(header["layers"])[3] = generator.choice(NUMBERS)


def start(header, generator):
    kind = generator.choice(["values", "seed", "pretrained", "pretrained"])
    header["start"] = {"kind": kind}
    if kind == "seed":
        weights = generator.choice(["signed_constant", "kaiming_uniform", "kaiming_normal", "ones"])
        scale = generator.choice(["none", "static", "dynamic"])
        header["start"] |= {"seed": generator.choice(NUMBERS), "weights": weights, "scale": scale}
    elif kind == "pretrained":
        header["start"] |= {"tag": generator.choice(TAGS), "sha256": "0" * 64}
        for one in header["rest"]:
            one[3:] = [generator.choice([one[3] if one[3:] else "00000000", "pretrained"])]
    header.setdefault("frozen", None)


def frozen(header, generator):
    counts = [[generator.choice([0, 0, 1, one[3], 2**40]), generator.choice([0, 0, 1])] for one in header["layers"]]
    header["frozen"] = {"seed": generator.choice(NUMBERS), "counts": counts}


def many(header, generator):
    number = generator.choice([3000, 9000, 12_000])
    kind = generator.randrange(4)
    if kind == 0:
        header["rest"] += [[f"extra.{i}", [], "float32", "00000000"] for i in range(number)]
    elif kind == 1:
        header["layers"] += [[f"extra.{i}", [1], "float32", 0] for i in range(number)]
    elif kind == 2:
        header["metadata"]["notes"] = [[i] for i in range(8 * number)]
    else:
        header["metadata"]["notes"] = json.loads("[" * 150 + "]" * 150)


def fewer(header, generator):
    """A smaller file, in which what is claimed weighs more."""
    for key in ("layers", "rest"):
        header[key] = generator.sample(header[key], min(len(header[key]), generator.choice([1, 2, 5])))
    header["frozen"] = None


LIES = [
    zero,
    huge,
    zero_beside_huge,
    head_or_stem,
    transposed,
    masked_buffer,
    renamed,
    escapes,
    hostile_metadata,
    dtype,
]
LIES += [count, start, frozen, many, fewer, fewer]


def forged(data, generator):
    """The file with lies in its header; mostly mended, so that sizes, masks and the fingerprint agree with it."""
    sys.set_int_max_str_digits(0)  # Python refuses to write numbers that a stranger's program writes
    told = []

    def change(header):
        for _ in range(generator.choice([1, 1, 2, 4])):
            told.append(generator.choice(LIES))
            # An earlier lie may have taken away what this one is about.
            with suppress(IndexError, TypeError, KeyError, AttributeError, ValueError):
                told[-1](header, generator)

    out = with_header(data, change)
    if generator.random() < 0.8:
        out = mended(out)
    if generator.random() < 0.05:  # what stands outside the ticket's own header
        outer, _ = parts(out)
        text = json.dumps({"format": generator.choice([*NUMBERS, *STRINGS]), "writer": generator.choice(STRINGS)})
        tensors = tensors_of(out) if generator.random() < 0.5 else {generator.choice(STRINGS) or "x": torch.zeros(3)}
        out = save(tensors, {**outer["__metadata__"], "timm_tickets": text})
    sys.set_int_max_str_digits(4300)
    return out, told


def mended(data):
    """The file, its values as many and its masks as full as the header says."""
    from timm_tickets.tickets.header import DTYPES
    from timm_tickets.tickets.mask_coding import encode
    from timm_tickets.tickets.starts import Frozen

    outer, _ = parts(data)
    text = outer["__metadata__"]["timm_tickets"]
    first = json.loads(text)["format"] == 1
    tensors = tensors_of(data)
    header = json.loads(text) if first else json.loads(zlib.decompress(tensors["header"].numpy().tobytes()))
    try:
        sizes, values = [math.prod(one[1]) for one in header["layers"]], {}
        if first or header["start"]["kind"] == "values":
            for one in header["layers"]:
                values[one[2]] = values.get(one[2], 0) + one[3]
        for one in header["rest"]:
            if first or one[3] == "stored":
                values[one[2]] = values.get(one[2], 0) + math.prod(one[1])
        if max(sum(sizes), *values.values(), 0) > 2**21 or min(*sizes, *values.values(), 0) < 0:
            return data
        stored = {f"values.{name}": torch.zeros(length, dtype=DTYPES[name]) for name, length in values.items()}
        masks, patterns = [], None
        if not first and header["frozen"]:
            patterns = Frozen.model_validate(header["frozen"]).patterns(sizes)
        for size, one in zip(sizes, header["layers"], strict=True):
            mask = torch.zeros(size, dtype=torch.bool)
            free = torch.ones(size, dtype=torch.bool)
            if patterns is not None:
                pruned, locked = map(torch.from_numpy, next(patterns))
                free, mask = ~(pruned | locked), mask | locked
            mask[free.nonzero()[: one[3] - int(mask.sum())].flatten()] = True
            masks.append(mask if first else mask[free])
        if first:
            bits = torch.cat(masks)
            bits = torch.cat([bits, torch.zeros(-len(bits) % 8, dtype=torch.bool)]).view(-1, 8).to(torch.uint8)
            stored["masks"] = (bits * (2 ** torch.arange(7, -1, -1, dtype=torch.uint8))).sum(1).to(torch.uint8)
        else:
            words = encode([mask.numpy() for mask in masks]).astype("<u4").tobytes()
            stored |= {"header": tensors["header"], "masks": torch.frombuffer(bytearray(words), dtype=torch.uint8)}
            elements = sum(math.prod(max(length, 1) for length in one[1]) for one in header["layers"] + header["rest"])
            if elements < 2**26:
                stored["padding"] = torch.zeros(elements // 256 + 1, dtype=torch.uint8)
    except (TypeError, KeyError, IndexError, ValueError, RuntimeError, OverflowError, AttributeError):
        return data  # beyond mending
    return sealed(save(stored, outer["__metadata__"]))


def sealed(data):
    """The file with the fingerprint of what it holds, if it holds anything."""
    from timm_tickets.tickets import reader as ticket_reader

    found = []
    original = ticket_reader.fingerprint
    ticket_reader.fingerprint = lambda *both: found.append(original(*both)) or found[-1]
    try:
        with tempfile.NamedTemporaryFile() as file, suppress(ValueError):
            file.write(data)
            file.flush()
            ticket_reader.read(Path(file.name), PRETRAINED)
    finally:
        ticket_reader.fingerprint = original
    return with_header(data, lambda header: header.update(fingerprint=found[0])) if found else data


PRETRAINED = {}  # state of the base tickets


def check_message(text):
    assert len(text) <= 2048, len(text)
    assert all(c.isprintable() or c == "\n" for c in text), text


def use(ticket, models):
    """Do with a ticket what can be done with one; nothing may happen but a refusal that changes nothing."""
    import timm_tickets as tt
    from timm_tickets.sparse.holder import release_
    from timm_tickets.tickets import publish as hub

    for action in ("apply_", "transfer_", "attach"):
        for model in models:
            before = {name: value.clone() for name, value in model.state_dict().items()}
            try:
                if action == "attach":
                    ticket.attach(model, torch.optim.SGD(model.parameters(), 0.1))
                else:
                    getattr(ticket, action)(model)
            except tt.TicketError as error:
                check_message(str(error))
                assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), action
            else:
                model.load_state_dict(before)
                release_(model)
    text = hub.card(ticket, "local-dir:x")
    assert all(c.isprintable() or c == "\n" for c in text)
    assert not re.search(r"checkpoint_path=|overlay=|<", text)
    assert len(text) < 200_000


def main(folder, number):
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    import timm

    import timm_tickets as tt

    PRETRAINED.update(load_file(folder / "state.safetensors"))
    generator = random.Random(0)
    models = [timm.create_model("test_efficientnet", num_classes=classes) for classes in (3, 5)]
    path = folder / "forged"
    result = {
        "files": 0,
        "loaded": 0,
        "refused": 0,
        "slowest": [0.0],
        "memory": 0,
        "beyond": -(2**40),
        "smallest": 2**40,
        "kinds": {},
    }
    for file in sorted(folder.glob("*.ticket")):
        data = file.read_bytes()
        for _ in range(number):
            bad, told = forged(data, generator)
            path.write_bytes(bad)
            given = generator.choice([PRETRAINED, None])
            before = peak(reset=True)
            begin = time.perf_counter()
            result["files"] += 1
            try:
                tt.weigh(path)
                ticket = tt.load_ticket(path, pretrained=given)
            except tt.TicketError as error:
                check_message(str(error))
                ticket = None
            told = sorted({lie.__name__ for lie in told})
            result["slowest"] = max(result["slowest"], [round(time.perf_counter() - begin, 2), len(bad), told])
            result["smallest"] = min(result["smallest"], len(bad))
            taken = peak() - before
            result["memory"] = max(result["memory"], taken)
            result["beyond"] = max(result["beyond"], taken - 8192 * len(bad))
            result["refused" if ticket is None else "loaded"] += 1
            for lie in told:
                kind = result["kinds"].setdefault(lie, [0, 0])
                kind[ticket is not None] += 1
            if ticket is not None:
                use(ticket, models)
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
