"""The cocotb side of the layer bench: runs the passes that it finds in its working directory.

Pass ``n`` is described by ``<n>.json``, and ``<n>.load`` holds what memory gets first, in the form
that ``bench.sv`` loads. The bench answers with ``<n>.result.json`` and ``<n>.dump``. Passes are
taken in order; where the next one is not there yet, the bench waits for it, so that passes are
prepared while others run. A file ``end`` says how many passes there are in all; it may shorten the
run at any time.

Nothing here happens once a cycle while a pass runs.

A pass's JSON has

- ``memory``: values of the bench's inputs of the same names: latencies, stalls, windows, where the
  memory begins;
- ``writes``: pairs of register number and value, one write a cycle, before the start;
- ``limit``: cycles after which the pass counts as hung;
- ``reads``: register numbers to read at the end, in order, a number once for each read;
- ``rereads``: pairs of (writes, reads) for afterwards, to read what a register points to;
- ``dump``: first word and number of words to read back.

The answer's JSON has ``hung``, ``registers`` (values in the order of ``reads``), ``rereads``,
``reads`` and ``writes`` (words that went over the port), ``violations`` (texts), and ``seconds``
and ``processor_seconds`` (that the simulator took from start to end of the pass).
"""

import json
import os
import time
from pathlib import Path

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, First, RisingEdge, Timer

from hw import registers

PERIOD = 10  # ns
PATIENCE = 600  # s that the bench waits for the next pass

# in the order of the bits of `violations`
VIOLATIONS = (
    "a read request changed while it waited",
    "a write request changed while it waited",
    "a read lay outside the memory",
    "a write lay outside the memory",
    "a read lay outside the read window",
    "a write lay outside the write window",
    "a request came while no pass ran",
    "the pass ended with reads under way",
    "the pass ended with writes under way",
)


class RegisterPort:
    """Driver of the core's register port; both edges that count for the core are rising ones."""

    def __init__(self, dut):
        self.dut = dut
        dut.csr_write.value = 0
        dut.csr_read.value = 0

    async def write(self, number, value):
        """Write one register; writes that follow each other take one cycle each."""
        dut = self.dut
        dut.csr_address.value = number
        dut.csr_write_data.value = value
        dut.csr_write.value = 1
        await FallingEdge(dut.clk)
        dut.csr_write.value = 0

    async def read(self, number):
        """Value of one register."""
        dut = self.dut
        dut.csr_address.value = number
        dut.csr_read.value = 1
        await FallingEdge(dut.clk)
        dut.csr_read.value = 0
        await FallingEdge(dut.clk)
        return int(dut.csr_read_data.value)


class Memory:
    """Host side of the bench's memory: whole files at once, in no simulated time."""

    def __init__(self, dut):
        self.dut = dut
        dut.load.value = 0
        dut.dump.value = 0
        dut.clear.value = 0

    async def _strobe(self, signal):
        signal.value = 1
        await FallingEdge(self.dut.clk)
        signal.value = 0

    async def behave(self, settings):
        """Set latencies, stalls and windows, and start to count and to watch."""
        for name, value in settings.items():
            getattr(self.dut, name).value = value
        await self._strobe(self.dut.clear)

    async def load(self, path):
        """Take over a load file, which is used up."""
        os.replace(path, "load.bin")
        await self._strobe(self.dut.load)

    async def dump(self, first, count, path):
        """Write ``count`` words from word ``first`` on to ``path``."""
        self.dut.dump_first.value = first
        self.dut.dump_count.value = count
        await self._strobe(self.dut.dump)
        os.replace("dump.bin", path)


async def run_pass(dut, port, memory, number):
    """Run pass ``number`` and leave its results."""
    job = json.loads(Path(f"{number}.json").read_text())
    await memory.behave(job["memory"])
    await memory.load(f"{number}.load")
    for register, value in job["writes"]:
        await port.write(register, value)
    began, worked = time.perf_counter(), time.process_time()
    await port.write(registers.number("control"), 1)
    await FallingEdge(dut.clk)
    if not dut.interrupt.value:
        await First(RisingEdge(dut.interrupt), Timer(job["limit"] * PERIOD, "ns"))
        await FallingEdge(dut.clk)
    result = {"hung": not dut.interrupt.value, "seconds": time.perf_counter() - began,
              "processor_seconds": time.process_time() - worked}
    result["registers"] = [await port.read(register) for register in job["reads"]]
    result["rereads"] = []
    for writes, reads in job["rereads"]:
        for register, value in writes:
            await port.write(register, value)
        result["rereads"].append([await port.read(register) for register in reads])
    seen = int(dut.violations.value)
    result["violations"] = [text for n, text in enumerate(VIOLATIONS) if seen >> n & 1]
    result["reads"] = int(dut.reads.value)
    result["writes"] = int(dut.writes.value)
    await memory.dump(*job["dump"], f"{number}.dump")
    Path("result.json").write_text(json.dumps(result))
    os.replace("result.json", f"{number}.result.json")
    return result


def await_pass(number):
    """Whether there is a pass ``number``; waits until that is known.

    Raises
    ------
    TimeoutError
        If nothing comes, for instance because the process that prepares passes has ended.
    """
    parent = os.getppid()
    deadline = time.monotonic() + PATIENCE
    while True:
        if Path("end").exists():
            return number < int(Path("end").read_text())
        if Path(f"{number}.json").exists():
            return True
        if time.monotonic() > deadline or os.getppid() != parent:
            raise TimeoutError(f"pass {number} must come within {PATIENCE} s, but did not")
        time.sleep(0.005)


@cocotb.test()
async def passes(dut):
    """Every pass in the working directory."""
    dut.rst.value = 1
    dut.seed.value = 1
    for name in ("read_latency", "write_latency"):
        getattr(dut, name).value = 1
    for name in ("read_stall", "response_stall", "write_stall", "answer_stall"):
        getattr(dut, name).value = 0
    port = RegisterPort(dut)
    memory = Memory(dut)
    Clock(dut.clk, PERIOD, "ns", impl="gpi").start()
    for _ in range(4):
        await FallingEdge(dut.clk)
    dut.rst.value = 0
    await FallingEdge(dut.clk)
    number = 0
    while await_pass(number):
        result = await run_pass(dut, port, memory, number)
        if result["hung"]:
            break
        number += 1
