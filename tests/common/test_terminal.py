import io
import time

import pytest
from rich.table import Table

from normlab.common.console import Console
from normlab.common.terminal import plain, say

HOSTILE = {
    "a\x1b[31mred\x1b[0m": "ared",
    "a\x9b2Jb": "ab",
    "\x1b]8;;http://elsewhere\x1b\\click\x1b]8;;\x07": "click",
    "\x1b]0;title\x07\x9d52;c;cGFzc3dk\x9ctext": "text",
    "\x1bPq#0\x1b\\\x1bctext": "text",
    "\x1b]0;no end": "0;no end",
    "1 done\r0 done\x08\x07\x0b": "1 done0 done",
    "\u202egnp\u202c.exe\u2066\u200b\ufeff\U000e0041": "gnp.exe",
    "one\r\ntwo\u2028three\tfour": "one\ntwo\nthree\tfour",
    "\udcff": "\ufffd",
    "\u00e9 漢字 ± -0.5 [red]text[/] :smile:": "\u00e9 漢字 ± -0.5 [red]text[/] :smile:",
}


@pytest.mark.parametrize(("text", "shown"), HOSTILE.items(), ids=ascii)
def test_a_text_is_shown_and_not_obeyed(text, shown, capsys) -> None:
    assert plain(text) == shown
    say(text)
    assert capsys.readouterr().out == f"{shown}\n"
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    console.print(text)
    table = Table.grid()
    table.add_row(text)
    console.print(table)
    assert "".join(console.file.getvalue().split()) == 2 * "".join(shown.split())


@pytest.mark.parametrize("part", ["\x1b]", "\x9d", "\x1b[", "\x9b0", "\x1b"])
def test_a_long_text_takes_no_long_time(part) -> None:
    begun = time.process_time()
    plain(part * 200_000)
    assert time.process_time() - begun < 2
