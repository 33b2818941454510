"""The tables of families are those of tests and of formulas, and no cell of them is empty."""

import pytest
from comfyui_deltaconv.deltaconv.families import FAMILIES
from comfyui_deltaconv.development import DevelopmentError, families


def rows(text):
    """Cells of the table between the marks, the heading first."""
    drawn = text.partition(families.BEGIN)[2].partition(families.END)[0]
    lines = [line for line in drawn.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def shown():
    """Every test that is evidence, as a result's name."""
    return [
        f"{wanted.test}[{wanted.parameter}]"
        for family in FAMILIES.values()
        for tests in families.evidence(family).values()
        for wanted in tests
    ]


def test_the_readme_has_a_row_per_family_and_no_empty_cell():
    head, *table = rows(families.README.read_text(encoding="utf-8"))
    assert head == ["family", *families.CAPABILITIES, "published blocks", "tested on"]
    assert [row[0] for row in table] == [family.title for family in FAMILIES.values()]
    assert all(len(row) == len(head) and all(row) for row in table)
    # Who breaks one of these runs the command again, and sees it.
    assert not any(families.NO in row for row in table)


def test_the_document_counts_as_the_formulas_do():
    text = families.DOCUMENT.read_text(encoding="utf-8")
    assert families.with_table(text, families.counted()) == text
    assert len(rows(text)) == 1 + 2 * len(FAMILIES)


def test_a_failed_test_is_a_no_and_a_missing_one_an_error():
    results = dict.fromkeys(shown(), True)
    assert families.NO not in families.table(results)
    broken = next(name for name in results if "test_locality_is_that" in name and "Wan" in name)
    lines = families.table({**results, broken: False}).splitlines()
    wrong = [line for line in lines if families.NO in line]
    assert len(wrong) == 3 and all("Wan" in line and line.count(families.NO) == 1 for line in wrong)
    del results[broken]
    with pytest.raises(DevelopmentError, match="test_locality_is_that_of_brute_force"):
        families.table(results)


def test_results_are_read_from_a_report(tmp_path):
    report = tmp_path / "results.xml"
    report.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="tests.nodes.test_a" name="test_b[c]"/>'
        '<testcase classname="tests.nodes.test_a" name="test_d"><failure/></testcase>'
        '<testcase classname="tests.nodes.test_a" name="test_e"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    assert families.results_of(report) == {
        "tests/nodes/test_a.py::test_b[c]": True,
        "tests/nodes/test_a.py::test_d": False,
    }
    with pytest.raises(DevelopmentError, match="Expected the marks"):
        families.with_table("a text", "a table")


def test_evidence_is_of_tests_that_are_there():
    for name in families.functions():
        file, _, function = name.partition("::")
        text = (families.ROOT / file).read_text(encoding="utf-8")
        assert f"\ndef {function}(" in text
