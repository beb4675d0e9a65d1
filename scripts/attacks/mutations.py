"""Changes to the bytes of a record: damage of a disk, edits of a person, and values that a hostile person thinks of."""

import json
import re
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import yaml

Mutated = tuple[str, bytes | None]  # what was done; the new contents, None for a file that is gone

# Values as they are written, in JSON and in YAML.
VALUES = (
    *("null", "true", "false", "0", "1", "-1", "7", "-0.0", "0.5", "1e308", "-1e308", "1e400", "2.5", "3", '"3"'),
    *("9" * 20, "9" * 401, "9" * 5000, "1e" + "9" * 30, str(2**63), str(-(2**63) - 1)),
    *('""', '"text"', '"0.99"', '"done"', '"bn"', '"diverged"', '"nan"', '"Infinity"', '"2020-01-01"'),
    *("[]", "{}", "[1, 2]", "[[]]", '{"a": 1}', '{"name": "bn"}', '{"": null}', "[null]", '[{"a": [1]}]'),
    *('"\\u001b[31mred\\u001b[0m"', '"\\u0000"', '"\\ud800"', '"\\u202e"', '"a\\nb"', '"=1+1"', '"../../x"', '"/etc"'),
    *('"<script>alert(1)</script>"', '"[x](javascript:1) | a | **b**"', '"$\\\\input{/etc/passwd}$"', '"%s%n{0}"'),
    *('"' + "x" * 100_000 + '"', "[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000),
    "[" + "0," * 100_000 + "0]",
)
OF_JSON = ("NaN", "Infinity", "-Infinity", '{"a": 1, "a": 2}')
BOMB = "[&a [x, x, x, x, x, x, x, x, x]" + "".join(
    f", &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(9)
)
OF_YAML = (
    *(".nan", ".inf", "-.inf", "~", "yes", "0x1F", "0o17", "1_000", "12:30:45", "2020-01-01", "2001-12-14t21:59:43Z"),
    *("!!binary aGVsbG8=", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!timestamp 2020-01-01", "!!str 1"),
    *("!!python/object/apply:os.system ['touch PWNED']", "!!python/name:os.system ''", "!!float '1'", "!!int 'x'"),
    *(
        "*unknown",
        "&a [*a]",
        "&b {b: *b}",
        "{1: 2, null: 3, 2.5: 4}",
        "{2020-01-01: 1}",
        "{[1, 2]: 3}",
        "{? {a: b} : c}",
    ),
    *("{<<: {name: none}}", "{<<: [1]}", "|\n  text", "'", "[", "{", "- -", ": :", "%YAML 1.1", "@", "`", BOMB + "]"),
)
KEYS = (
    "arm",
    "run",
    "state",
    "seed",
    "setting",
    "batch",
    "epoch",
    "step",
    "note",
    "",
    "a.b",
    "\x1b[1m",
    "norm",
    "layer",
)
MARK = "@@VALUE@@"


def mutate(chance: Random, name: str, content: bytes, other: bytes) -> Mutated:
    """One change of a file by its name; `other` is the same file of another run."""
    kinds: list[Callable[[], Mutated]] = [
        lambda: _bytes(chance, content),
        lambda: _lines(chance, content),
        lambda: _whole(chance, content, other),
    ]
    structured = name.endswith((".json", ".jsonl", ".yaml", ".claim"))
    weights = [3, 2, 2]
    if structured and (changes := _structured(chance, name, content)):
        kinds.append(lambda: changes)
        weights.append(9)
    return chance.choices(kinds, weights)[0]()


def _bytes(chance: Random, content: bytes) -> Mutated:
    if not content:
        return "bytes added", chance.randbytes(50)
    at = chance.randrange(len(content))
    kind = chance.randrange(6)
    if kind == 0:
        bit = chance.randrange(8)
        return f"bit {bit} of byte {at} flipped", content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
    if kind == 1:
        return f"truncated at byte {at}", content[:at]
    if kind == 2:
        return f"16 bytes at {at} zeroed", content[:at] + bytes(16) + content[at + 16 :]
    if kind == 3:
        return f"16 bytes at {at} at random", content[:at] + chance.randbytes(16) + content[at + 16 :]
    if kind == 4:
        return f"bytes {at} to {at + 20} removed", content[:at] + content[at + 20 :]
    digits = [found.start() for found in re.finditer(rb"\d", content)] or [at]
    at = chance.choice(digits)
    return f"another digit at byte {at}", content[:at] + str(chance.randrange(10)).encode() + content[at + 1 :]


def _lines(chance: Random, content: bytes) -> Mutated:
    lines = content.splitlines(keepends=True) or [b""]
    at, to = chance.randrange(len(lines)), chance.randrange(len(lines))
    kind = chance.choice(("removed", "repeated", "moved", "last", "reversed", "joined"))
    if kind == "removed":
        del lines[at]
    elif kind == "repeated":
        lines.insert(to, lines[at])
    elif kind == "moved":
        lines.insert(to, lines.pop(at))
    elif kind == "last":
        del lines[at:]
    elif kind == "reversed":
        lines.reverse()
    else:
        lines[at] = lines[at].rstrip(b"\n")
    return f"line {at + 1} {kind}", b"".join(lines)


def _whole(chance: Random, content: bytes, other: bytes) -> Mutated:
    text = content.decode(errors="replace")
    changed: dict[str, Callable[[], bytes | None]] = {
        "deleted": lambda: None,
        "emptied": lambda: b"",
        "replaced by another run's": lambda: other,
        "garbage appended": lambda: content + chance.randbytes(30),
        "appended to itself": lambda: content + content,
        "another run's appended": lambda: content + other,
        "a NUL appended": lambda: content + b"\0",
        "spaces appended": lambda: content + b" \n\n",
        "invalid UTF-8 in front": lambda: b"\xff\xfe\xfa" + content,
        "a BOM in front": lambda: b"\xef\xbb\xbf" + content,
        "in UTF-16": lambda: text.encode("utf-16"),
        "in UTF-32": lambda: text.encode("utf-32"),
        "in Latin 1": lambda: text.replace("e", "é").encode("latin-1", "replace"),
        "with CRLF": lambda: content.replace(b"\n", b"\r\n"),
        "with CR": lambda: content.replace(b"\n", b"\r"),
        "with U+2028": lambda: content.replace(b"\n", "\u2028".encode()),
        "of NULs": lambda: bytes(len(content)),
        "of random bytes": lambda: chance.randbytes(len(content)),
        "of 30 MB of spaces": lambda: b" " * 30_000_000,
        "of 30 MB in a line": lambda: b'{"epoch": 1, "step": 1, "x": "' + b"x" * 30_000_000 + b'"}',
        "of brackets": lambda: b"[" * 1_000_000,
        "a text": lambda: b'"text"',
        "a list": lambda: b"[1, 2]",
        "null": lambda: b"null",
    }
    kind = chance.choice([*changed])
    return kind, changed[kind]()


def _structured(chance: Random, name: str, content: bytes) -> Mutated | None:
    """A value replaced, or a key renamed, removed or added, in a file that still can be parsed."""
    if name.endswith(".jsonl"):
        lines = content.splitlines(keepends=True)
        if not lines:
            return None
        at = chance.randrange(len(lines))
        done, changed = _in_json(chance, lines[at])
        lines[at] = (changed or b"") + b"\n"
        if chance.random() < 0.2:  # of every row
            done, lines = f"{done}, as every row", [lines[at]] * len(lines)
        return f"line {at + 1}: {done}", b"".join(lines)
    return _in_yaml(chance, content) if name.endswith(".yaml") else _in_json(chance, content)


def _in_json(chance: Random, content: bytes) -> Mutated:
    value = json.loads(content)
    done = _change(chance, value)
    literal = chance.choice((*VALUES, *OF_JSON))
    text = json.dumps(value, indent=1 if content.count(b"\n") > 1 else None)
    return _filled(done, text, (f'"{MARK}"',), literal)


def _in_yaml(chance: Random, content: bytes) -> Mutated:
    value = yaml.safe_load(content)
    done = _change(chance, value)
    literal = chance.choice((*VALUES, *OF_YAML))
    return _filled(done, yaml.safe_dump(value, sort_keys=False), (f"'{MARK}'", MARK), literal)


def _filled(done: str, text: str, marks: tuple[str, ...], literal: str) -> Mutated:
    for mark in marks:
        if mark in text:
            shown = literal if len(literal) < 60 else f"{literal[:30]}... ({len(literal)} characters)"
            return f"{done} {shown}", text.replace(mark, literal).encode()
    return done, text.encode()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
    """Every value within, as what holds it, its key there, and its path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield value, key, (*path, key)
        yield from places(each, (*path, key))


def _change(chance: Random, value: Any) -> str:
    """Change one place; `MARK` stands where a value is to be filled in."""
    holder, key, path = chance.choice([*places(value)])
    where = ".".join(map(str, path))
    kind = chance.choices(("replaced", "removed", "renamed", "added", "scaled"), (8, 1, 1, 1, 2))[0]
    if kind == "scaled" and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = holder[key] * chance.choice((1.001, 2, 10, -1)) + chance.choice((0, 1))
        return f"{where} is {holder[key]}"
    if kind == "removed":
        del holder[key]
        return f"{where} removed"
    if kind in ("renamed", "added") and isinstance(holder, dict):
        new = chance.choice((*KEYS, f"{key}2"))
        holder[new] = holder.pop(key) if kind == "renamed" else MARK
        return f"{where} renamed {new!r}" if kind == "renamed" else f"{new!r} added beside {where}:"
    holder[key] = MARK
    return f"{where} replaced by"
