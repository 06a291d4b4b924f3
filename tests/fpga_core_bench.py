"""cocotb test of a whole board design: layers through the UART pins, against golden."""

import dataclasses
import os

import cocotb
import numpy as np
from cocotb.clock import Clock
from cocotb.simtime import get_sim_time
from cocotb.task import bridge
from cocotb.triggers import ClockCycles

from fpga.host import Host
from golden import layer
from hw import registers
from hw.config import TINY
from hw.descriptor import Format
from sim import lowering, random_layers, simulate
from sim.compare import Comparison, compare_convolve, compare_detector, compare_requantize
from tests.serial_line import SerialLine

DIVISOR = 4   # clock cycles per bit
TIMEOUT = 600
CLOCK_NS = 10
THRESHOLD = 19661  # 30 % zeros
NAMES = {number: name for name, (number, *_) in registers.REGISTERS.items()}

LAYERS = [
    {"format": Format.A4U, "kernel": 3, "height": 5, "width": 4, "channels": (20, 9),
     "outputs": 27, "residual": True},
    {"format": Format.MX8, "kernel": 3, "height": 3, "width": 3, "channels": (33,),
     "outputs": 5, "residual": False},
    {"format": Format.IN16, "kernel": 1, "height": 4, "width": 3, "channels": (3,),
     "outputs": 16, "residual": False},
]


def run_pass(host, pass_, evaluation):
    """Load what a pass needs, run it, and return what the comparison wants to see."""
    for first, words in pass_.load:
        host.write_memory(first, words.tobytes())
    for number, value in pass_.registers:
        host.write_register(NAMES[number], value)
    counters = host.run(pass_.chain.address, evaluation=evaluation,
                        timeout=8 * pass_.limit * CLOCK_NS * 1e-9)
    answer = {"hung": False, "violations": [], "status": host.read_register("status"), **counters}
    window = pass_.window
    words = np.frombuffer(host.read_memory(window.address, window.words), np.uint8)
    return answer, words.reshape(-1, host.word_bytes)


def run_layer(host, call, counts):
    """Both passes of a layer call; what of it was compared with golden."""
    lowered = lowering.lower(call, TINY)
    shape = lowered.shape
    labelled = shape.format in (Format.A4U, Format.A4S)
    if labelled:
        host.write_register("detector_entry", call.detector_base)
        for count in counts:
            host.write_register("detector_count", int(count))
    result = layer.run(call, counts, TINY.vector)
    work, cycles, _ = simulate.known_counters(lowered.plan, result, TINY)

    comparison = Comparison(call.name, call.evaluation)
    compare_requantize(comparison, lowered, result,
                       *run_pass(host, lowered.requantize, call.evaluation))
    if labelled:
        host.write_register("detector_entry", call.detector_base)
        kept = [host.read_register("detector_count") for _ in range(shape.slots)]
        stored = call.evaluation % call.interval == 0
        compare_detector(comparison, lowered, result.zero_counts if stored else counts, kept)
    compare_convolve(comparison, lowered, result, work, cycles,
                     *run_pass(host, lowered.convolve, call.evaluation))
    return comparison


@cocotb.test()
async def test_layers(dut):
    cocotb.start_soon(Clock(dut.clk, CLOCK_NS, unit="ns", impl="gpi").start())
    line = SerialLine(dut.rx, dut.tx, bit_ns=DIVISOR * CLOCK_NS, timeout_ns=6 * TIMEOUT * CLOCK_NS)
    dut.rst.value = 1
    await ClockCycles(dut.clk, 4)
    dut.rst.value = 0
    seed = int(os.environ.get("SQDM_SEED", "1"))

    def use():
        rng = np.random.default_rng(seed)
        host = Host(line, clock=lambda: get_sim_time("sec"))
        assert host.words == 2 ** TINY.address_width
        sparse = 0
        for chosen in LAYERS:
            call, counts = random_layers.random_call(
                rng, TINY, name=chosen["format"].name, evaluation=2, **chosen)
            call = dataclasses.replace(call, threshold=THRESHOLD, balance=None)
            comparison = run_layer(host, call, counts)
            assert not comparison.mismatches, f"seed {seed}: {comparison.mismatches[0]}"
            dut._log.info(f"{call.name}: {comparison.compared.total()} elements compared")
            sparse += host.read_register("sparse_work")
        assert sparse > 0, f"seed {seed}: no channel was sparse"
        assert host.retried == 0

    await bridge(use)()
