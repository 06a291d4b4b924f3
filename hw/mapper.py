"""Channel-last addresses: where every activation, scale and weight lies in memory."""

from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["PIXEL_WIDTH", "ActivationMapper", "ScaleMapper", "WeightMapper", "word_width"]

PIXEL_WIDTH = 16  # bits of a pixel's number and of the number of pixels of a tensor


def word_width(config):
    """Bits of the number of a word of V channels, and of how many a tensor has."""
    return (max(config.max_channels, config.max_outputs) // config.vector).bit_length()


class ActivationMapper(wiring.Component):
    """Address of a port word of an activation tensor, ``[word][pixel][sub]``.

    Combinational: ``address`` = ``base`` + (``word`` * ``plane`` + ``pixel``) * 2^``unit`` +
    ``sub``, modulo the address space.

    Parameters
    ----------
    config : Config
        Gives ``address_width`` and the widths of the counts.

    Members
    -------
    base : ``In(address_width)``
        First word of the tensor.
    plane : ``In(16)``
        Pixels of the tensor.
    word : ``In(word_width)``
        Number of the word of V channels.
    pixel : ``In(16)``
        ``row * width + column``.
    unit : ``In(2)``
        Base 2 logarithm of the port words of one (word, pixel): 2 for 16-bit values.
    sub : ``In(2)``
        Which of these port words.
    address : ``Out(address_width)``
    """

    latency = 0

    def __init__(self, config):
        super().__init__({
            "base": In(config.address_width),
            "plane": In(PIXEL_WIDTH),
            "word": In(word_width(config)),
            "pixel": In(PIXEL_WIDTH),
            "unit": In(2),
            "sub": In(2),
            "address": Out(config.address_width),
        })

    def elaborate(self, platform):
        m = Module()
        place = self.word * self.plane + self.pixel
        m.d.comb += self.address.eq(self.base + (place << self.unit) + self.sub)
        return m


class ScaleMapper(wiring.Component):
    """Place of a scale byte in a plane of bytes, ``[group][pixel]``, packed into port words.

    Combinational: byte number ``group`` * ``plane`` + ``pixel`` after the first byte of ``base``.

    Members
    -------
    base : ``In(address_width)``
        First word of the plane.
    plane : ``In(16)``
        Bytes of a group: the pixels of the tensor.
    group : ``In(word_width)``
    pixel : ``In(16)``
    address : ``Out(address_width)``
        Port word that holds the byte.
    byte : ``Out(log2(port bytes))``
        Number of the byte in that word.
    """

    latency = 0

    def __init__(self, config):
        self.byte_bits = (config.port_width // 8).bit_length() - 1
        super().__init__({
            "base": In(config.address_width),
            "plane": In(PIXEL_WIDTH),
            "group": In(word_width(config)),
            "pixel": In(PIXEL_WIDTH),
            "address": Out(config.address_width),
            "byte": Out(self.byte_bits),
        })

    def elaborate(self, platform):
        m = Module()
        place = self.group * self.plane + self.pixel
        m.d.comb += [
            self.address.eq(self.base + place[self.byte_bits:]),
            self.byte.eq(place[:self.byte_bits]),
        ]
        return m


class WeightMapper(wiring.Component):
    """Address of a port word of the weights, ``[slot][offset]``.

    Combinational: ``address`` = ``base`` + ``slot`` * ``row_words`` + ``offset``, modulo the
    address space. The words of one slot are contiguous, so that a list of channels becomes as many
    contiguous reads.

    Members
    -------
    base : ``In(address_width)``
        First word of the weights.
    slot : ``In(16)``
        Input channel slot.
    row_words : ``In(16)``
        Port words of a slot: taps * planes * words of output channels.
    offset : ``In(16)``
        Word within the slot.
    address : ``Out(address_width)``
    """

    latency = 0

    def __init__(self, config):
        self.slot_bits = (config.max_channels - 1).bit_length()
        super().__init__({
            "base": In(config.address_width),
            "slot": In(16),
            "row_words": In(16),
            "offset": In(16),
            "address": Out(config.address_width),
        })

    def elaborate(self, platform):
        m = Module()
        # Slots beyond max_channels do not exist: a narrower product is the same one.
        slot = self.slot[:self.slot_bits]
        m.d.comb += self.address.eq(self.base + slot * self.row_words + self.offset)
        return m
