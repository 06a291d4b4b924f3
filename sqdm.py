"""The command `sqdm`: what each subcommand needs is imported inside it, so that help is quick."""

import dataclasses
import json
import os
import sys
import tempfile
import time
import types
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


class CheckError(Exception):
    """A check that failed."""

    exit_code = 1


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

    from golden import quantize as quantizer
    from golden.load import load
    from golden.network import layer_shapes, macs

    network, record = load(model)
    shapes, work = layer_shapes(network.unet), macs(network.unet)
    quantized = None if record.get("quantized") is None else quantizer.load(model)
    formats = {} if quantized is None else quantized.formats
    total = sum(shape.macs for shape in shapes)
    facts = {
        "parameters": sum(value.numel() for value in network.parameters()),
        "macs": total,
        "macs_by_kind": work,
        "architecture": dataclasses.asdict(network.architecture),
        "layers": [{**dataclasses.asdict(shape), "macs": shape.macs,
                    "format": formats.get(shape.name)} for shape in shapes],
        "record": record,
    }
    if json_file:
        _write_json(json_file, facts)
    origin = ", ".join(f"{name} {value}" for name, value in record.items()
                       if name != "kind" and isinstance(value, (str, int, float)))
    source = record.get("origin")
    for name in ("path", "sha256"):
        if isinstance(source, dict) and name in source:
            origin += f"{', ' if origin else ''}{name} {source[name]}"
    kind = "float" if quantized is None else f"quantized by policy {quantized.policy.name}"
    print(f"{origin}\n{facts['parameters']:,} parameters; {work['total'] / 1e9:.2f} GMACs an"
          f" evaluation, {work['convolution'] / 1e9:.2f} in layers,"
          f" {work['attention'] / 1e9:.2f} in attention; {kind}")
    table = Table("layer", "format", "channels", "outputs", "pixels", "kernel", "MACs", "share")
    for column in table.columns[2:]:
        column.justify = "right"
    for shape in shapes:
        table.add_row(shape.name, formats.get(shape.name, "float"),
                      " + ".join(map(str, shape.segments)), str(shape.cout),
                      f"{shape.height}x{shape.width}", f"{shape.kernel}x{shape.kernel}",
                      f"{shape.macs:,}", f"{shape.macs / total:.1%}")
    _print_table(table)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="mnist32-silu, mnist32, cifar10-silu or cifar10.")],
    data: Annotated[
        Path | None,
        typer.Option(envvar="SQDM_DATA", help="Folder with the data set's files."),
    ] = None,
    out: Out = Path("build/train"),
    resume: Annotated[bool, typer.Option(help="Go on from the state saved in OUT.")] = False,
    steps: Annotated[int | None, typer.Option(help="Steps in all, if not the recipe's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the best.")] = None,
    start: Annotated[
        str | None,
        typer.Option(help="Model to fine-tune, a shipped name or a path, in place of the recipe's;"
                          " its architecture is taken too."),
    ] = None,
    activation: Annotated[
        str | None, typer.Option(help="relu or silu, if not the recipe's.")
    ] = None,
    quantized: Annotated[
        bool | None,
        typer.Option("--quantized/--float", help="Whether fine-tuning rounds to the formats."),
    ] = None,
    zeros: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of zero codes to aim at; 0: none in particular."),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(min=0, help="Of the penalty for missing zeros.")
    ] = None,
    teacher: Annotated[
        float | None, typer.Option(min=0, help="Weight of the distance to the start's images.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="Highest of the run.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights, images and noise.")] = None,
):
    """Train a recipe's network, or fine-tune one, and write the averaged weights."""
    from golden.finetune import Start
    from golden.load import shipped
    from golden.recipes import RECIPES, changed
    from golden.train import train

    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, not {recipe!r}")
    chosen = RECIPES[recipe]
    if start is not None and chosen.finetune is None:
        raise ValueError(f"start must be left out: {recipe} trains from random weights")
    model = None
    if chosen.finetune is not None:
        name = chosen.finetune.start
        if start is None and name not in shipped():
            start = out / name / f"{name}.safetensors"
        model = Start.read(start or name)
    chosen = changed(
        chosen, model and model.model.architecture, activation=activation, quantized=quantized,
        zeros=zeros, strength=strength, teacher=teacher, batch=batch, learning_rate=learning_rate,
        seed=seed)
    _output_folder(out)
    print(train(chosen, data, out, resume, steps, device, start=model))


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(
        help="Name of a shipped model, or path of a model file, an EDM file or diffusers' folder."
    )],
    out: Annotated[Path, typer.Option(help="File for the quantized model.")],
    policy: Annotated[str, typer.Option(
        help="fp16, int8, mxint8, int4, int4-channel, int4-vsq, int4-fp8, uint4-fp8 or mixed."
    )] = "mixed",
    mxint8: Annotated[str | None, typer.Option(
        help="Layers in MXINT8 beside a 4-bit policy: paper, none, auto (the most sensitive), or"
             " names or globs between commas; by default what is best for mixed, else none."
    )] = None,
    budget: Annotated[float | None, typer.Option(
        min=0, max=1, help="Share of the MACs that auto may put into MXINT8."
    )] = None,
    images: Annotated[int | None, typer.Option(
        min=1, help="Images of the calibrating run; by default 16, fewer for large networks."
    )] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of that run.")] = 0,
    steps: Annotated[
        int, typer.Option(min=1, help="Heun steps of that run, and of the schedule it is for.")
    ] = 18,
    label: Annotated[int | None, typer.Option(
        min=0, help="Class that the file is for, if the network has classes."
    )] = None,
    picture: Annotated[Path | None, typer.Option(
        help="PNG file for the sensitivity of each layer, with --mxint8 auto."
    )] = None,
    json_file: Json = None,
):
    """Quantize a float model by a policy, with scales from a sampling run of its own."""
    import resource

    from rich.table import Table

    from golden import quantize as quantizer
    from sim.progress import task

    quantizer.resolve(model)
    if picture is not None and quantizer.rule(policy, mxint8) != "auto":
        raise ValueError("picture must be given with --mxint8 auto only, not "
                         f"{quantizer.rule(policy, mxint8)!r}")
    for file in filter(None, (out, picture, json_file)):
        _output_folder(file.parent)
    began = time.monotonic()
    with task(f"quantizing {model}", 100) as advance:
        done = 0

        def progress(fraction):
            nonlocal done
            while done < int(100 * fraction):
                advance()
                done += 1

        quantized = quantizer.quantize(
            model, policy=policy, mxint8=mxint8, budget=budget, images=images, seed=seed,
            steps=steps, label=label, progress=progress)
    quantizer.save(quantized, out)
    seconds = time.monotonic() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results = {"model": str(out), **quantizer.summary(quantized), "formats": quantized.formats}
    if quantized.policy.executable:
        results["zero_fraction"] = round(quantizer.zero_fraction(quantized), 4)
    if picture:
        from golden import pictures

        pictures.sensitivity(picture, quantized)
    if json_file:
        _write_json(json_file, {**results, "seconds": round(seconds, 1),
                                "peak_memory_mib": round(memory)})
    table = Table("layer", "format", "bits an activation", "bits a weight", "SQNR dB", "MACs",
                  "share")
    for column in table.columns[2:]:
        column.justify = "right"
    for layer in results["layers"]:
        ratio = layer["sqnr_db"]
        table.add_row(layer["name"], layer["format"], f"{layer['activation_bits']:.2f}",
                      f"{layer['weight_bits']:.2f}", "-" if ratio is None else f"{ratio:.1f}",
                      f"{layer['macs']:,}", f"{layer['macs'] / results['macs']:.1%}")
    _print_table(table)
    zeros = (f", {results['zero_fraction']:.1%} zero activations in W4A4 layers"
             if "zero_fraction" in results else "")
    print(f"{out}: policy {policy}, {len(results['layers'])} layers,"
          f" {results['mxint8']:.1%} of the MACs in MXINT8{zeros}\n"
          f"saved against FP16: {results['compute_saved']:.1%} of compute (linear in bits),"
          f" {results['memory_saved']:.1%} of memory (weights and inputs with scales)\n"
          f"{seconds:.0f} s, peak memory {memory:,.0f} MiB")


@app.command()
def sample(
    model: Model,
    out: Out = Path("build/samples"),
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Image n depends on this and n only.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the solver, if not the model's.")
    ] = None,
    solver: Annotated[str, typer.Option(help="heun or euler.")] = "heun",
    churn: Annotated[float, typer.Option(help="Noise added on the way, EDM's S_churn.")] = 0.0,
    json_file: Json = None,
):
    """Sample images from a quantized model, in float and quantized, from the same noise."""
    from golden import quantize as quantizer
    from sim import demo

    quantized = quantizer.load(model)
    _output_folder(out)
    if json_file:
        _output_folder(json_file.parent)
    results = demo.draw_samples(quantized, model, out / "samples.png", count, seed, steps,
                                solver=solver, churn=churn)[0]
    _write_json(json_file or out / "samples.json", results)
    ratios = results["sqnr_db_of_evaluations"]
    print(f"{out / 'samples.png'}: {count} images, float above quantized;"
          f" SQNR {results['sqnr_db']:.1f} dB, of the denoiser in one evaluation"
          f" {min(ratios):.1f} to {max(ratios):.1f} dB")


@app.command()
def quality(
    model: Model,
    reference: Annotated[
        str | None,
        typer.Option(help="Model whose float network all rows are compared with; by default"
                          " MODEL's own."),
    ] = None,
    policies: Annotated[
        str | None,
        typer.Option(help="Formats of MODEL's network, between commas: names of sqdm quantize,"
                          " each with +RULE for its layers in MXINT8 if need be."),
    ] = None,
    reference_policies: Annotated[
        str | None, typer.Option(help="Formats of the reference's network, between commas.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(envvar="SQDM_DATA", help="Folder with the data set's files."),
    ] = None,
    out: Out = Path("build/quality"),
    samples: Annotated[
        int | None, typer.Option(min=2, help="Samples of the rows that matter most.")
    ] = None,
    others: Annotated[int | None, typer.Option(min=2, help="Samples of the other rows.")] = None,
    images: Annotated[int, typer.Option(min=2, help="Held-out images for the loss.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Heun steps of a sample.")] = 18,
    seed: Annotated[int, typer.Option(min=0, help="Of samples, images and resamples.")] = 0,
    resamples: Annotated[int, typer.Option(min=10, help="For the intervals.")] = 1000,
    features: Annotated[
        str | None,
        typer.Option(help="digits, resnet56 or inception; by default what suits the data."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="File of the features' weights: for FID, Inception's.")
    ] = None,
    json_file: Json = None,
):
    """Measure a model in several formats: paired errors, loss, Fréchet distance, and a picture."""
    from golden import quality as measures
    from sim.progress import task

    if json_file:
        _output_folder(json_file.parent)
    results = measures.assess(
        model, reference, policies=measures.split(policies),
        reference_policies=measures.split(reference_policies), folder=data,
        out=_output_folder(out), count=samples, others=others, images=images, steps=steps,
        seed=seed, number=resamples, extractor=features, weights=weights, task=task)
    for file in (out / "quality.json", *filter(None, [json_file])):
        _write_json(file, results)
    _print_table(measures.table(results))
    print(f"{out}: quality.png, quality.json, quality.md and the samples;"
          f" intervals hold {results['confidence']:.0%} of {resamples} resamples")


@app.command()
def simulate(
    model: Model,
    preset: Preset = "small",
    evaluations: Annotated[
        str, typer.Option(help="Numbers from 0 on, such as 0,9,17 or 0-3; or all.")
    ] = "0",
    layers: Annotated[str, typer.Option(help="Names or globs between commas.")] = "*",
    seed: Annotated[int, typer.Option(min=0, help="Of the image that is sampled.")] = 0,
    threshold: Annotated[
        float | None,
        typer.Option(help="Fixed mode: zero fraction from which a channel is sparse, in 0..1, such"
                          " as 0.3; by default channels are divided so that both sides end"
                          " together."),
    ] = None,
    interval: Annotated[
        int, typer.Option(min=1, help="Evaluations between updates of the zero counts.")
    ] = 1,
    trace: Annotated[
        Path | None,
        typer.Option(help="File of sqdm trace that gives the zero counts; by default the"
                          " evaluations that counted them are replayed."),
    ] = None,
    explain: Annotated[
        bool, typer.Option(help="Print how and why each layer is divided into jobs.")
    ] = False,
    json_file: Json = None,
    waves: Annotated[Path | None, typer.Option(help="VCD file for all signals; slow.")] = None,
):
    """Run layers of a sampling run on the RTL and compare every element with golden."""
    from golden import quantize as quantizer
    from hw import config
    from sim import demo, sampling

    choices = config.load(preset)
    quantized = quantizer.load_executable(model)
    wanted = sampling.parse_evaluations(evaluations, quantized)
    names = sampling.select_layers(layers, quantized)
    tiling = sampling.plans(quantized, choices, names)
    if explain:
        for name, plan in tiling.items():
            print(plan.explain(name))
    limits = None
    if threshold is not None:
        limits = sampling.thresholds_for(quantized, choices, threshold)
    counts = None
    if trace is not None:
        from golden.trace import load

        counts = load(trace)
        counts.check_model(quantized, seed=seed, vector=choices.vector)
    for file in filter(None, (json_file, waves)):
        _output_folder(file.parent)
    calls = sampling.layer_calls(quantized, choices, wanted, names, seed=seed, interval=interval,
                                 thresholds=limits, trace=counts)
    report = demo.run_layers(calls, choices, total=len(wanted) * len(names), plans=tiling,
                             waves=waves)
    results = report.as_dict()
    if json_file:
        _write_json(json_file, {
            "model": model, "preset": choices.name, "seed": seed, "interval": interval,
            "mode": "balanced" if limits is None else "threshold", "threshold": threshold,
            "cycles_by_format": demo.cycles_by_format(report), **results})
    _print_table(demo.layer_table(report, choices))
    print(f"evaluations {', '.join(map(str, wanted))} on {choices.name}:"
          f" {results['elements_compared']:,} elements compared,"
          f" {results['elements_different']:,} different;"
          f" {results['cycles_per_second']:,} cycles simulated a second")
    _check(report)


def _check(report):
    """Raise a CheckError if the RTL differed."""
    if report.mismatch is not None:
        raise CheckError(f"the RTL differs: {report.mismatch}")


@app.command()
def trace(
    model: Model,
    out: Annotated[Path, typer.Option(help="File for the trace, npz.")],
    images: Annotated[int, typer.Option(min=1, help="Images to sample.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the images that are sampled.")] = 0,
    exact: Annotated[
        bool, typer.Option(help="Count the codes of the integers, one image after the other.")
    ] = False,
    vector: Annotated[int, typer.Option(help="Channels in a word, 16 or 32.")] = 16,
    threshold: Annotated[
        float | None,
        typer.Option(help="Zero fraction from which a channel is sparse, in 0..1;"
                          " by default that of each layer of the model."),
    ] = None,
    interval: Annotated[
        int, typer.Option(min=1, help="Evaluations between updates of the labels.")
    ] = 1,
    pictures: Annotated[Path | None, typer.Option(help="Folder for pictures.")] = None,
    json_file: Json = None,
):
    """Sample images, count zeros by evaluation, layer and channel, and say what they are worth."""
    from rich.table import Table

    from golden import order, work
    from golden import pictures as draw
    from golden import quantize as quantizer
    from golden import trace as tracer
    from sim.progress import task
    from sim.simulate import one_thread

    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in 0..1, not {threshold!r}")
    quantized = quantizer.load_executable(model)
    for file in filter(None, (out, json_file)):
        _output_folder(file.parent)
    folder = pictures and _output_folder(pictures)
    total = tracer.rounds(quantized, images, exact)
    with task(f"sampling {images} image{'s' * (images > 1)}", total) as advance, one_thread():
        found = tracer.record(quantized, label=Path(model).stem, images=images, seed=seed,
                              vector=vector, exact=exact, progress=advance)
    tracer.save(found, out)
    with task("expected work"):
        facts = work.summary(found, order.orders(found), threshold, interval)
    if json_file:
        _write_json(json_file, facts)
    if folder:
        limits = None if threshold is None else dict.fromkeys(
            found.layers, round(threshold * work.FULL))
        draw.sparsity(folder / "sparsity.png", found, limits)
        draw.channels_by_time(folder / "channels_by_time.png", found)
        draw.zero_statistics(folder / "zero_statistics.png", found, facts)
        draw.expected_work(folder / "expected_work.png", facts)
    table = Table(title="Bounds of the speed-up over all dense with as many multipliers,"
                        " by dense : sparse", box=None, pad_edge=False)
    table.add_column("what is divided between both sides, and by what is known")
    for name in work.RATIOS:
        table.add_column(name, justify="right")
    for row in facts["work"]:
        table.add_row(row["name"], *(f"{value:.2f}" for value in row["speedup"].values()))
    _print_table(table)
    flipped = facts["flips"]
    print(f"{out}: {found.images} image{'s' * (images > 1)}, {found.evaluations} evaluations,"
          f" {facts['zero_fraction']:.1%} zero activations in W4A4 layers;"
          f" {sum(flipped) / max(1, len(flipped)):.1%} of labels differ from one evaluation to the"
          " next")


@app.command()
def profile(
    model: Annotated[str, typer.Argument(
        help="Shipped name or path of a quantized model, or name of a published network.")],
    preset: Preset = "medium",
    trace: Annotated[Path | None, typer.Option(help="Zeros of this file of sqdm trace.")] = None,
    evaluations: Annotated[str, typer.Option(help="Numbers like 0,9,17 or 0-3, or all.")] = "all",
    threshold: Annotated[
        float | None,
        typer.Option(help="Zero fraction from which a channel is sparse, in 0..1;"
                          " by default both sides are balanced."),
    ] = None,
    oracle: Annotated[
        bool, typer.Option(help="Balance by the evaluation's own zeros, not those before.")
    ] = False,
    zeros: Annotated[
        float | None, typer.Option(help="Move all zero fractions so that this is their mean.")
    ] = None,
    exact: Annotated[
        bool, typer.Option(help="Count the codes of an image in exact integers: minutes.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn, or of the image.")] = 0,
    objective: Annotated[
        str, typer.Option(help="What jobs are chosen for: total cycles, or those of compute.")
    ] = "total",
    explain: Annotated[
        bool, typer.Option(help="Print how and why each layer is divided into jobs.")
    ] = False,
    json_file: Json = None,
):
    """Say where the cycles of a sampling run go, by layer and evaluation, and what zeros save."""
    from golden import quantize as quantizer
    from golden import trace as tracer
    from hw import config as presets
    from sim import profile as profiler
    from sim.progress import task
    from sim.sampling import parse_evaluations
    from sim.simulate import one_thread

    config = presets.load(preset)
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in 0..1, not {threshold!r}")
    if exact and (trace or oracle or zeros is not None or threshold is not None):
        raise ValueError("exact must be without trace, threshold, oracle and zeros")
    if json_file:
        _output_folder(json_file.parent)
    found = None
    if model in profiler.NETWORKS and model not in quantizer.shipped():
        if trace or exact:
            raise ValueError(f"trace and exact must be of a quantized model, not of {model!r}")
        subjects = profiler.from_network(
            model, config, profiler.ZEROS if zeros is None else zeros)
        source = "uniform"
        wanted = parse_evaluations(evaluations, types.SimpleNamespace(steps=profiler.STEPS))
    else:
        quantized = quantizer.load_executable(model)
        found = tracer.load(trace) if trace else None
        subjects = profiler.from_model(quantized, config, found)
        if zeros is not None:
            subjects = profiler.shifted(subjects, zeros)
        source = "trace" if trace else "calibration"
        wanted = parse_evaluations(evaluations, quantized)
    if explain:
        for subject in subjects:
            print(profiler.plan_of(subject, config, objective).explain(subject.name))
    with task("cycles", len(wanted) * len(subjects)) as advance, one_thread():
        if exact:
            source = "codes"
            subjects, rows = profiler.exact(
                quantized, config, wanted, objective=objective, seed=seed, progress=advance)
        else:
            rows = profiler.profile(subjects, config, wanted, threshold=threshold, oracle=oracle,
                                    objective=objective, seed=seed, progress=advance)
    facts = {"model": model, "source": source, "seed": seed, "threshold": threshold,
             "oracle": oracle, "zeros": zeros, "objective": objective}
    result = profiler.report(subjects, rows, config, facts, objective)
    _print_table(profiler.table(result))
    if json_file:
        _write_json(json_file, result)


@app.command()
def fpga(
    board: Annotated[str, typer.Option(help="Name of the board.")] = "ulx3s-85f",
    preset: Preset = "tiny",
    out: Out = Path("build/fpga"),
    json_file: Json = None,
):
    """Build the bitstream of a core behind a serial line, for a board."""
    from fpga import boards, build
    from hw import config

    boards.get(board)
    choices = config.load(preset)
    if json_file:
        _output_folder(json_file.parent)
    result = build.build(board, choices, _output_folder(out), json=json_file)
    _print_table(build.summary(result))
    print(result["bitstream"])


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="Shipped name or path of the model.")] = "mnist32",
    preset: Preset = "small",
    out: Out = Path("build/demo"),
):
    """Sample images, run layers on the RTL bit for bit, and draw both."""
    from hw import config
    from sim import demo as driver

    choices = config.load(preset)
    results, reports = driver.demo(model, _output_folder(out), preset=preset)
    _print_table(driver.layer_table(reports[choices.name], choices))
    _print_table(driver.cycles_table(results["cycles_by_format"]))
    print(f"{results['elements_compared']:,} elements compared,"
          f" {results['elements_different']:,} different: {len(results['layers'])} layers of"
          f" {results['model']}, evaluations {', '.join(map(str, results['evaluations']))}")
    for report in reports.values():
        _check(report)
    print(f"{results['zero_fraction']:.1%} zero activations in W4A4 layers;"
          f" SQNR of {results['images']} images {results['sqnr_db']:.1f} dB\n"
          f"{out}: samples.png, sparsity.png, report.json and the Verilog,"
          f" in {results['seconds']:.0f} s")


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="Shipped name or path of the model.")] = "mnist32",
    preset: Annotated[
        str, typer.Option(help="Name of the configuration whose array is measured.")
    ] = "medium",
    evaluations: Annotated[str, typer.Option(help="Numbers like 0,9,17 or 0-3, or all.")] = "all",
    areas: Annotated[
        Path | None,
        typer.Option(help="JSON of areas by fpga.area; those of medium come with sqdm."),
    ] = None,
    tools: Annotated[
        bool, typer.Option(help="Build simulators and measure them, too: minutes.")
    ] = True,
    out: Out = Path("build/bench"),
):
    """Measure the array on the cycle model, and the tools: Verilog, simulators and their speed."""
    from fpga import area
    from hw import config as presets
    from sim import benchmark, demo, measure

    out = _output_folder(out)
    config = presets.load(preset)
    report = benchmark.measure(model, config, evaluations, areas or area.shipped(config))
    text = benchmark.markdown(report)
    _write(out / "report.md", text)
    _write_json(out / "report.json", report)
    print(text)
    if tools:
        report["tools"] = measure.measure(model)
        _write_json(out / "report.json", report)
        _print_table(measure.measure_table(report["tools"]))
        _print_table(demo.cycles_table({
            name: found["cycles_by_format"]
            for name, found in report["tools"]["presets"].items()}))
    print(out / "report.json")
    for name, found in report["tools"]["presets"].items() if tools else ():
        if found["mismatch"] is not None:
            raise CheckError(f"the RTL of {name} differs: {found['mismatch']}")


if __name__ == "__main__":
    main()
