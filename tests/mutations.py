"""Changes of files as accidents and people make them, drawn by hypothesis."""

import copy
import json
import struct
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Q = "model.layers.0.self_attn.q_proj"
HOSTILE = st.sampled_from(
    [None, True, -1, 0, 1, 8, 9, 2.5, 1 << 40, 1 << 63, 1 << 80, 10**400, float("inf"), "", "8", "..", "../x",
     "lm_head", "\ud800", "\0", "I64", "F64", "BF16", "lowrank", "pivoted", "dense", "model.norm", Q, [], [0],
     [1 << 40, 1 << 40], [-1, 5], {}, {"kind": "dense"}, {"kind": "lowrank", "rank": 8}, {"kind": "pivoted", "rank": 8},
     {"kind": "pivoted", "rank": 8, "bits": 8}, {"kind": "lowrank", "rank": 8, "bits": 3}, "I8", "F16"]
)  # fmt: skip


def change_somewhere(data: st.DataObject, value: Any) -> Any:
    """`value` with one part of it, at any depth, replaced, removed or moved under another name."""
    if not isinstance(value, dict | list) or not value or data.draw(st.integers(0, 9)) == 0:
        return data.draw(HOSTILE)
    value = copy.copy(value)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    deep = [key for key in keys if isinstance(value[key], dict | list)]
    key = data.draw(st.sampled_from(deep if deep and data.draw(st.booleans()) else keys))
    match data.draw(st.sampled_from(["deeper", "deeper", "deeper", "remove", "rename"])):
        case "remove":
            del value[key]
        case "rename" if isinstance(value, dict):
            value[data.draw(st.sampled_from(["..", "", "a", Q, *keys]))] = value.pop(key)
        case _:
            value[key] = change_somewhere(data, value[key])
    return value


def change_header(data: st.DataObject, file: Path) -> None:
    """The header of a safetensors file says something else, or has another length."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = content[8 : 8 + length], content[8 + length :]
    if data.draw(st.booleans()):
        header = json.dumps(change_somewhere(data, json.loads(header))).encode()
        length = len(header)
    else:
        length = data.draw(st.sampled_from([0, 1, length - 1, length + 1, len(content), 1 << 31, (1 << 64) - 1]))
    file.write_bytes(struct.pack("<Q", length) + header + rest)


def change_json(data: st.DataObject, file: Path) -> None:
    """A JSON file says something else."""
    file.write_text(json.dumps(change_somewhere(data, json.loads(file.read_text()))))


def flip_bits(data: st.DataObject, file: Path) -> None:
    """Some bits of a file are others, most often near its start, where what describes the rest stands."""
    content = bytearray(file.read_bytes())
    near = st.integers(0, min(len(content), 2000) - 1)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(near | st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)


def cut(data: st.DataObject, file: Path) -> None:
    """The end of a file is lost."""
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])


def lose(data: st.DataObject, file: Path) -> None:
    """The file is lost."""
    file.unlink()


def change_file(data: st.DataObject, file: Path) -> None:
    """One of the above, as the kind of file allows."""
    special = {".json": change_json, ".safetensors": change_header}.get(file.suffix, cut)
    data.draw(st.sampled_from([special, special, flip_bits, flip_bits, cut, lose]))(data, file)
