"""Reports: what is in the page and the folder."""

import json
import math

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from freqrank.report import Picture, Report, Section, Table, Text, label_ends, plot, png, write_folder


def made(title="A title"):
    with plot(2) as (figure, (left, right)):
        left.plot([1, 2], [3, 4])
        right.plot([1, 2], [3, 4])
        figure.draw_without_rendering()
        label_ends(right, [(2, 4, "a", "black"), (2, 4, "b", "red")])
        picture = Picture("a-plot", png(figure), "What <it> shows")
    table = Table(["name", "value"], [["x < y", "1.5"], ["z", "-2"]], "Some & numbers")
    results = {"loss": math.inf, "values": torch.ones(2)}
    return Report(
        title, "Text", [Section("one", "One", "About it", [picture, table, Text("A [b]", "[red]raw")], results)]
    )


def test_the_page_needs_nothing_else_and_escapes_text():
    page = made().to_html()
    assert page.count("data:image/png;base64,") == 1
    assert 'src="http' not in page
    assert "x &lt; y" in page
    assert "What &lt;it&gt; shows" in page
    assert "Some &amp; numbers" in page
    assert '<td class="n">-2</td>' in page


def test_the_results_are_json():
    results = json.loads(json.dumps(made().to_dict(), allow_nan=False))
    assert results["one"] == {"loss": "inf", "values": [1.0, 1.0]}
    assert results["machine"]["versions"]["torch"] == torch.__version__


def test_text_is_not_taken_for_markup(capsys):
    from rich.console import Console

    made().sections[0].print(Console())
    shown = capsys.readouterr().out
    assert "[red]raw" in shown
    assert "A [b]" in shown


def test_a_report_replaces_a_report_and_nothing_else(tmp_path):
    files = write_folder(made(), tmp_path / "out")
    assert {file.name for file in files} == {"report.html", "results.json", "a-plot.png"}
    assert (tmp_path / "out" / "a-plot.png").read_bytes().startswith(b"\x89PNG")
    write_folder(made("Another"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["title"] == "Another"
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        write_folder(made(), tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        write_folder(made(), tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_labels_are_moved_apart():
    with plot(1) as (_, (axes,)):
        axes.set_ylim(0, 1)
        label_ends(axes, [(0, y, str(y), "black") for y in (0.98, 0.99, 1.0, 0.2)], gap=0.1)
        heights = sorted(text.xy[1] for text in axes.texts)
    assert heights == pytest.approx([0.2, 0.8, 0.9, 1.0])


def test_a_row_of_the_wrong_length():
    with pytest.raises(ValueError, match="2 cells; got 1"):
        Table(["a", "b"], [["x"]])
