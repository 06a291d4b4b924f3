"""The register file against its map."""

import random

import pytest

from hw.register_file import RegisterFile
from hw.registers import REGISTERS
from tests.pe_model import simulate

READABLE = [name for name, (_, access, _) in REGISTERS.items() if "read" in access]
WRITABLE = [name for name, (_, access, _) in REGISTERS.items() if "write" in access]


def test_numbers_are_unique():
    numbers = [number for number, _, _ in REGISTERS.values()]
    assert len(set(numbers)) == len(numbers) and max(numbers) < 32


@pytest.mark.parametrize("reading, writing", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.9, 0.9)])
def test_random_traffic(reading, writing):
    """Reads, writes and both in one cycle, of every number; values change all the time."""
    dut = RegisterFile()
    rng = random.Random(int(10 * reading + writing))

    async def bench(ctx):
        held = None             # register and value that the cycle before asked for
        seen, struck = set(), set()
        for cycle in range(400):
            number = rng.randrange(32) if rng.random() < 0.3 else rng.choice(
                [number for number, _, _ in REGISTERS.values()])
            read, write, data = (rng.random() < reading, rng.random() < writing,
                                 rng.getrandbits(32))
            values = {name: rng.getrandbits(32) for name in READABLE}
            for name, value in values.items():
                ctx.set(getattr(dut, name), value)
            # detector_count comes in the cycle after its read; the others in that of the read
            if cycle and held is not None:
                name, value = held
                assert ctx.get(dut.read_data) == (
                    values[name] if name == "detector_count" else value), name
            for name, value in (("address", number), ("read", read), ("write", write),
                                ("write_data", data)):
                ctx.set(getattr(dut, name), value)
            here = {name for name, (n, _, _) in REGISTERS.items() if n == number}
            for name in WRITABLE:
                assert ctx.get(getattr(dut, f"strobe_{name}")) == (write and name in here)
                struck |= {name} if write and name in here else set()
            assert ctx.get(dut.read_detector_count) == (read and "detector_count" in here)
            held = None
            if read:
                name = next((name for name in READABLE if name in here), None)
                held = (name, values[name] if name else 0)
                seen.add(name)
            await ctx.tick()
        if reading > 0.4:
            assert seen == {*READABLE, None}
        if writing > 0.4:
            assert struck == {*WRITABLE}

    simulate(dut, bench)
