"""The operand buffers of a PE and how they are loaded."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from .buffer import Buffer
from .mapper import ActivationMapper, ScaleMapper
from .scale_unit import activation_scale_layout, chunk_layout
from .window import geometry_layout

__all__ = ["Operands", "Results", "load_layout", "scale_words", "wire_load"]


def load_layout(columns, depth, width):
    """A write of a buffer: an ``enable`` bit for each column, ``address`` and ``data``."""
    return data.StructLayout({
        "enable": columns, "address": range(max(2, depth)), "data": width})


def scale_words(config):
    """Port words that hold ``scale_depth`` scale bytes."""
    return -(-config.scale_depth // (config.port_width // 8))


def wire_load(load, buffer):
    """Statements that let ``load`` write ``buffer``."""
    return [
        buffer.write.eq(load.enable),
        buffer.write_address.eq(load.address),
        buffer.write_data.eq(load.data),
    ]


class Operands(wiring.Component):
    """Activation codes and their scales, one word and one scale a cycle.

    ``codes`` and ``scale`` answer an ``issue`` `latency` = 3 cycles later, with ``valid``.

    Members
    -------
    geometry : ``In``
        See `geometry_layout`.
    load_codes, load_scales : ``In``
        Port words, addressed from 0 in the order of the tensor in memory.
    issue, word, pixel, sub, group : ``In``
        Read plane ``sub`` of code word ``word`` of input pixel ``pixel``, and the scale of group
        ``group`` there.
    valid : ``Out(1)``
    codes : ``Out(4 * V)``
        V nibbles.
    scale : ``Out``
        Decoded, see `activation_scale_layout`.
    """

    latency = 1 + Buffer.latency

    def __init__(self, config):
        self.config = config
        geometry = geometry_layout(config)
        super().__init__({
            "geometry": In(geometry),
            "load_codes": In(load_layout(1, config.activation_depth, config.port_width)),
            "load_scales": In(load_layout(1, scale_words(config), config.port_width)),
            "issue": In(1),
            "word": In(geometry["words"].shape),
            "pixel": In(16),
            "sub": In(1),
            "group": In(geometry["groups"].shape),
            "valid": Out(1),
            "codes": Out(config.port_width),
            "scale": Out(activation_scale_layout),
        })

    def elaborate(self, platform):
        m = Module()
        config, geometry = self.config, self.geometry
        m.submodules.codes = codes = Buffer(config.activation_depth, config.port_width)
        m.submodules.scales = scales = Buffer(scale_words(config), config.port_width)
        m.submodules.code_mapper = code_mapper = ActivationMapper(config)
        m.submodules.scale_mapper = scale_mapper = ScaleMapper(config)
        m.d.comb += wire_load(self.load_codes, codes) + wire_load(self.load_scales, scales)
        m.d.comb += [
            code_mapper.plane.eq(geometry.plane), code_mapper.word.eq(self.word),
            code_mapper.pixel.eq(self.pixel), code_mapper.unit.eq(geometry.mx),
            code_mapper.sub.eq(self.sub),
            scale_mapper.plane.eq(geometry.plane), scale_mapper.group.eq(self.group),
            scale_mapper.pixel.eq(self.pixel),
        ]
        byte, byte_read = Signal.like(scale_mapper.byte), Signal.like(scale_mapper.byte)
        byte_here = Signal.like(scale_mapper.byte)
        m.d.sync += [
            codes.request.eq(self.issue), codes.address.eq(code_mapper.address),
            scales.request.eq(self.issue), scales.address.eq(scale_mapper.address),
            byte.eq(scale_mapper.byte), byte_read.eq(byte), byte_here.eq(byte_read),
        ]
        code = Signal(8)
        normal = code[3:7] != 0
        m.d.comb += [
            self.valid.eq(codes.response),
            self.codes.eq(codes.data),
            code.eq(scales.data.word_select(byte_here, 8)),
            self.scale.factor.eq(Mux(geometry.mx, 1, Cat(code[0:3], normal))),
            self.scale.shift.eq(Mux(geometry.mx, code[0:4], Mux(normal, code[3:7] - 1, 0))),
        ]
        return m


class Results(wiring.Component):
    """Finished chunks on their way to the post-processor.

    Members
    -------
    push, chunk : ``In``
        A chunk that ends here; there is room, because `Throttle` has reserved it.
    o : ``Out(stream)``
        Chunks in order.
    popped : ``Out(1)``
        A chunk left in this cycle.
    """

    def __init__(self, config):
        self.config = config
        super().__init__({
            "push": In(1),
            "chunk": In(chunk_layout(config)),
            "o": Out(stream.Signature(chunk_layout(config))),
            "popped": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.queue = queue = fifo.SyncFIFOBuffered(
            width=len(self.chunk.as_value()), depth=self.config.result_depth)
        m.d.comb += [
            queue.w_en.eq(self.push),
            queue.w_data.eq(self.chunk),
            self.o.valid.eq(queue.r_rdy),
            self.o.payload.eq(queue.r_data),
            queue.r_en.eq(self.o.ready),
            self.popped.eq(self.o.valid & self.o.ready),
        ]
        return m
