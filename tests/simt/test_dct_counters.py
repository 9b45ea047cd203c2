"""The committed counts of what the DCT's kernels move."""

import json
from pathlib import Path

import freqrank_simt
import pytest

from bench.python import counters

ROWS = json.loads((Path(__file__).parents[2] / "bench" / "results" / "dct-counters.json").read_text())["rows"]


def test_every_plan_moves_what_it_states():
    assert {row["algorithm"] for row in ROWS} == {
        "power of two",
        "mixed radix",
        "Bluestein",
        "several passes",
        "2-D tile",
    }
    for row in ROWS:
        assert row["bytes_stated"] == f"{row['bytes_read']} + {row['bytes_written']}", row["n"]


def test_powers_of_two_are_read_and_written_once():
    rows = [row for row in ROWS if row["algorithm"] == "power of two"]
    assert {int(row["n"]) for row in rows if row["n"].isdigit()} >= {32 << i for i in range(8)}
    for row in rows:
        size = 4 if row["dtype"] == "float32" else 2
        assert row["bytes_read"] == row["bytes_written"] == row["rows"] * int(row["n"].split()[0]) * size
        assert row["requested"] == row["bytes_read"] + row["bytes_written"]
        assert row["sectors_read"] == row["sectors_written"] == 1
        assert row["bank_conflicts"] == 0 or row["n"].endswith("dim=0")
        assert row["spilled"] == 0


@pytest.mark.parametrize("n", [64, 1024])
def test_the_counts_are_those_of_the_kernels(n):
    row = counters.Runner(freqrank_simt).row(counters.Case((n,), 2, "bfloat16"))
    committed = [r for r in ROWS if (r["n"], r["type"], r["dtype"]) == (str(n), 2, "bfloat16")]
    assert [row] == [{key: r[key] for key in row} for r in committed], "run python -m bench.python.counters again"
