"""The two experiments on linearisation run, keep what they have, and report what they measured."""

from __future__ import annotations

import json
import sys

import pytest

from bench.python import kernel_approximation, recovery


def test_kernel_approximation(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--quick", "--out", str(tmp_path)])
    kernel_approximation.main()
    document = json.loads((tmp_path / "results.json").read_text())
    assert {row["sampling"] for row in document["rates"]} == set(kernel_approximation.SAMPLINGS)
    assert {row["feature_map"] for row in document["heads"]} == set(kernel_approximation.FEATURE_MAPS)
    assert all(0 < row["total_variation"] < 1 for row in document["heads"])
    assert (tmp_path / "rates.png").stat().st_size > 1000
    text = capsys.readouterr().out
    assert "Sobol on the sphere" in text
    assert "hedgehog" in text


def test_fitted_slope():
    counts = [1, 2, 4, 8]
    assert kernel_approximation.slope(counts, [3 / n for n in counts]) == pytest.approx(-1)
    assert kernel_approximation.slope(counts, [3 / n**0.5 for n in counts]) == pytest.approx(-0.5)


def test_recovery_goes_on_and_reports(tmp_path, monkeypatch, capsys):
    def run(*names: str) -> dict:
        options = ["--steps", "2", "--context", "32", "--batch", "1", "--tokens", "512", "--seeds", "0", "1"]
        monkeypatch.setattr(sys, "argv", ["x", *options, "--only", *names, "--out", str(tmp_path)])
        recovery.main()
        return json.loads((tmp_path / "results.json").read_text())

    run("original", "released")
    done = run("original", "released", "hybrid")
    assert [(r["name"], r["seed"]) for r in done["rows"]] == [
        ("original", 0), ("released", 0), ("released", 1), ("hybrid", 0), ("hybrid", 1),
    ]  # fmt: skip
    assert all(r["tokens"] == 64 for r in done["rows"] if r["name"] != "original")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    text = capsys.readouterr().out
    assert " %" in text
    original, released, hybrid = (
        [r["loss"] for r in done["rows"] if r["name"] == name] for name in ("original", "released", "hybrid")
    )
    gap = sum(released) / 2 - original[0]
    assert f"{100 * (sum(released) - sum(hybrid)) / 2 / gap:.0f} %" in (tmp_path / "RESULTS.md").read_text()
    monkeypatch.setattr(sys, "argv", ["x", "--steps", "3", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        recovery.main()
    assert "give another --out" in capsys.readouterr().err
