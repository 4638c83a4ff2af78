"""The table of results: every figure, and the author's words left alone."""

import json

from benchmarks import results
from benchmarks.measure import Result, Times


def written(tmp_path, found):
    path = tmp_path / "some.json"
    path.write_text(json.dumps([result.as_json() for result in found]))
    return str(path)


def test_figures_stand_between_the_marks(tmp_path):
    extra = {"baseline_gb": 30.25, "ours_gb": 5.5, "ratio": 5.5}
    found = [
        Result("step/4/x", Times(8.0, 9.0), Times(2.0, 3.0), 2e-6, "same note", bound_s=1.0),
        Result("text/4", Times(3.0, 9.0), Times(2.0, 3.0), None, "same note"),
        Result("memory/4/fp32", Times(3.0, 9.0), Times(2.0, 3.0), None, extra=extra),
    ]
    into = tmp_path / "R.md"
    into.write_text(f"# Mine\n\n{results.START}\nold\n{results.STOP}\n\nmy words\n")
    assert results.main([written(tmp_path, found), "--into", str(into)]) == 0
    text = into.read_text()
    assert text.startswith("# Mine\n") and text.endswith("\n\nmy words\n") and "old" not in text
    assert "| `step/4/x` | 8 s | 2 s | 4.00 | 2.0e-06 | 1 s | 2.00 |" in text
    assert "| `memory/4/fp32` | 30.25 GB | 5.50 GB | 5.50 |  |  |  |" in text
    assert "- `step/4/x`, `text/4`: same note" in text


def test_a_new_file_is_the_table_alone_and_a_broken_one_is_named(tmp_path, capsys):
    into = tmp_path / "new.md"
    found = [Result("text/4", Times(3.0, 9.0), Times(2.0, 3.0), None)]
    assert results.main([written(tmp_path, found), "--into", str(into)]) == 0
    assert "`text/4`" in into.read_text()
    bare = tmp_path / "README.md"
    bare.write_text("mine")
    assert results.main([written(tmp_path, found), "--into", str(bare)]) == 2 and bare.read_text() == "mine"
    assert "has no marks" in capsys.readouterr().err
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert results.main([str(broken), "--into", str(into)]) == 2
    assert "broken.json cannot be read" in capsys.readouterr().err
