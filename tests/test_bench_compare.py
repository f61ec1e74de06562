"""Two files of the benchmark compared, and the overview of one."""

import json

import pytest
from bench_cases import cell, of_run
from numoe.__main__ import main
from numoe.bench import compare, report


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (cell(1.0, 0.5), cell(1.2, 0.5 / 1.2), "slower"),
        (cell(1.0, 0.5), cell(0.8, 0.5 / 0.8), "faster"),
        (cell(1.0, 0.5), cell(1.04, 0.5 / 1.04), "same"),  # below 5 %
        (cell(1.0, 0.5), cell(1.2, 0.5 / 1.2, spread=0.3), "same"),  # below the spread
        (cell(1.0, 0.5), cell(0.5, 0.5), "same"),  # twice as fast on memory that was twice as fast
        (cell(1.0, 0.5), cell(2.0, 0.5 / 2, clean=False), "?"),
    ],
)
def test_verdicts(before, after, verdict):
    (row,) = compare.compare(of_run(before), of_run(after))
    assert row["verdict"] == verdict
    assert row["ratio"] == after["contenders"]["numoe"]["median"]


def test_the_comparison_counts_what_both_files_have():
    before = of_run(cell(1.0, numpy=2.0), cell(1.0, tokens=4))
    after = of_run(cell(4.0, 0.125, other=1.0), cell(1.0, tokens=4), cell(1.0, tokens=16))
    after["machine"] = {**after["machine"], "cpu": "y"}
    lines = list(compare.comparison_lines(before, after))
    assert lines[0] == "note: cpu differs: x / y"
    assert "slower" in next(line for line in lines if line.startswith("tiny") and " 4.00 " in line)
    # in common: numoe at T = 1 (4x) and T = 4 (1x), geometric mean 2; alone: numpy, other, numoe at T = 16
    assert lines[-1].startswith("2 compared: 0 faster, 1 slower, 1 within noise, 0 disturbed")
    assert lines[-1].endswith("geometric mean 2.000; 3 in one file only")


def test_a_run_compared_with_itself_is_the_same(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(of_run(cell(1.0), cell(2.0, tokens=4))))
    assert main(["bench", "--compare", str(path), str(path)]) == 0
    assert "2 compared: 0 faster, 0 slower, 2 within noise" in capsys.readouterr().out


def test_flags():
    result = cell(1.0)["contenders"]["numoe"]
    assert report.flags(result) == ""
    assert report.flags({**result, "clean": False, "drifted": True}) == "~%"
    assert report.flags({**result, "wrong": True}) == "!"


def test_the_overview_shows_who_was_fastest_and_who_is_wrong():
    cells = [cell(2.0, 0.4, numpy=1.0, other=4.0), cell(3.0, 0.2, numpy=12.0, tokens=16)]
    cells[1]["contenders"]["cheat"] = {**cells[1]["contenders"]["numpy"], "median": 0.1, "wrong": True}
    title, heading, one, many, mean, end = report.overview_lines(cells)
    assert "forward;" in title
    assert heading.split() == ["layer", "T", "numoe", "numpy", "other", "cheat"]
    assert one.split() == ["tiny", "1", "40", "40*", "40", "-"]
    assert many.split() == ["tiny", "16", "20*", "20", "-", "20!"]
    assert mean.split() == ["x", "numoe,", "mean", "1.00", "1.41", "2.00", "-"]  # √(0.5 * 4)
    assert end == ""
