"""The core: everything between the register port and the memory port."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .dense_pe import DensePE
from .descriptor import VERSION, Kind
from .dispatcher import Dispatcher
from .memory_guard import MemoryGuard
from .memory_port import MemoryPort
from .parts import place
from .post_processor import PostProcessor
from .register_file import RegisterFile
from .registers import IDENTITY
from .requantizer import Requantizer
from .sequencer import Sequencer
from .sparse_pe import SparsePE

__all__ = ["Core"]


class Core(wiring.Component):
    """The SQ-DM core: runs requantization passes and convolutions from descriptors in memory.

    The host writes operands and a descriptor to memory, the descriptor's address to a register and
    ``start`` to another, and waits for ``interrupt``. See `hw.registers` and `hw.descriptor`.

    Parameters
    ----------
    config : Config

    Members
    -------
    csr_address, csr_write, csr_write_data, csr_read : ``In``
    csr_read_data : ``Out(32)``
        Register port; data appears in the cycle after ``csr_read``.
    interrupt : ``Out(1)``
        The last pass has ended; falls with the next start.
    memory : ``Out(MemoryPort(config))``
    """

    def __init__(self, config):
        self.config = config
        self.requantizer = Requantizer(config)
        self.dense = DensePE(config)
        self.post_processor = PostProcessor(config)
        self.parts = {
            **self.requantizer.parts, **self.dense.parts, **self.post_processor.parts}
        if config.sparse_pes:
            self.parts["sparse_pe"] = SparsePE(config)
        super().__init__({
            "csr_address": In(5),
            "csr_write": In(1),
            "csr_write_data": In(32),
            "csr_read": In(1),
            "csr_read_data": Out(32),
            "interrupt": Out(1),
            "memory": Out(MemoryPort(config)),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        m.submodules.registers = registers = RegisterFile()
        m.submodules.sequencer = sequencer = Sequencer(config)
        m.submodules.guard = guard = MemoryGuard(config)
        m.submodules.requantizer = requantizer = self.requantizer
        m.submodules.dispatcher = dispatcher = Dispatcher(config)
        m.submodules.dense = dense = self.dense
        m.submodules.post_processor = post_processor = self.post_processor
        sparse = [place(m, f"sparse_{number}", "sparse_pe", self.parts["sparse_pe"])
                  for number in range(config.sparse_pes)]
        layer = sequencer.layer
        wiring.connect(m, guard.memory, wiring.flipped(self.memory))

        # registers
        descriptor, evaluation = Signal(32), Signal(16)
        with m.If(registers.strobe_descriptor):
            m.d.sync += descriptor.eq(registers.write_data)
        with m.If(registers.strobe_evaluation):
            m.d.sync += evaluation.eq(registers.write_data)
        m.d.comb += [
            registers.address.eq(self.csr_address),
            registers.write.eq(self.csr_write),
            registers.write_data.eq(self.csr_write_data),
            registers.read.eq(self.csr_read),
            self.csr_read_data.eq(registers.read_data),
            registers.identity.eq(IDENTITY),
            registers.parameters.eq(
                VERSION | config.vector << 8 | config.dense_lanes << 16 | config.sparse_pes << 24),
            registers.status.eq(Cat(
                sequencer.busy, sequencer.done, Signal(6, name="reserved"), sequencer.error)),
            registers.descriptor.eq(descriptor),
            registers.evaluation.eq(evaluation),
            registers.detector_entry.eq(requantizer.register_entry),
            registers.detector_count.eq(requantizer.register_count),
            registers.saturations.eq(requantizer.saturations),
            requantizer.register_entry_write.eq(registers.strobe_detector_entry),
            requantizer.register_count_write.eq(registers.strobe_detector_count),
            requantizer.register_count_read.eq(registers.read_detector_count),
            requantizer.register_data.eq(registers.write_data),
            sequencer.start.eq(registers.strobe_control & registers.write_data[0]),
            sequencer.address.eq(descriptor),
            self.interrupt.eq(sequencer.done),
        ]

        # memory: one unit at a time reads and one writes
        loading, computing = Signal(), Signal()
        requantizing = layer.kind == Kind.REQUANTIZE
        fetching = sequencer.fetching
        for chosen, port in (
                (fetching, sequencer.read),
                (~fetching & requantizing, requantizer.read),
                (~fetching & ~requantizing & loading, dispatcher.read),
                (~fetching & ~requantizing & ~loading, post_processor.read)):
            with m.If(chosen):
                m.d.comb += [
                    guard.read.request.valid.eq(port.request.valid),
                    guard.read.request.payload.eq(port.request.payload),
                    guard.read.response.ready.eq(port.response.ready),
                ]
            m.d.comb += [
                port.request.ready.eq(chosen & guard.read.request.ready),
                port.response.valid.eq(chosen & guard.read.response.valid),
                port.response.payload.eq(guard.read.response.payload),
            ]
        for chosen, port in ((requantizing, requantizer.write),
                             (~requantizing, post_processor.write)):
            with m.If(chosen):
                m.d.comb += [
                    guard.write.request.valid.eq(port.request.valid),
                    guard.write.request.payload.eq(port.request.payload),
                ]
            m.d.comb += [
                port.request.ready.eq(chosen & guard.write.request.ready),
                port.done.eq(chosen & guard.write.done),
            ]
        m.d.comb += [
            guard.check.eq(sequencer.checked),
            guard.read_base.eq(layer.read_base), guard.read_limit.eq(layer.read_limit),
            guard.write_base.eq(layer.write_base), guard.write_limit.eq(layer.write_limit),
            sequencer.violation.eq(guard.violation),
            sequencer.settled.eq(guard.settled),
        ]

        # requantization
        m.d.comb += [
            requantizer.start.eq(sequencer.requantize),
            requantizer.evaluation.eq(evaluation),
        ]
        for name in requantizer.fields.shape().members:
            m.d.comb += requantizer.fields[name].eq(layer[name])

        # convolution: load, then both sides at once
        compute = Signal()
        m.d.comb += [
            dispatcher.layer.eq(layer),
            dispatcher.start.eq(sequencer.convolve),
            compute.eq(dispatcher.done),
            post_processor.layer.eq(layer),
            post_processor.start.eq(compute),
            post_processor.load_table.eq(dispatcher.table),
            post_processor.dense_part.eq(dispatcher.dense_geometry.words != 0),
            post_processor.sparse_part.eq(dispatcher.sparse_geometry.words != 0),
            dense.geometry.eq(dispatcher.dense_geometry),
            dense.start.eq(compute & post_processor.dense_part),
            dense.load_codes.eq(dispatcher.dense_codes),
            dense.load_scales.eq(dispatcher.scales),
            dense.load_weights.eq(dispatcher.dense_weights),
            dense.load_weight_scales.eq(dispatcher.dense_weight_scales),
        ]
        wiring.connect(m, dense.o, post_processor.i_dense)
        for number, pe in enumerate(sparse):
            m.d.comb += [
                pe.geometry.eq(dispatcher.sparse_geometry),
                pe.index.eq(number),
                pe.start.eq(compute & post_processor.sparse_part),
                pe.load_codes.eq(dispatcher.sparse_codes),
                pe.load_scales.eq(dispatcher.scales),
                pe.load_weights.eq(dispatcher.sparse_weights),
                pe.load_weight_scales.eq(dispatcher.sparse_weight_scales),
            ]
            port = getattr(post_processor, f"i_sparse_{number}")
            m.d.comb += [
                port.valid.eq(pe.o.valid), port.payload.eq(pe.o.payload),
                pe.o.ready.eq(port.ready),
            ]
        with m.If(sequencer.convolve):
            m.d.sync += loading.eq(1)
        with m.If(compute | dispatcher.refused):
            m.d.sync += loading.eq(0)
        m.d.sync += computing.eq(compute | (computing & post_processor.busy))
        m.d.comb += [
            sequencer.refused.eq(dispatcher.refused),
            sequencer.finished.eq(Mux(
                requantizing, ~requantizer.busy,
                ~loading & ~computing & ~sequencer.convolve)),
        ]

        # counters
        def count(register, step):
            counter = Signal(32, name=f"{register}_count")
            m.d.sync += counter.eq(counter + step)
            with m.If(sequencer.start & ~sequencer.busy):
                m.d.sync += counter.eq(0)
            m.d.comb += getattr(registers, register).eq(counter)

        count("total_cycles", sequencer.busy)
        count("compute_cycles", post_processor.merging)
        count("dense_busy", dense.busy)
        count("dense_work", dense.work)
        count("sparse_busy", Cat(pe.busy for pe in sparse).any())
        count("sparse_work", sum((pe.work for pe in sparse), start=0))
        count("stall_cycles", Cat(pe.starved for pe in [dense, *sparse]).any())
        return m
