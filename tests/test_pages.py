"""Tables between markers: written from results/, and nothing else on the page is touched."""

import pandas as pd
import pytest

from qreg_utils.batch.pages import CLAIMS, PageError, filled, main, write_pages

TABLE = "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
PAGE = """# Page

<!-- results: table toy -->
old
<!-- /results -->

Text that stays: 1 | 2.

<!-- results: verdicts toy -->
<!-- /results -->
"""


@pytest.fixture
def project(tmp_path):
    study = tmp_path / "results" / "toy"
    study.mkdir(parents=True)
    (study / "table.md").write_text(TABLE)
    row = {"dataset": "cifar10", "model": "resnet20", "method": "lsq", "bits": 8, "activation_bits": 8, "detail": ""}
    row |= {"published": "+3.33", "measure": "relative error improvement", "low": 0.5, "high": 3.0, "seeds": 6}
    claims = [
        {**row, "claim": CLAIMS["8 bits of LSQ gain on corrupted images"], "effect": 1.75, "verdict": "supported"},
        {**row, "claim": CLAIMS["2 bits lose"], "effect": 1.0, "verdict": "not decided"},
        {**row, "claim": CLAIMS["2 bits lose"], "effect": 2.0, "verdict": "contradicted"},
        {**row, "claim": CLAIMS["the noise of quantization is normal"], "verdict": "not measured"},
    ]
    pd.DataFrame(claims).to_csv(study / "claims.csv", index=False)
    (tmp_path / "README.md").write_text(PAGE)
    return tmp_path


def test_what_is_between_markers_is_written_anew_and_the_rest_stays(project):
    text = filled(project / "README.md", project / "results")
    assert TABLE in text and "old" not in text and "Text that stays: 1 | 2." in text
    assert text.count("<!-- results: ") == text.count("<!-- /results -->") == 2


def test_each_claim_of_the_paper_has_a_row(project):
    text = filled(project / "README.md", project / "results")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert set(CLAIMS) < set(rows)
    assert "`toy` (CIFAR-10): +1.75 [+0.50, +3.00], 6: **supported**" in rows["8 bits of LSQ gain on corrupted images"]
    assert "1 not decided, 1 contradicted" in rows["2 bits lose"]
    assert "not measured" in rows["the noise of quantization is normal"]


def test_pages_are_written_once(project, capsys):
    assert [path.name for path in write_pages(project)] == ["README.md"]
    assert write_pages(project) == [] and main(project) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("marker", ["table nowhere", "tables toy", "table"])
def test_a_marker_that_cannot_be_filled_is_named_and_nothing_is_written(project, capsys, marker):
    readme = project / "README.md"
    readme.write_text(PAGE.replace("table toy", marker))
    with pytest.raises(PageError, match=rf"README.md: <!-- results: {marker} -->"):
        write_pages(project)
    assert main(project) == 2 and "old" in readme.read_text()
    assert len(capsys.readouterr().err.splitlines()) == 1
