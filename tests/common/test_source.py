"""The digest of a user's own code: what changes it, and what does not."""

import textwrap

import pytest

from normlab.common.source import _own_code, changed_modules, own_code

NETS = """
    '''Networks of mine.'''
    import torch
    from my_package import parts
    from my_package.blocks import Block, width
    WIDTHS = [8, 16]

    class Net(torch.nn.Module):
        '''A network.'''
        def __init__(self):
            self.block, self.head = Block(WIDTHS), make_head()

    def make_head():
        return parts.head  # of linear layers

    class Other(torch.nn.Module):
        size = width
"""
FILES = {
    "nets.py": NETS,
    "my_package/__init__.py": "STARTED = True",
    "my_package/parts/__init__.py": "from ..deep import head",
    "my_package/deep.py": "head = 3",
    "my_package/blocks.py": "from . import deep\nclass Block: depth = deep.head\nwidth = 4\nunused = 5",
    "unrelated.py": "x = 1",
}


@pytest.fixture
def digest(tmp_path, monkeypatch):
    """Of nets.Net, after `changes` of the text of files."""
    monkeypatch.chdir(tmp_path)

    def make(changes=(), target="nets.Net"):
        for name, text in FILES.items():
            for file, old, new in changes:
                if file == name:
                    assert old in text
                    text = text.replace(old, new)
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(textwrap.dedent(text))
        _own_code.cache_clear()
        return own_code(target)

    return make


def test_what_is_behind_an_object_is_found(digest) -> None:
    modules = digest()["modules"]
    assert list(modules) == ["my_package", "my_package.blocks", "my_package.deep", "my_package.parts", "nets"]


@pytest.mark.parametrize(
    ("change", "modules"),
    [
        (("nets.py", "make_head()\n\n", "make_head(1)\n\n"), ["nets"]),
        (("nets.py", "[8, 16]", "[8, 17]"), ["nets"]),
        (("nets.py", "parts.head", "parts.heads"), ["nets"]),
        (("my_package/__init__.py", "STARTED = True", "print()"), ["my_package"]),
        (("my_package/deep.py", "3", "4"), ["my_package.deep"]),
        (("my_package/blocks.py", "deep.head", "deep.head + 1"), ["my_package.blocks"]),
        (("my_package/parts/__init__.py", "..deep", "..blocks"), ["my_package.parts"]),
    ],
)
def test_a_change_of_what_the_object_uses_is_named(digest, change, modules) -> None:
    assert changed_modules(digest(), digest([change])) == modules


@pytest.mark.parametrize(
    "change",
    [
        ("nets.py", "# of linear layers", "# of anything"),
        ("nets.py", "A network.", "The network."),
        ("my_package/__init__.py", "True", "False"),
        ("nets.py", "Networks of mine.", "Mine."),
        ("nets.py", "size = width", "size = 2 * width"),
        ("nets.py", "WIDTHS = [8, 16]", "WIDTHS = [\n        8,\n        16,\n    ]"),
        ("my_package/blocks.py", "unused = 5", "unused = 6"),
        ("unrelated.py", "1", "2"),
    ],
)
def test_a_change_of_anything_else_is_none(digest, change) -> None:
    before = digest()
    assert changed_modules(before, digest([change])) == []


def test_of_a_name_that_no_statement_binds_the_whole_module_counts(digest) -> None:
    star = ("nets.py", "from my_package.blocks import Block, width", "from my_package.blocks import *")
    before = digest([star])
    assert changed_modules(before, digest([star, ("my_package/blocks.py", "unused = 5", "unused = 6")]))


@pytest.mark.parametrize(
    "target", ["torchvision.models.resnet18", "normlab.norms.batch.BN", "json.dumps", "no.such", "sys.path"]
)
def test_what_is_installed_or_missing_has_none(digest, target) -> None:
    assert digest(target=target) is None


def test_a_module_that_cannot_be_parsed_has_none(digest) -> None:
    assert digest([("nets.py", "import torch", "import (")]) is None
