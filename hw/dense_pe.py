"""The dense PE: V-wide dot products for K output channels every cycle."""

from amaranth import Cat, Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from .buffer import Buffer, WideBuffer
from .drain import Drain, Results, connect_drain, delay
from .issue import ISSUE_CYCLES, Issue
from .job import geometry_layout, load_layout, record_layout
from .lanes import DenseGroup, extend_codes
from .parts import place
from .scale_unit import ScaleUnit, chunk_layout
from .window import SETUP_CYCLES, Window

__all__ = ["FIRST_CHUNK", "FIRST_ISSUE", "OPERAND_CYCLES", "DensePE"]

FIRST_ISSUE = SETUP_CYCLES + 1 + ISSUE_CYCLES
"""Cycle of the first issue, besides one for each dense PE; ``start`` is in cycle 0."""

OPERAND_CYCLES = Buffer.latency
"""Cycles from an issue to its operands at the lanes: a word of codes and a row of weights."""

FIRST_CHUNK = OPERAND_CYCLES + DenseGroup.latency + ScaleUnit.latency + Results.latency
"""Cycles from the last issue of a unit to its first chunk at ``o``, besides `hw.drain.steps`."""


class DensePE(wiring.Component):
    """Convolves the dense side's part of a run for every n-th unit of work.

    A word of V codes times K output channels in one cycle, zeros or not. `Window` gives the order
    of units, `Issue` says when a word is issued.

    Members
    -------
    geometry : ``In``
        See `hw.job.geometry_layout`; stable from ``start`` until the last chunk has been taken.
    index : ``In``
        Number of this PE.
    start : ``In(1)``
        Begin a run; every result of the one before has been taken.
    load_codes, load_records, load_weights, load_weight_scales : ``In``
        Writes of the buffers. ``load_weights.enable`` has a bit for each channel of a word;
        ``load_weight_scales.enable`` one for each port word. Weight scales are decoded.
    o : ``Out(stream)``
        See `hw.scale_unit.chunk_layout`.
    busy : ``Out(1)``
        From the cycle after ``start`` of an active side until the last issue.
    work : ``Out(1)``
        A word is issued.
    starved : ``Out(1)``
        The last issue of a unit waits for room for its results.
    """

    def __init__(self, config):
        self.config = config
        self.lanes = config.dense_steps      # of a group
        self.parts = {"dense_group": DenseGroup(config, self.lanes)}
        scale_bits = 8 * config.dense_scale_units
        super().__init__({
            "geometry": In(geometry_layout(config)),
            "index": In(range(max(2, config.dense_pes))),
            "start": In(1),
            "load_codes": In(load_layout(1, config.codes_depth, config.port_width)),
            "load_records": In(load_layout(
                1, config.record_depth, record_layout(config, "dense").size)),
            "load_weights": In(load_layout(
                config.vector, config.weight_depth, 4 * config.dense_lanes)),
            "load_weight_scales": In(load_layout(
                max(1, scale_bits // config.port_width), config.weight_scale_depth,
                min(scale_bits, config.port_width))),
            "o": Out(stream.Signature(chunk_layout(config))),
            "busy": Out(1),
            "work": Out(1),
            "starved": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, vector = self.config, self.config.vector
        lanes, units = config.dense_lanes, config.dense_scale_units
        scale_columns = len(self.load_weight_scales.enable)
        m.submodules.window = window = Window(config, side="dense")
        m.submodules.issue = issue = Issue(config, side="dense")
        m.submodules.codes = codes = WideBuffer(config.codes_depth, config.port_width)
        m.submodules.weights = weights = WideBuffer(
            config.weight_depth, 4 * lanes * vector, columns=vector)
        m.submodules.weight_scales = weight_scales = WideBuffer(
            config.weight_scale_depth, 8 * units, columns=scale_columns)
        m.submodules.drain = drain = Drain(config, "dense")
        m.submodules.results = results = Results(config, "dense")
        wiring.connect(m, window.o, issue.i)
        wiring.connect(m, results.o, wiring.flipped(self.o))
        product = issue.product
        m.d.comb += [
            window.geometry.eq(self.geometry), issue.geometry.eq(self.geometry),
            window.index.eq(self.index), window.start.eq(self.start),
            issue.load_records.eq(self.load_records),
            issue.returned.eq(results.returned),
            self.busy.eq(window.busy | issue.busy),
            self.work.eq(issue.fire & ~product.empty),
            self.starved.eq(issue.starved),
            codes.write.eq(self.load_codes.enable),
            codes.write_address.eq(self.load_codes.address),
            codes.write_data.eq(self.load_codes.data),
            codes.request.eq(issue.fire),
            codes.address.eq(product.address),
            weights.write.eq(self.load_weights.enable),
            weights.write_address.eq(self.load_weights.address),
            weights.write_data.eq(self.load_weights.data.replicate(vector)),
            weights.request.eq(issue.fire),
            weights.address.eq(product.row),
            weight_scales.write.eq(self.load_weight_scales.enable),
            weight_scales.write_address.eq(self.load_weight_scales.address),
            weight_scales.write_data.eq(self.load_weight_scales.data.replicate(scale_columns)),
            weight_scales.request.eq(drain.scale_request),
            weight_scales.address.eq(drain.scale_row),
        ]

        # cycle 2: codes and weights; the sums of an empty group count for nothing, for its
        # scale is zero
        valid = delay(m, issue.fire, OPERAND_CYCLES, "fired")
        first = delay(m, product.first, OPERAND_CYCLES, "first")
        codes_signed = delay(m, product.codes_signed, OPERAND_CYCLES, "codes_signed")
        weights_signed = delay(m, product.weights_signed, OPERAND_CYCLES, "weights_signed")
        to_drain = OPERAND_CYCLES + DenseGroup.latency - Drain.lead
        m.d.comb += [
            drain.group_valid.eq(delay(m, issue.ends, to_drain, "ends")),
            drain.group.eq(delay(m, issue.group.as_value(), to_drain, "group")),
        ]
        groups = []
        for unit in range(units):
            part = place(m, f"group_{unit}", "dense_group", self.parts["dense_group"])
            m.d.comb += [
                part.valid.eq(valid),
                part.first.eq(first),
                part.codes.eq(extend_codes(codes.data, codes_signed)),
                part.weights.eq(Cat(
                    weights.data.word_select(channel * lanes + lane, 4)
                    for lane in range(unit, lanes, units) for channel in range(vector))),
                part.weights_signed.eq(weights_signed),
            ]
            groups.append(part)
        connect_drain(m, drain, results, groups, weight_scales.data)
        return m
