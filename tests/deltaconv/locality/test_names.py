"""Names come from models and files: pictures and pages show them, whatever they are."""

import pytest
from comfyui_deltaconv.deltaconv.locality.html_page import report_html
from comfyui_deltaconv.deltaconv.locality.text import report_text
from comfyui_deltaconv.deltaconv.markdown import escaped
from locality_reports import small_report


@pytest.mark.parametrize(
    "name", ["a$b", r"$\frac{$", r"$\nothing$ costs 5 $", "line\nbreak", "{0}%s"]
)
def test_a_name_is_no_formula(name):
    report = small_report(path=name, family=name)
    assert f"| {escaped(name)} " in report_text(report)
    assert report_html(report).count("<img") == 3
