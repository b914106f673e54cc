"""The benchmarks run, and their tables have a row for everything. (How fast things are is no matter for a test.)"""

import subprocess
import sys
from pathlib import Path

import pytest

from qreg_utils.corruptions import CORRUPTIONS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmark") / "report.md"
    toy = ["--rounds", "1", "--images", "2", "--layout-images", "3"]
    subprocess.run([sys.executable, "benchmarks/corruptions.py", "--output", output, *toy], cwd=ROOT, check=True)
    return output.read_text()


def test_every_corruption_is_timed_at_both_sizes(report):
    assert all(report.count(f"| {name} ") == 2 for name in CORRUPTIONS)


def test_the_layout_is_written(report):
    assert "285 corrupted images of 3 test images by two processes" in report


def test_the_committed_table_is_complete():
    text = (ROOT / "docs" / "benchmark-corruptions.md").read_text()
    assert all(text.count(f"| {name} ") == 2 for name in CORRUPTIONS)
    assert "950,000 corrupted images" in text
