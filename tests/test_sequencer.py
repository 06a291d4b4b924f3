"""The sequencer: what it fetches, which descriptors it refuses, and how chains run and end."""

import collections
import itertools
import random
from dataclasses import replace

import pytest

from hw.config import MEDIUM
from hw.config import TINY as SMALLEST
from hw.descriptor import FIELDS, VERSION, WORDS, Error, Format, Kind, pack
from hw.sequencer import Sequencer
from tests.pe_model import STALLS, simulate

TINY = replace(SMALLEST, sparse_weight_depth=1024)
DENSE = replace(TINY, name="dense", sparse_pes=0)
SPARSE = replace(TINY, name="sparse", dense_pes=0)
WIDE = replace(TINY, name="wide", vector=32, dense_lanes=8, dense_scale_units=8, sparse_lanes=32,
               sparse_scale_units=8, max_channels=96, max_outputs=96)
FEW = replace(TINY, name="few", weight_depth=128, weight_scale_depth=64,
              sparse_weight_scale_depth=64, codes_depth=256, entry_depth=8192,
              record_depth=4096, sparse_weight_depth=4096)
FEW_DENSE = replace(FEW, name="few-dense", sparse_pes=0)
THREE = replace(TINY, name="three", sparse_pes=3, tile_outputs=128, weight_scale_depth=256,
                sparse_weight_scale_depth=256)
LAST = 1 << TINY.address_width
LAST_ENTRIES = TINY.detector_depth - 32     # of the detector, for 32 channels


def requantization(config, **fields):
    """A legal requantization pass."""
    return {"version": VERSION, "kind": Kind.REQUANTIZE, "vector": config.vector, "kernel": 0,
            "format": Format.A4S, "height": 3, "width": 5, "channels": 20, "batch": 1,
            "stride": 1, "shift": 9, "interval": 1, "threshold": 131071, "write_limit": 900,
            "read_base": 900, "read_limit": 1000, "window_exponent": 249,
            "tile_channels": 64} | fields


def convolution(config, **fields):
    """A legal convolution; the tile is the image where nothing else is said."""
    fields = {"height": 3, "width": 5, "channels": 32} | fields
    tile = {"tile_height": fields["height"], "tile_width": fields["width"], "tile_channels": 0}
    return requantization(config, kind=Kind.CONVOLVE, kernel=3, outputs=7, align_shift=3,
                          interval=0, dense_limit=255) | tile | fields


def mx8(make):
    """``make`` for MX8."""
    def made(config, **fields):
        share = {"share": 3} if make is convolution else {"tile_channels": 32}
        return make(config, **{"format": Format.MX8, "group": 32, "channels": 32} | share | fields)
    return made


def input16(config, **fields):
    return requantization(config, **{
        "format": Format.IN16, "group": 32, "channels": 3, "tile_channels": 32} | fields)


def flat(config, **fields):
    """A 1x1 convolution of 16 slots in one row."""
    width = fields.get("width", 5)
    return convolution(config, **{
        "kernel": 1, "height": 1, "channels": 16, "tile_width": width} | fields)


def keeping(config, **fields):
    return convolution(config, **{"outputs": 32, "keep_sums": 1} | fields)


# What a field may be at most, and the error one step further on. Sizes are those of TINY: 16
# channels a word, 4 dense lanes, 16 sparse lanes with 4 scale units, 2 non-zeros an entry.
LIMITS = [
    (requantization, {"shift": 31}, {"shift": 32}, Error.SHIFT),
    (convolution, {"shift": 31}, {"shift": 255}, Error.SHIFT),
    (convolution, {"align_shift": 31}, {"align_shift": 32}, Error.SHIFT),
    (requantization, {"align_shift": 99}, None, None),
    (requantization, {"channels": 128}, {"channels": 129}, Error.CHANNELS),
    (requantization, {"channels": 128}, {"channels": 65535}, Error.CHANNELS),
    (requantization, {"channels": 97, "channels_second": 16},
     {"channels": 113, "channels_second": 1}, Error.CHANNELS),
    (requantization, {"channels": 16, "channels_second": 112},
     {"channels": 65530, "channels_second": 65530}, Error.CHANNELS),
    (mx8(requantization), {"channels": 48, "channels_second": 65},
     {"channels": 49, "channels_second": 65}, Error.CHANNELS),
    (replace(TINY, max_channels=96), mx8(requantization), {"channels": 96}, {"channels": 97},
     Error.CHANNELS),
    (input16, {"channels": 64}, {"channels": 65}, Error.CHANNELS),
    (requantization, {"tile_channels": 32}, {"tile_channels": 96}, Error.CHANNELS),
    (flat, {"outputs": 32, "channels": 64}, {"outputs": 33}, Error.CHANNELS),
    (convolution, {"channels": 64}, {"channels": 80}, Error.CHANNELS),
    (requantization, {"outputs": 999, "kernel": 7, "tile_y": 9}, None, None),
    # 65535 pixels; the product of both sizes must not wrap around
    (requantization, {"height": 257, "width": 255}, {"height": 256, "width": 256}, Error.SHAPE),
    (requantization, {"height": 1, "width": 65535}, {"height": 65535, "width": 65535},
     Error.SHAPE),
    (requantization, {"channels": 64, "height": 255, "width": 255}, None, None),
    # the tile lies in the image
    (convolution, {"height": 9, "tile_y": 4, "tile_height": 5}, {"tile_height": 6}, Error.SHAPE),
    (convolution, {"height": 9, "tile_y": 4, "tile_height": 5},
     {"tile_y": 65535, "tile_height": 65535}, Error.SHAPE),
    (convolution, {"width": 9, "tile_x": 2, "tile_width": 7}, {"tile_x": 3}, Error.SHAPE),
    (mx8(convolution), {"share": 5}, {"share": 6}, Error.SHAPE),
    # Half of 1024 entries: 8 of a pixel with 16 slots, 32 of an MX8 pixel.
    (flat, {"width": 64}, {"width": 65, "tile_width": 65}, Error.ACTIVATIONS),
    (flat, {"width": 64, "height": 99}, {"width": 65, "tile_width": 65}, Error.ACTIVATIONS),
    (flat, {"width": 999, "tile_x": 100, "tile_width": 64}, {"tile_width": 65},
     Error.ACTIVATIONS),
    (flat, {"width": 16, "channels": 64}, {"width": 17, "tile_width": 17}, Error.ACTIVATIONS),
    (mx8(flat), {"width": 16}, {"width": 17, "tile_width": 17}, Error.ACTIVATIONS),
    # three rows of 21 pixels of input; fewer where the tile needs no more
    (convolution, {"channels": 16, "height": 9, "width": 21}, {"width": 22, "tile_width": 22},
     Error.ACTIVATIONS),
    (convolution, {"channels": 16, "height": 9, "width": 40, "tile_x": 3, "tile_width": 19},
     {"tile_width": 20}, Error.ACTIVATIONS),
    (convolution, {"channels": 16, "height": 9, "width": 40, "tile_x": 20, "tile_width": 20},
     {"tile_x": 19}, Error.ACTIVATIONS),
    (convolution, {"channels": 16, "height": 9, "width": 40, "tile_width": 20},
     {"tile_x": 1}, Error.ACTIVATIONS),
    (convolution, {"channels": 16, "height": 2, "width": 32}, {"width": 33, "tile_width": 33},
     Error.ACTIVATIONS),
    (convolution, {"channels": 16, "height": 9, "width": 32, "tile_height": 1},
     {"tile_y": 1}, Error.ACTIVATIONS),
    (convolution, {"channels": 16, "height": 9, "width": 32, "tile_y": 8, "tile_height": 1},
     {"tile_y": 7}, Error.ACTIVATIONS),
    # sparse weights: taps * planes * tiles of one PE * slots of 1024
    (convolution, {"channels": 64, "outputs": 16}, {"outputs": 17}, Error.WEIGHTS),
    (convolution, {"channels": 48, "outputs": 32}, {"channels": 64}, Error.WEIGHTS),
    (mx8(convolution), {"outputs": 16}, {"outputs": 17}, Error.WEIGHTS),
    (requantization, {"interval": 65535}, {"interval": 0}, Error.DETECTOR),
    (requantization, {"detector": LAST_ENTRIES}, {"detector": LAST_ENTRIES + 1}, Error.DETECTOR),
    (requantization, {"detector": LAST_ENTRIES}, {"detector": 65535}, Error.DETECTOR),
    (convolution, {"detector": 65535, "interval": 0}, None, None),
    (mx8(requantization), {"detector": 65535}, {"interval": 0}, Error.DETECTOR),
    # partial sums: pixels of the tile * chunks of 256
    (keeping, {"height": 8, "width": 4}, {"height": 11, "width": 3, "tile_width": 3,
                                          "tile_height": 11}, Error.PARTIALS),
    (keeping, {"height": 64, "width": 4, "channels": 16, "outputs": 4}, {"outputs": 5},
     Error.PARTIALS),
    (keeping, {"height": 64, "width": 5, "channels": 16, "keep_sums": 0}, {"keep_sums": 1},
     Error.PARTIALS),
    (requantization, {"read_base": 50, "read_limit": 50}, {"read_limit": 49}, Error.WINDOW),
    (convolution, {"write_base": 50, "write_limit": 50}, {"write_limit": 49}, Error.WINDOW),
    (convolution, {"read_base": 7, "read_limit": LAST}, {"read_limit": LAST + 1}, Error.WINDOW),
    (convolution, {"write_limit": LAST}, {"write_limit": 1 << 31}, Error.WINDOW),
    *((convolution, {name: LAST - 1} | dict.fromkeys(("read_limit", "write_limit"), LAST),
       {name: LAST}, Error.WINDOW)
      for name in ("source", "source_second", "scales", "permutation", "counts", "table",
                   "weights", "weight_scales", "residual_source", "destination")),
    (convolution, {"source": 1}, {"source": 1 << 31}, Error.WINDOW),
    (convolution, {}, {"next": LAST}, Error.WINDOW),
    (convolution, {"scale_byte": 7}, {"scale_byte": 8}, Error.UNSUPPORTED),
    # other configurations
    (DENSE, flat, {"width": 256}, {"width": 257, "tile_width": 257}, Error.ACTIVATIONS),
    (DENSE, mx8(flat), {"width": 128, "share": 1}, {"width": 129, "tile_width": 129},
     Error.ACTIVATIONS),
    (DENSE, flat, {"width": 128, "channels": 64, "dense_limit": 1},
     {"width": 129, "tile_width": 129}, Error.ACTIVATIONS),
    (DENSE, convolution, {"channels": 64, "outputs": 32}, None, None),
    (DENSE, mx8(convolution), {"share": 1}, {"share": 0}, Error.UNSUPPORTED),
    (SPARSE, mx8(convolution), {"share": 0}, {"share": 1}, Error.UNSUPPORTED),
    (SPARSE, flat, {"width": 64}, {"width": 65, "tile_width": 65}, Error.ACTIVATIONS),
    (FEW, flat, {"width": 128, "dense_limit": 1}, {"width": 129, "tile_width": 129},
     Error.ACTIVATIONS),
    (FEW, flat, {"width": 64, "channels": 64, "dense_limit": 2}, {"dense_limit": 3},
     Error.ACTIVATIONS),
    (FEW, flat, {"width": 32, "channels": 64, "dense_limit": 4}, {"width": 33, "tile_width": 33},
     Error.ACTIVATIONS),
    (FEW, convolution, {"channels": 64, "outputs": 14, "dense_limit": 3}, {"dense_limit": 4},
     Error.WEIGHTS),
    (FEW, convolution, {"outputs": 16}, {"outputs": 17}, Error.SCALES),     # of the sparse PE
    (FEW_DENSE, convolution, {"channels": 16, "outputs": 28}, {"outputs": 29}, Error.SCALES),
    (FEW_DENSE, convolution, {"channels": 32, "outputs": 28}, {"channels": 48}, Error.WEIGHTS),
    (THREE, flat, {"outputs": 48}, {"outputs": 49}, Error.TILES),
    (THREE, flat, {"outputs": 16}, {"outputs": 17}, Error.TILES),
    (THREE, flat, {"outputs": 96}, {"outputs": 97}, Error.TILES),
    # three PEs with two tiles each
    (THREE, convolution, {"channels": 48, "outputs": 96, "dense_limit": 2}, {"channels": 64},
     Error.WEIGHTS),
    (WIDE, requantization, {"channels": 96}, {"channels": 97}, Error.CHANNELS),
    (WIDE, convolution, {"channels": 64}, {"channels": 16}, Error.CHANNELS),
    (WIDE, convolution, {"scale_byte": 15}, {"scale_byte": 16}, Error.UNSUPPORTED),
    (MEDIUM, convolution, {"channels": 64, "height": 32, "width": 32, "outputs": 32},
     {"outputs": 33}, Error.TILES),
    (MEDIUM, convolution, {"source": (1 << 24) - 1, "write_limit": 1 << 24},
     {"source": 1 << 24}, Error.WINDOW),
]
LIMITS = [limit if len(limit) == 5 else (TINY, *limit) for limit in LIMITS]

# Values that no pass may have, on top of a legal descriptor.
ILLEGAL = [
    *((make, {"version": value}, Error.VERSION)
      for make in (requantization, convolution) for value in (0, 1, 3, 255)),
    *((requantization, {"kind": value}, Error.KIND) for value in (0, 3, 130)),
    *((make, {"vector": value}, Error.VECTOR)
      for make in (requantization, convolution) for value in (0, 32, 17)),
    *((make, {"format": value}, Error.FORMAT)
      for make in (requantization, convolution) for value in (4, 15)),
    (requantization, {"group": 32}, Error.FORMAT),
    (convolution, {"group": 16}, Error.FORMAT),
    (convolution, {"format": Format.MX8, "group": 0}, Error.FORMAT),
    (mx8(convolution), {"group": 16}, Error.FORMAT),
    (mx8(convolution), {"format": Format.IN16}, Error.FORMAT),           # requantize only
    (requantization, {"format": Format.A4U}, Error.FORMAT),              # needs ReLU
    (input16, {"channels_second": 1}, Error.FORMAT),
    (input16, {"relu": 1}, Error.FORMAT),
    (mx8(requantization), {"balance": 1}, Error.FORMAT),
    *((requantization, {name: 1}, Error.FORMAT)
      for name in ("residual", "accumulate", "keep_sums", "keep_weights")),
    *((convolution, {name: 1}, Error.FORMAT) for name in ("relu", "balance")),
    *((make, {name: value}, Error.UNSUPPORTED)
      for make in (requantization, convolution)
      for name, value in (("stride", 0), ("stride", 2), ("resample", 1), ("batch", 0),
                          ("batch", 2))),
    # nothing has been kept by a convolution of the same chain
    *((convolution, {name: 1}, Error.UNSUPPORTED) for name in ("accumulate", "keep_weights")),
    *((make, {name: 0}, Error.SHAPE)
      for make in (requantization, convolution) for name in ("height", "width", "channels")),
    *((convolution, {name: 0}, Error.SHAPE) for name in ("outputs", "tile_height", "tile_width")),
    *((convolution, {"kernel": value}, Error.SHAPE) for value in (0, 2, 4, 5, 131)),
    *((requantization, {"tile_channels": value}, Error.CHANNELS) for value in (0, 16, 33, 65535)),
    (mx8(requantization), {"tile_channels": 64}, Error.CHANNELS),
    *((convolution, {"channels": value}, Error.CHANNELS) for value in (1, 24, 65535)),
    *((mx8(convolution), {"channels": value}, Error.CHANNELS) for value in (16, 64)),
]


class Bench:
    """A sequencer and the memory of its descriptors."""

    def __init__(self, ctx, dut, stalls=(0, 0), seed=0):
        self.ctx, self.dut, self.rng, self.stalls = ctx, dut, random.Random(seed), stalls
        self.width = dut.config.port_width // 32
        self.memory, self.reads, self.waiting = {}, [], collections.deque()
        self.offered = False

    def write(self, address, words):
        """Put a descriptor into memory."""
        for number, first in enumerate(range(0, WORDS, self.width)):
            self.memory[address + number] = sum(
                word << 32 * n for n, word in enumerate(words[first:first + self.width]))

    def set(self, **inputs):
        for name, value in inputs.items():
            self.ctx.set(getattr(self.dut, name), value)

    def get(self, name):
        return self.ctx.get(getattr(self.dut, name))

    async def tick(self, **inputs):
        """One cycle, in which memory answers; its reads are in ``reads``."""
        self.set(**inputs)
        ctx, read = self.ctx, self.dut.read
        ready = self.rng.random() >= self.stalls[0]
        self.offered = bool(self.waiting) and (
            self.offered or self.rng.random() >= self.stalls[1])
        ctx.set(read.request.ready, ready)
        ctx.set(read.response.valid, self.offered)
        ctx.set(read.response.payload, self.waiting[0] if self.offered else
                self.rng.getrandbits(self.dut.config.port_width))
        asked = ctx.get(read.request.valid) and ready
        address = ctx.get(read.request.payload)
        took = self.offered and ctx.get(read.response.ready)
        await ctx.tick()
        if took:
            self.waiting.popleft()
            self.offered = False
        if asked:
            self.reads.append(address)
            self.waiting.append(self.memory[address])

    async def check(self, words, address=3):
        """Start, and wait for the verdict: an error, or None in the cycle of the pass's strobe."""
        self.write(address, words)
        self.reads.clear()
        self.set(ready=1, idle=1, settled=1, refused=0, violation=0)
        await self.tick(start=1, address=address)
        self.set(start=0)
        for _ in range(2000):
            if self.get("done"):
                assert not self.get("busy")
                break
            assert self.get("busy")
            if self.get("requantize") or self.get("convolve"):
                assert self.get("requantize") + self.get("convolve") == 1
                assert not self.get("error")
                break
            await self.tick()
        else:
            raise AssertionError("a verdict must come")
        assert self.reads == [*range(address, address + WORDS // self.width)]
        return Error(self.get("error")) or None

    async def finish(self):
        """End a pass that has begun."""
        await self.tick(idle=0)
        assert not self.get("requantize") and not self.get("convolve")
        await self.tick(idle=1)
        assert self.get("done") and not self.get("busy")
        return self.get("error")


def run(config, body, **options):
    dut = Sequencer(config)

    async def bench(ctx):
        await body(Bench(ctx, dut, **options))

    simulate(dut, bench)


def test_every_error_of_a_descriptor_is_tried():
    tried = {error for *_, error in itertools.chain(LIMITS, ILLEGAL) if error}
    assert tried == {*Error} - {Error.NONE, Error.PERMUTATION, Error.ACCESS}


@pytest.mark.parametrize("config", sorted({config for config, *_ in LIMITS}, key=str),
                         ids=lambda config: config.name)
def test_limits(config):
    """Each limit is legal, and one step further the named error and nothing else."""
    async def body(bench):
        for of, make, legal, more, error in LIMITS:
            if of != config:
                continue
            fields = make(config, **legal)
            assert await bench.check(pack(**fields)) is None, fields
            assert await bench.finish() == 0
            if more:
                fields = fields | more
                assert await bench.check(pack(**fields)) == error, fields

    run(config, body)


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
    chosen = [bit for bit in reserved if bit < 30 * 32] + rng.sample(reserved, 8)

    async def body(bench):
        for bit in chosen:
            words = pack(**requantization(TINY))
            words[bit // 32] |= 1 << bit % 32
            assert await bench.check(words) == Error.UNSUPPORTED, bit

    run(TINY, body)


@pytest.mark.parametrize("response", STALLS)
@pytest.mark.parametrize("request_stall", STALLS)
def test_fetch_with_stalls(request_stall, response):
    """The descriptor's words and no others are read; its fields come out."""
    async def body(bench):
        for address, make in ((3, requantization), (500, convolution)):
            fields = make(TINY, channels=32, height=2, width=3, outputs=17)
            assert await bench.check(pack(**fields), address) is None
            assert bench.get("convolve") == (make is convolution)
            layer = bench.get("layer")
            assert {name: layer[name] for name in fields} == {
                name: int(value) for name, value in fields.items()}
            assert await bench.finish() == 0

    run(TINY, body, stalls=(request_stall, response), seed=4)


def sizes(config, fields):
    """The derived sizes from their definitions."""
    def whole(value, size):
        return -(-value // size)

    get = dict.fromkeys(FIELDS, 0) | fields
    mx = get["format"] in (Format.MX8, Format.IN16)
    border = get["kernel"] == 3
    seen = {"plane": get["height"] * get["width"], "mx": int(mx)}
    if get["kind"] == Kind.REQUANTIZE:
        words = sum(whole(get[name], config.vector) for name in ("channels", "channels_second"))
        slots = whole(words * config.vector, 32) * 32 if mx else words * config.vector
        if get["format"] == Format.IN16:
            slots = 2 * whole(get["channels"], 32) * 32
        return seen | {"slot_words": slots // config.vector}
    taps = 9 if border else 1
    first_row, first_column = max(0, get["tile_y"] - border), max(0, get["tile_x"] - border)
    tiles = whole(get["outputs"], config.sparse_lanes)
    return seen | {
        "slot_words": get["channels"] // config.vector,
        "output_words": whole(get["outputs"], config.vector),
        "chunks": whole(get["outputs"], config.quad),
        "dense_tiles": whole(get["outputs"], config.dense_lanes),
        "sparse_tiles": tiles, "sparse_own": max(1, tiles // config.sparse_pes),
        "kernel3": int(border), "taps": taps,
        "slot_pitch": taps * (1 + mx) * get["weight_pitch"],
        "origin": get["tile_y"] * get["width"] + get["tile_x"],
        "input_row": first_row,
        "input_last": min(get["height"], get["tile_y"] + get["tile_height"] + border) - 1,
        "input_column": first_column,
        "input_width": min(get["width"], get["tile_x"] + get["tile_width"] + border)
        - first_column,
    }


@pytest.mark.parametrize("config", [TINY, WIDE, THREE], ids=lambda config: config.name)
def test_derived_sizes(config):
    """Of random passes; images are narrow enough for the buffers."""
    rng = random.Random(7)

    async def body(bench):
        for number in range(60):
            height, width = rng.randint(1, 300), rng.randint(1, 5)
            image = {"height": height, "width": width}
            if number % 4 == 3:
                make = rng.choice((requantization, mx8(requantization), input16))
                fields = make(config, channels=rng.randint(1, 32), **image)
            else:
                make = rng.choice((convolution, mx8(convolution), flat))
                y, x = rng.randrange(height), rng.randrange(width)
                fields = make(
                    config, **image, channels=32, outputs=rng.randint(1, 16), share=0,
                    tile_y=y, tile_x=x, tile_height=rng.randint(1, height - y),
                    tile_width=rng.randint(1, width - x), weight_pitch=rng.randrange(1 << 14))
            assert await bench.check(pack(**fields)) is None, fields
            layer = bench.get("layer")
            expected = sizes(config, fields)
            assert {name: layer[name] for name in expected} == expected, fields
            assert await bench.finish() == 0

    run(config, body)


def test_a_pass_ends_when_writes_are_settled():
    """`start` while busy is ignored; violations and refusals are reported at the end."""
    async def body(bench):
        for strobe, error in ((None, Error.NONE), ("violation", Error.ACCESS),
                              ("refused", Error.PERMUTATION)):
            assert await bench.check(pack(**convolution(TINY))) is None
            bench.reads.clear()
            await bench.tick(idle=0, settled=0)
            for idle, settled in ((0, 0), (0, 1), (1, 0), (1, 0)):
                await bench.tick(start=1, idle=idle, settled=settled)
                assert bench.get("busy") and not bench.get("done")
            if strobe:
                await bench.tick(**{strobe: 1, "idle": 0})
                assert bench.get("busy") and bench.get("error") == error
            await bench.tick(start=0, violation=0, refused=0, idle=1, settled=1)
            assert bench.get("done") and not bench.get("busy")
            assert bench.get("error") == error
            await bench.tick(violation=1, refused=1)      # nobody's any more
            assert bench.get("error") == error and bench.get("done")
            await bench.tick(violation=0, refused=0)
            assert not bench.reads

    run(TINY, body)


class Units:
    """What begins passes: a loader, computing behind it, a requantizer, and writes behind both.

    A job is loaded, then waits until the one before has been computed; the loader is ready again
    when its own job is computed. Times are random.
    """

    def __init__(self, rng):
        self.rng = rng
        self.loading = self.computing = self.requantizing = self.writes = 0
        self.loaded = False

    @property
    def ready(self):
        return not self.loading and not self.loaded

    @property
    def idle(self):
        return self.ready and not self.computing and not self.requantizing

    def begin(self, kind):
        if kind == Kind.CONVOLVE:
            self.loading = self.rng.choice((3, 60, 90))
        else:
            self.requantizing = self.rng.choice((5, 100))

    def step(self):
        if self.computing or self.requantizing:
            self.writes = 9
        else:
            self.writes = max(0, self.writes - 1)
        self.computing, self.requantizing = (
            max(0, value - 1) for value in (self.computing, self.requantizing))
        if self.loaded and not self.computing:
            self.loaded, self.computing = False, self.rng.choice((4, 50, 120))
        if self.loading:
            self.loading -= 1
            self.loaded = not self.loading


async def run_chain(bench, chain, units, fault=None):
    """Run the descriptors ``chain`` and check every cycle; the numbers of those that began.

    ``fault``: number of the pass during which something goes wrong, and what.
    """
    words = WORDS // bench.width
    for number, fields in enumerate(chain):
        last = number == len(chain) - 1
        bench.write(7 + words * number, pack(**fields | {
            "next": 0 if last else 7 + words * (number + 1)}))
    bench.reads.clear()
    await bench.tick(start=1, address=7, ready=1, idle=1, settled=1)
    bench.set(start=0)
    begun, layer, early, during = [], None, 0, None
    for cycle in range(4000):
        strobes = {"refused": 0, "violation": 0}
        if fault and len(begun) == fault[0] + 1 and during is None:
            during = cycle + 2
        if during == cycle:
            strobes[fault[1]] = 1
            if fault[1] == "refused":
                units.loading, units.loaded = 0, False
        bench.set(ready=units.ready, idle=units.idle, settled=not units.writes, **strobes)
        if bench.get("done"):
            assert not bench.get("busy") and units.idle and not units.writes
            break
        assert bench.get("busy")
        seen = bench.ctx.get(bench.dut.layer.as_value())
        for name, kind in (("convolve", Kind.CONVOLVE), ("requantize", Kind.REQUANTIZE)):
            if bench.get(name):
                number = len(begun)
                fields = dict.fromkeys(FIELDS, 0) | chain[number]
                assert kind == fields["kind"]
                shown = bench.get("layer")
                assert all(shown[name] == fields[name] for name in FIELDS if name != "next")
                before = chain[number - 1]["kind"] if number else None
                if Kind.REQUANTIZE in (kind, before):
                    assert units.idle and not units.writes, number
                assert units.ready
                early += not units.idle
                units.begin(kind)
                begun.append(number)
                layer = seen
        assert layer is None or seen == layer, "the layer must stay"
        await bench.tick()
        units.step()
    else:
        raise AssertionError("the chain must end")
    most = min(len(chain), len(begun) + 1)
    assert bench.reads in ([*range(7, 7 + words * most)], [*range(7, 7 + words * len(begun))])
    return begun, early


@pytest.mark.parametrize("seed", range(4))
def test_chain(seed):
    """Passes begin in order, convolutions before the one before has ended, the others alone."""
    rng = random.Random(seed)

    async def body(bench):
        kept = []
        chain = []
        for _ in range(8):
            if rng.random() < 0.25:
                chain.append(requantization(TINY, source=rng.randrange(900)))
                kept.clear()
            else:
                extra = {}
                if kept and rng.random() < 0.5:
                    extra["keep_weights"] = 1
                if kept and kept[-1] and rng.random() < 0.7:
                    extra["accumulate"] = 1
                kept.append(rng.random() < 0.5)
                chain.append(convolution(
                    TINY, source=rng.randrange(900), keep_sums=int(kept[-1]), **extra))
        begun, early = await run_chain(bench, chain, Units(rng))
        assert begun == [*range(8)] and bench.get("error") == 0
        assert early > 0, "loading must overlap computing"

    run(TINY, body, stalls=((0, 0), (0.5, 0), (0, 0.9))[seed % 3], seed=seed)


CONVOLVE, KEEP, ADD = {}, {"keep_sums": 1}, {"accumulate": 1}
BREAKS = [
    # a chain of convolutions (None: a requantization), and the error that ends it
    ([CONVOLVE, {"keep_weights": 1}, {"keep_weights": 1}], None),
    ([CONVOLVE, None, {"keep_weights": 1}], Error.UNSUPPORTED),
    ([KEEP, None, ADD], Error.UNSUPPORTED),
    ([KEEP, ADD | KEEP, ADD], None),
    ([KEEP, CONVOLVE, ADD], Error.UNSUPPORTED),
    ([CONVOLVE, ADD], Error.UNSUPPORTED),
    *(([CONVOLVE, {"keep_weights": 1} | other], Error.UNSUPPORTED) for other in (
        {"format": Format.A4U}, {"kernel": 1}, {"channels": 16}, {"outputs": 8},
        {"dense_limit": 1})),
    *(([KEEP, ADD | other], Error.UNSUPPORTED) for other in (
        {"outputs": 8}, {"tile_height": 2}, {"tile_width": 4})),
    ([KEEP, ADD | {"channels": 16, "tile_x": 0}], None),
    ([CONVOLVE, CONVOLVE, {"version": 9}, CONVOLVE], Error.VERSION),
    ([None, {"kernel": 2}], Error.SHAPE),
]


@pytest.mark.parametrize("number", range(len(BREAKS)))
def test_a_chain_ends_at_its_first_error(number):
    links, error = BREAKS[number]
    chain = [requantization(TINY) if link is None else convolution(TINY, **link)
             for link in links]

    async def body(bench):
        begun, _ = await run_chain(bench, chain, Units(random.Random(number)))
        legal = len(links) if error is None else next(
            n for n in range(1, len(links)) if links[n] and n == (
                2 if len(links) > 2 else 1))
        assert begun == [*range(legal)]
        assert bench.get("error") == (error or 0)

    run(TINY, body)


@pytest.mark.parametrize("strobe, error", [
    ("violation", Error.ACCESS), ("refused", Error.PERMUTATION)])
@pytest.mark.parametrize("bad_next", [False, True])
def test_an_error_of_a_pass_ends_the_chain(strobe, error, bad_next):
    """What has begun comes to its end, nothing begins any more, and the earlier error counts."""
    chain = [convolution(TINY) for _ in range(5)]
    if bad_next:
        chain[3]["version"] = 1

    async def body(bench):
        begun, _ = await run_chain(
            bench, chain, Units(random.Random(1)), fault=(2, strobe))
        assert begun == [0, 1, 2]
        assert bench.get("error") == error

    run(TINY, body)
