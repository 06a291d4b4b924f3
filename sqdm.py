"""The command `sqdm`: what each subcommand needs is imported inside it, so that help is quick."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
)


def main():
    """Run the command line; a user's mistake ends in one line on stderr and a status.

    Status 2 is for wrong input: any ValueError or OSError. Status 1 is for a check that failed: an
    exception with ``exit_code`` 1. Everything else is a defect and keeps its traceback, and so
    does everything when SQDM_TRACEBACK is set.
    """
    try:
        app()
    except Exception as error:
        code = getattr(error, "exit_code", 2 if isinstance(error, (ValueError, OSError)) else None)
        if code is None or os.environ.get("SQDM_TRACEBACK"):
            raise
        print(f"sqdm: {_one_line(error)}", file=sys.stderr)
        sys.exit(code)


def _one_line(error):
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _output_folder(path):
    """`path` as a folder that can be written, made if need be."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(
            f"{path}: output folder must be writable ({error.strerror}); choose another"
        ) from None
    return path


def _write(path, text):
    """Write `text` to `path`, whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path}: must be writable ({error.strerror}); choose another") from None
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path, value):
    _write(path, json.dumps(value, indent=2) + "\n")


def _print_version(value: bool):
    if value:
        from importlib.metadata import version

        print(f"sqdm {version('sqdm')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say which."),
    ] = False,
):
    """From a trained diffusion model to a bit-exact sparse 4-bit accelerator."""


Out = Annotated[Path, typer.Option(help="Folder for the results; made if need be.")]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="mnist32 or cifar10.")],
    data: Annotated[
        Path | None,
        typer.Option(envvar="SQDM_DATA", help="Folder with the data set's files."),
    ] = None,
    out: Out = Path("build/train"),
    resume: Annotated[bool, typer.Option(help="Go on from the state saved in OUT.")] = False,
    steps: Annotated[int | None, typer.Option(help="Steps in all, if not the recipe's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the best.")] = None,
):
    """Train a recipe's network and write the averaged weights."""
    from golden.recipes import RECIPES
    from golden.train import train

    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, not {recipe!r}")
    _output_folder(out)
    print(train(RECIPES[recipe], data, out, resume, steps, device))


if __name__ == "__main__":
    main()
