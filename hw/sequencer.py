"""The sequencer: fetches descriptors, checks them and hands their passes out."""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .descriptor import FIELDS, VERSION, WORDS, Error, Format, Kind
from .layer import derived_sizes, layer_layout
from .memory_port import ReadPort

__all__ = ["Sequencer"]

ADDRESSES = ("source", "source_second", "scales", "permutation", "counts", "table", "weights",
             "weight_scales", "residual_source", "destination", "read_base", "write_base", "next")
LIMITS = ("read_limit", "write_limit")
BLOCK = 32      # slots that share an MXINT8 scale; outputs at which a tile may begin


class Sequencer(wiring.Component):
    """Runs a chain of passes, each from a descriptor that names the next one.

    While a pass is under way the next descriptor is fetched and checked. A convolution begins as
    soon as ``ready`` says that the loader has nothing left to load, so that loading overlaps
    computing; a requantization begins when everything before it has ended and is in memory, and
    nothing begins before it has ended likewise. A convolution therefore must not load codes or
    weights that a convolution before it in the same chain writes.

    A descriptor that breaks a rule begins nothing. It ends the chain, as do an access outside the
    windows and a strange permutation; passes that have begun come to their end. ``error`` is that
    of the pass that was earlier in the chain.

    Members
    -------
    start : ``In(1)``
        Begin; ignored while busy.
    address : ``In``
        Of the first descriptor.
    busy, done : ``Out(1)``
        A chain is running; the last one has ended.
    error : ``Out(8)``
        `Error` of the last chain; 0 while it is running without one.
    read : ``Out(ReadPort)``
        Fetches descriptors; always takes its responses.
    layer : ``Out``
        See `layer_layout`; of the pass that began last, from its strobe to the next one.
    requantize, convolve : ``Out(1)``
        High for one cycle: begin that pass.
    ready : ``In(1)``
        The loader takes a job.
    idle : ``In(1)``
        Nothing that has begun is under way; low from the cycle after a strobe.
    settled : ``In(1)``
        No write is on its way.
    refused : ``In(1)``
        High for one cycle: the permutation is not one of the job's tile, and the job has ended.
    violation : ``In(1)``
        An access lay outside its window.
    """

    size_cycles = 5     # until the sizes that follow from a descriptor have settled

    def __init__(self, config):
        self.config = config
        super().__init__({
            "start": In(1),
            "address": In(config.address_width),
            "busy": Out(1),
            "done": Out(1),
            "error": Out(8),
            "read": Out(ReadPort(config)),
            "layer": Out(layer_layout(config)),
            "requantize": Out(1),
            "convolve": Out(1),
            "ready": In(1),
            "idle": In(1),
            "settled": In(1),
            "refused": In(1),
            "violation": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        words = WORDS * 32 // config.port_width
        raw = Signal(WORDS * 32)
        asked, got = Signal(range(words + 1)), Signal(range(words + 1))
        address = Signal(config.address_width)
        new = Signal(layer_layout(config))
        for name, (word, low, bits, _) in FIELDS.items():
            at = word * 32 + low
            m.d.comb += new[name].eq(raw[at:at + bits])
        named = [False] * WORDS * 32
        for word, low, bits, _ in FIELDS.values():
            at = word * 32 + low
            named[at:at + bits] = [True] * bits
        reserved = Cat(raw[bit] for bit in range(WORDS * 32) if not named[bit])

        fetching = Signal()
        request, response = self.read.request, self.read.response
        m.d.comb += [
            request.valid.eq(fetching & (asked != words)),
            request.payload.eq(address + asked),
            response.ready.eq(1),
        ]

        sizes = Sizes(m, config, new)
        follows = Signal()      # a convolution of this chain was the last pass to begin
        code = Signal(8)
        with m.If(0):
            pass
        for error, broken in self.rules(new, self.layer, follows, sizes, reserved):
            with m.Elif(broken):
                m.d.comb += code.eq(error)

        verdict = Signal(8)     # of the descriptor that ends the chain
        alone = Signal()        # the pass before or the next one lets no other run beside it
        quiet = Signal()
        wait = Signal(range(self.size_cycles))
        m.d.comb += [
            alone.eq((new.kind == Kind.REQUANTIZE) | ~follows),
            quiet.eq(self.idle & self.settled),
            self.busy.eq(1),
        ]

        def fetch(place):
            m.d.sync += [address.eq(place), asked.eq(0), got.eq(0)]
            m.next = "Fetch"

        with m.FSM(name="chain"):
            with m.State("Idle"):
                m.d.comb += self.busy.eq(0)
                with m.If(self.start):
                    m.d.sync += [
                        self.done.eq(0), self.error.eq(0), verdict.eq(0), follows.eq(0)]
                    fetch(self.address)
            with m.State("Fetch"):
                m.d.comb += fetching.eq(1)
                with m.If(request.valid & request.ready):
                    m.d.sync += asked.eq(asked + 1)
                with m.If(response.valid):
                    m.d.sync += [
                        raw.eq(Cat(raw[config.port_width:], response.payload)), got.eq(got + 1)]
                    with m.If(got + 1 == words):
                        m.d.sync += wait.eq(self.size_cycles - 1)
                        m.next = "Size"
            with m.State("Size"):
                m.d.sync += wait.eq(wait - 1)
                with m.If(wait == 0):
                    m.next = "Check"
            with m.State("Check"):
                m.d.sync += verdict.eq(code)
                m.next = "Wait"
                with m.If(code != 0):
                    m.next = "Drain"
            with m.State("Wait"):
                with m.If(self.error.any() | self.refused | self.violation):
                    m.next = "Drain"
                with m.Elif(Mux(alone, quiet, self.ready)):
                    m.d.sync += self.layer.eq(new)
                    m.next = "Begin"
            with m.State("Begin"):
                convolve = self.layer.kind == Kind.CONVOLVE
                m.d.comb += [self.requantize.eq(~convolve), self.convolve.eq(convolve)]
                m.d.sync += follows.eq(convolve)
                with m.If(self.layer.next.any()):
                    fetch(self.layer.next)
                with m.Else():
                    m.next = "Drain"
            with m.State("Drain"):
                with m.If(quiet):
                    m.d.sync += self.done.eq(1)
                    with m.If(~self.error.any() & ~self.refused & ~self.violation):
                        m.d.sync += self.error.eq(verdict)
                    m.next = "Idle"
        with m.If(self.busy & ~self.error.any()):
            with m.If(self.violation):
                m.d.sync += self.error.eq(Error.ACCESS)
            with m.Elif(self.refused):
                m.d.sync += self.error.eq(Error.PERMUTATION)
        return m

    def rules(self, layer, before, follows, sizes, reserved):
        """Pairs of an `Error` and the condition that raises it, the first one that holds counts.

        ``before`` is the pass before, a convolution if ``follows``.
        """
        config, vector = self.config, self.config.vector
        convolve = layer.kind == Kind.CONVOLVE
        requantize = layer.kind == Kind.REQUANTIZE
        input16, mx = layer.format == Format.IN16, layer.mx
        multiplied = convolve & mx
        beyond = Cat(
            *(layer[name][config.address_width:].any() for name in ADDRESSES),
            *(layer[name] > 1 << config.address_width for name in LIMITS)).any()

        def same(*names):
            return follows & Cat(layer[name] == before[name] for name in names).all()

        no_weights = layer.keep_weights & ~same(
            "format", "kernel", "channels", "outputs", "dense_limit")
        no_sums = layer.accumulate & ~(
            before.keep_sums & same("outputs", "tile_height", "tile_width"))
        no_side = Const(0)
        if not config.sparse_pes:
            no_side = multiplied & (layer.share != 1)
        if not config.dense_pes:
            no_side = multiplied & (layer.share != 0)
        bad_tile = ((layer.tile_channels == 0) | (layer.tile_channels > config.tile_channels)
                    | Mux(mx, layer.tile_channels != BLOCK,
                          layer.tile_channels[:BLOCK.bit_length() - 1].any()))
        bad_slots = ((layer.channels > config.tile_channels)
                     | Mux(mx, layer.channels != BLOCK,
                           layer.channels[:vector.bit_length() - 1].any())
                     | (layer.outputs > config.tile_outputs))
        # Numbers of tiles of lanes that the sparse PEs cannot share evenly.
        uneven = [tiles for tiles in range(1, 1 << len(layer.sparse_tiles))
                  if config.sparse_pes and tiles % config.sparse_pes and config.sparse_pes % tiles]
        return [
            (Error.VERSION, layer.version != VERSION),
            (Error.KIND, ~requantize & ~convolve),
            (Error.VECTOR, layer.vector != vector),
            (Error.FORMAT, (layer.format > Format.IN16) | (layer.group != Mux(mx, BLOCK, 0))
                | (input16 & (layer.channels_second != 0))
                | Mux(convolve, layer.relu | layer.balance | input16,
                      layer.residual | layer.accumulate | layer.keep_sums | layer.keep_weights
                      | ((layer.format == Format.A4U) & ~layer.relu)
                      | (input16 & layer.relu) | (mx & layer.balance))),
            (Error.UNSUPPORTED, (layer.stride != 1) | (layer.resample != 0) | (layer.batch != 1)
                | no_weights | no_sums | no_side
                | (convolve & (layer.scale_byte >= config.port_width // 8)) | reserved.any()),
            (Error.SHAPE, (sizes.plane == 0) | sizes.plane[16:].any() | (layer.channels == 0)
                | (convolve & ((layer.outputs == 0) | sizes.beyond_image
                               | ((layer.kernel != 1) & (layer.kernel != 3))
                               | (mx & (layer.share > layer.tile_width))))),
            (Error.CHANNELS, Mux(convolve, bad_slots, bad_tile | sizes.too_many_channels)),
            (Error.ACTIVATIONS, convolve & sizes.too_many_activations),
            (Error.WEIGHTS, convolve & sizes.too_many_weights),
            (Error.SCALES, convolve & sizes.too_many_scales),
            (Error.WINDOW, beyond | (layer.read_limit < layer.read_base)
                | (layer.write_limit < layer.write_base)),
            (Error.SHIFT, layer.shift[5:].any() | (convolve & layer.align_shift[5:].any())),
            (Error.DETECTOR, requantize & ((layer.interval == 0) | (
                ~mx & (layer.detector + sizes.slots > config.detector_depth)))),
            (Error.PARTIALS, convolve & (layer.accumulate | layer.keep_sums)
                & (sizes.sums > config.partial_depth)),
            (Error.TILES, convolve & Cat(layer.sparse_tiles == tiles for tiles in uneven).any()),
        ]


class Sizes:
    """Sizes that follow from a layer's fields, as registers of the module ``m``.

    They are right `Sequencer.size_cycles` cycles after the last change of the fields: those of a
    convolution for ``channels``, ``outputs`` and a tile that fit the core, and the others always.
    """

    def __init__(self, m, config, layer):
        vector = config.vector
        word_bits, quad_bits = (vector - 1).bit_length(), (config.quad - 1).bit_length()
        input16, convolve = layer.format == Format.IN16, layer.kind == Kind.CONVOLVE
        mx = input16 | (layer.format == Format.MX8)
        derived = {name: Signal(bits, name=f"derived_{name}")
                   for name, bits in derived_sizes(config).items()}
        m.d.comb += [layer[name].eq(value) for name, value in derived.items()]
        self.plane, self.slots, self.sums = Signal(32), Signal(18), Signal(32)
        self.too_many_channels, self.beyond_image = Signal(), Signal()
        self.too_many_activations, self.too_many_weights = Signal(), Signal()
        self.too_many_scales = Signal()

        def whole(value, bits):
            return (value + ((1 << bits) - 1)) >> bits

        def tiles_of(lanes):
            return whole(layer.outputs, (lanes - 1).bit_length())

        # cycle 0
        words, blocks = Signal(14), Signal(12)
        row_end, column_end, pixels = Signal(17), Signal(17), Signal(32)
        m.d.comb += [
            derived["mx"].eq(mx),
            derived["kernel3"].eq(layer.kernel == 3),
            derived["taps"].eq(Mux(derived["kernel3"], 9, 1)),
            derived["plane"].eq(self.plane),
        ]
        m.d.sync += [
            self.plane.eq(layer.height * layer.width),
            words.eq(whole(layer.channels, word_bits) + whole(layer.channels_second, word_bits)),
            blocks.eq(whole(layer.channels, 5)),
            row_end.eq(layer.tile_y + layer.tile_height),
            column_end.eq(layer.tile_x + layer.tile_width),
            pixels.eq(layer.tile_height * layer.tile_width),
            derived["output_words"].eq(whole(layer.outputs, word_bits)),
            derived["chunks"].eq(whole(layer.outputs, quad_bits)),
            derived["dense_tiles"].eq(tiles_of(config.dense_lanes)),
            derived["sparse_tiles"].eq(tiles_of(config.sparse_lanes)),
            derived["slot_pitch"].eq(
                (layer.weight_pitch * derived["taps"])[:20] << layer.mx),
            derived["origin"].eq(layer.tile_y * layer.width + layer.tile_x),
        ]

        # cycle 1
        kernel3 = derived["kernel3"]
        in_end, dense_words, own = Signal(16), Signal(14), derived["sparse_own"]
        block_words = BLOCK // vector
        m.d.sync += [
            self.slots.eq(Mux(input16, blocks << 6, Mux(
                mx & ~convolve, (words + (block_words - 1)) // block_words << 5,
                words << word_bits))),
            derived["input_row"].eq(layer.tile_y - (kernel3 & (layer.tile_y != 0))),
            derived["input_last"].eq(Mux(
                kernel3 & (row_end != layer.height), row_end, row_end - 1)),
            derived["input_column"].eq(layer.tile_x - (kernel3 & (layer.tile_x != 0))),
            in_end.eq(Mux(kernel3 & (column_end != layer.width), column_end + 1, column_end)),
            dense_words.eq(words),
            self.beyond_image.eq((layer.tile_height == 0) | (layer.tile_width == 0)
                                 | (row_end > layer.height) | (column_end > layer.width)),
            self.sums.eq(pixels[:16] * derived["chunks"]),
        ]
        if config.sparse_pes:
            with m.If(~mx & (layer.dense_limit < words)):
                m.d.sync += dense_words.eq(layer.dense_limit)
            with m.Switch(derived["sparse_tiles"]):
                for tiles in range(1 << len(derived["sparse_tiles"])):
                    with m.Case(tiles):
                        m.d.sync += own.eq(max(1, tiles // config.sparse_pes))

        # cycle 2
        rows, dense_taps, sparse_taps = Signal(17), Signal(18), Signal(12)
        entries = Signal(12)
        taps_planes = (derived["taps"] << layer.mx)[:5]
        m.d.comb += derived["slot_words"].eq(self.slots >> word_bits)
        m.d.sync += [
            rows.eq(derived["input_last"] - derived["input_row"] + 1),
            derived["input_width"].eq(in_end - derived["input_column"]),
            dense_taps.eq(taps_planes * dense_words),
            sparse_taps.eq(taps_planes * own),
            entries.eq(whole(self.slots[:12], (config.sparse_rate - 1).bit_length())),
            self.too_many_channels.eq(
                (self.slots > config.max_channels) | layer.channels[15]
                | layer.channels_second[15]),
        ]

        # cycle 3
        area, dense_rows, sparse_rows = Signal(18), Signal(26), Signal(26)
        dense_scales, sparse_scales = Signal(20), Signal(20)
        most = Mux(kernel3, 3, 1)
        m.d.sync += [
            area.eq(Mux(rows < most, rows[:2], most) * derived["input_width"]),
            dense_rows.eq(dense_taps * derived["dense_tiles"]),
            sparse_rows.eq(sparse_taps * self.slots[:12]),
            dense_scales.eq(derived["taps"] * derived["dense_tiles"] * config.dense_steps),
            sparse_scales.eq(derived["taps"] * own * config.sparse_steps),
        ]

        # cycle 4
        activations = (area << layer.mx) > config.record_depth // 2
        weights = scales = Const(0)
        if config.dense_pes:
            activations |= ((area * dense_words) << layer.mx) > config.codes_depth // 2
            weights |= dense_rows > config.weight_depth
            scales |= dense_scales > config.weight_scale_depth
        if config.sparse_pes:
            activations |= ((area * entries) << layer.mx) > config.entry_depth // 2
            weights |= sparse_rows > config.sparse_weight_depth
            scales |= sparse_scales > config.sparse_weight_scale_depth
        m.d.sync += [
            self.too_many_activations.eq(activations), self.too_many_weights.eq(weights),
            self.too_many_scales.eq(scales),
        ]
