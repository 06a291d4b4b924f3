"""Zero counters: for each channel slot, the pixels whose code is zero."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["ZeroCounters"]


class ZeroCounters(wiring.Component):
    """Count zeros in rows of V/4 channel slots.

    Takes a row every cycle; a row may come again two cycles later at the earliest. With ``first``
    the row's counters start from zero. The counters of ``r_row`` appear on ``r_counts`` a cycle
    after ``r_enable``, two cycles after the row's last count at the earliest; counting takes the
    place of reading.

    Members
    -------
    enable, first : ``In(1)``
    row : ``In(row_bits)``
    zeros : ``In(V/4)``
    r_enable : ``In(1)``
    r_row : ``In(row_bits)``
    r_counts : ``Out(V/4 * 16)``
        They keep until the next ``r_enable`` or ``enable``.
    """

    def __init__(self, config):
        self.quad = config.quad
        self.rows = config.max_channels // config.quad
        row_bits = (self.rows - 1).bit_length()
        super().__init__({
            "enable": In(1),
            "first": In(1),
            "row": In(row_bits),
            "zeros": In(self.quad),
            "r_enable": In(1),
            "r_row": In(row_bits),
            "r_counts": Out(16 * self.quad),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.counts = counts = memory.Memory(
            shape=16 * self.quad, depth=self.rows, init=[])
        read = counts.read_port()
        write = counts.write_port()

        # cycle 1: read
        m.d.comb += [
            read.addr.eq(Mux(self.enable, self.row, self.r_row)),
            read.en.eq(self.enable | self.r_enable),
            self.r_counts.eq(read.data),
        ]
        row = Signal.like(self.row)
        zeros = Signal(self.quad)
        first = Signal()
        m.d.sync += [
            write.en.eq(self.enable),
            row.eq(self.row),
            zeros.eq(self.zeros),
            first.eq(self.first),
        ]

        # cycle 2: write
        before = [Mux(first, 0, read.data.word_select(lane, 16)) for lane in range(self.quad)]
        m.d.comb += [
            write.addr.eq(row),
            write.data.eq(Cat((count + zero)[:16]
                              for count, zero in zip(before, zeros, strict=True))),
        ]
        return m
