"""The dense PE: V-wide dot products for K output channels, W4A4 and MXINT8."""

from amaranth import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .buffer import Buffer
from .drain import Drain, Throttle, delay, drive_unit, flush_chunks, group_layout, lanes_of_unit
from .mapper import WeightMapper
from .operands import Operands, Results, load_layout, scale_words, wire_load
from .parts import place
from .scale_unit import ScaleUnit, chunk_layout, connect_unit, unit_members
from .window import Window, geometry_layout

__all__ = ["DenseGroup", "DensePE"]


class DenseGroup(wiring.Component):
    """Dot products for the output channels that share a scale unit.

    A product word enters with ``valid``; `latency` = 3 cycles later the sums hold its dot products.
    `Drain`'s cycle C is the one before, when the word is the last of its group.

    Members
    -------
    valid, first : ``In(1)``
        A word, and whether it is the first of its group.
    activations : ``In(4 * V)``
        Nibbles; signed with ``activations_signed``.
    weights : ``In(4 * V * lanes)``
        Nibbles, ``[lane][channel]``; signed with ``weights_signed``.
    weight : ``In(2)``
        The dot products count 16 to this power.
    load, step, lane, bank, first_add, scale, weight_scale, mx, flush_lane, flush_bank, flush_sum
        The members of `ScaleUnit` but for its sums.
    """

    latency = 3

    def __init__(self, config, lanes):
        self.config, self.lanes = config, lanes
        super().__init__({
            "valid": In(1),
            "first": In(1),
            "activations": In(4 * config.vector),
            "activations_signed": In(1),
            "weights": In(4 * config.vector * lanes),
            "weights_signed": In(1),
            "weight": In(2),
            **unit_members(config, lanes),
        })

    def elaborate(self, platform):
        m = Module()
        vector, lanes = self.config.vector, self.lanes
        m.submodules.scale_unit = unit = ScaleUnit(self.config, lanes)

        # cycle 0: copies of the operands next to their multipliers
        activations, weights = Signal.like(self.activations), Signal.like(self.weights)
        signs = Signal(2)
        m.d.sync += [
            activations.eq(self.activations), weights.eq(self.weights),
            signs.eq(Cat(self.activations_signed, self.weights_signed)),
        ]
        valid = delay(m, self.valid, 2, "valid")
        first = delay(m, self.first, 2, "first")
        weight = delay(m, self.weight, 2, "weight")

        def nibble(word, number, sign):
            bits = word.word_select(number, 4)
            return Cat(bits, bits[3] & sign).as_signed()

        for lane in range(lanes):
            # cycle 1: sums of four products; cycle 2: their sum joins the group's
            quarters = []
            for base in range(0, vector, 4):
                quarter = Signal(signed(12), name=f"quarter_{lane}_{base // 4}")
                m.d.sync += quarter.eq(sum(
                    nibble(activations, n, signs[0]) * nibble(weights, lane * vector + n, signs[1])
                    for n in range(base, base + 4)))
                quarters.append(quarter)
            total = Signal(signed(self.config.sum_width), name=f"sum_{lane}")
            dot = Signal(signed(16), name=f"dot_{lane}")
            shifted = Signal(signed(self.config.sum_width), name=f"shifted_{lane}")
            m.d.comb += [dot.eq(sum(quarters)), unit.sums[lane].eq(total)]
            with m.Switch(weight):
                for power in range(3):
                    with m.Case(power):
                        m.d.comb += shifted.eq(dot << 4 * power)
            with m.If(valid):
                m.d.sync += total.eq(Mux(first, 0, total) + shifted)

        connect_unit(m, self, unit)
        return m


class DensePE(wiring.Component):
    """Convolves the dense channels: a word of V channels times K output channels a cycle.

    MX formats take four cycles a word, one for each pair of nibbles. A group of scales takes at
    least K / dense_scale_units cycles. Results leave in the order of `Window`, V/4 outputs at a
    time. Operands must be loaded before ``start``.

    Members
    -------
    geometry : ``In``
        See `geometry_layout`; ``words`` counts the dense ones.
    start : ``In(1)``
        Begin; ignored by nothing, so the PE must be idle.
    load_codes, load_scales, load_weights, load_weight_scales : ``In``
        Writes of the buffers (``enable``, ``address``, ``data``); ``load_weights.enable`` has a
        bit for each channel of a word.
    o : ``Out(stream)``
        See `chunk_layout`.
    busy, work, starved : ``Out(1)``
        Work is left; a word is multiplied in this cycle; it waits for room for results.
    """

    def __init__(self, config):
        self.config = config
        self.lanes = lanes_of_unit(config.dense_lanes, config.dense_scale_units)
        self.parts = {"dense_group": DenseGroup(config, self.lanes)}
        super().__init__({
            "geometry": In(geometry_layout(config)),
            "start": In(1),
            "load_codes": In(load_layout(1, config.activation_depth, config.port_width)),
            "load_scales": In(load_layout(1, scale_words(config), config.port_width)),
            "load_weights": In(load_layout(
                config.vector, config.weight_depth, 4 * config.dense_lanes)),
            "load_weight_scales": In(load_layout(
                1, config.weight_scale_depth, 8 * config.dense_scale_units)),
            "o": Out(stream.Signature(chunk_layout(config))),
            "busy": Out(1),
            "work": Out(1),
            "starved": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, geometry = self.config, self.geometry
        lanes, units, vector = config.dense_lanes, config.dense_scale_units, config.vector
        m.submodules.window = window = Window(config, lanes=lanes, step=1)
        m.submodules.throttle = throttle = Throttle(config, lanes=lanes, units=units)
        m.submodules.drain = drain = Drain(
            config, lanes=lanes, units=units, scale_depth=config.weight_scale_depth)
        m.submodules.operands = operands = Operands(config)
        m.submodules.weights = weights = Buffer(
            config.weight_depth, 4 * lanes * vector, columns=vector)
        m.submodules.weight_scales = weight_scales = Buffer(
            config.weight_scale_depth, 8 * units)
        m.d.comb += wire_load(self.load_weight_scales, weight_scales)
        m.d.comb += [
            weights.write.eq(self.load_weights.enable),
            weights.write_address.eq(self.load_weights.address),
            weights.write_data.eq(self.load_weights.data.replicate(vector)),
            operands.load_codes.eq(self.load_codes),
            operands.load_scales.eq(self.load_scales),
        ]
        tap = window.o.payload
        m.d.comb += [window.geometry.eq(geometry), window.start.eq(self.start)]

        # issue: the words of the groups of a tap, four nibble passes each for MX formats
        word, group_word, group, passes = (
            Signal.like(geometry.words), Signal(2), Signal.like(geometry.groups), Signal(2))
        word_rows = Signal(16)      # of the words before this one
        tiles, tap_rows, plane_rows = Signal(10), Signal(16), Signal(16)
        m.d.sync += [    # constant while the PE runs
            tiles.eq(geometry.output_words << (vector // lanes).bit_length() - 1),
            plane_rows.eq(geometry.words * tiles),
            tap_rows.eq(plane_rows << geometry.mx),
        ]
        last_word, last_pass = Signal(), Signal()
        m.d.comb += [
            last_word.eq(word + 1 == geometry.words),
            last_pass.eq(~geometry.mx | (passes == 3)),
            throttle.group_last.eq(last_pass & (last_word | (
                geometry.mx & (group_word + 1 == geometry.group_words)))),
            throttle.tile_last.eq(last_pass & last_word & tap.last),
            throttle.chunks.eq(tap.chunks),
            throttle.issue.eq(window.o.valid & throttle.allowed),
            window.o.ready.eq(throttle.allowed & last_pass & last_word),
            self.busy.eq(window.o.valid),
            self.work.eq(throttle.issue),
            self.starved.eq(window.o.valid & throttle.starved),
        ]
        with m.If(throttle.issue):
            m.d.sync += passes.eq(passes + geometry.mx)
            with m.If(last_pass):
                m.d.sync += [
                    word.eq(word + 1), word_rows.eq(word_rows + tiles),
                    group_word.eq(group_word + 1)]
                with m.If(throttle.group_last):
                    m.d.sync += [group.eq(group + 1), group_word.eq(0)]
                with m.If(last_word):
                    m.d.sync += [word.eq(0), word_rows.eq(0), group.eq(0), group_word.eq(0)]

        # cycle 1: addresses; cycle 3: operands
        m.submodules.weight_mapper = weight_mapper = WeightMapper(config)
        request = Signal()
        weight_row, scale_row = Signal(16), Signal(16)
        group_row = Signal(8)
        m.d.comb += [
            operands.issue.eq(throttle.issue),
            operands.word.eq(word),
            operands.pixel.eq(tap.pixel),
            operands.group.eq(group),
            operands.sub.eq(passes[1]),
            operands.geometry.eq(geometry),
            weight_mapper.slot.eq(tap.tap),
            weight_mapper.row_words.eq(tap_rows),
            weight_mapper.offset.eq(word_rows + Mux(passes[0], plane_rows, 0) + tap.tile),
            weights.request.eq(request),
            weights.address.eq(weight_row),
        ]
        steps_of_output = vector // units
        first_group, tile_step = Signal(init=1), Signal(16)
        m.d.sync += [
            request.eq(throttle.issue),
            weight_row.eq(weight_mapper.address),
            # weight scales lie as [tap][group][step of all tiles]
            group_row.eq(tap.tap * geometry.groups + group),
            tile_step.eq(tap.tile * self.lanes),
            scale_row.eq(group_row * (geometry.output_words * steps_of_output) + tile_step),
        ]
        with m.If(throttle.issue & throttle.group_last):
            m.d.sync += first_group.eq(tap.last & last_word)

        # cycle 3: to the groups; cycle C = 5: the drain
        token_layout = data.StructLayout({
            "first": 1, "weight": 2, "a_signed": 1, "w_signed": 1})
        token = Signal(token_layout)
        m.d.comb += [
            token.first.eq((group_word == 0) & (passes == 0)
                           & (geometry.mx | (word == 0))),
            token.weight.eq(passes[0] + passes[1]),
            token.a_signed.eq(Mux(geometry.mx, passes[1], geometry.signed_codes)),
            token.w_signed.eq(~geometry.mx | passes[0]),
        ]
        arriving = Signal(token_layout)
        m.d.comb += arriving.eq(delay(m, token.as_value(), 3, "token"))
        end_layout = group_layout(config, lanes, config.weight_scale_depth)
        end = Signal(end_layout)
        m.d.comb += [
            end.first.eq(first_group), end.last.eq(tap.last & last_word),
            end.chunks.eq(tap.chunks),
        ]
        ends = delay(m, throttle.issue & throttle.group_last, 5, "ends")
        ended = Signal(end_layout)
        m.d.comb += [
            ended.eq(delay(m, end.as_value(), 5, "end")),
            drain.group_valid.eq(ends),
            drain.group.eq(ended),
            drain.group.row.eq(delay(m, scale_row, 3, "scale_row")),
            drain.group.scale.eq(delay(m, operands.scale.as_value(), 2, "scale")),
            weight_scales.request.eq(drain.scale_request),
            weight_scales.address.eq(drain.scale_row),
        ]

        groups = []
        for unit in range(units):
            part = place(m, f"group_{unit}", "dense_group", self.parts["dense_group"])
            own = range(unit, lanes, units)
            m.d.comb += [
                part.valid.eq(operands.valid),
                part.first.eq(arriving.first),
                part.activations.eq(operands.codes),
                part.activations_signed.eq(arriving.a_signed),
                part.weights.eq(Cat(
                    weights.data.word_select(channel * lanes + lane, 4)
                    for lane in own for channel in range(vector))),
                part.weights_signed.eq(arriving.w_signed),
                part.weight.eq(arriving.weight),
                part.weight_scale.eq(weight_scales.data.word_select(unit, 8)),
                part.mx.eq(geometry.mx),
            ]
            drive_unit(m, drain, part)
            groups.append(part)
        m.submodules.results = results = Results(config)
        flush_chunks(m, config, drain, groups, units, results.chunk, results.push)
        m.d.comb += throttle.popped.eq(results.popped)
        wiring.connect(m, results.o, wiring.flipped(self.o))
        return m
