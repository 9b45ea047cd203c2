"""What standard error shows: a bar, rich's where it is installed, else one line now and then; no remarks of others."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SECONDS_BETWEEN_LINES = 2.0


@contextmanager
def bar(title: str, total: int, show: bool = True) -> Iterator[Callable[[str], None]]:
    """Yields ``advance(what)``, to be called after each of ``total`` steps with a word on what comes next."""
    if not show:
        yield _nothing
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield _lines(title, total)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)

        def advance(what: str = "") -> None:
            progress.update(task, advance=1, description=f"{title} {what}".rstrip())

        yield advance


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Keep a library's logger to errors: remarks on how it was called are not for those who call us."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _nothing(what: str = "") -> None:
    pass


def _lines(title: str, total: int) -> Callable[[str], None]:
    done, shown = 0, time.monotonic()

    def advance(what: str = "") -> None:
        nonlocal done, shown
        done += 1
        if time.monotonic() - shown >= _SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            print(f"{title} {done}/{total} {what}".rstrip(), file=sys.stderr, flush=True)

    return advance
