"""cocotb bench of one PE, run by tests/test_pe.py."""

import os
import random

import cocotb
from cocotb.triggers import Timer

from hw import pe
from hw.config import load as load_config
from hw.dense_pe import DensePE
from hw.job import geometry_layout
from hw.sparse_pe import SparsePE
from tests.pe_case import Case
from tests.pe_model import STALLS, packed
from tests.pe_run import SHAPES, Seen, check

CONFIG = load_config(os.environ["PE_CONFIG"])
SIDE = os.environ["PE_SIDE"]
PE = {"dense": DensePE, "sparse": SparsePE}[SIDE]
LOADS = {
    name: member.shape
    for name, member in PE(CONFIG).signature.members.items()
    if name.startswith("load_")
}


async def cycle(dut):
    """The low half of a cycle, in which outputs follow the inputs."""
    dut.clk.value = 0
    await Timer(5, "ns")


async def rise(dut):
    dut.clk.value = 1
    await Timer(5, "ns")


async def load(dut, case, index):
    for port, enable, address, data in case.loads(index):
        layout = LOADS[port]
        getattr(dut, port).value = packed(
            layout, {"enable": enable, "address": address, "data": data})
        await cycle(dut)
        await rise(dut)
        getattr(dut, port).value = 0


def sums(value):
    """The signed sums of a chunk."""
    width = CONFIG.accumulator_width
    half = 1 << width - 1
    return [((value >> n * width) + half) % (2 * half) - half for n in range(CONFIG.quad)]


async def run(dut, case, index, rng, stall, wait):
    seen, number, idle, new = Seen(), 0, 0, True
    dut.geometry.value = packed(geometry_layout(CONFIG), case.geometry)
    dut.index.value = index
    while idle < 40:
        dut.start.value = number == 0
        ready = number > wait and rng.random() >= stall
        dut.o__ready.value = ready
        await cycle(dut)
        busy, valid = int(dut.busy.value), int(dut.o__valid.value)
        seen.busy += busy
        seen.work += int(dut.work.value)
        seen.starved += int(dut.starved.value)
        if valid and new:
            seen.came.append(number)
            seen.chunks.append(sums(int(dut.o__payload.value)))
        if valid and ready:
            seen.taken.append(number)
        new = not valid or ready
        await rise(dut)
        number += 1
        idle = 0 if busy or valid or number < 20 else idle + 1
        assert number < 50_000, f"{case} must end"
    return seen


@cocotb.test()
async def test_random_runs(dut):
    """Sums and cycles of random runs; every load goes through the ports."""
    rng = random.Random(cocotb.RANDOM_SEED)
    for name in ("start", "geometry", "index", "o__ready", *LOADS):
        getattr(dut, name).value = 0
    dut.rst.value = 1
    for _ in range(2):
        await cycle(dut)
        await rise(dut)
    dut.rst.value = 0
    arrival = pe.first_chunk(CONFIG, PE)
    for number in range(len(SHAPES)):
        case = Case(CONFIG, SIDE, rng, density=(0.6, 0.1, 0.3)[number % 3],
                    **SHAPES[number % len(SHAPES)])
        index = number % case.pes
        await load(dut, case, index)
        for stall, wait in ((0, 0), (rng.choice(STALLS), 300)):
            seen = await run(dut, case, index, rng, stall, wait)
            check(case, index, seen, pe.FIRST_ISSUE, arrival)
