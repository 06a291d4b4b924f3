"""From the integers of a layer call to what the core sees, and back.

`lower` places the operands of a layer call in memory and writes descriptors: one of the
requantization pass, and one of each job of the convolution (`sim.tiler`). The ``pack_`` functions
define how each operand lies in port words, and each has an ``unpack_`` twin. Port words are rows of
bytes here: an array (n, V/2) of uint8, the lowest byte first. Tensors may be anything that numpy
can read as integers.
"""

import dataclasses

import numpy as np

from hw import descriptor, registers
from hw.descriptor import Format, Kind
from sim import tiler
from sim.shape import BLOCK, FitError, Shape

__all__ = [
    "NO_CHANNEL", "FitError", "Shape", "Region", "Allocator", "Pass", "Lowered", "region_words",
    "block_words", "check_shape", "check_fit", "lower", "filler", "pack_words", "pack_tensor",
    "unpack_tensor", "pack_codes", "unpack_codes", "pack_bytes", "unpack_bytes", "pack_halves",
    "unpack_halves", "pack_list", "unpack_list", "pack_table", "unpack_table", "pack_weights",
    "unpack_weights", "pack_weight_scales", "unpack_weight_scales",
]

NO_CHANNEL = 0xFFFF   # position of a list that no channel takes
HEADER = ("size", "low", "high", "cut")   # of a list, 16 bits each


def _ceil(value, step):
    return -(-value // step)


def _integers(name, values, low, high):
    """``values`` as int64, checked to lie within low..high."""
    values = np.asarray(values)
    if values.dtype.kind not in "iub":
        raise TypeError(f"{name} must be integers, not {values.dtype}")
    values = values.astype(np.int64)
    if values.size and (values.min() < low or values.max() > high):
        worst = values.min() if values.min() < low else values.max()
        raise ValueError(f"{name} must be in {low}..{high}, not {int(worst)!r}")
    return values


def _pad(values, axis, multiple):
    """``values`` with zeros appended to ``axis`` up to a multiple."""
    missing = -values.shape[axis] % multiple
    if not missing:
        return values
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, missing)
    return np.pad(values, widths)


def _nibbles(values):
    """(..., n) integers, of which 4 bits count, as (..., n / 2) bytes."""
    values = (values & 15).astype(np.uint8)
    return values[..., 0::2] | values[..., 1::2] << 4


def _values(packed, signed):
    """Inverse of `_nibbles`: (..., n) int64."""
    values = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
    values = values.astype(np.int64)
    return (values ^ 8) - 8 if signed else values


# How operands lie in port words.

def pack_words(values, vector):
    """(n,) 32-bit words, as of a descriptor, in port words."""
    return pack_bytes(_integers("words", values, 0, (1 << 32) - 1).astype("<u4").view(np.uint8),
                      vector)


def pack_tensor(tensor, vector):
    """(C, H, W) 16-bit integers as [ceil(C/V)][H][W][4] words."""
    tensor = _integers("tensor", tensor, -1 << 15, (1 << 15) - 1)
    tensor = _pad(tensor, 0, vector)
    channels, height, width = tensor.shape
    tensor = tensor.reshape(channels // vector, vector, height, width).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(tensor, "<i2").view(np.uint8).reshape(-1, vector // 2)


def unpack_tensor(words, height, width, vector):
    """(C, H, W) int64 of [C/V][H][W][4] words; C is a multiple of V."""
    tensor = np.ascontiguousarray(words).view("<i2").reshape(-1, height, width, vector)
    return tensor.transpose(0, 3, 1, 2).reshape(-1, height, width).astype(np.int64)


def pack_codes(codes, format, vector):
    """(positions, H, W) codes of a tile as [H][W][plane][positions / V] words.

    There are two planes for MX8 and IN16, low nibbles and high nibbles.
    """
    low, high = {Format.A4U: (0, 15), Format.A4S: (-7, 7)}.get(format, (-128, 127))
    codes = _integers("codes", codes, low, high).transpose(1, 2, 0)      # (H, W, positions)
    if format in (Format.MX8, Format.IN16):
        codes = np.stack([codes, codes >> 4], 2)                         # (H, W, plane, positions)
    return _nibbles(codes).reshape(-1, vector // 2)


def unpack_codes(words, height, width, format, vector):
    """Inverse of `pack_codes`: (positions, H, W) int64."""
    words = np.asarray(words)
    if format in (Format.MX8, Format.IN16):
        planes = words.reshape(height, width, 2, -1)
        codes = _values(planes[:, :, 0], False) + 16 * _values(planes[:, :, 1], True)
    else:
        codes = _values(words.reshape(height, width, -1), format == Format.A4S)
    return codes.transpose(2, 0, 1)


def pack_bytes(values, vector):
    """Bytes, contiguous whatever their shape; the last word is filled up with zeros."""
    values = _integers("bytes", values, 0, 255).astype(np.uint8).ravel()
    return _pad(values, 0, vector // 2).reshape(-1, vector // 2)


def unpack_bytes(words, shape):
    """Inverse of `pack_bytes`: int64 of ``shape``."""
    return words.ravel()[:int(np.prod(shape))].astype(np.int64).reshape(shape)


def pack_halves(values, vector):
    """(n,) 16-bit unsigned integers, contiguous; the last word is filled up with zeros."""
    values = _integers("halves", values, 0, 65535).astype("<u2")
    return _pad(values.view(np.uint8), 0, vector // 2).reshape(-1, vector // 2)


def unpack_halves(words, count):
    """Inverse of `pack_halves`: (count,) int64."""
    return np.ascontiguousarray(words).reshape(-1).view("<u2")[:count].astype(np.int64)


def pack_list(slots, low, high, cut, vector):
    """The list of a tile: a word of its sizes, then the slot of each position.

    The slots are padded with `NO_CHANNEL` to a multiple of V.
    """
    slots = _integers("slots", slots, 0, NO_CHANNEL)
    head = pack_halves(np.array([len(slots), low, high, cut]), vector)
    slots = np.pad(slots, (0, -len(slots) % vector), constant_values=NO_CHANNEL)
    return np.concatenate([head, pack_halves(slots, vector)])


def unpack_list(words, vector):
    """``{"size", "low", "high", "cut"}`` of a list, and the slots that ``words`` has room for."""
    head = dict(zip(HEADER, unpack_halves(words[:1], 4).tolist(), strict=True))
    return head, unpack_halves(words[1:], len(words[1:]) * vector // 4)


def block_words(tile_channels, vector):
    """Port words from the list of one tile to that of the next."""
    return 1 + tile_channels * 4 // vector


def pack_table(factor, term, vector):
    """(n,) entries of 64 bits: 32 bits ``term``, 16 bits ``factor``; padded to a multiple of V."""
    factor = _integers("factor", factor, -1 << 15, (1 << 15) - 1)
    term = _integers("term", term, -1 << 31, (1 << 31) - 1)
    entries = (term & 0xFFFFFFFF) | (factor & 0xFFFF) << 32
    return _pad(entries.astype("<u8"), 0, vector).view(np.uint8).reshape(-1, vector // 2)


def unpack_table(words):
    """``factor`` and ``term`` of all entries, int64."""
    entries = np.ascontiguousarray(words).reshape(-1).view("<u4").reshape(-1, 2)
    return (entries[:, 1].astype("<u2").view("<i2").astype(np.int64),
            np.ascontiguousarray(entries[:, 0]).view("<i4").astype(np.int64))


def pack_weights(codes, format, vector):
    """(Cout, slots, k, k) codes as [slot][tap][plane][ceil(Cout/V)] words."""
    mx = format in (Format.MX8, Format.IN16)
    codes = _integers("weight_codes", codes, -127 if mx else -7, 127 if mx else 7)
    codes = _pad(codes, 0, vector)
    outputs, slots = codes.shape[:2]
    codes = codes.reshape(outputs, slots, -1).transpose(1, 2, 0)     # (slot, tap, Cout)
    if mx:
        codes = np.stack([codes, codes >> 4], 2)                     # (slot, tap, plane, Cout)
    return _nibbles(codes).reshape(-1, vector // 2)


def unpack_weights(words, slots, kernel, format, vector):
    """(Cout, slots, k, k) int64; Cout is a multiple of V."""
    words = np.asarray(words)
    if format in (Format.MX8, Format.IN16):
        planes = words.reshape(slots, kernel * kernel, 2, -1)
        codes = _values(planes[:, :, 0], False) + 16 * _values(planes[:, :, 1], True)
    else:
        codes = _values(words.reshape(slots, kernel * kernel, -1), True)
    return codes.transpose(2, 0, 1).reshape(-1, slots, kernel, kernel)


def pack_weight_scales(scales, vector):
    """(Cout, taps, groups) bytes as [tap][group][Cout padded to a multiple of V]."""
    scales = _pad(_integers("weight_scales", scales, 0, 255), 0, vector)
    return pack_bytes(scales.transpose(1, 2, 0), vector)


def unpack_weight_scales(words, taps, groups):
    """(Cout, taps, groups) int64; Cout is a multiple of V."""
    return words.reshape(taps, groups, -1).transpose(2, 0, 1).astype(np.int64)


def filler(first, count, vector):
    """What is in memory where a pass has to write: a pattern that no result looks like for long."""
    places = np.arange(first, first + count)[:, None] * (vector // 2) + np.arange(vector // 2)
    places = places.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (places >> np.uint64(56)).astype(np.uint8)


# What follows from the shape and the plan of a layer.

def region_words(plan):
    """Port words of every region of a layer, as {name: words}.

    Regions in the order of memory: descriptors, what the requantization pass reads, what it
    writes, what only the convolution reads (after what it reads of the first pass), results.
    """
    shape = plan.shape
    word_bytes = shape.vector // 2
    one = descriptor.WORDS * 4 // word_bytes
    words = {"requantize": one, "convolve": one * plan.chosen.jobs}
    for name, slots in zip(("source", "source_second"), shape.segment_slots, strict=False):
        words[name] = slots * shape.pixels * 2 // word_bytes
    if shape.format != Format.IN16:
        words["affine"] = shape.slots * 8 // word_bytes
        words["counts"] = shape.slots * 2 // word_bytes
    tiles = shape.tiles(plan.tile_channels)
    words["permutation"] = len(tiles) * block_words(plan.tile_channels, shape.vector)
    words["scales"] = _ceil(shape.groups * shape.pixels, word_bytes)
    words["codes"] = sum(tile_words(shape, tile) for tile in tiles)
    words["epilogue"] = shape.output_slots * 8 // word_bytes
    words["weights"] = shape.slots * shape.taps * shape.planes * shape.output_words
    words["weight_scales"] = shape.taps * shape.groups * shape.output_slots // word_bytes
    if shape.residual:
        words["residual"] = shape.output_slots * shape.pixels * 2 // word_bytes
    words["destination"] = shape.output_slots * shape.pixels * 2 // word_bytes
    return words


def tile_words(shape, tile):
    """Port words of the codes of a tile of `Shape.tiles`."""
    return _ceil(tile[2], shape.vector) * shape.planes * shape.pixels


def check_shape(name, shape, config, detector_base=0, **choices):
    """Plan of a layer of a shape, whatever the labels of its channels.

    ``choices`` are keywords of `sim.tiler.plan`.

    Raises
    ------
    FitError
        With the first rule that the layer breaks, and by how much.
    """
    try:
        plan = tiler.plan(shape, config, **choices)
        last = detector_base + shape.slots
        if shape.labelled and last > config.detector_depth:
            tiler.refuse(descriptor.Error.DETECTOR, "detector entries", last,
                         config.detector_depth, config)
        _place(plan, 0, None)
    except FitError as error:
        raise FitError(error.error, f"{name}: {error}") from None
    return plan


def check_fit(call, config, plan=None):
    """Plan of a layer call; the rules are those of the core's error codes.

    Parameters
    ----------
    call : golden.layer.LayerCall
    config : hw.config.Config
    plan : sim.tiler.Plan
        Where it is there already; its channel tiles must be those of the call.

    Raises
    ------
    FitError
        With the first rule that the layer breaks, and by how much.
    """
    error = descriptor.Error
    for what, value, low, code in (
            ("shift", call.requantization.shift, 0, error.SHIFT),
            ("align_shift", call.convolution.align_shift, 0, error.SHIFT),
            ("scale_shift", call.convolution.scale_shift, 0, error.SHIFT),
            ("interval", call.interval, 1, error.DETECTOR)):
        high = 31 if code == error.SHIFT else 65535
        if not low <= value <= high:
            raise FitError(code, f"{call.name}: {what} must be in {low}..{high}, not {value!r}")
    shape = Shape.of(call, config)
    if plan is None:
        return check_shape(call.name, shape, config, call.detector_base,
                           **tiler.choices(call, config))
    if plan.shape != shape:
        raise ValueError(f"plan must be of the shape of {call.name}, {shape}, not {plan.shape}")
    if shape.labelled and plan.tile_channels != call.tile_channels:
        raise ValueError(f"tile_channels of the plan must be those of {call.name},"
                         f" {call.tile_channels}, not {plan.tile_channels}")
    check_shape(call.name, shape, config, call.detector_base, density=plan.density,
                tile_channels=plan.tile_channels, dense_limit=plan.dense_limit)
    return plan


# Where things lie.

@dataclasses.dataclass(frozen=True)
class Region:
    """``words`` port words of memory from word ``address`` on."""

    address: int
    words: int

    @property
    def limit(self):
        """The first word behind the region."""
        return self.address + self.words

    def moved(self, distance):
        """The region ``distance`` words further up."""
        return Region(self.address + distance, self.words)


class Allocator:
    """Hands out regions of memory in ascending order.

    Parameters
    ----------
    base, limit : int
        First word to hand out, and the first that does not exist.
    alignment : int
        Every region starts at a multiple of this many words.
    rng : numpy.random.Generator
        Leave up to three words between regions, as this decides; without it regions touch.
    """

    def __init__(self, base, limit, alignment=1, rng=None):
        self.next, self.limit = base, limit
        self.alignment, self.rng = alignment, rng

    def take(self, words):
        """The next region of ``words`` words.

        Raises
        ------
        ValueError
            If it would end beyond the limit.
        """
        gap = int(self.rng.integers(4)) if self.rng is not None else 0
        address = _ceil(self.next + gap, self.alignment) * self.alignment
        if address + words > self.limit:
            raise ValueError(f"words must be at most {self.limit - address}, not {words!r}")
        self.next = address + words
        return Region(address, words)


# What each pass reads and writes; of the second, what the first one wrote comes first.
READS = {
    Kind.REQUANTIZE: ("source", "source_second", "affine"),
    Kind.CONVOLVE: ("permutation", "scales", "codes", "epilogue", "weights", "weight_scales",
                    "residual"),
}
WRITES = {
    Kind.REQUANTIZE: ("counts", "permutation", "scales", "codes"),
    Kind.CONVOLVE: ("destination",),
}
CHAIN = ("permutation", "scales", "codes")   # from the first pass to the second


def _place(plan, base, rng):
    """Regions of a layer from word ``base`` on: {name: Region}.

    Where memory is short, the results lie where the first pass had its input.
    """
    words = region_words(plan)
    available = 1 << plan.config.address_width

    def place(overlay, rng):
        allocator = Allocator(base, 1 << 40, rng=rng)
        regions = {}

        def take(names):
            names = [name for name in names if name in words]
            if rng is not None:
                names = [names[n] for n in rng.permutation(len(names))]
            regions.update((name, allocator.take(words[name])) for name in names)

        take(("requantize", "convolve"))
        begin = allocator.next
        take(READS[Kind.REQUANTIZE])
        take(("counts",))
        if overlay:
            regions["destination"] = Region(begin, words["destination"])
            allocator.next = max(allocator.next, begin + words["destination"])
        take(CHAIN)
        take([name for name in READS[Kind.CONVOLVE] if name not in CHAIN])
        if not overlay:
            take(("destination",))
        return regions, allocator.next

    for way in ((False, rng), (True, rng), (True, None)):
        regions, end = place(*way)
        if end <= available:
            return regions
    tiler.refuse(descriptor.Error.WINDOW, "words of memory", end, available, plan.config)


def _window(regions, names):
    """First word and the word behind the last of the named regions that exist."""
    present = [regions[name] for name in names if name in regions]
    return min(region.address for region in present), max(region.limit for region in present)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """A chain of descriptors that one start executes: a requantization, or jobs of a convolution.

    Members
    -------
    kind : hw.descriptor.Kind
    descriptors : tuple of descriptor fields by name, one for each
    regions : {name: Region} that the pass reads or writes, and its descriptors
    load : list of (first word, (n, V/2) bytes): what memory must hold before
    registers : list of (register number, value) to write before the start
    limit : cycles after which the pass has gone wrong, with a memory that never stalls
    """

    kind: Kind
    descriptors: tuple
    regions: dict
    load: list
    registers: list
    limit: int

    @property
    def fields(self):
        """Fields of the first descriptor; all have the same windows."""
        return self.descriptors[0]

    @property
    def descriptor(self):
        """Word address of the first descriptor."""
        return self.chain.address

    @property
    def chain(self):
        """The region of the descriptors."""
        return self.regions[self.kind.name.lower()]

    @property
    def window(self):
        """The region that the pass may write."""
        first, limit = self.fields["write_base"], self.fields["write_limit"]
        return Region(first, limit - first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lowered:
    """A layer call as the core sees it: its two passes share the quantized tensor in memory."""

    plan: tiler.Plan
    requantize: Pass
    convolve: Pass

    @property
    def shape(self):
        return self.plan.shape


def lower(call, config, *, plan=None, base=0, top=False, rng=None):
    """Place a layer call in memory and describe it.

    Parameters
    ----------
    call : golden.layer.LayerCall
    config : hw.config.Config
    plan : sim.tiler.Plan
        By default that of `sim.tiler.plan_for`.
    base : int
        First word to use.
    top : bool
        End with the last word of the address space instead.
    rng : numpy.random.Generator
        Shuffle the regions as far as windows allow and leave gaps between them.

    Returns
    -------
    Lowered

    Raises
    ------
    FitError
        If the layer does not fit the core, see `check_fit`.
    TypeError, ValueError
        If operands are not integers, or out of range.
    """
    plan = check_fit(call, config, plan)
    try:
        regions = _place(plan, base, rng)
    except FitError as error:
        raise FitError(error.error, f"{call.name}: {error}") from None
    if top:
        distance = (1 << config.address_width) - max(region.limit for region in regions.values())
        regions = {name: region.moved(distance) for name, region in regions.items()}
    return Lowered(plan=plan, requantize=_lower_requantize(call, plan, regions),
                   convolve=_lower_convolve(call, plan, regions))


def _fields(shape, kind, regions):
    """Descriptor fields that both kinds have."""
    read_base, read_limit = _window(regions, READS[kind])
    write_base, write_limit = _window(regions, WRITES[kind])
    return {
        "version": descriptor.VERSION, "kind": kind, "vector": shape.vector,
        "kernel": shape.kernel, "format": shape.format, "group": shape.group_size,
        "height": shape.height, "width": shape.width, "batch": 1, "stride": 1,
        "read_base": read_base, "read_limit": read_limit,
        "write_base": write_base, "write_limit": write_limit,
    }


def _pass(kind, shape, regions, descriptors, operands, registers_, limit):
    """A `Pass` whose memory holds its descriptors, ``operands`` and a filler where it writes."""
    own = kind.name.lower()
    used = {name: regions[name] for name in (own, *READS[kind], *WRITES[kind]) if name in regions}
    chain = used[own]
    step = chain.words // len(descriptors)
    last = len(descriptors) - 1
    descriptors = tuple(
        fields | {"next": chain.address + (number + 1) * step if number < last else 0}
        for number, fields in enumerate(descriptors))
    first, limit_word = (descriptors[0][name] for name in ("write_base", "write_limit"))
    load = [(first, filler(first, limit_word - first, shape.vector))]
    load.append((chain.address, np.concatenate([
        pack_words(descriptor.pack(**fields), shape.vector) for fields in descriptors])))
    for name, words in operands.items():
        if words.shape != (used[name].words, shape.vector // 2):
            raise ValueError(f"{name} must take {used[name].words} words, not {len(words)!r}")
        load.append((used[name].address, words))
    return Pass(kind=kind, descriptors=descriptors, regions=used, load=load, limit=limit,
                registers=[*registers_, (registers.number("descriptor"), chain.address)])


def _lower_requantize(call, plan, regions):
    shape, operands = plan.shape, {}
    requantization = call.requantization
    for name, segment in zip(("source", "source_second"), requantization.segments, strict=False):
        operands[name] = pack_tensor(segment, shape.vector)
    fields = _fields(shape, Kind.REQUANTIZE, regions) | {
        "relu": int(requantization.relu), "interval": call.interval,
        "channels": shape.channels[0], "source": regions["source"].address,
        "scales": regions["scales"].address, "permutation": regions["permutation"].address,
        "destination": regions["codes"].address, "detector": call.detector_base,
        "threshold": call.threshold, "tile_channels": plan.tile_channels,
    }
    if shape.format != Format.IN16:
        operands["affine"] = pack_table(requantization.gain, requantization.offset, shape.vector)
        fields |= {"counts": regions["counts"].address, "table": regions["affine"].address,
                   "shift": requantization.shift}
    if len(shape.channels) > 1:
        fields |= {"source_second": regions["source_second"].address,
                   "channels_second": shape.channels[1]}
    if shape.labelled:
        fields["dense_limit"] = plan.dense_limit
    if shape.labelled and call.balance is not None:
        fields |= {"balance": 1, **{
            f"cost_{name}": value for name, value in vars(call.balance).items()}}
    words = sum(map(len, operands.values())) + fields["write_limit"] - fields["write_base"]
    return _pass(Kind.REQUANTIZE, shape, regions, [fields], operands,
                 [(registers.number("evaluation"), call.evaluation)],
                 5000 + 40 * words + 200 * len(shape.tiles(plan.tile_channels)))


def _lower_convolve(call, plan, regions):
    shape, config, convolution = plan.shape, plan.config, call.convolution
    operands = {
        "epilogue": pack_table(convolution.multiplier, convolution.bias, shape.vector),
        "weights": pack_weights(convolution.weight_codes, shape.format, shape.vector),
        "weight_scales": pack_weight_scales(convolution.weight_scales, shape.vector),
    }
    if shape.residual:
        operands["residual"] = pack_tensor(convolution.residual, shape.vector)
    common = _fields(shape, Kind.CONVOLVE, regions) | {
        "format": Format.MX8 if shape.mx else shape.format,
        "weight_pitch": shape.output_words,
        "scale_pitch": shape.groups * shape.output_slots * 2 // shape.vector,
        "shift": convolution.scale_shift, "align_shift": convolution.align_shift,
    }
    if shape.residual:
        common |= {"residual": 1, "residual_multiplier": convolution.residual_multiplier}
    if shape.mx:
        common["share"] = plan.share
    else:
        common["dense_limit"] = plan.dense_limit
    descriptors = [common | _job(plan, regions, job) for job in plan.jobs]
    # Every issue of either side as if there were no other, and every word far away.
    issues = sum(shape.planes ** 2 * shape.taps * job.height * job.width * (
        max(4, job.slots) * (_ceil(job.outputs, config.dense_lanes)
                             + _ceil(job.outputs, config.sparse_lanes))) for job in plan.jobs)
    words = sum(plan.chosen.reads.values()) + sum(region.words for region in regions.values())
    return _pass(Kind.CONVOLVE, shape, regions, descriptors, operands, [],
                 int(5000 + 40 * words + issues))


def _job(plan, regions, job):
    """Descriptor fields of a job that other jobs of the layer do not share."""
    shape = plan.shape
    word_bytes = shape.vector // 2
    block = job.slot // BLOCK if shape.mx else 0
    output = job.output // shape.vector
    scale, scale_byte = divmod(block * shape.pixels, word_bytes)
    before = shape.tiles(plan.tile_channels)[:job.tile]
    fields = {
        "channels": job.slots, "outputs": job.outputs,
        "tile_y": job.y, "tile_x": job.x, "tile_height": job.height, "tile_width": job.width,
        "accumulate": int(job.accumulate), "keep_sums": int(job.keep_sums),
        "keep_weights": int(job.keep_weights),
        "source": regions["codes"].address + sum(tile_words(shape, tile) for tile in before),
        "scales": regions["scales"].address + scale, "scale_byte": scale_byte,
        "permutation": regions["permutation"].address
        + job.tile * block_words(plan.tile_channels, shape.vector),
        "table": regions["epilogue"].address + 16 * output,
        "weights": regions["weights"].address
        + job.slot * shape.taps * shape.planes * shape.output_words + output,
        "weight_scales": regions["weight_scales"].address
        + 2 * (block * shape.output_words + output),
        "destination": regions["destination"].address + 4 * shape.pixels * output,
    }
    if shape.residual:
        fields["residual_source"] = regions["residual"].address + 4 * shape.pixels * output
    return fields
