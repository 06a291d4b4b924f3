"""The sparse PE: every cycle up to M non-zero activations, each times L output channels."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .buffer import Buffer, WideBuffer
from .drain import Drain, Results, connect_drain, delay
from .issue import ISSUE_CYCLES, Issue
from .job import entry_layout, geometry_layout, load_layout, record_layout
from .lanes import SparseCodes, SparseGroup
from .parts import place
from .scale_unit import ScaleUnit, chunk_layout
from .window import SETUP_CYCLES, Window

__all__ = ["FIRST_CHUNK", "FIRST_ISSUE", "OPERAND_CYCLES", "SparsePE"]

FIRST_ISSUE = SETUP_CYCLES + 1 + ISSUE_CYCLES
"""Cycle of the first issue, besides one for each sparse PE; ``start`` is in cycle 0."""

OPERAND_CYCLES = 2 * Buffer.latency
"""Cycles from an issue to its operands at the lanes: the entry, then its rows of weights."""

FIRST_CHUNK = OPERAND_CYCLES + SparseGroup.latency + ScaleUnit.latency + Results.latency
"""Cycles from the last issue of a unit to its first chunk at ``o``, besides `hw.drain.steps`."""


class SparsePE(wiring.Component):
    """Convolves the sparse side's part of a run for every n-th unit of work.

    Gathers: for each output pixel, tile of lanes and tap it reads the entries of the input pixel,
    and each of an entry's M non-zeros meets the weights of L output channels in one cycle. Zeros
    take no cycle, nor do taps outside the image. `Window` gives the order of units, `Issue` says
    when an entry is issued.

    Members
    -------
    geometry : ``In``
        See `hw.job.geometry_layout`; stable from ``start`` until the last chunk has been taken.
    index : ``In``
        Number of this PE.
    start : ``In(1)``
        Begin a run; every result of the one before has been taken.
    load_entries, load_records, load_weights, load_weight_scales : ``In``
        Writes of the buffers. ``load_weights.enable`` has a bit for each V output channels;
        ``load_weight_scales.enable`` one for each port word. Weight scales are decoded.
    o : ``Out(stream)``
        See `hw.scale_unit.chunk_layout`.
    busy : ``Out(1)``
        From the cycle after ``start`` of an active side until the last issue.
    work : ``Out(range(M + 1))``
        Non-zeros of the entry that was issued `Buffer.latency` cycles before.
    starved : ``Out(1)``
        The last issue of a unit waits for room for its results.
    """

    def __init__(self, config):
        self.config = config
        self.lanes = config.sparse_steps     # of a group
        self.parts = {"sparse_group": SparseGroup(config, self.lanes)}
        scale_bits = 8 * config.sparse_scale_units
        super().__init__({
            "geometry": In(geometry_layout(config)),
            "index": In(range(max(2, config.sparse_pes))),
            "start": In(1),
            "load_entries": In(load_layout(1, config.entry_depth, entry_layout(config).size)),
            "load_records": In(load_layout(
                1, config.record_depth, record_layout(config, "sparse").size)),
            "load_weights": In(load_layout(
                config.sparse_lanes // config.vector, config.sparse_weight_depth,
                config.port_width)),
            "load_weight_scales": In(load_layout(
                max(1, scale_bits // config.port_width), config.weight_scale_depth,
                min(scale_bits, config.port_width))),
            "o": Out(stream.Signature(chunk_layout(config))),
            "busy": Out(1),
            "work": Out(range(config.sparse_rate + 1)),
            "starved": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, rate = self.config, self.config.sparse_rate
        lanes, units = config.sparse_lanes, config.sparse_scale_units
        columns, scale_columns = lanes // config.vector, len(self.load_weight_scales.enable)
        m.submodules.window = window = Window(config, side="sparse")
        m.submodules.issue = issue = Issue(config, side="sparse")
        m.submodules.entries = entries = Buffer(config.entry_depth, entry_layout(config).size)
        m.submodules.weight_scales = weight_scales = WideBuffer(
            config.weight_scale_depth, 8 * units, columns=scale_columns)
        m.submodules.codes = codes = SparseCodes(config)
        m.submodules.drain = drain = Drain(config, "sparse")
        m.submodules.results = results = Results(config, "sparse")
        wiring.connect(m, window.o, issue.i)
        wiring.connect(m, results.o, wiring.flipped(self.o))
        m.d.comb += [
            window.geometry.eq(self.geometry), issue.geometry.eq(self.geometry),
            window.index.eq(self.index), window.start.eq(self.start),
            issue.load_records.eq(self.load_records),
            issue.returned.eq(results.returned),
            self.busy.eq(window.busy | issue.busy),
            self.starved.eq(issue.starved),
            entries.write.eq(self.load_entries.enable),
            entries.write_address.eq(self.load_entries.address),
            entries.write_data.eq(self.load_entries.data),
            entries.request.eq(issue.fire),
            entries.address.eq(issue.product.address),
            weight_scales.write.eq(self.load_weight_scales.enable),
            weight_scales.write_address.eq(self.load_weight_scales.address),
            weight_scales.write_data.eq(self.load_weight_scales.data.replicate(scale_columns)),
            weight_scales.request.eq(drain.scale_request),
            weight_scales.address.eq(drain.scale_row),
        ]

        # cycle 2: the entry is here; each of its non-zeros reads its row of weights
        product = issue.product
        there = Signal(data.StructLayout({"row": product.row.shape(), "empty": 1, "masked": 1}))
        m.d.comb += there.eq(delay(
            m, Cat(product.row, product.empty, product.masked), Buffer.latency, "entry"))
        found = Signal(entry_layout(config))
        counted, filled = Signal(rate), Signal(rate)
        m.d.comb += [
            found.eq(entries.data),
            counted.eq(Cat(
                ~there.empty & ~(there.masked & (found[k].position < self.geometry.high))
                for k in range(rate))),
            filled.eq(Cat(
                (found[k].code != 0) & counted[k] & entries.response for k in range(rate))),
            self.work.eq(sum(filled[k] for k in range(rate))),
        ]
        copies = []
        for k in range(rate):
            m.submodules[f"weights_{k}"] = weights = WideBuffer(
                config.sparse_weight_depth, 4 * lanes, columns=columns)
            m.d.comb += [
                weights.write.eq(self.load_weights.enable),
                weights.write_address.eq(self.load_weights.address),
                weights.write_data.eq(self.load_weights.data.replicate(columns)),
                weights.request.eq(entries.response),
                weights.address.eq(there.row + found[k].position),
            ]
            copies.append(weights.data)
            # cycle 3: the codes; cycle 4: codes and weights
            code = Signal(4, name=f"code_{k}")
            m.d.sync += code.eq(Mux(counted[k], found[k].code, 0))
            m.d.comb += codes.codes[k].eq(code)

        signs = Cat(product.codes_signed, product.weights_signed)
        early = delay(m, signs, OPERAND_CYCLES - SparseCodes.latency, "signs")
        m.d.comb += Cat(codes.codes_signed, codes.weights_signed).eq(early)
        valid = delay(m, issue.fire, OPERAND_CYCLES, "fired")
        first = delay(m, product.first, OPERAND_CYCLES, "first")
        to_drain = OPERAND_CYCLES + SparseGroup.latency - Drain.lead
        m.d.comb += [
            drain.group_valid.eq(delay(m, issue.ends, to_drain, "ends")),
            drain.group.eq(delay(m, issue.group.as_value(), to_drain, "group")),
        ]
        groups = []
        for unit in range(units):
            part = place(m, f"group_{unit}", "sparse_group", self.parts["sparse_group"])
            m.d.comb += [
                part.valid.eq(valid),
                part.first.eq(first),
                part.plain.eq(codes.plain),
                part.negated.eq(codes.negated),
                part.weights.eq(Cat(
                    copy.word_select(lane, 4)
                    for lane in range(unit, lanes, units) for copy in copies)),
            ]
            groups.append(part)
        connect_drain(m, drain, results, groups, weight_scales.data)
        return m
