"""The README's figures are the committed records'."""

import pytest

from bench import readme, records, report

H200 = records.RESULTS / "h200"


def test_readme_shows_the_committed_records() -> None:
    """Fails where somebody edits a figure by hand, or commits records without `python -m bench report --readme h200`."""
    text = readme.README.read_text()
    assert readme.replace(text, readme.content(H200)) == text


def test_every_committed_figure_passed_its_check() -> None:
    found = [record for _, made in report.load(H200).values() for record in made]
    assert found
    for record in found:
        assert 0 <= record.error <= record.tolerance, record.key
        assert record.us > 0 and record.percent_of_bound < 105, record.key


def test_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the two lines"):
        readme.replace("# Title\n", "| |")
