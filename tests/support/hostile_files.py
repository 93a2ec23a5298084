"""Tickets as a stranger might send them. Run as a program it loads many and says how that went, as JSON.

    python hostile_files.py FOLDER COUNT

FOLDER holds tickets, and state.safetensors for those that need pretrained weights; COUNT files are made of each.
"""

import ctypes
import json
import random
import re
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save

ESC = "\x1b[2J\x1b]0;owned\x07"
POOL = [None, True, -1, 0, 1, 3, 2**31, 2**40, 2**62, 2**70, 1.5, float("nan"), "", "float64", "stored", "pretrained"]
POOL += ["00000000", "x" * 2000, [], {}, [2**62, 2**62], [0, 2**70], [-3], [1] * 500, ["a", [3], "float32", 1]]


def parts(data):
    """A file's outer header and what follows it."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def tensors_of(data):
    """A file's tensors: safetensors' own `load`, which with 0.4.3 takes none that is empty."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return load_file(file.name)


def with_outer(outer, tensors):
    text = json.dumps(outer).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def with_header(data, change):
    """The file with its ticket header, of either format, changed by a function."""
    outer, after = parts(data)
    text = outer["__metadata__"]["timm_tickets"]
    if json.loads(text)["format"] == 1:
        header = json.loads(text)
        change(header)
        outer["__metadata__"]["timm_tickets"] = json.dumps(header)
        return with_outer(outer, after)
    tensors = tensors_of(data)
    header = json.loads(zlib.decompress(tensors["header"].numpy().tobytes()))
    change(header)
    packed = bytearray(zlib.compress(json.dumps(header).encode()))
    tensors["header"] = torch.frombuffer(packed, dtype=torch.uint8)
    return save(tensors, outer["__metadata__"])


def lie(tree, generator):
    """Replace, drop or repeat one thing somewhere in a JSON tree."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        key = generator.choice(list(keys))
        inside = tree[key]
        if isinstance(inside, dict | list) and inside and generator.random() < 0.8:
            tree = inside
            continue
        action = generator.randrange(4)
        if action == 0:
            del tree[key]
        elif action == 1 and isinstance(tree, list):
            tree.insert(generator.randrange(len(tree) + 1), inside)
        elif action == 2 and isinstance(inside, int):
            tree[key] = inside + generator.choice([-1, 1, 2**20, -inside, 2**33])
        else:
            tree[key] = generator.choice(POOL)
        return


def damaged(data, generator):
    """One way of many to damage a file; and whether its metadata may have changed as well."""
    out, kind = bytearray(data), generator.randrange(8)
    head = 8 + struct.unpack("<Q", data[:8])[0]
    open_metadata = b"fingerprint" in data[:head]  # format 1 has them in the clear, format 2 under zlib's checksum
    if kind == 0:
        return out[: generator.randrange(len(out))], False
    if kind in (1, 2):  # bits flipped, in the header more often than its size would have it
        for _ in range(generator.choice([1, 1, 1, 2, 20])):
            out[generator.randrange(head if kind == 1 else len(out))] ^= 1 << generator.randrange(8)
        return out, open_metadata
    if kind == 3:  # a piece taken out, put in or written over
        begin, length = generator.randrange(len(out)), generator.randrange(1, 40)
        out[begin : begin + generator.choice([0, length])] = generator.choice([b"", generator.randbytes(length)])
        return out, open_metadata
    if kind == 4:  # the outer header: dtypes, shapes, offsets, names
        outer, tensors = parts(data)
        lie(outer, generator)
        return with_outer(outer, tensors), True
    if kind == 5:  # a key twice
        text = data[8:head].replace(b'"shape"', b'"dtype":"F64","shape"', 1)
        return struct.pack("<Q", len(text)) + text + data[head:], False

    def change(header):
        for _ in range(generator.choice([1, 1, 1, 3])):
            lie(header, generator)

    return with_header(data, change), True


def peak(reset=False):
    """Bytes that the process has held at most since the last reset; on Linux."""
    status, kind = Path("/proc/self/status"), "VmRSS" if reset else "VmHWM"
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # what is kept for later use would hide what is taken next
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(rf"{kind}:\s+(\d+)", status.read_text())[1]) * 1024


def main(folder, count):
    import timm_tickets as tt

    state = load_file(folder / "state.safetensors")
    generator = random.Random(0)
    path, result = folder / "damaged", {"files": 0, "exact": 0, "refused": 0, "largest": 0, "slowest": 0.0}
    files = sorted(folder.glob("*.ticket"))
    saved = {file: tt.load_ticket(file, pretrained=state) for file in files}
    before = peak(reset=True)
    for file in files:
        data = file.read_bytes()
        for _ in range(count):
            bad, metadata_too = damaged(data, generator)
            path.write_bytes(bad)
            result["files"] += 1
            result["largest"] = max(result["largest"], len(bad))
            begin = time.perf_counter()
            try:
                ticket = tt.load_ticket(path, pretrained=state)
            except tt.TicketError:
                result["refused"] += 1
            else:
                assert ticket.fingerprint == saved[file].fingerprint, file
                assert metadata_too or ticket.metadata == saved[file].metadata, file
                result["exact"] += 1
            result["slowest"] = max(result["slowest"], time.perf_counter() - begin)
    result["memory"] = peak() - before
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
