"""What the PEs of both sides have in common: units of work in, chunks of sums out."""

from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from .buffer import WideBuffer
from .drain import (
    Drain, Results, connect_drain, delay, lanes_of, scale_rows_of, steps, units_of)
from .issue import ISSUE_CYCLES, Issue
from .job import geometry_layout, load_layout, record_layout, weight_scale_columns
from .parts import place
from .scale_unit import ScaleUnit, chunk_layout
from .window import SETUP_CYCLES, Window

__all__ = ["FIRST_ISSUE", "PE", "first_chunk"]

FIRST_ISSUE = SETUP_CYCLES + 1 + ISSUE_CYCLES
"""Cycle of a PE's first issue, besides one for each PE of its side; ``start`` is in cycle 0."""


def first_chunk(config, pe):
    """Cycles from the last issue of a unit to its first chunk at ``o``, for a subclass of `PE`."""
    return (pe.operand_cycles + pe.group.latency + steps(config, pe.side) + ScaleUnit.latency
            + Results.latency)


class PE(wiring.Component):
    """A PE without its operands: convolves its side's part of a run for every n-th unit of work.

    `Window` gives the order of units, `Issue` says when a product is issued; a subclass brings its
    operands to the lanes `operand_cycles` later; `Drain` and `Results` follow the lanes.

    Class attributes
    ----------------
    side : "dense" or "sparse"
    group : the lanes that share a scale unit, of `hw.lanes`
    operand_cycles : from an issue to its operands at the lanes

    Parameters
    ----------
    members : dict
        Members of the subclass: its operands' loads and ``work``.

    Members
    -------
    geometry : ``In``
        See `hw.job.geometry_layout`; stable from ``start`` until the last chunk has been taken.
    index : ``In``
        Number of this PE among those of its side.
    start : ``In(1)``
        Begin a run; every result of the one before has been taken.
    load_records, load_weight_scales : ``In``
        Writes of the buffers. ``load_weight_scales.enable`` has a bit for each port word; weight
        scales are decoded.
    o : ``Out(stream)``
        See `hw.scale_unit.chunk_layout`.
    busy : ``Out(1)``
        From the cycle after ``start`` of an active side until the last issue.
    starved : ``Out(1)``
        The last issue of a unit waits for room for its results.
    """

    def __init__(self, config, members):
        self.config = config
        self.lanes = steps(config, self.side)     # of a group
        self.parts = {f"{self.side}_group": self.group(config, self.lanes)}
        scale_bits = 8 * units_of(config, self.side)
        super().__init__({
            "geometry": In(geometry_layout(config)),
            "index": In(range(max(2, getattr(config, f"{self.side}_pes")))),
            "start": In(1),
            "load_records": In(load_layout(
                1, config.record_depth, record_layout(config, self.side).size)),
            "load_weight_scales": In(load_layout(
                weight_scale_columns(config, self.side), scale_rows_of(config, self.side),
                min(scale_bits, config.port_width))),
            "o": Out(stream.Signature(chunk_layout(config))),
            "busy": Out(1),
            "starved": Out(1),
            **members,
        })

    def issues(self, m):
        """Place what leads to an issue; returns the `Issue`."""
        m.submodules.window = window = Window(self.config, side=self.side)
        m.submodules.issue = issue = Issue(self.config, side=self.side)
        wiring.connect(m, window.o, issue.i)
        m.d.comb += [
            window.geometry.eq(self.geometry), issue.geometry.eq(self.geometry),
            window.index.eq(self.index), window.start.eq(self.start),
            issue.load_records.eq(self.load_records),
            self.busy.eq(window.busy | issue.busy),
            self.starved.eq(issue.starved),
        ]
        return issue

    def lanes_of_unit(self, unit):
        """Lanes of a tile that belong to a scale unit."""
        return range(unit, lanes_of(self.config, self.side), units_of(self.config, self.side))

    def groups(self, m, issue):
        """Place the groups and what follows them; returns the groups, without their operands."""
        config, side = self.config, self.side
        m.submodules.weight_scales = weight_scales = WideBuffer(
            scale_rows_of(config, side), 8 * units_of(config, side),
            columns=len(self.load_weight_scales.enable))
        m.submodules.drain = drain = Drain(config, side)
        m.submodules.results = results = Results(config, side)
        wiring.connect(m, results.o, wiring.flipped(self.o))
        valid = delay(m, issue.fire, self.operand_cycles, "fired")
        first = delay(m, issue.product.first, self.operand_cycles, "first")
        to_drain = self.operand_cycles + self.group.latency - Drain.lead
        weight_scales.connect_load(m, self.load_weight_scales)
        m.d.comb += [
            issue.returned.eq(results.returned),
            weight_scales.request.eq(drain.scale_request),
            weight_scales.address.eq(drain.scale_row),
            drain.group_valid.eq(delay(m, issue.ends, to_drain, "ends")),
            drain.group.eq(delay(m, issue.group.as_value(), to_drain, "group")),
        ]
        groups = []
        for unit in range(units_of(config, side)):
            part = place(m, f"group_{unit}", f"{side}_group", self.parts[f"{side}_group"])
            m.d.comb += [part.valid.eq(valid), part.first.eq(first)]
            groups.append(part)
        connect_drain(m, drain, results, groups, weight_scales.data)
        return groups
