"""The bench around one PE in cocotb: loads, a sink that stalls, exact sums and cycles."""

import os
import random

import cocotb
from cocotb.triggers import Timer

from hw.config import load
from hw.operands import load_layout, scale_words
from hw.window import geometry_layout
from sim.cycles import taps_of_pixels
from tests import naive, pe_model

CONFIG = load(os.environ.get("PE_CONFIG", "tiny"))
V = CONFIG.vector
LOADS = {name: load_layout(columns, depth, width) for name, columns, depth, width in (
    ("load_codes", 1, CONFIG.activation_depth, CONFIG.port_width),
    ("load_scales", 1, scale_words(CONFIG), CONFIG.port_width),
)}


class Case:
    """The operands of a side: ``codes[position][pixel]``, weights and all scales."""

    def __init__(self, rng, format, height, width, kernel, outputs, words, *, density=0.7,
                 codes=None, extreme=False):
        self.format, self.height, self.width, self.kernel = format, height, width, kernel
        self.outputs, self.words = outputs, words
        self.mx = format in (naive.MX8, naive.IN16)
        self.pixels = height * width
        lowest, highest = {naive.A4U: (0, 15), naive.A4S: (-7, 7), naive.MX8: (-127, 127),
                           naive.IN16: (-128, 127)}[format]
        limit = 127 if self.mx else 7
        top_scale = 15 if self.mx else 126

        def code():
            if extreme:
                return lowest if lowest else highest
            value = rng.choice((lowest, highest, rng.randint(lowest, highest)))
            return value if rng.random() < density else 0

        def weight():
            return rng.choice((-limit, limit, rng.randint(-limit, limit))) if not extreme \
                else -limit

        def scale():
            return top_scale if extreme else rng.randint(0, top_scale)

        self.geometry = pe_model.geometry(
            CONFIG, height, width, kernel=kernel, outputs=outputs, words=words, format=format)
        groups, taps = self.geometry["groups"], kernel * kernel
        self.codes = codes or [[code() for _ in range(self.pixels)] for _ in range(words * V)]
        self.scales = [[scale() for _ in range(self.pixels)] for _ in range(groups)]
        self.weights = [[[weight() for _ in range(taps)] for _ in self.codes]
                        for _ in range(outputs)]                      # [output][position][tap]
        self.weight_scales = [[[scale() for _ in range(groups)] for _ in range(taps)]
                              for _ in range(outputs)]

    def __str__(self):
        return (f"format {self.format} {self.height}x{self.width} kernel {self.kernel}"
                f" {self.words} words to {self.outputs} outputs")

    def rows(self, values):
        return [values[n:n + self.width] for n in range(0, self.pixels, self.width)]

    def by_position(self):
        """Weights as ``[position][tap][output]``, outputs padded with zeros to whole words."""
        pad = [0] * (pe_model.padded_outputs(CONFIG, self.outputs) - self.outputs)
        return [[[self.weights[k][position][tap] for k in range(self.outputs)] + pad
                 for tap in range(self.kernel ** 2)] for position in range(len(self.codes))]

    def chunks(self, pixels):
        """What leaves for these output pixels, V/4 sums at a time."""
        size = self.kernel
        acc = naive.accumulate(
            [self.rows(line) for line in self.codes], [self.rows(line) for line in self.scales],
            self.format, [[[taps[row:row + size] for row in range(0, size * size, size)]
                           for taps in channels] for channels in self.weights],
            self.weight_scales, self.kernel, V)
        for pixel in pixels:
            sums = [plane[pixel // self.width][pixel % self.width] for plane in acc]
            sums += [0] * (-len(sums) % CONFIG.quad)
            for first in range(0, len(sums), CONFIG.quad):
                yield sums[first:first + CONFIG.quad]

    def taps(self):
        """Input pixels under each output pixel."""
        return taps_of_pixels(self.height, self.width, self.kernel)


class Bench:
    """Clock, loads and sink of a PE; ``loads`` are the layouts of its weight ports."""

    def __init__(self, dut, seed, loads):
        self.dut, self.rng, self.loads = dut, random.Random(seed), LOADS | loads
        self.seed = seed

    async def reset(self):
        for name in ["start", "geometry", "o__ready", *self.loads]:
            getattr(self.dut, name).value = 0
        self.dut.rst.value = 1
        await self.tick()
        await self.tick()
        self.dut.rst.value = 0

    async def settle(self):
        """The low half of a cycle: outputs follow the inputs that were set."""
        self.dut.clk.value = 0
        await Timer(5, "ns")

    async def rise(self):
        self.dut.clk.value = 1
        await Timer(5, "ns")

    async def tick(self):
        await self.settle()
        await self.rise()

    async def write(self, name, address, data, column=0):
        layout = self.loads[name]
        assert address < 1 << layout["address"].width, f"{name} must have a row {address}"
        getattr(self.dut, name).value = pe_model.packed(
            layout, {"enable": 1 << column, "address": address, "data": data})
        await self.tick()
        getattr(self.dut, name).value = pe_model.packed(
            layout, {"enable": 0, "address": address, "data": 0})

    async def load(self, case, weights, weight_scales):
        self.dut.geometry.value = pe_model.packed(geometry_layout(CONFIG), case.geometry)
        for address, word in enumerate(pe_model.code_words(CONFIG, case.codes, case.mx)):
            await self.write("load_codes", address, word)
        for address, word in enumerate(pe_model.port_bytes(
                CONFIG, [code for line in case.scales for code in line])):
            await self.write("load_scales", address, word)
        for (row, column), word in weights.items():
            await self.write("load_weights", row, word, column)
        for row, word in enumerate(weight_scales):
            await self.write("load_weight_scales", row, word)

    async def run(self, case, expected, *, stall=0.0, wait=0):
        """Run what is loaded and compare all chunks; the cycles that were seen.

        The sink takes nothing in the first ``wait`` cycles and stalls by ``stall`` afterwards.
        """
        dut, rng = self.dut, self.rng
        seen = {"busy": 0, "work": 0, "starved": 0, "pops": []}
        width, half = CONFIG.accumulator_width, 1 << CONFIG.accumulator_width - 1
        dut.start.value = 1
        dut.o__ready.value = 0
        await self.tick()
        dut.start.value = 0
        cycle, idle, held = 1, 0, None
        while idle < 30:
            ready = cycle > wait and rng.random() >= stall
            dut.o__ready.value = ready
            await self.settle()
            for name in ("busy", "work", "starved"):
                seen[name] += int(getattr(dut, name).value)
            valid = int(dut.o__valid.value)
            assert valid or held is None, "a chunk must stay until it is taken"
            if valid:
                payload = int(dut.o__payload.value)
                assert held is None or payload == held, "a chunk must not change"
                held = None if ready else payload
            if valid and ready:
                number = len(seen["pops"])
                assert number < len(expected), f"{case}: more chunks than {len(expected)}"
                sums = [((payload >> n * width) % (2 * half) + half) % (2 * half) - half
                        for n in range(CONFIG.quad)]
                assert sums == expected[number], (
                    f"{case} seed {self.seed}: chunk {number} must be {expected[number]},"
                    f" not {sums}")
                seen["pops"].append(cycle)
            busy = int(dut.busy.value)
            await self.rise()
            cycle += 1
            idle = 0 if busy or len(seen["pops"]) < len(expected) else idle + 1
            assert cycle < 100_000, f"{case} must end"
        assert len(seen["pops"]) == len(expected) and not int(dut.o__valid.value)
        return seen


def check_cycles(case, seen, side, arrivals):
    """Cycles seen against a `sim.cycles.Side` that was given the times of all pops."""
    assert seen["busy"] == side.issued, f"{case}: busy {seen['busy']}, not {side.issued} cycles"
    assert seen["starved"] == sum(end - first for first, end in side.stalls), str(case)
    assert len(arrivals) == len(seen["pops"])
    for arrival, pop in zip(arrivals, seen["pops"]):
        assert pop >= arrival, f"{case}: a chunk in cycle {pop}, not before {arrival}"


def seed():
    return cocotb.RANDOM_SEED
