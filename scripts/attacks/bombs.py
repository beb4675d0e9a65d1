"""Files that are small on disk and large in memory, deep, or odd."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ANCHORS = "x0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"x{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
YAML = {
    "anchors that multiply": ANCHORS,
    "anchors in one value": "bomb: [&a [x, x, x, x, x, x, x, x, x]"
    + "".join(f", &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(9))
    + "]\n",
    "an anchor within itself": "loop: &l [*l]\n",
    "merges that multiply": "m0: &m0 {a: 1}\n"
    + "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 9)),
    "100,000 brackets": "deep: " + "[" * 100_000 + "]" * 100_000 + "\n",
    "deep mappings": "deep: " + "{a: " * 20_000 + "1" + "}" * 20_000 + "\n",
    "deep indentation": "deep:\n" + "".join(f"{' ' * i}a:\n" for i in range(1, 2000)) + f"{' ' * 2000}b\n",
    "an integer of 300,000 digits": f"big: {'9' * 300_000}\n",
    "a sexagesimal integer": f"big: {':'.join(['59'] * 5000)}\n",
    "100,000 keys": "".join(f"k{i}: {i}\n" for i in range(100_000)),
    "a text of 20 MB": f"text: {'x' * 20_000_000}\n",
    "200,000 documents": "---\n" * 200_000,
}
YAML_VALUES = (
    *("2020-01-01", "2001-12-14t21:59:43.1-05:00", "!!binary aGVsbG8=", "!!set {a, b}", "!!omap [a: 1]", "{1: 2}"),
    *(
        "!!python/object/apply:os.system ['touch PWNED']",
        "!!python/tuple [1]",
        "12:30:45",
        "0x1F",
        ".inf",
        ".nan",
        "-.inf",
    ),
    *("'3'", "[1]", "{a: 1}", "null", "true", "1e400", "-0.0", "9" * 500, '"\\x00"', '"\\ud800"', '"\\x1b[31m"'),
)
JSON: dict[str, Callable[[], str]] = {
    "100,000 brackets": lambda: "[" * 100_000 + "]" * 100_000,
    "brackets in a row": lambda: '{"epoch": 1, "step": 1, "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
    "deep by 900": lambda: '{"state": "done", "epoch": 1, "step": 1, "x": ' + "[" * 900 + "]" * 900 + "}\n",
    "deep mappings": lambda: '{"state":' * 50_000 + "1" + "}" * 50_000,
    "an integer of 4,000 digits": lambda: json_row("9" * 4000),
    "an integer of 300,000 digits": lambda: json_row("9" * 300_000),
    "a text of 50 MB": lambda: json_row('"' + "x" * 50_000_000 + '"'),
    "a list of 3 million numbers": lambda: json_row("[" + "0," * 3_000_000 + "0]"),
    "300,000 keys": lambda: (
        "{" + "".join(f'"k{i}": {i}, ' for i in range(300_000)) + '"state": "done", "epoch": 1, "step": 1}\n'
    ),
}


def json_row(value: str) -> str:
    return (
        f'{{"state": "done", "epoch": {value}, "step": {value}, "epochs": {value}, "wall_seconds": {value},'
        f' "error": {value}, "pid": {value}, "layer": {value}, "command": {value}, "device": {value},'
        f' "tasks": {value}, "test_accuracy": {value}, "heartbeat": {value}, "host": {value}}}\n'
    )


ROWS: dict[str, Callable[[], str]] = {
    "a million rows": lambda: "".join(f'{{"epoch":{i},"step":{i},"layer":"a"}}\n' for i in range(1, 1_000_001)),
    "other columns in every row": lambda: "".join(
        json.dumps({"epoch": i, "step": i, "layer": "a", **{f"c{i}_{j}": j for j in range(200)}}) + "\n"
        for i in range(1, 1001)
    ),
    "20,000 columns": lambda: (
        json.dumps({"epoch": 1, "step": 1, "layer": "a", **{f"c{j}": j for j in range(20_000)}}) + "\n"
    ),
    "10,000 layers": lambda: "".join(f'{{"epoch":{i},"step":{i},"layer":"layer{i}"}}\n' for i in range(1, 10_001)),
    "steps of 2**62": lambda: (
        '{"epoch": 2, "step": 4611686018427387904, "layer": "a", "position": 4611686018427387904}\n'
    ),
    "lists of other lengths": lambda: "".join(
        json.dumps({"epoch": i, "step": i, "layer": "a", "losses": [0.1] * i, "grid": "x"}) + "\n" for i in (1, 2)
    ),
    "3 million empty lines": lambda: "\n" * 3_000_000,
    "300,000 damaged lines": lambda: "x\n" * 300_000,
}


def _npz(path: Path, **arrays: Any) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def index_bomb(path: Path, study: Path) -> None:
    """An index of some 6 MB that unpacks to 6 GB."""
    header = (
        b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (6000000000,), }".ljust(127) + b"\n"
    )
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("head.npy", "w", force_zip64=True) as file,
    ):
        file.write(header)
        zeros = bytes(10_000_000)
        for _ in range(600):
            file.write(zeros)


def index_shape(path: Path, study: Path) -> None:
    """An index whose array says that it has 2**60 numbers."""
    header = (
        b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (1152921504606846976,), }".ljust(127)
        + b"\n"
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("head.npy", header + b"x")


def index_pickle(path: Path, study: Path) -> None:
    _npz(path, head=np.array([{"a": 1}], dtype=object))


def _index_of(groups: Any, **arrays: Any) -> Callable[[Path, Path], None]:
    """An index with right stamps of each file of rows, whatever else it says; `groups` is called with these."""

    def make(path: Path, study: Path) -> None:
        stamps = []
        for file in sorted(study.glob("*/metrics.jsonl")):
            stat = file.stat()
            stamps.append(
                (f"{file.parent.name}/{file.name}", [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
            )
        with np.load(path) as before:
            version = json.loads(before["head"].tobytes())["version"] if "head" in before else 2
        head = json.dumps({"version": version, "groups": groups(stamps)}).encode()
        _npz(path, head=np.frombuffer(head, np.uint8), **arrays)

    return make


def _members(stamps: Any, rows: Any, lists: Any) -> list[Any]:
    return [[name, stamp, rows, lists] for name, stamp in stamps]


COLUMNS = ["epoch", "step", "test_accuracy"]
INDEX: dict[str, Callable[[Path, Path], None]] = {
    "6 MB that unpack to 6 GB": index_bomb,
    "an array of 2**60 numbers": index_shape,
    "a pickle": index_pickle,
    "columns of texts": _index_of(
        lambda stamps: [
            {"columns": COLUMNS, "numbers": [], "files": _members(stamps, 1, {name: ["x"] for name in COLUMNS})}
        ],
        **{"0": np.zeros((0, 1))},
    ),
    "columns of other lengths": _index_of(
        lambda stamps: [
            {
                "columns": COLUMNS,
                "numbers": ["epoch"],
                "files": _members(stamps, 1, {"step": [1, 2, 3], "test_accuracy": []}),
            }
        ],
        **{"0": np.zeros((1, 99))},
    ),
    "columns that are none": _index_of(
        lambda stamps: [{"columns": COLUMNS, "numbers": [], "files": _members(stamps, 1, dict.fromkeys(COLUMNS, 3))}],
        **{"0": np.zeros((0, 1))},
    ),
    "no step": _index_of(
        lambda stamps: [{"columns": ["epoch"], "numbers": ["epoch"], "files": _members(stamps, 1, {})}],
        **{"0": np.ones((1, 99))},
    ),
    "complex numbers": _index_of(
        lambda stamps: [{"columns": COLUMNS, "numbers": COLUMNS, "files": _members(stamps, 1, {})}],
        **{"0": np.ones((3, 99), complex)},
    ),
    "numbers out of range": _index_of(
        lambda stamps: [{"columns": COLUMNS, "numbers": COLUMNS, "files": _members(stamps, 1, {})}],
        **{"0": np.full((3, 99), np.inf)},
    ),
    "a column named arm": _index_of(
        lambda stamps: [
            {"columns": [*COLUMNS, "arm", "run"], "numbers": [*COLUMNS, "arm", "run"], "files": _members(stamps, 1, {})}
        ],
        **{"0": np.ones((5, 99))},
    ),
}


def yaml_of(text: str) -> Any:
    return yaml.safe_load(text)


def to_yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=False)


def put(holder: Any, name: str, value: Any) -> None:
    """Set what a dotted name leads to."""
    *way, last = name.split(".")
    for part in way:
        holder = holder[part]
    holder[last] = value


def with_literal(text: str, name: str, literal: str) -> str:
    """A configuration in which a setting is written so."""
    value = yaml_of(text)
    put(value, name, "@@VALUE@@")
    return to_yaml(value).replace("'@@VALUE@@'", literal)


def flipped(content: bytes) -> bytes:
    """The lowest bit of the last digit flipped, so that a number is another one."""
    at = max(i for i, byte in enumerate(content) if chr(byte).isdigit())
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
