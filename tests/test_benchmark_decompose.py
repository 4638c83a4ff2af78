"""The benchmark of report decomposition: its reports, and the whole of it on a few."""

import json

from benchmarks import decompose


def test_reports_are_long_enough_and_hardly_repeat():
    reports = decompose.make_reports(40)
    assert all(200 <= len(f"{findings} {impression}".split()) < 240 for _, findings, impression in reports)
    sentences = [sentence for _, findings, _ in reports for sentence in findings.split(". ")]
    assert len(set(sentences)) > 0.7 * len(sentences)
    assert decompose.make_reports(40) == reports != decompose.make_reports(40, seed=1)


def test_the_whole_comparison_and_its_json(tmp_path):
    arguments = [
        "--reports",
        "12",
        "--part",
        "5",
        "--workers",
        "1",
        "--repeats",
        "1",
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert decompose.main(arguments) == 0
    (result,) = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert result["name"] == "decompose/12" and result["reports"] == 12
    assert result["max_rel_diff"] == 0, "index and memory must change nothing"
    assert result["baseline_s"] > 0 and result["ours_ms_a_report"] > 0
    assert 20 < result["peak_mb_of_a_tenth"] <= result["peak_mb"] * 1.2 and result["peak_mb"] < 500
