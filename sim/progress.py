"""Progress on the terminal, on stderr: a bar for each task, then a line with its time."""

import contextlib
import time

from rich import progress
from rich.console import Console

__all__ = ["task"]


@contextlib.contextmanager
def task(text, total=None):
    """Show a bar for a task of `total` steps; the value is a function that advances it by one.

    The time is printed when the task ends without an exception.
    """
    console = Console(stderr=True)
    began = time.monotonic()
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(),
               progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
    with progress.Progress(*columns, console=console, transient=True,
                           disable=not console.is_terminal) as bars:
        bar = bars.add_task(text, total=total)
        yield lambda *_: bars.advance(bar)
    console.print(f"{text}: {time.monotonic() - began:.1f} s", highlight=False)
