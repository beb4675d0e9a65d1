"""The digest of a user's own code: what changes it, and what does not."""

import importlib.abc
import importlib.util
import sys
import textwrap

import pytest

from normlab.common.source import _own_modules, changed_modules, own_code

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
        _own_modules.cache_clear()
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
        (("nets.py", "size = width", "size = 2 * width"), ["nets"]),  # it might be registered, or be a base class
        (("my_package/__init__.py", "True", "print()"), ["my_package"]),
        (("my_package/deep.py", "3", "4"), ["my_package.deep"]),
        (("my_package/blocks.py", "unused = 5", "unused = 6"), ["my_package.blocks"]),
        (("my_package/parts/__init__.py", "head", "head, other"), ["my_package.parts"]),
        (("my_package/deep.py", "3", "3\nimport unrelated"), ["my_package.deep", "unrelated"]),
        (("my_package/deep.py", "3", "3" + " + 1" * 900), ["my_package.deep"]),
        (("my_package/deep.py", "3", "3 +"), ["my_package.deep"]),  # broken, and another part may not use it
    ],
)
def test_a_change_of_own_modules_is_named(digest, change, modules) -> None:
    assert changed_modules(digest(), digest([change])) == modules


@pytest.mark.parametrize(
    "change",
    [
        ("nets.py", "# of linear layers", "# of anything"),
        ("nets.py", "A network.", "The network."),
        ("nets.py", "Networks of mine.", "Mine."),
        ("nets.py", "WIDTHS = [8, 16]", "WIDTHS = [\n        8,\n        16,\n    ]"),
        ("unrelated.py", "1", "2"),
    ],
)
def test_a_change_of_anything_else_is_none(digest, change) -> None:
    assert changed_modules(digest(), digest([change])) == []


@pytest.mark.parametrize("target", ["nets.Net.make", "my_package.blocks.Block.Inner"])
def test_an_object_inside_of_a_class_has_the_code_of_its_module(digest, target) -> None:
    assert ".".join(target.split(".")[:-2]) in digest(target=target)["modules"]


@pytest.mark.parametrize(
    "target", ["torchvision.models.resnet18", "normlab.norms.batch.BatchNorm", "json.dumps", "no.such", "sys.path"]
)
def test_what_is_installed_or_missing_has_none(digest, target) -> None:
    assert digest(target=target) is None


@pytest.mark.parametrize("imported", [False, True])
def test_a_package_that_a_hook_finds_is_own(digest, monkeypatch, tmp_path, imported) -> None:
    """As an editable install of a flat layout does, before and after the package is imported."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "hooked.py").write_text("width = 4\n")

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            return importlib.util.spec_from_file_location(name, folder / "hooked.py") if name == "hooked" else None

    monkeypatch.setattr("sys.meta_path", [*sys.meta_path, Finder()])
    monkeypatch.delitem(sys.modules, "hooked", raising=False)
    if imported:
        monkeypatch.setitem(sys.modules, "hooked", importlib.import_module("hooked"))
    assert list(digest(target="hooked.width")["modules"]) == ["hooked"]
