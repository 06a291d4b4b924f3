"""Places of a ring buffer between a unit that fills them and one that empties them."""

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["Ring"]


class Ring(wiring.Component):
    """Count the places of a ring that are taken and those that are full.

    The filling unit reserves a place when there is ``room`` and later says that it is filled; the
    emptying unit takes a place that is ``ready`` and later releases it. All four may coincide;
    their effect shows in the next cycle. The order of places is the units' own affair.

    Parameters
    ----------
    depth : int
        Places.

    Members
    -------
    reserve, fill : ``In(1)``
    room : ``Out(1)``
    take, release : ``In(1)``
    ready : ``Out(1)``
    """

    reserve: In(1)
    fill: In(1)
    room: Out(1)
    take: In(1)
    release: In(1)
    ready: Out(1)

    def __init__(self, depth):
        if not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth must be a positive integer, not {depth!r}")
        self.depth = depth
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        reserved = Signal(range(self.depth + 1))
        filled = Signal(range(self.depth + 1))
        m.d.sync += [
            reserved.eq(reserved + self.reserve - self.release),
            filled.eq(filled + self.fill - self.take),
        ]
        m.d.comb += [
            self.room.eq(reserved != self.depth),
            self.ready.eq(filled != 0),
        ]
        return m
