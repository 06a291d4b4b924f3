"""Layer calls on the RTL, compared with golden and with the cycle model.

Golden results and memory images are made in this process while the simulator, a process of its own,
runs the passes before; both meet in a folder of files (`sim.layer_bench`).
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.resources
import json
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from golden import convolution, layer
from hw import descriptor, registers
from hw.descriptor import Format
from hw.registers import COUNTERS
from sim import lowering, tiler, verilator
from sim.compare import Comparison, compare_convolve, compare_detector, compare_requantize
from sim.cycles import layer_cycles

__all__ = ["MemoryModel", "Record", "Report", "core_verilog", "build", "one_thread", "simulate"]

MEMORY_WIDTH = 22   # 2 to this power words are the most that the bench's memory has
AHEAD = 12   # passes that are prepared before the first of them is compared
CYCLES = ("compute_cycles", "dense_busy", "sparse_busy", "stall_cycles")   # known to the cycle


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """How the bench's memory behaves; a stall of n holds its channel back in n of 256 cycles."""

    read_latency: int = 4
    write_latency: int = 4
    read_stall: int = 0
    response_stall: int = 0
    write_stall: int = 0
    answer_stall: int = 0
    seed: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            low = 1 if field.name in ("read_latency", "write_latency", "seed") else 0
            high = (1 << 32) - 1 if field.name == "seed" else 255
            if not low <= value <= high:
                raise ValueError(f"{field.name} must be in {low}..{high}, not {value!r}")

    @property
    def slowdown(self):
        """How many times longer a pass may take."""
        most = max(self.read_stall, self.response_stall, self.write_stall, self.answer_stall)
        return 4 * (1 + max(self.read_latency, self.write_latency) // 16) * 256 / (256 - most)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What one layer call took, and whether it was right.

    Members
    -------
    layer, evaluation, format : of the call
    height, width, kernel, channels, outputs : of the convolution
    macs : useful ones: taps that lie inside the image, whatever the activation
    zero_fraction : of the activations' codes; 0 for the network's input
    elements_compared, elements_different : of everything that was compared
    dense_channels, sparse_channels : input channels that only one of the sides takes
    shared_channels : those that either side takes, at some pixels
    requantize, convolve : registers of the passes by name, with ``reads`` and ``writes`` in words
    foreseen : total cycles of the convolution by the cycle model, for a memory that never stalls
    mismatches : list of sim.compare.Mismatch, the first of each kind
    """

    layer: str
    evaluation: int
    format: str
    height: int = 0
    width: int = 0
    kernel: int = 0
    channels: int = 0
    outputs: int = 0
    macs: int = 0
    zero_fraction: float = 0.0
    elements_compared: int
    elements_different: int
    dense_channels: int
    sparse_channels: int
    shared_channels: int = 0
    requantize: dict
    convolve: dict
    foreseen: int = 0
    mismatches: list

    def as_dict(self):
        """Plain data, mismatches as texts."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"mismatches": [str(mismatch) for mismatch in self.mismatches]}


@dataclasses.dataclass(kw_only=True)
class Report:
    """What a run of layer calls showed.

    Members
    -------
    records : list of Record, in the order of the calls
    compared, different : elements by kind
    counts_written : layer calls whose labels came through registers, not from the core's own pass
    build_seconds, run_seconds : for the simulator; for everything else
    simulation_seconds : of the run, those in which the core worked on a pass
    processor_seconds : of those, what the simulator had of a processor
    """

    records: list = dataclasses.field(default_factory=list)
    compared: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    different: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    counts_written: int = 0
    build_seconds: float = 0.0
    run_seconds: float = 0.0
    simulation_seconds: float = 0.0
    processor_seconds: float = 0.0

    @property
    def mismatch(self):
        """The first difference of the run, or None."""
        return next((mismatch for record in self.records for mismatch in record.mismatches), None)

    def total(self, kind, name):
        """Sum of a counter over the passes of ``kind``, "requantize" or "convolve"."""
        return sum(getattr(record, kind).get(name, 0) for record in self.records)

    @property
    def cycles(self):
        """Cycles of all passes."""
        return self.total("requantize", "total_cycles") + self.total("convolve", "total_cycles")

    def as_dict(self):
        """Plain data for a JSON file."""
        return {
            "elements_compared": self.compared.total(),
            "elements_different": self.different.total(),
            "compared": dict(self.compared),
            "different": dict(self.different),
            "mismatch": None if self.mismatch is None else str(self.mismatch),
            "layers": len({record.layer for record in self.records}),
            "evaluations": sorted({record.evaluation for record in self.records}),
            "calls": len(self.records),
            "cycles": self.cycles,
            "requantize_cycles": self.total("requantize", "total_cycles"),
            "convolve_cycles": self.total("convolve", "total_cycles"),
            "compute_cycles": self.total("convolve", "compute_cycles"),
            "foreseen_convolve_cycles": sum(record.foreseen for record in self.records),
            "counts_written": self.counts_written,
            "build_seconds": round(self.build_seconds, 3),
            "run_seconds": round(self.run_seconds, 3),
            "simulation_seconds": round(self.simulation_seconds, 3),
            "processor_seconds": round(self.processor_seconds, 3),
            "cycles_per_second": round(self.cycles / (self.simulation_seconds or 1)),
            "cycles_per_processor_second": round(self.cycles / (self.processor_seconds or 1)),
            "records": [record.as_dict() for record in self.records],
        }


@functools.cache
def core_verilog(config):
    """Verilog of the core of ``config``, module ``sqdm_core``."""
    from hw.verilog import generate

    return generate(config)[0]


def build(config, *, verilog=None, waves=False, cache_dir=None, optimize=True):
    """Build the layer bench around a core, or find it in the cache; returns the simulator.

    Parameters
    ----------
    config : Config
    verilog : str
        Module ``sqdm_core``, where it is not the one that ``config`` gives.
    waves, cache_dir, optimize
        See `sim.verilator.build`.
    """
    bench = importlib.resources.files("sim").joinpath("bench.sv").read_text()
    memory_width = min(config.address_width, MEMORY_WIDTH)
    return verilator.build(
        {"sqdm_core.v": core_verilog(config) if verilog is None else verilog, "bench.sv": bench},
        "bench", waves=waves, cache_dir=cache_dir, optimize=optimize, build_args=[
            f"-GVECTOR={config.vector}", f"-GADDRESS_WIDTH={config.address_width}",
            f"-GMEMORY_WIDTH={memory_width}"])


@contextlib.contextmanager
def one_thread():
    """Let torch compute with one thread.

    Layers are too small to gain from more, which would wait for each other on a busy machine, and
    the simulator wants a processor too.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def simulate(calls, config, *, plans=None, memory=None, placement=None, verilog=None, waves=None,
             keep_going=False, progress=None, folder=None, cache_dir=None, optimize=True):
    """Run layer calls on the RTL and compare everything they leave behind.

    Each call is a requantization pass and a chain of jobs that convolve what the first one wrote.
    The detector keeps its counts from call to call.

    Parameters
    ----------
    calls : iterable of (golden.layer.LayerCall, counts)
        ``counts`` are the (slots,) zero counts that the labels of the call follow from; where the
        core does not hold them already, they are written through registers. None: what the core
        holds. Calls are taken one by one, while earlier ones run.
    config : Config
    plans : dict
        `sim.tiler.Plan` by name of layer; others are made from the calls.
    memory : callable
        `MemoryModel` of each call, from its number; by default memory never stalls.
    placement : callable
        Keywords for `sim.lowering.lower` from the number of the call.
    verilog : str
        See `build`.
    waves : Path
        Where to write waves.
    keep_going : bool
        Run all calls even if one differs.
    progress : callable
        Called with each `Record` when it is complete.
    folder : Path
        Where to put the files of the run; by default a temporary folder, kept only if the
        simulator fails.
    optimize : bool
        See `sim.verilator.build`.

    Returns
    -------
    Report

    Raises
    ------
    sim.lowering.FitError
        If a layer does not fit the core.
    sim.verilator.BuildError, sim.verilator.SimulationError
        If the simulator cannot be built, or ends without results.
    """
    report = Report()
    began = time.monotonic()
    simulator = build(config, verilog=verilog, waves=waves is not None, cache_dir=cache_dir,
                      optimize=optimize)
    report.build_seconds = time.monotonic() - began
    own = folder is None
    folder = Path(tempfile.mkdtemp(prefix="sqdm-simulate-")) if own else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(config, folder, report, plans or {}, memory or (lambda number: MemoryModel()),
               placement or (lambda number: {}), keep_going, progress)
    try:
        with one_thread():
            run.all(calls, simulator, waves)
    except verilator.SimulationError:
        own = False   # its log stays
        raise
    finally:
        if own:
            shutil.rmtree(folder)
    return report


class _Run:
    """The feeding and collecting end of a run in ``folder``."""

    def __init__(self, config, folder, report, plans, memory, placement, keep_going, progress):
        self.config, self.folder, self.report, self.plans = config, folder, report, plans
        self.memory, self.placement = memory, placement
        self.keep_going, self.progress = keep_going, progress
        self.held = np.full(config.detector_depth, -1)   # what the detector keeps; -1: not known
        self.passes = 0
        self.waiting = collections.deque()               # calls fed and not yet collected
        self.failure = None

    def all(self, calls, simulator, waves):
        """Feed, run and collect all calls."""
        thread = threading.Thread(target=self._simulate, args=(simulator, waves))
        thread.start()
        began = time.monotonic()
        try:
            for number, (call, counts) in enumerate(calls):
                self._feed(number, call, counts)
                while len(self.waiting) * 2 > AHEAD and self._collect(thread):
                    pass
                if self._stopped():
                    break
            self._end(self.passes)
            while self.waiting and not self._stopped():
                self._collect(thread)
        finally:
            self._end(0)
            thread.join()
            self.report.run_seconds = time.monotonic() - began
        if self.failure is not None:
            raise self.failure

    def _simulate(self, simulator, waves):
        try:
            verilator.run(simulator, "sim.layer_bench", folder=self.folder, waves=waves)
        except Exception as error:   # for the thread that waits
            self.failure = error

    def _stopped(self):
        hung = any(mismatch.what == "end of the pass" for record in self.report.records[-1:]
                   for mismatch in record.mismatches)
        return hung or (self.report.mismatch is not None and not self.keep_going)

    def _end(self, passes):
        """Tell the bench how many passes there are in all; it stops when it has run as many."""
        if not (self.folder / "end").exists() or passes == 0:
            self._write("end", str(passes))

    def _write(self, name, text):
        (self.folder / "partial").write_text(text)
        (self.folder / "partial").rename(self.folder / name)

    def _feed(self, number, call, counts):
        """Prepare both passes of a call."""
        config = self.config
        lowered = lowering.lower(call, config, plan=self.plans.get(call.name),
                                 **self.placement(number))
        shape = lowered.shape
        entries = slice(call.detector_base, call.detector_base + shape.slots)
        held = self.held[entries]
        writes = []
        if shape.labelled and counts is None:
            if (held < 0).any():
                raise ValueError(f"{call.name}: counts must be given, the core holds none yet")
            counts = torch.tensor(held)
        elif shape.labelled and (held != np.asarray(counts)).any():
            held[:] = counts
            entry, count = registers.number("detector_entry"), registers.number("detector_count")
            writes = [(entry, call.detector_base), *((count, int(value)) for value in counts)]
            self.report.counts_written += 1
        result = layer.run(call, counts, config.vector, config.dense_pes > 0,
                           config.sparse_pes > 0)
        if shape.labelled and call.evaluation % call.interval == 0:
            held[:] = result.zero_counts
        known = len(held) == shape.slots and (held >= 0).all()
        stored = held.copy() if known else None
        rereads = [] if stored is None else [(
            [(registers.number("detector_entry"), call.detector_base)],
            [registers.number("detector_count")] * shape.slots)]
        model = self.memory(number)
        first = memory_first(lowered)
        self._feed_pass(lowered.requantize, model, first, writes, rereads)
        self._feed_pass(lowered.convolve, model, first, [], [])
        self.waiting.append((call, lowered, result, stored))

    def _feed_pass(self, pass_, model, memory_first, writes, rereads):
        with open(self.folder / f"{self.passes}.load", "wb") as file:
            for first, words in pass_.load:
                file.write(np.array([first, len(words)], ">u4").tobytes())
                file.write(np.ascontiguousarray(words[:, ::-1]).tobytes())
        windows = ("read_base", "read_limit", "write_base", "write_limit")
        settings = dataclasses.asdict(model) | {name: pass_.fields[name] for name in windows}
        self._write(f"{self.passes}.json", json.dumps({
            "memory": settings | {"descriptor": pass_.chain.address,
                                  "descriptor_words": pass_.chain.words,
                                  "memory_first": memory_first},
            "writes": [*writes, *pass_.registers],
            "limit": int(pass_.limit * model.slowdown),
            "reads": [registers.number(name) for name in ("status", *COUNTERS)],
            "rereads": rereads,
            "dump": [pass_.window.address, pass_.window.words],
        }))
        self.passes += 1

    def _answer(self, number, thread):
        """Results of a pass and the words of its window; waits for them."""
        path = self.folder / f"{number}.result.json"
        while not path.exists():
            if not thread.is_alive() and not path.exists():
                raise self.failure or RuntimeError(f"pass {number} must have a result")
            time.sleep(0.002)
        answer = json.loads(path.read_text())
        names = ("status", *COUNTERS)
        answer |= dict(zip(names, answer.pop("registers"), strict=True))
        words = np.fromfile(self.folder / f"{number}.dump", np.uint8)
        for suffix in ("json", "result.json", "dump"):
            (self.folder / f"{number}.{suffix}").unlink()
        return answer, words.reshape(-1, self.config.vector // 2)

    def _collect(self, thread):
        """Compare the oldest call that waits; False if the run has come to its end with it."""
        call, lowered, result, stored = self.waiting.popleft()
        number = self.passes - 2 * (len(self.waiting) + 1)
        comparison = Comparison(call.name, call.evaluation)
        answers, foreseen = [], 0
        answer, words = self._answer(number, thread)
        answers.append(answer)
        compare_requantize(comparison, lowered, result, answer, words)
        if not answer["hung"]:
            if stored is not None:
                compare_detector(comparison, lowered, stored, answer["rereads"][0])
            answer, words = self._answer(number + 1, thread)
            answers.append(answer)
            work, cycles, foreseen = known_counters(lowered.plan, result, self.config)
            compare_convolve(comparison, lowered, result, work, cycles, answer, words)
        self.report.simulation_seconds += sum(answer["seconds"] for answer in answers)
        self.report.processor_seconds += sum(answer["processor_seconds"] for answer in answers)
        answers += [{}] * (2 - len(answers))
        record = Record(
            layer=call.name, evaluation=call.evaluation, format=lowered.shape.format.name,
            **_sizes(lowered.shape, result.codes), **_sides(lowered.plan, result.lists),
            elements_compared=comparison.compared.total(),
            elements_different=comparison.different.total(), mismatches=comparison.mismatches,
            foreseen=foreseen,
            **{name: {key: answer[key] for key in (*COUNTERS, "reads", "writes") if key in answer}
               for name, answer in zip(("requantize", "convolve"), answers, strict=True)})
        self.report.records.append(record)
        self.report.compared += comparison.compared
        self.report.different += comparison.different
        if self.progress is not None:
            self.progress(record)
        return not self._stopped()


def memory_first(lowered):
    """First word of the bench's memory, so that everything of a layer call lies in it.

    Raises
    ------
    sim.shape.FitError
        If the layer call takes more words than there are.
    """
    regions = [*lowered.requantize.regions.values(), *lowered.convolve.regions.values()]
    limit = max(region.limit for region in regions)
    first = max(0, limit - (1 << MEMORY_WIDTH))
    lowest = min(region.address for region in regions)
    if lowest < first:
        tiler.refuse(descriptor.Error.WINDOW, "words of the bench's memory", limit - lowest,
                     1 << MEMORY_WIDTH, lowered.plan.config)
    return first


def known_counters(plan, result, config):
    """Counters of a convolution by register name: its work, and its cycles; and all its cycles.

    Cycles are those with a memory port that never holds back a sum; the last ones, of the whole
    chain, are close to those of the bench's memory if it does not stall.

    Parameters
    ----------
    plan : sim.tiler.Plan
    result : golden.layer.LayerResult
    config : hw.config.Config
    """
    cycles = layer_cycles(plan, result, config)
    # Jobs of the same channels and outputs at different places count as one with all their runs.
    places = collections.defaultdict(list)
    for job, runs in zip(plan.jobs, cycles["runs"], strict=True):
        places[job.tile, job.output, job.outputs].extend(runs)
    totals = np.zeros(2, np.int64)
    for (tile, _, outputs), runs in places.items():
        totals += convolution.work(
            result.codes, [result.lists[tile]], plan.shape.kernel, outputs, config.dense_lanes,
            config.sparse_lanes, share=plan.share if plan.shape.mx else 1, runs=runs)
    work = {"dense_work": int(totals[0]), "sparse_work": int(totals[1])}
    return work, {name: cycles[name] for name in CYCLES}, cycles["total_cycles"]


def _sides(plan, lists):
    """Channels of either side, and of both, as fields of `Record`."""
    if plan.shape.mx:
        whose = {0: "sparse", 1: "dense"}.get(plan.share, "shared")
        sizes = {whose: sum(plan.shape.channels)}
    else:
        sizes = {"dense": sum(part.low for part in lists),
                 "sparse": sum(len(part.slots) - part.high for part in lists),
                 "shared": sum(part.high - part.low for part in lists)}
    return {f"{side}_channels": sizes.get(side, 0) for side in ("dense", "sparse", "shared")}


def _sizes(shape, codes):
    """Shape, size and zeros of a layer, as fields of `Record`."""
    channels = sum(shape.channels)
    taps = _taps(shape.height, shape.kernel) * _taps(shape.width, shape.kernel)
    zeros = 0.0
    if shape.format != Format.IN16:
        zeros = float((codes.codes[codes.valid] == 0).double().mean())
    return {"height": shape.height, "width": shape.width, "kernel": shape.kernel,
            "channels": channels, "outputs": shape.outputs,
            "macs": taps * channels * shape.outputs, "zero_fraction": round(zeros, 4)}


def _taps(size, kernel):
    """Taps of a row of ``size`` outputs that lie inside the row."""
    reach = kernel // 2
    return sum(max(0, size - abs(offset)) for offset in range(-reach, reach + 1))
