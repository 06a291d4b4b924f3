"""The sequencer: what it fetches, which descriptors it refuses, and how a pass ends."""

import itertools
import random
from dataclasses import replace

import pytest

from hw.config import SMALL, TINY
from hw.descriptor import FIELDS, WORDS, Error, Format, Kind, pack
from hw.sequencer import Sequencer
from tests.pe_model import STALLS, simulate

DENSE = replace(TINY, name="dense", sparse_pes=0)
WIDE = replace(TINY, name="wide", vector=32, dense_lanes=8, max_channels=96, max_outputs=96)
LAST = 1 << TINY.address_width


def requantization(config, **fields):
    """A legal requantization pass."""
    return {"version": 1, "kind": Kind.REQUANTIZE, "vector": config.vector, "kernel": 0,
            "format": Format.A4S, "height": 3, "width": 5, "channels": 20, "batch": 1,
            "stride": 1, "shift": 9, "interval": 1, "threshold": 131071, "write_limit": 900,
            "read_base": 900, "read_limit": 1000, "window_exponent": 249} | fields


def convolution(config, **fields):
    """A legal convolution."""
    return requantization(config, kind=Kind.CONVOLVE, kernel=3, outputs=7, align_shift=3,
                          interval=0) | fields


def mx(config, form, group, make=convolution, **fields):
    return make(config, format=form, group=group, channels=8) | fields


# What a field may be at most, and the error one step further on. Sizes are those of TINY: 16
# channels a word, 4 dense lanes with 2 scale units, 32 sparse lanes with 4.
LIMITS = [
    (requantization, {"shift": 31}, {"shift": 32}, Error.SHIFT),
    (convolution, {"shift": 31}, {"shift": 255}, Error.SHIFT),
    (convolution, {"align_shift": 31}, {"align_shift": 32}, Error.SHIFT),
    (requantization, {"align_shift": 99}, None, None),
    (requantization, {"channels": 64}, {"channels": 65}, Error.CHANNELS),
    (requantization, {"channels": 64}, {"channels": 65535}, Error.CHANNELS),
    (requantization, {"channels": 48, "channels_second": 16},
     {"channels": 49, "channels_second": 1}, Error.CHANNELS),
    (requantization, {"channels": 16, "channels_second": 48},
     {"channels": 16, "channels_second": 65535}, Error.CHANNELS),
    (requantization, {"channels": 16, "channels_second": 48},
     {"channels": 65530, "channels_second": 65530}, Error.CHANNELS),
    (convolution, {"kernel": 1, "outputs": 64, "channels": 16}, {"outputs": 65}, Error.CHANNELS),
    (requantization, {"outputs": 999, "kernel": 7}, None, None),
    # 65535 pixels; the product of both sizes must not wrap around
    (requantization, {"height": 257, "width": 255}, {"height": 256, "width": 256}, Error.SHAPE),
    (requantization, {"height": 1, "width": 65535}, {"height": 65535, "width": 65535},
     Error.SHAPE),
    # codes: 1024 words; scales: 1024 bytes; only a convolution buffers them
    (convolution, {"kernel": 1, "channels": 20, "height": 16, "width": 32},
     {"kernel": 1, "channels": 20, "height": 19, "width": 27}, Error.ACTIVATIONS),
    (lambda config, **fields: mx(config, Format.MX8, 32, **fields),
     {"height": 16, "width": 32}, {"height": 19, "width": 27}, Error.ACTIVATIONS),
    (lambda config, **fields: mx(config, Format.IN16, 16, **fields),
     {"height": 16, "width": 16}, {"height": 1, "width": 257}, Error.ACTIVATIONS),
    (requantization, {"channels": 64, "height": 255, "width": 255}, None, None),
    # dense weights: taps * words * planes * output words * 4 rows of 512
    (lambda config, **fields: mx(config, Format.MX8, 32, **fields),
     {"channels": 48, "outputs": 32}, {"channels": 64}, Error.WEIGHTS),
    (lambda config, **fields: mx(config, Format.MX8, 32, **fields),
     {"kernel": 1, "channels": 64, "outputs": 64}, None, None),
    # sparse weights: slots * taps * tiles of 640
    (convolution, {"channels": 64, "outputs": 32}, {"channels": 64, "outputs": 33},
     Error.WEIGHTS),
    (lambda config, **fields: mx(config, Format.IN16, 16, **fields),
     {"outputs": 48}, {"outputs": 49}, Error.WEIGHTS),
    (requantization, {"interval": 65535}, {"interval": 0}, Error.DETECTOR),
    (requantization, {"detector": 2048 - 32}, {"detector": 2048 - 31}, Error.DETECTOR),
    (requantization, {"detector": 2048 - 32}, {"detector": 65535}, Error.DETECTOR),
    (convolution, {"detector": 65535, "interval": 0}, None, None),
    (lambda config, **fields: mx(config, Format.MX8, 32, requantization, **fields),
     {"detector": 65535}, {"interval": 0}, Error.DETECTOR),
    (requantization, {"read_base": 50, "read_limit": 50}, {"read_limit": 49}, Error.WINDOW),
    (convolution, {"write_base": 50, "write_limit": 50}, {"write_limit": 49}, Error.WINDOW),
    (convolution, {"read_base": 7, "read_limit": LAST}, {"read_limit": LAST + 1}, Error.WINDOW),
    (convolution, {"write_limit": LAST}, {"write_limit": 1 << 31}, Error.WINDOW),
    *((convolution, {name: LAST - 1} | dict.fromkeys(("read_limit", "write_limit"), LAST),
       {name: LAST}, Error.WINDOW)
      for name in ("source", "source_second", "scales", "permutation", "counts", "table",
                   "weights", "weight_scales", "residual_source", "destination")),
    (convolution, {"source": 1}, {"source": 1 << 31}, Error.WINDOW),
]

# Values that no pass may have, on top of a legal descriptor.
ILLEGAL = [
    *((make, {"version": value}, Error.VERSION)
      for make in (requantization, convolution) for value in (0, 2, 255)),
    *((requantization, {"kind": value}, Error.KIND) for value in (0, 3, 130)),
    *((make, {"vector": value}, Error.VECTOR)
      for make in (requantization, convolution) for value in (0, 32, 17)),
    *((make, {"format": value}, Error.FORMAT)
      for make in (requantization, convolution) for value in (4, 15)),
    (requantization, {"group": 32}, Error.FORMAT),
    (convolution, {"group": 16}, Error.FORMAT),
    (convolution, {"format": Format.MX8, "group": 0}, Error.FORMAT),
    (convolution, {"format": Format.MX8, "group": 16}, Error.FORMAT),
    (convolution, {"format": Format.IN16, "group": 32}, Error.FORMAT),
    (requantization, {"format": Format.A4U}, Error.FORMAT),              # needs ReLU
    (requantization, {"residual": 1}, Error.FORMAT),
    (convolution, {"relu": 1}, Error.FORMAT),
    *((make, {"format": Format.IN16, "group": 16, "channels": channels,
              "channels_second": second, "relu": relu}, Error.FORMAT)
      for make, channels, second, relu in (
          (requantization, 17, 0, 0), (requantization, 3, 1, 0), (requantization, 3, 0, 1),
          (convolution, 17, 0, 0), (convolution, 3, 16, 0))),
    *((make, {name: value}, Error.UNSUPPORTED)
      for make in (requantization, convolution)
      for name, value in (("stride", 0), ("stride", 2), ("resample", 1), ("batch", 0),
                          ("batch", 2), ("accumulate", 1), ("tile_y", 1), ("tile_x", 65535),
                          ("halo", 1))),
    *((make, {name: 0}, Error.SHAPE)
      for make in (requantization, convolution) for name in ("height", "width", "channels")),
    (convolution, {"outputs": 0}, Error.SHAPE),
    *((convolution, {"kernel": value}, Error.SHAPE) for value in (0, 2, 4, 5, 131)),
]

FEW_SCALES = replace(TINY, name="few-scales", scale_depth=512, weight_scale_depth=256,
                     activation_depth=4096)
FEW_UNITS = replace(FEW_SCALES, name="few-units", sparse_scale_units=1, sparse_weight_depth=144)
OTHERS = {
    DENSE: [      # without sparse PEs only the dense weights count: 36 * words * output words
        ({"channels": 64, "outputs": 48}, None),
        ({"channels": 64, "outputs": 49}, Error.WEIGHTS)],
    WIDE: [
        ({"channels": 96, "outputs": 1, "kernel": 1}, None),
        ({"channels": 97, "outputs": 1}, Error.CHANNELS),
        ({"outputs": 97}, Error.CHANNELS),
        ({"vector": 16}, Error.VECTOR)],
    SMALL: [
        ({"channels": 128, "outputs": 64}, None),
        ({"channels": 128, "outputs": 65}, Error.WEIGHTS),
        ({"channels": 128, "height": 32, "width": 32, "outputs": 64}, None),
        ({"channels": 128, "height": 33, "width": 32}, Error.ACTIVATIONS),
        ({"channels": 16, "height": 64, "width": 64}, None),
        ({"channels": 16, "height": 65, "width": 64}, Error.SCALES),
        ({"source": (1 << 22) - 1, "write_limit": 1 << 22}, None),
        ({"source": 1 << 22}, Error.WINDOW)],
    FEW_SCALES: [
        ({"channels": 16, "height": 16, "width": 32}, None),
        ({"channels": 16, "height": 19, "width": 27}, Error.SCALES),
        ({"format": Format.IN16, "group": 16, "channels": 3, "height": 16, "width": 16}, None),
        ({"format": Format.IN16, "group": 16, "channels": 3, "height": 1, "width": 257},
         Error.SCALES),
        # weight scales of the dense PE: taps * groups * output words * 8 rows
        ({"channels": 16, "outputs": 48}, None),
        ({"channels": 16, "outputs": 49}, Error.SCALES),
        ({"format": Format.MX8, "group": 32, "channels": 32, "outputs": 48}, None),
        ({"format": Format.MX8, "group": 32, "channels": 33, "outputs": 32}, Error.SCALES)],
    FEW_UNITS: [  # of a sparse PE: taps * output words * 16 rows, and 9 weight rows a slot, A4 only
        ({"channels": 16, "outputs": 16}, None),
        ({"channels": 16, "outputs": 17}, Error.SCALES),
        ({"channels": 17, "outputs": 16}, Error.WEIGHTS),
        ({"format": Format.MX8, "group": 32, "channels": 32, "outputs": 17}, None)],
}


class Bench:
    """A sequencer, the memory of its descriptor, and the rest of a core."""

    def __init__(self, ctx, dut, stalls=(0, 0), seed=0):
        self.ctx, self.dut, self.rng, self.stalls = ctx, dut, random.Random(seed), stalls

    async def tick(self, **inputs):
        for name, value in inputs.items():
            self.ctx.set(getattr(self.dut, name), value)
        await self.ctx.tick()

    def get(self, name):
        return self.ctx.get(getattr(self.dut, name))

    async def fetch(self, words, address):
        """Start, and answer the reads of the descriptor; then memory must be left alone."""
        ctx, dut, rng = self.ctx, self.dut, self.rng
        width = dut.config.port_width // 32
        ports = [sum(word << 32 * n for n, word in enumerate(words[first:first + width]))
                 for first in range(0, WORDS, width)]
        await self.tick(start=1, address=address)
        ctx.set(dut.start, 0)
        asked = answered = 0
        offered = False
        while answered < len(ports):
            assert self.get("busy") and self.get("fetching") and not self.get("done")
            assert self.get("error") == 0
            ready = rng.random() >= self.stalls[0]
            offered = answered < asked and (offered or rng.random() >= self.stalls[1])
            ctx.set(dut.read.request.ready, ready)
            ctx.set(dut.read.response.valid, offered)
            ctx.set(dut.read.response.payload, ports[answered] if offered else
                    rng.getrandbits(dut.config.port_width))
            assert self.get_stream() == (asked < len(ports))
            if asked < len(ports):
                assert ctx.get(dut.read.request.payload) == address + asked
            took = offered and ctx.get(dut.read.response.ready)
            asked += ready and asked < len(ports)
            await ctx.tick()
            answered += took
            offered = offered and not took
        ctx.set(dut.read.response.valid, 0)
        ctx.set(dut.read.request.ready, 1)

    def get_stream(self):
        return self.ctx.get(self.dut.read.request.valid)

    async def check(self, words, address=3):
        """Fetch and wait for the verdict: an error, or None in the cycle of the pass's strobe."""
        await self.fetch(words, address)
        for _ in range(20):
            assert not self.get_stream() and not self.get("fetching")
            if self.get("done"):
                assert not self.get("busy") and not self.get("checked")
                return Error(self.get("error"))
            if self.get("requantize") or self.get("convolve"):
                assert self.get("checked") and self.get("busy") and not self.get("error")
                assert self.get("requantize") + self.get("convolve") == 1
                return None
            assert self.get("busy") and not self.get("checked")
            await self.ctx.tick()
        raise AssertionError("a verdict must come within 20 cycles")

    async def finish(self):
        """End a pass that has begun."""
        await self.tick(finished=0, settled=1)
        assert not self.get("requantize") and not self.get("convolve")
        await self.tick(finished=1)
        assert self.get("done") and not self.get("busy")
        assert not self.get("checked")
        self.ctx.set(self.dut.finished, 0)
        return self.get("error")


def run(config, body, **options):
    dut = Sequencer(config)

    async def bench(ctx):
        await body(Bench(ctx, dut, **options))

    simulate(dut, bench)


def test_every_error_of_a_descriptor_is_tried():
    tried = {error for *_, error in itertools.chain(LIMITS, ILLEGAL, *OTHERS.values()) if error}
    assert tried == {*Error} - {Error.NONE, Error.PERMUTATION, Error.ACCESS}


def test_limits():
    """Each limit is legal, and one step further the named error and nothing else."""
    async def body(bench):
        for make, legal, more, error in LIMITS:
            fields = make(TINY, **legal)
            assert await bench.check(pack(**fields)) is None, fields
            assert await bench.finish() == 0
            if more:
                fields = fields | more
                assert await bench.check(pack(**fields)) == error, fields

    run(TINY, body)


def test_illegal_fields():
    """Each error by each of its fields; a legal pass afterwards clears it."""
    async def body(bench):
        for number, (make, fields, error) in enumerate(ILLEGAL):
            assert await bench.check(pack(**make(TINY) | fields)) == error, fields
            for _ in range(3):
                assert bench.get("done") and bench.get("error") == error
                await bench.tick()
            if number % 8 == 0:
                assert await bench.check(pack(**make(TINY))) is None
                assert await bench.finish() == 0

    run(TINY, body)


def test_reserved_bits():
    """Every bit without a name must be 0."""
    named = {word * 32 + low + n for word, low, bits, _ in FIELDS.values() for n in range(bits)}
    reserved = [bit for bit in range(32 * WORDS) if bit not in named]
    rng = random.Random(1)
    chosen = [bit for bit in reserved if bit < 25 * 32] + rng.sample(reserved, 8)

    async def body(bench):
        for bit in chosen:
            words = pack(**requantization(TINY))
            words[bit // 32] |= 1 << bit % 32
            assert await bench.check(words) == Error.UNSUPPORTED, bit

    run(TINY, body)


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.name)
def test_other_configurations(config):
    """Limits follow the configuration."""
    async def body(bench):
        for fields, error in OTHERS[config]:
            fields = convolution(config) | fields
            assert await bench.check(pack(**fields)) == error, fields
            if error is None:
                assert await bench.finish() == 0

    run(config, body)


@pytest.mark.parametrize("response", STALLS)
@pytest.mark.parametrize("request_stall", STALLS)
def test_fetch_with_stalls(request_stall, response):
    """The descriptor's words and no others are read; its fields and sizes come out."""
    async def body(bench):
        for address, make in ((0, requantization), (500, convolution)):
            fields = make(TINY, channels=17, channels_second=1, height=2, width=3, outputs=17)
            assert await bench.check(pack(**fields), address) is None
            assert bench.get("convolve") == (make is convolution)
            layer = bench.get("layer")
            assert {name: layer[name] for name in fields} == {
                name: int(value) for name, value in fields.items()}
            assert (layer.plane, layer.slot_words, layer.output_words, layer.mx) == (6, 3, 2, 0)
            assert await bench.finish() == 0

    run(TINY, body, stalls=(request_stall, response), seed=4)


@pytest.mark.parametrize("format, group, words, mx", [
    (Format.A4S, 0, 1, 0), (Format.MX8, 32, 1, 1), (Format.IN16, 16, 2, 1)])
def test_derived_sizes(format, group, words, mx):
    async def body(bench):
        for channels, outputs in ((1, 1), (16, 16)):
            assert await bench.check(pack(**convolution(
                TINY, format=format, group=group, channels=channels, outputs=outputs))) is None
            layer = bench.get("layer")
            assert (layer.plane, layer.slot_words, layer.output_words, layer.mx) == (
                15, words, 1, mx)
            assert await bench.finish() == 0

    run(TINY, body)


def test_a_pass_ends_when_writes_are_settled():
    """`start` while busy is ignored; violations and refusals are reported at the end."""
    async def body(bench):
        for strobe, error in ((None, Error.NONE), ("violation", Error.ACCESS),
                              ("refused", Error.PERMUTATION)):
            assert await bench.check(pack(**convolution(TINY))) is None
            await bench.tick(finished=0, settled=0)
            for finished, settled in ((0, 0), (0, 1), (1, 0), (1, 0)):
                await bench.tick(start=1, finished=finished, settled=settled)
                assert bench.get("busy") and bench.get("checked") and not bench.get("done")
                assert not bench.get("fetching") and not bench.get_stream()
            if strobe:
                await bench.tick(**{strobe: 1, "finished": 0})
                assert bench.get("busy")
            await bench.tick(start=0, violation=0, refused=0, finished=1, settled=1)
            assert bench.get("done") and not bench.get("busy")
            assert bench.get("error") == error
            await bench.tick(violation=1, refused=1)      # nobody's any more
            assert bench.get("error") == error and bench.get("done")
            await bench.tick(violation=0, refused=0, finished=0)

    run(TINY, body)
