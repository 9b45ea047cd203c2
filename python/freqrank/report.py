"""Reports: tables for the console, plots, one self-contained HTML page and JSON, from the same few parts."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import freqrank
from freqrank import _native

#: Okabe and Ito's colours, told apart by colour-blind readers too
COLOURS = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "blue": "#0072B2",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "grey": "#8A8A8A",
}


def machine() -> dict[str, Any]:
    """Versions, processor, devices, and which native libraries were loaded or why not.

    >>> machine()["libraries"]["cpu"].startswith("loaded")
    True
    """
    versions = {"freqrank": freqrank.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "scipy", "matplotlib"):
        version = _version(name)
        if version is not None:
            versions[name] = version
    return {
        "versions": versions,
        "cpu": {
            "model": _cpu_model(),
            "architecture": platform.machine(),
            "isa": str(torch.ops.freqrank.cpu_isa()),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "libraries": dict(_native.libraries),
        "system": f"{platform.system()} {platform.release()}",
    }


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def size(count: float) -> str:
    """A number of bytes for people, in units of 1000.

    >>> size(999), size(4_120_000)
    ('999 B', '4.12 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def plain(value: Any) -> Any:
    """``value`` with everything in it made JSON: dataclasses and tensors unpacked, non-finite numbers as strings.

    >>> plain({"a": torch.tensor([1, 2]), 3: math.inf})
    {'a': [1, 2], '3': 'inf'}
    """
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


@dataclass
class Table:
    """Columns and rows of ready-made text; a cell that looks like a number is set to the right."""

    columns: Sequence[str]
    rows: list[Sequence[str]]
    title: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"every row must have {len(self.columns)} cells; got {len(row)}: {row!r}")

    def __str__(self) -> str:
        """Plain lines, columns side by side.

        >>> print(Table(["method", "loss"], [["svd", "1.5"], ["svd-llm", "1.25"]], "Losses"))
        Losses
        method   loss
        svd      1.5
        svd-llm  1.25
        """
        cells = [list(self.columns)] * any(self.columns) + [list(row) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([self.title] * bool(self.title) + lines)

    def is_numeric(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column] not in ("", "-")]
        return bool(cells) and all(cell.lstrip("+-")[:1].isdigit() for cell in cells)

    def to_html(self) -> str:
        classes = [' class="n"' if self.is_numeric(i) else "" for i in range(len(self.columns))]
        head = "".join(f"<th{c}>{html.escape(x)}</th>" for c, x in zip(classes, self.columns, strict=True))
        body = "".join(
            "<tr>" + "".join(f"<td{c}>{html.escape(x)}</td>" for c, x in zip(classes, row, strict=True)) + "</tr>\n"
            for row in self.rows
        )
        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        return (
            f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'
        )

    def print(self, console: Any) -> None:
        from rich import box
        from rich.table import Table as RichTable

        table = RichTable(
            title=self.title or None,
            show_header=any(self.columns),
            box=box.SIMPLE_HEAD,
            title_justify="left",
            title_style="bold",
            pad_edge=False,
        )
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if self.is_numeric(i) else "left")
        for row in self.rows:
            table.add_row(*map(_escape, row))
        console.print(table)


@dataclass
class Picture:
    """A plot, kept as PNG bytes; ``name`` is its file name without the ending."""

    name: str
    png: bytes
    caption: str

    def to_html(self) -> str:
        data = base64.b64encode(self.png).decode()
        caption = html.escape(self.caption)
        return (
            f'<figure><img src="data:image/png;base64,{data}" alt="{caption}"><figcaption>{caption}</figcaption>'
            "</figure>\n"
        )


@dataclass
class Text:
    """A block of literal text, such as a sample that a model wrote."""

    title: str
    text: str

    def to_html(self) -> str:
        return f"<h3>{html.escape(self.title)}</h3>\n<pre>{html.escape(self.text)}</pre>\n"


@dataclass
class Section:
    """A heading, what was done in a sentence or two, tables, plots and literal text, and the numbers for the JSON."""

    key: str
    title: str
    text: str
    parts: list[Table | Picture | Text] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def print(self, console: Any) -> None:
        """Print the section to a rich console; plots are left to the files."""
        console.rule(f"[bold]{_escape(self.title)}", align="left")
        console.print(_escape(self.text), style="dim")
        for part in self.parts:
            if isinstance(part, Table):
                part.print(console)
            elif isinstance(part, Text):
                console.print(f"[bold]{_escape(part.title)}[/]\n{_escape(part.text)}\n", highlight=False)


@dataclass
class Report:
    """Sections under a title; :meth:`write` makes a folder of them."""

    title: str
    text: str
    sections: list[Section] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=machine)

    def to_dict(self) -> dict[str, Any]:
        seconds = {section.key: round(section.seconds, 2) for section in self.sections}
        results = {section.key: section.results for section in self.sections}
        return plain({"title": self.title, "machine": self.facts, "seconds": seconds, **results})

    def to_html(self) -> str:
        """One page that needs no other file."""
        parts = []
        for section in self.sections:
            parts.append(f'<section id="{section.key}"><h2>{html.escape(section.title)}</h2>\n')
            parts.append(f"<p>{html.escape(section.text)}</p>\n")
            parts.extend(part.to_html() for part in section.parts)
            parts.append("</section>\n")
        links = " · ".join(f'<a href="#{s.key}">{html.escape(s.title)}</a>' for s in self.sections)
        cpu, versions = self.facts["cpu"], self.facts["versions"]
        where = (
            f"{cpu['model']} ({cpu['isa']}), {cpu['threads']} of {cpu['cores']} cores · "
            + " · ".join(f"{name} {version}" for name, version in versions.items())
            + f" · computed in {sum(s.seconds for s in self.sections):.0f} s"
        )
        return _PAGE.format(
            title=html.escape(self.title),
            text=html.escape(self.text),
            links=links,
            where=html.escape(where),
            body="".join(parts),
        )

    def files(self) -> dict[str, bytes]:
        """``report.html``, ``results.json`` and one PNG a plot, by name."""
        files = {"report.html": self.to_html().encode(), "results.json": json.dumps(self.to_dict(), indent=1).encode()}
        for section in self.sections:
            files |= {f"{part.name}.png": part.png for part in section.parts if isinstance(part, Picture)}
        return files


def check_folder(folder: Path) -> None:
    """Raise unless ``folder`` can be written: absent, empty, or the report of an earlier run and nothing else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"the output {folder} is a file")
    names = {path.name for path in folder.iterdir()}
    if not names:
        return
    suffixes = (".html", ".json", ".png", ".csv")
    if not {"results.json", "rows.json"} & names or any(Path(name).suffix not in suffixes for name in names):
        raise FileExistsError(
            f"the output folder {folder} is not empty and holds more than an earlier report; name a new one"
        )


def write_folder(report: Report, folder: Path, more: Mapping[str, bytes] | None = None) -> list[Path]:
    """Write the report's files and ``more`` into ``folder``, all or none; an earlier report there is replaced."""
    check_folder(folder)
    files = {**report.files(), **(more or {})}
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        for name, data in files.items():
            (new / name).write_bytes(data)
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        new.rename(folder)
    return [folder / name for name in files]


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@contextmanager
def plot(columns: int = 1, *, width: float = 8.0, height: float = 4.2, **options: Any) -> Iterator[tuple[Any, list]]:
    """A figure with ``columns`` plots side by side: yields it and a list of its axes, in the library's style.

    No window system and no global state of matplotlib's is touched.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "grid.color": "#E6E6E6",
            "axes.axisbelow": True,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "legend.frameon": False,
            "lines.linewidth": 1.6,
            "lines.markersize": 4.5,
        }
    ):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False, **options)
        yield figure, list(axes[0])


def log_losses(axes: Any, losses: Sequence[float]) -> None:
    """A logarithmic axis that shows all of ``losses`` and has them written as plain numbers."""
    low, high = min(losses), max(losses)
    axes.set_yscale("log")
    axes.set_ylim(low * 0.91, high * 1.03)
    steps = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)
    ticks = [step for step in steps if low < step < high] or [low]
    axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.minorticks_off()


def png(figure: Any, dpi: int = 150) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()


def label_ends(axes: Any, labels: list[tuple[float, float, str, str]], *, gap: float = 0.055) -> None:
    """Write a name in its colour to the right of each point (x, y, text, colour), moved apart where they would touch.

    ``gap`` is the smallest distance of two labels as a fraction of the axis' height. Call it when the limits are final.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = sorted((float(to_axes.transform((x, y))[1]), x, text, colour) for x, y, text, colour in labels)
    heights = [height for height, *_ in placed]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    limit = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - gap
    for (_, x, text, colour), height in zip(placed, heights, strict=True):
        axes.annotate(
            text,
            (x, height),
            xycoords=("data", "axes fraction"),
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=8.5,
            annotation_clip=False,
        )


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ margin-bottom: .2rem; }}
h2 {{ margin-top: 3rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem; }}
nav, .where {{ color: #666; font-size: .875rem; }}
a {{ color: #0072B2; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .875rem; margin: 1rem 0; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; font-weight: 600; padding-bottom: .4rem; }}
th, td {{ padding: .2rem .9rem .2rem 0; text-align: left; white-space: nowrap; }}
th {{ border-bottom: 1px solid #999; font-weight: 600; }}
tbody tr:nth-child(even) {{ background: #f7f7f7; }}
.n {{ text-align: right; }}
figure {{ margin: 1.5rem 0; }}
img {{ max-width: 100%; }}
figcaption {{ color: #666; font-size: .875rem; }}
pre {{ background: #f7f7f7; padding: .8rem; overflow-x: auto; font-size: .8125rem; line-height: 1.4; }}
</style>
<h1>{title}</h1>
<p>{text}</p>
<p class="where">{where}</p>
<nav>{links}</nav>
{body}
</html>
"""
