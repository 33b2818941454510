"""What reports say is Markdown: tables stay tables, and what strangers name does nothing in it."""

import html

from comfyui_deltaconv.deltaconv.markdown import bullets, escaped, table
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt


def test_a_table_lines_up_and_is_one():
    text = table([["layer", "error"], ["input_blocks.1", "0.5"], ["m", "12.25"]])
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].startswith("| input_blocks.1 |") and lines[3].endswith("| 12.25 |")
    shown = MarkdownIt().enable("table").render(text)
    assert shown.count("<tr>") == 3 and 'style="text-align:right"' in shown
    assert "<td>input_blocks.1</td>" in shown


def test_every_line_of_a_list_is_an_item():
    assert MarkdownIt().render(bullets(["one", "two"])).count("<li>") == 2


@given(st.text(alphabet="ab _*<>[]()`|~\\&!#-\n$x1", max_size=30))
def test_a_name_of_a_stranger_is_shown_as_it_is(name):
    page = MarkdownIt("gfm-like", {"linkify": False}).render(bullets([f"for {escaped(name)}."]))
    inside = page.removeprefix("<ul>\n<li>").removesuffix("</li>\n</ul>\n")
    assert "<" not in inside
    assert html.unescape(inside) == f"for {' '.join(name.split())}."
