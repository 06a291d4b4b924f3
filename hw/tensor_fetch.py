"""The requests of a requantization pass: the affine table, then the tensor pixel by pixel."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from hw.mapper import PIXEL_WIDTH, ActivationMapper, word_width

__all__ = ["TensorFetch"]


class TensorFetch(wiring.Component):
    """Ask for every word that a requantization pass reads, in the order in which it uses them.

    After ``start`` come the words of the table (with ``has_table``, 16 for each word of V slots),
    then for each pixel all words of the first and of the second segment, four port words each. One
    request can leave each cycle. A ``start`` while requests are left to make is ignored.

    Members
    -------
    start, has_table : ``In(1)``
    table, source, source_second : ``In(address_width)``
        First words of the table and of the segments.
    first_words, words : ``In``
        Words of V slots of the first segment, and of both.
    pixels : ``In(16)``
    request : ``Out(stream.Signature(address_width))``
    """

    def __init__(self, config):
        self.config = config
        words = word_width(config)
        super().__init__({
            "start": In(1),
            "has_table": In(1),
            "table": In(config.address_width),
            "source": In(config.address_width),
            "source_second": In(config.address_width),
            "first_words": In(words),
            "words": In(words),
            "pixels": In(PIXEL_WIDTH),
            "request": Out(stream.Signature(config.address_width)),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.mapper = mapper = ActivationMapper(self.config)
        index = Signal(word_width(self.config) + 4)  # of the table's word
        sub = Signal(2)
        word = Signal(word_width(self.config))
        pixel = Signal(PIXEL_WIDTH)
        second = word >= self.first_words
        last_word = word == self.words - 1
        last_pixel = pixel == self.pixels - 1

        m.d.comb += [
            mapper.base.eq(Mux(second, self.source_second, self.source)),
            mapper.plane.eq(self.pixels),
            mapper.word.eq(Mux(second, word - self.first_words, word)),
            mapper.pixel.eq(pixel),
            mapper.unit.eq(2),
            mapper.sub.eq(sub),
        ]

        def ask(address):
            m.d.sync += [self.request.valid.eq(1), self.request.payload.eq(address)]

        with m.If(self.request.ready):
            m.d.sync += self.request.valid.eq(0)
        with m.FSM(name="fetch"):
            with m.State("Idle"):
                m.d.sync += [index.eq(0), sub.eq(0), word.eq(0), pixel.eq(0)]
                with m.If(self.start & self.has_table):
                    m.next = "Table"
                with m.Elif(self.start):
                    m.next = "Pixels"
            with m.State("Table"):
                with m.If(~self.request.valid | self.request.ready):
                    ask(self.table + index)
                    m.d.sync += index.eq(index + 1)
                    with m.If(index == (self.words << 4) - 1):
                        m.next = "Pixels"
            with m.State("Pixels"):
                with m.If(~self.request.valid | self.request.ready):
                    ask(mapper.address)
                    m.d.sync += sub.eq(sub + 1)
                    with m.If(sub == 3):
                        m.d.sync += word.eq(Mux(last_word, 0, word + 1))
                        with m.If(last_word):
                            m.d.sync += pixel.eq(pixel + 1)
                            with m.If(last_pixel):
                                m.next = "Idle"
        return m
