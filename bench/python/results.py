"""Files of results: JSON, and the RESULTS.md and plots that are made from them and from nothing else."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from bench.python.measure import COPY, MATMUL
from bench.python.registry import BASELINE

SCHEMA = 1
SUMMARY = "RESULTS.md"
DOCUMENT = {
    "schema": int,
    "family": str,
    "title": str,
    "axis": str,
    "date": str,
    "machine": dict,
    "versions": dict,
    "settings": dict,
    "left_out": list,
    "rows": list,
}
ROW = {
    "case": str,
    "op": str,
    "shape": list,
    "dtype": str,
    "options": dict,
    "device": str,
    "n": int,
    "series": str,
    "bytes": int,
    "implementation": str,
}
TIMES = {
    "seconds": float,
    "quartiles": list,
    "samples": int,
    "calls_per_sample": int,
    "error": (float, type(None)),
    "ratio": (float, type(None)),
    "fraction_of_copy": (float, type(None)),
    "bytes_per_second": (float, type(None)),
}


def check(document: dict[str, Any]) -> None:
    """Raises ValueError that names what does not belong into a file of results."""
    faults: list[str] = []

    def compare(what: str, item: dict[str, Any], schema: dict[str, Any]) -> None:
        for key, kind in schema.items():
            if not isinstance(item.get(key, faults), kind) or key not in item:
                faults.append(f"{what}: {key} is {item.get(key, 'missing')!r}")

    compare("document", document, DOCUMENT)
    if document.get("schema") != SCHEMA:
        faults.append(f"document: schema is {document.get('schema')!r}, this reads {SCHEMA}")
    for row in document.get("rows", []):
        what = f"{row.get('case')}, {row.get('implementation')}"
        compare(what, row, ROW if "refused" in row else {**ROW, **TIMES})
        if "refused" in row and "seconds" in row:
            faults.append(f"{what}: has a time and is refused")
    if faults:
        raise ValueError("not a file of results: " + "; ".join(faults[:5]))


def _plain(value: Any) -> Any:
    """Finite numbers with six digits, and nothing that JSON does not know."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def write(folder: Path, name: str, document: dict[str, Any]) -> Path:
    document = _plain(document)
    check(document)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    rows = ",\n  ".join(json.dumps(row) for row in document["rows"])
    head = json.dumps({**document, "rows": []}, indent=1)
    path.write_text(head.replace('"rows": []', f'"rows": [\n  {rows}\n ]') + "\n")
    return path


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Name without suffix -> document, for every file of results in the folder."""
    documents = {}
    for path in sorted(folder.glob("*.json")):
        if not path.stem.endswith("-counters"):
            documents[path.stem] = json.loads(path.read_text())
            check(documents[path.stem])
    return documents


# --- RESULTS.md ---------------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    size, unit = (1.0, "s") if value >= 1 else (1e-3, "ms") if value >= 1e-3 else (1e-6, "µs")
    return f"{value / size:.3g} {unit}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _mebibytes(row: dict[str, Any]) -> str:
    """The memory of a row; empty for rows without, as those of C++ and of older files are."""
    if row.get("memory") is None:
        return ""
    size = row["memory"] / 2**20
    return f"{size:.3g}" if size < 1000 else f"{size:.0f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def _by_case(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["implementation"]] = row
    return cases


def _by_series(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        series.setdefault(row["series"], []).append(row)
    return series


def _names(rows: list[dict[str, Any]]) -> list[str]:
    """Implementations in order of appearance, without the baseline and what is only measured beside."""
    seen = dict.fromkeys(row["implementation"] for row in rows)
    return [name for name in seen if name not in (BASELINE, COPY, MATMUL)]


def _peer_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "refused" in row:
        return row["refused"].split(":")[0]
    if row["ratio"] is None:
        return ""
    memory = _mebibytes(row)
    return f"{_ratio(row['ratio'])} ({row['error']:.0e}{f', {memory} MiB' if memory else ''})"


def _baseline_cells(row: dict[str, Any] | None, matmul: bool, memory: bool) -> list[str]:
    if row is None or "refused" in row:
        return [row["refused"] if row else "", "", *([""] if matmul else []), "", *([""] if memory else [])]
    fraction = [f"{row['fraction_of_matmul']:.2f}" if row.get("fraction_of_matmul") else ""] if matmul else []
    taken = [_mebibytes(row)] if memory else []
    of_copy = "" if row["fraction_of_copy"] is None else f"{row['fraction_of_copy']:.2f}"
    return [seconds(row["seconds"]), of_copy, *fraction, _error(row["error"]), *taken]


def _document_section(name: str, document: dict[str, Any], folder: Path) -> list[str]:
    machine, versions, settings = document["machine"], document["versions"], document["settings"]
    gpu = machine["gpu"]
    where = gpu["name"] if gpu and settings["device"] == "cuda" else f"{machine['cpu']}, {machine['cores']} cores"
    about = [f"CPU {machine['cpu']}, {machine['cores']} cores, {machine['isa']}"]
    if gpu:
        about.append(f"GPU {gpu['name']}, driver {gpu['driver']}")
    about.append(f"{settings['threads']} threads for all")
    about += [f"{key} {versions[key]}" for key in sorted(versions) if versions[key] and key not in ("commit", "dirty")]
    commit = (versions["commit"] or "unknown")[:12] + (" with uncommitted changes" if versions["dirty"] else "")
    lines = [
        f"## {document['title']}: {where}",
        "",
        f"{'; '.join(about)}. Commit {commit}, {document['date']}"
        + (", quick run" if settings["quick"] else "")
        + ("" if settings["complete"] else ", cut short")
        + f". Data: [{name}.json]({name}.json).",
        "",
    ]
    rows = document["rows"]
    matmul = any(row["implementation"] == MATMUL for row in rows)
    memory = any(row.get("memory") is not None for row in rows)
    peers = _names(rows)
    for series, in_series in _by_series(rows).items():
        lines += [f"### {series[0].upper()}{series[1:]}", ""]
        plot = f"{name}-{slug(series)}.png"
        if (folder / plot).exists():
            lines += [f"![{document['title']}, {series}]({plot})", ""]
        present = [peer for peer in peers if any(row["implementation"] == peer for row in in_series)]
        header = ["case", BASELINE, "of copy", *(["of matrix product"] if matmul else []), "error"]
        header += [*(["MiB"] if memory else []), *present]
        table = []
        for case, found in _by_case(in_series).items():
            cells = [_peer_cell(found.get(peer)) for peer in present]
            table.append([case, *_baseline_cells(found.get(BASELINE), matmul, memory), *cells])
        lines += _table(header, table)
    slower = [row for row in rows if (row.get("ratio") or 1) < 0.99 and row["implementation"] in peers]
    if slower:
        what = "; ".join(f"{row['case']}: {row['implementation']} {_ratio(row['ratio'])}" for row in slower)
        lines += [f"Faster than {BASELINE}: {what}.", ""]
    if document["left_out"]:
        lines += ["Left out: " + "; ".join(_left_out(item) for item in document["left_out"]) + ".", ""]
    lines += ["<details><summary>Every row</summary>", ""]
    table = []
    for row in rows:
        cells = [row["case"], row["device"], row["implementation"]]
        if "refused" in row:
            table.append([*cells, row["refused"], "", "", "", "", "", *([""] if memory else [])])
            continue
        low, high = row["quartiles"]
        bandwidth = row["bytes_per_second"]
        table.append(
            [
                *cells,
                seconds(row["seconds"]),
                f"{seconds(low)} to {seconds(high)}",
                "" if row["ratio"] is None else _ratio(row["ratio"]),
                "" if bandwidth is None else f"{bandwidth / 1e9:.3g}",
                "" if row["fraction_of_copy"] is None else f"{row['fraction_of_copy']:.3f}",
                _error(row["error"]),
                *([_mebibytes(row)] if memory else []),
            ]
        )
    header = ["case", "device", "implementation", "median", "quartiles", "ratio", "GB/s", "of copy", "error"]
    header += ["MiB"] if memory else []
    return [*lines, *_table(header, table), "</details>", ""]


def _left_out(item: dict[str, Any]) -> str:
    cases = item["cases"]
    return f"{item['implementation']} {item['reason']} ({cases} case{'s' * (cases != 1)})"


def _counters_section(path: Path) -> list[str]:
    """A file `<family>-counters.json`: {"title", "note", "rows": [{column: value, ...}, ...]}."""
    content = json.loads(path.read_text())
    lines = [f"## {content['title']}", ""]
    if content.get("note"):
        lines += [content["note"], ""]
    lines += [f"Data: [{path.name}]({path.name}).", ""]
    columns = list(dict.fromkeys(key for row in content["rows"] for key in row))

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    table = [[cell(row.get(column)) for column in columns] for row in content["rows"]]
    return [*lines, *_table([column.replace("_", " ") for column in columns], table)]


def render(folder: Path) -> str:
    lines = [
        "# Results",
        "",
        "Generated from the JSON files beside it by `python -m bench.python.run` (`--render` alone regenerates it); do",
        "not edit. All implementations of a case ran in the same process on the same data, in interleaved rounds, with",
        "cold caches and the same number of threads; times are medians.",
        "",
        f"*{BASELINE}* is its time; *of copy* the time of copying as many bytes as the case must move (every input",
        "read once, every output written once), divided by its time; *of matrix product* its rate of the operations",
        "that the case needs at least, over that of a large matrix product; *error* its relative error against",
        "float64, or of factors the squared loss beyond the least, relative to it; *MiB*, where it is known, what a",
        "call needs at its peak beside its inputs, its result among it. The columns of the others say how many times",
        f"as long as {BASELINE} they took (above 1 {BASELINE} is faster), and in brackets their error and memory.",
        "What gives a wrong result has no time.",
        "",
    ]
    for name, document in load(folder).items():
        lines += _document_section(name, document, folder)
    for path in sorted(folder.glob("*-counters.json")):
        lines += _counters_section(path)
    return "\n".join(lines).rstrip() + "\n"


# --- plots --------------------------------------------------------------------------------------------------------


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def plot(folder: Path, least: int = 4) -> list[Path]:
    """Ratio and bandwidth against N, for every series of at least so many lengths. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    for name, document in load(folder).items():
        for series, in_series in _by_series(document["rows"]).items():
            rows = [row for row in in_series if "seconds" in row]
            if len({row["n"] for row in rows}) < least or not _names(rows):
                continue
            figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
            for index, each in enumerate([BASELINE, COPY, *_names(rows)]):
                of = sorted((row for row in rows if row["implementation"] == each), key=lambda row: row["n"])
                style: dict[str, Any] = {"marker": ".", "label": each, "color": f"C{index}"}
                if each == COPY:
                    style |= {"color": "0.6", "linestyle": "--"}
                left.plot([row["n"] for row in of], [row["bytes_per_second"] / 1e9 for row in of], **style)
                ratios = [row for row in of if row["ratio"] is not None]
                right.plot([row["n"] for row in ratios], [row["ratio"] for row in ratios], **style)
            left.set(ylabel="GB/s of the bytes that must move", ylim=(0, None))
            right.set(ylabel=f"time / time of {BASELINE}", yscale="log")
            right.axhline(1, color="0.8", linewidth=0.8)
            for axes in (left, right):
                axes.set(xlabel=document["axis"], xscale="log")
                axes.set_xscale("log", base=2)
            left.legend(fontsize="small")
            figure.suptitle(f"{document['title']}: {series}")
            path = folder / f"{name}-{slug(series)}.png"
            figure.savefig(path, dpi=80)
            pyplot.close(figure)
            made.append(path)
    return made
