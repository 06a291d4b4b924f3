"""The sequencer: fetches a descriptor, checks it and runs its pass."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .descriptor import FIELDS, VERSION, WORDS, Error, Format, Kind
from .layer import layer_layout
from .memory_port import ReadPort

__all__ = ["Sequencer"]

ADDRESSES = ("source", "source_second", "scales", "permutation", "counts", "table", "weights",
             "weight_scales", "residual_source", "destination", "read_base", "write_base")
LIMITS = ("read_limit", "write_limit")


class Sequencer(wiring.Component):
    """Runs one pass from one descriptor.

    A descriptor that breaks a rule ends the pass with an `Error` before anything but the
    descriptor itself was read and anything was written. An access outside the windows or a strange
    permutation is reported at the end.

    Members
    -------
    start : ``In(1)``
        Begin; ignored while busy.
    address : ``In``
        Of the descriptor.
    busy, done : ``Out(1)``
        A pass is running; the last one has ended.
    error : ``Out(8)``
        `Error` of the last pass.
    read : ``Out(ReadPort)``
        Fetches the descriptor.
    layer : ``Out``
        See `layer_layout`; stable from ``checked`` to ``done``.
    fetching, checked : ``Out(1)``
        The memory port belongs to the sequencer; the windows of ``layer`` hold.
    requantize, convolve : ``Out(1)``
        High for one cycle: begin that pass.
    finished : ``In(1)``
        The pass has come to its end.
    refused : ``In(1)``
        High for one cycle: the permutation is not one of this layer; ``finished`` follows.
    violation : ``In(1)``
        An access lay outside its window.
    settled : ``In(1)``
        No write is on its way.
    """

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
            "fetching": Out(1),
            "checked": Out(1),
            "requantize": Out(1),
            "convolve": Out(1),
            "finished": In(1),
            "refused": In(1),
            "violation": In(1),
            "settled": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, layer = self.config, self.layer
        words = WORDS * 32 // config.port_width
        raw = Signal(WORDS * 32)
        asked, got = Signal(range(words + 1)), Signal(range(words + 1))
        for name, (word, low, bits, _) in FIELDS.items():
            at = word * 32 + low
            m.d.comb += layer[name].eq(raw[at:at + bits])
        named = [False] * WORDS * 32
        for word, low, bits, _ in FIELDS.values():
            at = word * 32 + low
            named[at:at + bits] = [True] * bits
        reserved = Cat(raw[bit] for bit in range(WORDS * 32) if not named[bit])

        request, response = self.read.request, self.read.response
        m.d.comb += [
            request.valid.eq(self.fetching & (asked != words)),
            request.payload.eq(self.address + asked),
            response.ready.eq(self.fetching),
        ]

        # sizes, each a register of its own: they have `size_cycles` cycles to settle
        size_cycles = 4
        sizes = Sizes(m, config, layer)

        code = Signal(8)
        rules = self.rules(layer, sizes, reserved)
        with m.If(0):
            pass
        for error, broken in rules:
            with m.Elif(broken):
                m.d.comb += code.eq(error)

        wait = Signal(range(size_cycles + 1))
        with m.FSM(name="pass"):
            with m.State("Idle"):
                with m.If(self.start):
                    m.d.sync += [self.done.eq(0), self.error.eq(0), asked.eq(0), got.eq(0)]
                    m.next = "Fetch"
            with m.State("Fetch"):
                m.d.comb += [self.busy.eq(1), self.fetching.eq(1)]
                with m.If(request.valid & request.ready):
                    m.d.sync += asked.eq(asked + 1)
                with m.If(response.valid):
                    m.d.sync += [
                        raw.eq(Cat(raw[config.port_width:], response.payload)), got.eq(got + 1)]
                    with m.If(got + 1 == words):
                        m.d.sync += wait.eq(size_cycles)
                        m.next = "Size"
            with m.State("Size"):
                m.d.comb += self.busy.eq(1)
                m.d.sync += wait.eq(wait - 1)
                with m.If(wait == 0):
                    m.next = "Check"
            with m.State("Check"):
                m.d.comb += self.busy.eq(1)
                with m.If(code != 0):
                    m.d.sync += [self.error.eq(code), self.done.eq(1)]
                    m.next = "Idle"
                with m.Else():
                    m.next = "Begin"
            with m.State("Begin"):
                m.d.comb += [
                    self.busy.eq(1), self.checked.eq(1),
                    self.requantize.eq(layer.kind == Kind.REQUANTIZE),
                    self.convolve.eq(layer.kind == Kind.CONVOLVE),
                ]
                m.next = "Run"
            with m.State("Run"):
                m.d.comb += [self.busy.eq(1), self.checked.eq(1)]
                with m.If(self.violation):
                    m.d.sync += self.error.eq(Error.ACCESS)
                with m.If(self.refused):
                    m.d.sync += self.error.eq(Error.PERMUTATION)
                with m.If(self.finished & self.settled):
                    m.d.sync += self.done.eq(1)
                    m.next = "Idle"
        return m

    def rules(self, layer, sizes, reserved):
        """Pairs of an `Error` and the condition that raises it, the first one that holds counts."""
        config, vector = self.config, self.config.vector
        convolve = layer.kind == Kind.CONVOLVE
        a4 = (layer.format == Format.A4U) | (layer.format == Format.A4S)
        input16 = layer.format == Format.IN16
        group = Mux(a4, 0, Mux(input16, vector, 32))
        beyond = Cat(
            *(layer[name][config.address_width:].any() for name in ADDRESSES),
            *(layer[name] > 1 << config.address_width for name in LIMITS)).any()
        return [
            (Error.VERSION, layer.version != VERSION),
            (Error.KIND, (layer.kind != Kind.REQUANTIZE) & ~convolve),
            (Error.VECTOR, layer.vector != vector),
            (Error.FORMAT, (layer.format > Format.IN16) | (layer.group != group)
                | (input16 & ((layer.channels_second != 0) | (layer.channels > vector)))
                | Mux(convolve, layer.relu,
                      layer.residual | ((layer.format == Format.A4U) & ~layer.relu)
                      | (input16 & layer.relu))),
            (Error.UNSUPPORTED, (layer.stride != 1) | (layer.resample != 0) | (layer.batch != 1)
                | layer.accumulate | (layer.tile_y != 0) | (layer.tile_x != 0)
                | (layer.halo != 0) | reserved.any()),
            (Error.SHAPE, (sizes.plane == 0) | sizes.plane[16:].any() | (layer.channels == 0)
                | (convolve & ((layer.outputs == 0)
                               | ((layer.kernel != 1) & (layer.kernel != 3))))),
            (Error.CHANNELS, sizes.too_many_channels
                | (convolve & (layer.outputs > config.max_outputs))),
            (Error.ACTIVATIONS, convolve & (sizes.codes > config.activation_depth)),
            (Error.WEIGHTS, convolve & sizes.too_many_weights),
            (Error.SCALES, convolve & sizes.too_many_scales),
            (Error.WINDOW, beyond | (layer.read_limit < layer.read_base)
                | (layer.write_limit < layer.write_base)),
            (Error.SHIFT, layer.shift[5:].any() | (convolve & layer.align_shift[5:].any())),
            (Error.DETECTOR, ~convolve & ((layer.interval == 0) | (
                a4 & (layer.detector + sizes.slots > config.detector_depth)))),
        ]


class Sizes:
    """Sizes that follow from a layer's fields, as registers of the module ``m``.

    They are right four cycles after the last change of the fields.
    """

    def __init__(self, m, config, layer):
        vector = config.vector
        word_bits = (vector - 1).bit_length()
        input16 = layer.format == Format.IN16
        mx = input16 | (layer.format == Format.MX8)
        self.plane = plane = Signal(32)
        self.slots = slots = Signal(18)
        self.codes = codes = Signal(36)
        self.too_many_channels, self.too_many_weights = Signal(), Signal()
        self.too_many_scales = Signal()
        words, output_words, taps = Signal(14), Signal(14), Signal(4)
        groups, tap_words, planes_words = Signal(14), Signal(18), Signal(20)
        rows, scale_rows, scales = Signal(32), Signal(32), Signal(36)

        def whole(channels):
            return (channels + (vector - 1)) >> word_bits

        m.d.comb += [
            layer.plane.eq(plane), layer.slot_words.eq(words), layer.output_words.eq(output_words),
            layer.mx.eq(mx),
        ]
        m.d.sync += [
            # cycle 0
            plane.eq(layer.height * layer.width),
            words.eq(Mux(input16, 2, whole(layer.channels) + whole(layer.channels_second))),
            output_words.eq(whole(layer.outputs)),
            taps.eq(Mux(layer.kernel == 3, 9, 1)),
            # cycle 1
            slots.eq(words << word_bits),
            groups.eq(Mux(input16, 2, Mux(mx, ((words << word_bits) + 31) >> 5, 1))),
            codes.eq((words * plane[:20]) << mx),
            tap_words.eq(taps * output_words),
            planes_words.eq((taps * words) << mx),
            # cycle 2
            scales.eq(groups * plane[:20]),
            rows.eq(planes_words * output_words),
            scale_rows.eq(tap_words * groups),
            self.too_many_channels.eq(
                (slots > config.max_channels) | (layer.channels[15]) | (layer.channels_second[15])),
        ]
        # cycle 3
        dense_rows = rows << (vector // config.dense_lanes).bit_length() - 1
        dense_scale_rows = scale_rows << (vector // config.dense_scale_units).bit_length() - 1
        broken = dense_rows > config.weight_depth
        long = (scales > config.scale_depth) | (dense_scale_rows > config.weight_scale_depth)
        if config.sparse_pes:
            columns = config.sparse_lanes // vector
            tiles = (output_words + (columns - 1)) >> columns.bit_length() - 1
            sparse_rows = Signal(36)
            m.d.sync += sparse_rows.eq((slots * taps) * tiles)
            broken |= ~mx & (sparse_rows > config.sparse_weight_depth)
            long |= ~mx & ((scale_rows << (vector // config.sparse_scale_units).bit_length() - 1)
                           > config.weight_scale_depth)
        m.d.sync += [self.too_many_weights.eq(broken), self.too_many_scales.eq(long)]
