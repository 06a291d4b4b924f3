"""The command `sqdm`: what each subcommand needs is imported inside it, so that help is quick."""

import dataclasses
import json
import os
import sys
import tempfile
import time
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


def _status(text):
    """A line with a spinner for work that takes seconds; nothing where output is not a terminal."""
    from rich.console import Console

    return Console(stderr=True).status(text)


def _print_table(table):
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)   # in place of 80, for names of layers
    console.print(table)


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
Preset = Annotated[str, typer.Option(help="Name of a configuration, or path of a TOML file.")]
Json = Annotated[Path | None, typer.Option("--json", help="File for the results, as JSON.")]
Model = Annotated[str, typer.Argument(help="Name of a shipped model, or path of a model file.")]


@app.command()
def generate(preset: Preset = "small", out: Out = Path("build/verilog")):
    """Write the Verilog of a core, and a JSON file with its ports, registers and descriptor."""
    from hw import config

    choices = config.load(preset)
    out = _output_folder(out)

    from hw import verilog   # Amaranth takes a second: only for a configuration that can be built

    with _status(f"generating {choices.name}"):
        began = time.monotonic()
        text, description = verilog.generate(choices)
        seconds = time.monotonic() - began
    name = description["module"]
    _write(out / f"{name}.v", text)
    _write_json(out / f"{name}.json", description)
    print(f"{out / name}.v: {choices.name}, {choices.multipliers} multipliers, "
          f"{text.count(chr(10))} lines in {seconds:.1f} s; described in {name}.json")


@app.command()
def info(model: Model, json_file: Json = None):
    """Print what a model is: its origin, and size, work and shape of every layer."""
    from rich.table import Table

    from golden.checkpoint import load_model
    from golden.network import layer_shapes

    network, record = load_model(model)
    shapes = layer_shapes(network.unet)
    total = sum(shape.macs for shape in shapes)
    facts = {
        "parameters": sum(value.numel() for value in network.parameters()),
        "macs": total,
        "layers": [{**dataclasses.asdict(shape), "macs": shape.macs} for shape in shapes],
        "record": record,
    }
    if json_file:
        _write_json(json_file, facts)
    origin = ", ".join(f"{name} {value}" for name, value in record.items()
                       if name != "architecture" and value is not None)
    print(f"{origin}\n{facts['parameters']:,} parameters, {total:,} MACs an evaluation")
    table = Table("layer", "channels", "outputs", "pixels", "kernel", "MACs", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for shape in shapes:
        table.add_row(shape.name, " + ".join(map(str, shape.segments)), str(shape.cout),
                      f"{shape.height}x{shape.width}", f"{shape.kernel}x{shape.kernel}",
                      f"{shape.macs:,}", f"{shape.macs / total:.1%}")
    _print_table(table)


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
