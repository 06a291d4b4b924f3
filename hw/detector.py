"""The sparsity detector: zero counts of every layer and channel, and the labels they give."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from hw.mapper import PIXEL_WIDTH

__all__ = ["Detector"]


class Detector(wiring.Component):
    """Keep zero counts from one evaluation to the next and label channels by them.

    A channel is sparse when its stored count * 65536 >= ``threshold`` * ``pixels``. Counts are
    replaced in evaluations that are a multiple of ``interval``: ``due`` tells.

    ``start`` takes over ``threshold``, ``pixels``, ``evaluation`` and ``interval``; labels are
    right from 2 cycles later and ``due`` when ``busy`` is low, 17 cycles later. ``count`` and
    ``sparse`` follow ``entry`` by one cycle. A write and a read of the same entry in one cycle read
    the old count. Registers are for an idle core: an access in the same cycle takes the place of
    the pass's own, and the entry moves on after each access to the count. Entries beyond the
    memory's depth ignore writes and read as others.

    Parameters
    ----------
    config : Config
        Gives ``detector_depth``, the number of 16-bit counts.

    Members
    -------
    start : ``In(1)``
    threshold : ``In(32)``
    pixels, evaluation, interval : ``In(16)``
        ``interval`` must not be 0.
    busy, due : ``Out(1)``
    entry : ``In(16)``
        Read of the pass.
    count, sparse : ``Out(16)``, ``Out(1)``
    w_enable, w_entry, w_count : ``In``
        Write of the pass.
    register_entry_write, register_count_write, register_count_read : ``In(1)``
        Strobes of the register port.
    register_data : ``In(16)``
        What the first two write.
    register_entry : ``Out(16)``
        The register; the count read appears on ``count`` in the next cycle.
    """

    def __init__(self, config):
        self.depth = config.detector_depth
        super().__init__({
            "start": In(1),
            "threshold": In(32),
            "pixels": In(PIXEL_WIDTH),
            "evaluation": In(16),
            "interval": In(16),
            "busy": Out(1),
            "due": Out(1),
            "entry": In(16),
            "count": Out(16),
            "sparse": Out(1),
            "w_enable": In(1),
            "w_entry": In(16),
            "w_count": In(16),
            "register_entry_write": In(1),
            "register_count_write": In(1),
            "register_count_read": In(1),
            "register_data": In(16),
            "register_entry": Out(16),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.counts = counts = memory.Memory(shape=16, depth=self.depth, init=[])
        read = counts.read_port()
        write = counts.write_port()

        w_entry = Signal(16)
        m.d.comb += [
            read.addr.eq(Mux(self.register_count_read, self.register_entry, self.entry)),
            self.count.eq(read.data),
            w_entry.eq(Mux(self.register_count_write, self.register_entry, self.w_entry)),
            write.addr.eq(w_entry),
            write.data.eq(Mux(self.register_count_write, self.register_data, self.w_count)),
            write.en.eq((self.register_count_write | self.w_enable) & (w_entry < self.depth)),
        ]
        with m.If(self.register_entry_write):
            m.d.sync += self.register_entry.eq(self.register_data)
        with m.Elif(self.register_count_write | self.register_count_read):
            m.d.sync += self.register_entry.eq(self.register_entry + 1)

        limit = Signal(32 + PIXEL_WIDTH)
        m.d.comb += self.sparse.eq(Cat(Const(0, 16), read.data) >= limit)

        # evaluation modulo interval, a bit a cycle
        dividend = Signal(16)
        remainder = Signal(16)
        left = Signal(range(17))
        trial = Cat(dividend[-1], remainder)
        m.d.comb += [
            self.busy.eq(left != 0),
            self.due.eq(remainder == 0),
        ]
        with m.If(self.start):
            m.d.sync += [
                limit.eq(self.threshold * self.pixels),
                dividend.eq(self.evaluation),
                remainder.eq(0),
                left.eq(16),
            ]
        with m.Elif(self.busy):
            m.d.sync += [
                dividend.eq(dividend << 1),
                remainder.eq(Mux(trial >= self.interval, trial - self.interval, trial)),
                left.eq(left - 1),
            ]
        return m
