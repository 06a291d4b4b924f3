"""From the integers of a layer call to what the core sees, and back.

`lower` places the operands of both passes of a layer call in memory and writes their descriptors;
the ``pack_`` functions define how each operand lies in port words, and each has an ``unpack_``
twin. Port words are rows of bytes here: an array (n, V/2) of uint8, the lowest byte first. Tensors
may be anything that numpy can read as integers.
"""

import dataclasses

import numpy as np

from hw import descriptor, registers
from hw.descriptor import Format, Kind

__all__ = [
    "NO_CHANNEL", "FitError", "Shape", "Region", "Allocator", "Pass", "Lowered", "region_words",
    "demands", "check_shape", "check_fit", "lower", "filler", "pack_words", "pack_tensor",
    "unpack_tensor", "pack_codes", "unpack_codes", "pack_bytes", "unpack_bytes", "pack_halves",
    "unpack_halves", "pack_permutation", "unpack_permutation", "pack_table", "unpack_table",
    "pack_weights", "unpack_weights", "pack_weight_scales", "unpack_weight_scales",
]

NO_CHANNEL = 0xFFFF   # position in a permutation that no channel takes


class FitError(ValueError):
    """A layer that a core cannot run; the text says which rule it breaks and by how much.

    ``error`` is the code of `hw.descriptor.Error` with which the core would refuse it.
    """

    def __init__(self, error, message):
        super().__init__(message)
        self.error = error


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
    """(positions, H, W) codes as [word][H][W][plane] words; two planes for MX8 and IN16."""
    low, high = {Format.A4U: (0, 15), Format.A4S: (-7, 7)}.get(format, (-128, 127))
    codes = _integers("codes", codes, low, high)
    positions, height, width = codes.shape
    codes = codes.reshape(positions // vector, vector, height, width).transpose(0, 2, 3, 1)
    if format in (Format.MX8, Format.IN16):
        codes = np.stack([codes, codes >> 4], 3)             # (word, H, W, plane, V)
    return _nibbles(codes).reshape(-1, vector // 2)


def unpack_codes(words, height, width, format, vector):
    """(positions, H, W) int64 of [word][H][W][plane] words."""
    words = np.asarray(words)
    if format in (Format.MX8, Format.IN16):
        planes = words.reshape(-1, height, width, 2, vector // 2)
        codes = _values(planes[..., 0, :], False) + 16 * _values(planes[..., 1, :], True)
    else:
        codes = _values(words.reshape(-1, height, width, vector // 2), format == Format.A4S)
    return codes.transpose(0, 3, 1, 2).reshape(-1, height, width)


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


def pack_permutation(dense, sparse, vector):
    """Lists of slots: a word with their lengths, then the slot of each position.

    The lists are padded with `NO_CHANNEL` to multiples of V.
    """
    head = np.zeros((1, vector // 2), np.uint8)
    head[0, :4] = np.array([len(dense), len(sparse)], "<u2").view(np.uint8)
    lists = []
    for slots in (dense, sparse):
        slots = _integers("slots", slots, 0, NO_CHANNEL)
        lists.append(np.pad(slots, (0, -len(slots) % vector), constant_values=NO_CHANNEL))
    return np.concatenate([head, pack_halves(np.concatenate(lists), vector)])


def unpack_permutation(words, vector):
    """Lengths of both lists, and the (positions,) slots that ``words`` has room for."""
    dense, sparse = unpack_halves(words[:1], 2)
    return int(dense), int(sparse), unpack_halves(words[1:], len(words[1:]) * vector // 4)


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


# What follows from the shape of a layer.

@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a layer call on a core.

    Members
    -------
    format : hw.descriptor.Format
    kernel, height, width : of the convolution
    channels : tuple of the segments' channels
    outputs : output channels
    vector : V
    sparse : bool, whether channels may go to a sparse side
    residual : bool, whether a tensor is added to the output
    """

    format: Format
    kernel: int
    height: int
    width: int
    channels: tuple
    outputs: int
    vector: int
    sparse: bool
    residual: bool

    @classmethod
    def of(cls, call, config):
        """Shape of ``call`` on the core of ``config``."""
        requantization, convolution = call.requantization, call.convolution
        format = Format(int(requantization.format))
        _, height, width = np.shape(requantization.segments[0])
        return cls(
            format=format, kernel=int(convolution.kernel), height=height, width=width,
            channels=tuple(len(segment) for segment in requantization.segments),
            outputs=len(convolution.weight_codes), vector=config.vector,
            sparse=config.sparse_pes > 0 and format in (Format.A4U, Format.A4S),
            residual=convolution.residual is not None)

    @property
    def mx(self):
        """Whether codes and weights have two nibbles."""
        return self.format in (Format.MX8, Format.IN16)

    @property
    def pixels(self):
        return self.height * self.width

    @property
    def taps(self):
        return self.kernel * self.kernel

    @property
    def planes(self):
        """Port words of V codes."""
        return 2 if self.mx else 1

    @property
    def slots(self):
        """Slots of the codes; the network input has V for each half of a value."""
        if self.format == Format.IN16:
            return 2 * self.vector
        return sum(_ceil(count, self.vector) * self.vector for count in self.channels)

    @property
    def segment_slots(self):
        """Slots of each segment of the 16-bit input."""
        return [_ceil(count, self.vector) * self.vector for count in self.channels]

    @property
    def group_size(self):
        """The descriptor's ``group``: slots that share a scale, or 0 for all."""
        return {Format.MX8: 32, Format.IN16: self.vector}.get(self.format, 0)

    @property
    def groups(self):
        """Scales of a pixel."""
        return _ceil(self.slots, self.group_size) if self.group_size else 1

    @property
    def code_words(self):
        """The most words of V codes that a pixel may take, whatever the labels."""
        if self.mx:
            return self.slots // self.vector
        count = sum(self.channels)
        if self.sparse and count > 1:
            return (count - 2) // self.vector + 2    # each list ends with a short word
        return _ceil(count, self.vector)

    @property
    def output_slots(self):
        """Output channels with padding."""
        return _ceil(self.outputs, self.vector) * self.vector

    def channel(self, slot):
        """(channel, half) of a slot, or None; half is "hi" or "lo" for the network input."""
        if self.format == Format.IN16:
            number = slot % self.vector
            return (number, "lo" if slot >= self.vector else "hi") if (
                number < self.channels[0]) else None
        base = 0
        for count, slots in zip(self.channels, self.segment_slots, strict=True):
            if slot < slots:
                return (base + slot, "") if slot < count else None
            slot -= slots
            base += count
        return None




def region_words(shape):
    """Port words of every region of a layer, as {name: words}.

    Regions in the order of memory: descriptors, what the requantization pass reads, what it
    writes, what only the convolution pass reads (after what it reads of the first pass), results.
    """
    word_bytes = shape.vector // 2
    words = dict.fromkeys(("requantize", "convolve"), descriptor.WORDS * 4 // word_bytes)
    for name, slots in zip(("source", "source_second"), shape.segment_slots, strict=False):
        words[name] = slots * shape.pixels * 2 // word_bytes
    if shape.format != Format.IN16:
        words["affine"] = shape.slots * 8 // word_bytes
        words["counts"] = shape.slots * 2 // word_bytes
    words["permutation"] = 1 + shape.code_words * shape.vector * 2 // word_bytes
    words["scales"] = _ceil(shape.groups * shape.pixels, word_bytes)
    words["codes"] = shape.code_words * shape.pixels * shape.planes
    words["epilogue"] = shape.output_slots * 8 // word_bytes
    words["weights"] = (shape.slots * shape.taps * shape.planes
                        * shape.output_slots // shape.vector)
    words["weight_scales"] = shape.taps * shape.groups * shape.output_slots // word_bytes
    if shape.residual:
        words["residual"] = shape.output_slots * shape.pixels * 2 // word_bytes
    words["destination"] = shape.output_slots * shape.pixels * 2 // word_bytes
    return words


def demands(shape, config, detector_base=0):
    """What a layer needs of a core, in the order of its checks: (error, what, need, have)."""
    error = descriptor.Error
    words = shape.slots // shape.vector
    rows = shape.taps * shape.groups * shape.output_slots
    if shape.format == Format.IN16:
        yield error.FORMAT, "channels of the network input", sum(shape.channels), shape.vector
    yield error.SHAPE, "pixels", shape.pixels, 65535
    yield error.CHANNELS, "input channel slots", shape.slots, config.max_channels
    yield error.CHANNELS, "output channels", shape.outputs, config.max_outputs
    yield (error.ACTIVATIONS, "words of activation codes", words * shape.pixels * shape.planes,
           config.activation_depth)
    yield (error.WEIGHTS, "words of dense weights",
           words * shape.taps * shape.planes * shape.output_slots // config.dense_lanes,
           config.weight_depth)
    if shape.sparse:
        yield (error.WEIGHTS, "words of sparse weights",
               shape.slots * shape.taps * _ceil(shape.output_slots, config.sparse_lanes),
               config.sparse_weight_depth)
    yield error.SCALES, "activation scales", shape.groups * shape.pixels, config.scale_depth
    yield (error.SCALES, "words of dense weight scales", rows // config.dense_scale_units,
           config.weight_scale_depth)
    if shape.sparse:
        yield (error.SCALES, "words of sparse weight scales", rows // config.sparse_scale_units,
               config.weight_scale_depth)
    if shape.format in (Format.A4U, Format.A4S):
        yield (error.DETECTOR, "detector entries", detector_base + shape.slots,
               config.detector_depth)


def check_shape(name, shape, config, detector_base=0):
    """Check that a core can run a layer of a shape, whatever the labels of its channels.

    Raises
    ------
    FitError
        With the first rule that the layer breaks, and by how much.
    """
    if shape.kernel not in (1, 3):
        raise FitError(descriptor.Error.SHAPE,
                       f"{name}: kernel must be 1 or 3, not {shape.kernel!r}")
    for error, what, need, available in demands(shape, config, detector_base):
        if need > available:
            raise FitError(error, f"{name}: {what} must be at most {available} for"
                                  f" {config.name}, not {need}: {need - available} too many")
    _place(name, shape, config, 0, None)


def check_fit(call, config):
    """Check that a core can run a layer call; the rules are those of the core's error codes.

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
    check_shape(call.name, Shape.of(call, config), config, call.detector_base)


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


def _place(name, shape, config, base, rng):
    """Regions of a layer from word ``base`` on: {name: Region}.

    Where memory is short, the results lie where the first pass had its input.
    """
    words = region_words(shape)
    available = 1 << config.address_width

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
    raise FitError(descriptor.Error.WINDOW,
                   f"{name}: words of memory must be at most {available} for {config.name}, not"
                   f" {end}: {end - available} too many")


def _window(regions, names):
    """First word and the word behind the last of the named regions that exist."""
    present = [regions[name] for name in names if name in regions]
    return min(region.address for region in present), max(region.limit for region in present)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass of the core.

    Members
    -------
    kind : hw.descriptor.Kind
    fields : descriptor fields by name
    regions : {name: Region} that the pass reads or writes, and its descriptor
    load : list of (first word, (n, V/2) bytes): what memory must hold before
    registers : list of (register number, value) to write before the start
    limit : cycles after which the pass has gone wrong, with a memory that never stalls
    """

    kind: Kind
    fields: dict
    regions: dict
    load: list
    registers: list
    limit: int

    @property
    def descriptor(self):
        """Word address of the descriptor."""
        return self.regions[self.kind.name.lower()].address

    @property
    def window(self):
        """The region that the pass may write."""
        first, limit = self.fields["write_base"], self.fields["write_limit"]
        return Region(first, limit - first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lowered:
    """A layer call as the core sees it: its two passes share the quantized tensor in memory."""

    shape: Shape
    requantize: Pass
    convolve: Pass


def lower(call, config, *, base=0, top=False, rng=None):
    """Place a layer call in memory and describe it.

    Parameters
    ----------
    call : golden.layer.LayerCall
    config : hw.config.Config
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
    check_fit(call, config)
    shape = Shape.of(call, config)
    regions = _place(call.name, shape, config, base, rng)
    if top:
        distance = (1 << config.address_width) - max(region.limit for region in regions.values())
        regions = {name: region.moved(distance) for name, region in regions.items()}
    return Lowered(shape=shape,
                   requantize=_lower_requantize(call, shape, regions),
                   convolve=_lower_convolve(call, shape, config, regions))


def _fields(call, shape, kind, regions):
    """Descriptor fields that both passes have."""
    read_base, read_limit = _window(regions, READS[kind])
    write_base, write_limit = _window(regions, WRITES[kind])
    return {
        "version": descriptor.VERSION, "kind": kind, "vector": shape.vector,
        "kernel": shape.kernel, "format": shape.format, "group": shape.group_size,
        "height": shape.height, "width": shape.width, "channels": shape.channels[0],
        "channels_second": shape.channels[1] if len(shape.channels) > 1 else 0,
        "outputs": shape.outputs, "batch": 1, "stride": 1, "interval": call.interval,
        "read_base": read_base, "read_limit": read_limit,
        "write_base": write_base, "write_limit": write_limit,
    }


def _pass(kind, shape, regions, fields, operands, registers_, limit):
    """A `Pass` whose memory holds its descriptor, ``operands`` and a filler where it writes."""
    own = kind.name.lower()
    used = {name: regions[name] for name in (own, *READS[kind], *WRITES[kind]) if name in regions}
    first = fields["write_base"]
    load = [(first, filler(first, fields["write_limit"] - first, shape.vector))]
    load.append((used[own].address, pack_words(descriptor.pack(**fields), shape.vector)))
    for name, words in operands.items():
        if words.shape != (used[name].words, shape.vector // 2):
            raise ValueError(f"{name} must take {used[name].words} words, not {len(words)!r}")
        load.append((used[name].address, words))
    return Pass(kind=kind, fields=fields, regions=used, load=load, limit=limit,
                registers=[*registers_, (registers.number("descriptor"), used[own].address)])


def _lower_requantize(call, shape, regions):
    operands = {}
    requantization = call.requantization
    for name, segment in zip(("source", "source_second"), requantization.segments, strict=False):
        operands[name] = pack_tensor(segment, shape.vector)
    fields = _fields(call, shape, Kind.REQUANTIZE, regions)
    if shape.format != Format.IN16:
        operands["affine"] = pack_table(requantization.gain, requantization.offset, shape.vector)
        fields |= {"counts": regions["counts"].address, "table": regions["affine"].address,
                   "shift": requantization.shift}
    if len(shape.channels) > 1:
        fields["source_second"] = regions["source_second"].address
    fields |= {
        "relu": int(requantization.relu), "source": regions["source"].address,
        "scales": regions["scales"].address, "permutation": regions["permutation"].address,
        "destination": regions["codes"].address, "detector": call.detector_base,
        "threshold": call.threshold,
    }
    words = sum(map(len, operands.values())) + fields["write_limit"] - fields["write_base"]
    return _pass(Kind.REQUANTIZE, shape, regions, fields, operands,
                 [(registers.number("evaluation"), call.evaluation)], 5000 + 40 * words)


def _lower_convolve(call, shape, config, regions):
    convolution = call.convolution
    operands = {
        "epilogue": pack_table(convolution.multiplier, convolution.bias, shape.vector),
        "weights": pack_weights(convolution.weight_codes, shape.format, shape.vector),
        "weight_scales": pack_weight_scales(convolution.weight_scales, shape.vector),
    }
    if shape.residual:
        operands["residual"] = pack_tensor(convolution.residual, shape.vector)
    fields = _fields(call, shape, Kind.CONVOLVE, regions) | {
        "residual": int(shape.residual), "source": regions["codes"].address,
        "scales": regions["scales"].address, "permutation": regions["permutation"].address,
        "table": regions["epilogue"].address, "weights": regions["weights"].address,
        "weight_scales": regions["weight_scales"].address,
        "destination": regions["destination"].address,
        "shift": convolution.scale_shift, "align_shift": convolution.align_shift,
    }
    if shape.residual:
        fields |= {"residual_source": regions["residual"].address,
                   "residual_multiplier": convolution.residual_multiplier}
    words = sum(region.words for region in regions.values())
    steps = shape.pixels * shape.taps * shape.output_slots
    products = steps * (shape.slots // shape.vector * 4 // config.dense_lanes
                        + (shape.slots // config.sparse_lanes if shape.sparse else 0) + 2)
    return _pass(Kind.CONVOLVE, shape, regions, fields, operands, [], 5000 + 40 * words + products)
