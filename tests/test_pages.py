"""Tables between markers: written from results/, and nothing else on the page is touched."""

import math

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


def evidence_of(project, *studies):
    for study, effect, seeds in studies:
        folder = project / "results" / study
        folder.mkdir(exist_ok=True)
        row = {
            "dataset": "cifar10",
            "model": "resnet20",
            "method": "lsq",
            "activation_bits": 2,
            "bits": 2,
            "detail": "",
        }
        row |= {"claim": CLAIMS["2 bits lose"], "effect": effect, "low": effect - 1, "high": effect + 1, "seeds": seeds}
        row |= {"spread": 1.0, "image_variance": 0.25, "published_effect": -8.32, "seeds_needed": math.inf}
        several = [{**row, "verdict": "not decided"}]
        doubling = {**row, "claim": CLAIMS["the noise doubles with every bit less"], "published_effect": math.nan}
        verdicts = ["supported", "supported", "contradicted", "not decided"]
        several += [{**doubling, "bits": 2 + i, "verdict": verdict} for i, verdict in enumerate(verdicts)]
        pd.DataFrame(several).to_csv(folder / "claims.csv", index=False)
    marker = "+".join(name for name, *_ in studies)
    (project / "README.md").write_text(f"<!-- results: evidence {marker} -->\n<!-- /results -->\n")
    text = filled(project / "README.md", project / "results").replace("\N{NO-BREAK SPACE}", " ")
    return {
        part.splitlines()[0]: [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| ")
        ]
        for part in text.split("### ")[1:]
    }


def test_the_evidence_has_a_row_for_each_comparison_and_the_mean_of_comparable_studies(project):
    tables = evidence_of(project, ("a", 1.0, 4), ("b", 3.0, 4))
    assert [name.lower() for name in tables] == [name.lower() for name in CLAIMS]
    head, _, first, second, mean = tables["2 bits lose"]
    assert head == ["study", "compared", "effect [95% interval]", "published", "seeds", "verdict"]
    assert first[:3] == ["`a`: ResNet-20, CIFAR-10", "LSQ, 2 bits", "+1.00 [+0.00, +2.00]"]
    assert first[3:] == ["-8.32", "4", "**not decided** (over 200 seeds would)"]
    assert second[0] == "`b`: ResNet-20, CIFAR-10"
    # of each study's mean the variance is 1 / 4 + 0.25; tau^2 = (4 - 2 * 0.5) / 2; 12.706 is t's with one degree
    half_width = 12.7062 * math.sqrt((0.5 + 1.5) / 2)
    assert mean[:3] == ["mean of 2 studies", "LSQ, 2 bits", f"+2.00 [{2 - half_width:+.2f}, {2 + half_width:+.2f}]"]
    counted = "2 supported, 1 contradicted, 1 not decided (over 200 seeds would)"
    doubling = tables["The noise doubles with every bit less"]
    assert [row[1:] for row in doubling[2:4]] == 2 * [["4 settings", "", "", "4", counted]]
    assert tables["The noise of quantization is normal"] == []


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
