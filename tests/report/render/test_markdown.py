import re
from html.parser import HTMLParser

import markdown_it
import pandas as pd
import pytest

from normlab.report.analysis.cells import Table, TableCell
from normlab.report.render.markdown import as_code, escaped, markdown, markdown_table, notes

try:
    from markdown import markdown as python_markdown  # of the documentation site
except ImportError:
    python_markdown = None


def test_markdown_is_aligned_and_pipes_are_escaped():
    text = markdown(pd.DataFrame({"arm": ["a|b", "c"], "batch 8": ["1", "22.0 (n=1)"]}))
    assert text.splitlines() == [
        "| arm  |    batch 8 |",
        "| ---- | ---------: |",
        "| a\\|b |          1 |",
        "| c    | 22.0 (n=1) |",
    ]


def test_a_column_of_sentences_is_left_aligned():
    long = "A sentence that is rather longer than a number with its interval."
    frame = pd.DataFrame({"arm": ["bn"], "claim": [long], "n": ["3"]})
    assert markdown(frame).splitlines()[1] == f"| --- | {'-' * len(long)} | --: |"


def test_in_markdown_the_best_number_is_bold_without_its_notes_and_a_close_one_is_plain():
    rows = [
        {"arm": TableCell("bn"), "batch 8": TableCell("91.2 ± 0.8 (n=3)", highlight="best")},
        {"arm": TableCell("none"), "batch 8": TableCell("91.0 ± 0.8 (n=3)", highlight="close")},
    ]
    setting, pipes = markdown_table(Table("accuracy", "Accuracy", "", pd.DataFrame(), {"digits": rows}))
    assert setting == "**digits**"
    assert pipes.splitlines()[2:] == [
        "| bn   | **91.2 ± 0.8** (n=3) |",
        "| none |     91.0 ± 0.8 (n=3) |",
    ]


HOSTILE = [
    "a|b",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "[x] [y]",
    "![i](http://elsewhere/i.png)",
    "[x]: javascript:alert(1)",
    "# head",
    "> quote",
    "- item",
    "12. item",
    "`code` *b* **b** _i_ __b__ ~~s~~ $x$",
    "&lt;b&gt; &amp; &#106; a & b < c",
    "\\*a\\<b>",
    "<http://elsewhere> <!-- x",
    "{: onclick=alert(1)}",
    "a_b-c [1.5, 2.5] -0.5 +1 (n=3)",
]


class _Read(HTMLParser):
    """The tags and the text of what a reader of Markdown made."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, object]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, attributes))

    def handle_data(self, data):
        self.text += data


def readers():
    yield markdown_it.MarkdownIt("gfm-like", {"linkify": False}).render
    if python_markdown:
        yield lambda text: python_markdown(text, extensions=["tables", "attr_list"])


@pytest.mark.parametrize("text", HOSTILE)
def test_escaped_markdown_is_read_as_its_text(text):
    for read in readers():
        for around, tags in (("{}", ["p"]), ("- {}", ["ul", "li"]), ("**x**\n\n## {}", ["p", "strong", "h2"])):
            html = _Read(read(around.format(escaped(text))))
            assert [tag for tag, _ in html.tags if tag != "p"] == [tag for tag in tags if tag != "p"], html.tags
            assert html.text.strip().removeprefix("x").strip() == text
        html = _Read(read(markdown(pd.DataFrame({"arm": [text], "n": ["1"]}))))
        assert {tag for tag, _ in html.tags} <= {"table", "thead", "tbody", "tr", "th", "td"}
        assert html.text.split() == ["arm", "n", *text.split(), "1"]


def test_lines_and_controls_of_a_name_are_no_markdown():
    assert escaped("a\n# b\x1b[31m\u202ec\r\n\n---") == "a # bc ---"
    assert as_code("a\nb") == "`a b`"
    assert "`" not in as_code("a`b").replace("\\`", "")


@pytest.mark.parametrize(
    "text",
    [
        *HOSTILE,
        "[x](JavaScript:alert(1)) [x]( <javascript:alert(1)>) [x](java\tscript:alert(1)) [x](data:text/html,x)",
        "[x](javascript&colon;alert(1)) [x](&#106;avascript:alert(1)) [x](javascript\\:alert(1))",
        "[x][y]\n\n[y]: javascript:alert(1)\n[z]:\n  vbscript:x",
        "![a][b]\n\n[b]: http://elsewhere/i.png",
        "!![a](http://elsewhere/i.png) !!![a](http://elsewhere/i.png)",
        "<details><summary>x",
        "[x](a b [y](javascript:alert(1))",
    ],
)
def test_notes_of_a_person_hold_no_html_no_images_and_no_links_but_to_the_web_and_files(text):
    for read in readers():
        for tag, attributes in _Read(read(notes(text))).tags:
            assert tag not in ("script", "img", "details", "summary")
            for name, value in attributes:
                assert name in ("href", "start") or tag == "p", (tag, name, value)
                assert name != "href" or re.match(r"https?://|[^:]*$", value), value


def test_notes_of_a_person_stay_markdown_and_end_what_they_began():
    text = "# Seen\n\n- *a* < b & c: [docs](../report.md), [web](https://a.org/b)\n\n```\ncode"
    assert notes(text) == f"{text}\n```"
    assert notes(f"{text}\n```") == f"{text}\n```"
