"""Saved locality reports: read back as they were, or refused with the reason."""

import json

import pytest
from comfyui_deltaconv.deltaconv.locality.document import read_report
from comfyui_deltaconv.deltaconv.locality.text import report_text
from locality_reports import small_report

PATH = "blocks.0.attn"
MEASURED = ("sites", PATH, "measurements", 0)


def test_a_report_is_read_back_as_it_was():
    report = small_report()
    again = read_report(report.to_json())
    assert again.to_json() == report.to_json() and report_text(again) == report_text(report)
    assert again.sites == report.sites


@pytest.mark.parametrize(
    ("where", "value", "reason"),
    [
        (("format",), 2, "its format is 2"),
        (("latent",), [0, 8], "latent"),
        (("share",), "0.6", "share: Input should be a valid number"),
        (("percents",), [], "1 sigmas at 0 percents"),
        (("sigmas",), [1e300], "figures beyond 1e"),
        (("sites",), {}, "0 layers"),
        (("sites", PATH, "path"), "blocks.1.attn", "path blocks.1.attn"),
        (("sites", PATH, "width"), 10**8, "a map of 100000000 × 8"),
        (("sites", PATH, "height"), 9, "windows"),
        (("sites", PATH, "measurements"), [], "0 measurements at 1 sigmas"),
        (("sites", PATH, "sensitivity", "block_error"), [1e300], "figures beyond 1e"),
        ((*MEASURED, "entropy"), [8e9], "an entropy beyond"),
        ((*MEASURED, "entropy"), [], "lists of"),
        ((*MEASURED, "profile"), [1.0], "a profile of 1"),
        ((*MEASURED, "fits", 0, "a"), 1e300, "figures beyond 1e"),
        (("maps", PATH, "shape"), [1, 1, 1, 8, 9], "maps of 128 bytes"),
        (("maps", PATH, "shape"), [1, 1, 1, 4, 16], r"maps of \(1, 1, 1, 4, 16\)"),
        (("maps", PATH, "float16"), "?", ""),
        (("left_out",), {"x": 1}, "left_out"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(where, value, reason):
    document = json.loads(small_report().to_json())
    inner = document
    for part in where[:-1]:
        inner = inner[part]
    inner[where[-1]] = value
    with pytest.raises(ValueError, match=rf"Expected a locality report .*{reason}.*Measure again"):
        read_report(json.dumps(document))


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "[" * 10**6, "[" + "[]," * 10**6 + "[]]", "1" * 10**6]
)
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="Expected a locality report"):
        read_report(text)
