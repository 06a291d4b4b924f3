"""The core: everything between the register port and the memory port."""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .arbiter import ReadArbiter
from .dense_pe import DensePE
from .descriptor import VERSION, Kind
from .job import run_layout
from .layer import layer_layout
from .loader import Loader
from .memory_guard import MemoryGuard, inside
from .memory_port import MemoryPort
from .parts import place
from .post_processor import PostProcessor
from .read_queue import ReadQueue
from .register_file import RegisterFile
from .registers import IDENTITY
from .requantizer import Requantizer
from .sequencer import Sequencer
from .sparse_pe import SparsePE

__all__ = ["Core"]


class Core(wiring.Component):
    """The SQ-DM core: runs requantization passes and convolutions from descriptors in memory.

    The host writes operands and a chain of descriptors to memory, the first one's address to a
    register and ``start`` to another, and waits for ``interrupt``. See `hw.registers` and
    `hw.descriptor`.

    A run that the loader offers is taken when nothing is computed; PEs and post-processor begin in
    the next cycle. The loader may be at the next job by then, so what is computed has its own copy
    of the layer.

    Parameters
    ----------
    config : Config

    Members
    -------
    csr_address, csr_write, csr_write_data, csr_read : ``In``
    csr_read_data : ``Out(32)``
        Register port; data appears in the cycle after ``csr_read``.
    interrupt : ``Out(1)``
        The last chain has ended; falls with the next start.
    memory : ``Out(MemoryPort(config))``
    """

    def __init__(self, config):
        self.config = config
        self.requantizer = Requantizer(config)
        self.post_processor = PostProcessor(config)
        self.parts = {**self.requantizer.parts, **self.post_processor.parts}
        if config.dense_pes:
            self.parts["dense_pe"] = DensePE(config)
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
        m.submodules.arbiter = arbiter = ReadArbiter(config, 4)
        m.submodules.guard = guard = MemoryGuard(config)
        m.submodules.requantizer = requantizer = self.requantizer
        m.submodules.loader = loader = Loader(config)
        m.submodules.queue = queue = ReadQueue(config)
        m.submodules.post_processor = post_processor = self.post_processor
        dense, sparse = (
            [place(m, f"{side}_{number}", f"{side}_pe", self.parts[f"{side}_pe"])
             for number in range(pes)]
            for side, pes in (("dense", config.dense_pes), ("sparse", config.sparse_pes)))
        layer = sequencer.layer
        computed = Signal(layer_layout(config))     # layer of the job that is computed
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
            registers.array.eq(
                config.dense_pes | config.sparse_lanes << 8 | config.sparse_rate << 16),
            registers.status.eq(Cat(
                sequencer.busy, sequencer.done, Signal(6, name="reserved"), sequencer.error)),
            registers.descriptor.eq(descriptor),
            registers.evaluation.eq(evaluation),
            registers.detector_entry.eq(requantizer.register_entry),
            registers.detector_count.eq(requantizer.register_count),
            requantizer.register_entry_write.eq(registers.strobe_detector_entry),
            requantizer.register_count_write.eq(registers.strobe_detector_count),
            requantizer.register_count_read.eq(registers.read_detector_count),
            requantizer.register_data.eq(registers.write_data),
            sequencer.start.eq(registers.strobe_control & registers.write_data[0]),
            sequencer.address.eq(descriptor),
            self.interrupt.eq(sequencer.done),
        ]

        # memory: residuals hold up results, so they go first and never wait for the loader to take
        # its words; descriptors are never urgent
        clients = (post_processor, requantizer, loader, sequencer)
        wiring.connect(m, loader.read, queue.i)
        for number, client in enumerate(clients):
            read = queue.o if client is loader else client.read
            wiring.connect(m, read, getattr(arbiter, f"i_{number}"))
        wiring.connect(m, arbiter.o, guard.read)
        requantizing = Signal()
        with m.Switch(arbiter.owner):
            for number, client in enumerate(clients):
                of = computed if client is post_processor else layer
                with m.Case(number):
                    m.d.comb += [
                        guard.read_base.eq(of.read_base),
                        guard.read_inside.eq((client is sequencer) | inside(
                            arbiter.o.request.payload, of.read_base, of.read_limit)),
                    ]
        for chosen, client in ((requantizing, requantizer), (~requantizing, post_processor)):
            with m.If(chosen):
                m.d.comb += [
                    guard.write.request.valid.eq(client.write.request.valid),
                    guard.write.request.payload.eq(client.write.request.payload),
                ]
            m.d.comb += [
                client.write.request.ready.eq(chosen & guard.write.request.ready),
                client.write.done.eq(chosen & guard.write.done),
            ]
        m.d.comb += [
            guard.write_inside.eq(Mux(
                requantizing,
                inside(requantizer.write.request.payload.address,
                       layer.write_base, layer.write_limit),
                post_processor.write_inside)),
            post_processor.settled.eq(guard.settled),
            sequencer.settled.eq(guard.settled),
            sequencer.violation.eq(guard.violation),
        ]

        # requantization
        m.d.comb += [
            requantizing.eq(layer.kind == Kind.REQUANTIZE),
            requantizer.start.eq(sequencer.requantize),
            requantizer.evaluation.eq(evaluation),
        ]
        for name in requantizer.fields.shape().members:
            m.d.comb += requantizer.fields[name].eq(layer[name])

        # convolution: a run is computed when nothing else is
        run, begin, pending = Signal(run_layout(config)), Signal(), Signal()
        ready, taken = Signal(), Signal()
        offer = loader.run
        m.d.comb += [
            loader.layer.eq(layer),
            loader.start.eq(sequencer.convolve),
            offer.ready.eq(~begin & ~post_processor.merging
                           & ~Cat(pe.busy for pe in (*dense, *sparse)).any()),
            taken.eq(offer.valid & offer.ready),
            # The layer stays until its job's first run has been taken.
            ready.eq(loader.ready & (~pending | (taken & offer.payload.first))),
            sequencer.ready.eq(ready),
            sequencer.refused.eq(loader.refused),
            sequencer.idle.eq(~sequencer.requantize & ~requantizer.busy
                              & ~sequencer.convolve & ready & ~offer.valid
                              & ~begin & ~post_processor.busy),
            post_processor.layer.eq(computed),
            post_processor.run.eq(run),
            post_processor.start.eq(begin),
            post_processor.load_table.eq(loader.table),
        ]
        m.d.sync += [begin.eq(taken), loader.released.eq(post_processor.ended)]
        with m.If(taken):
            m.d.sync += run.eq(offer.payload)
            with m.If(offer.payload.first):
                m.d.sync += [computed.eq(layer), pending.eq(0)]
        with m.If(loader.refused):
            m.d.sync += pending.eq(0)
        with m.If(sequencer.convolve):
            m.d.sync += pending.eq(1)
        for side, pes, loads in (
                ("dense", dense, ("codes", "records", "weights", "weight_scales")),
                ("sparse", sparse, ("entries", "records", "weights", "weight_scales"))):
            for number, pe in enumerate(pes):
                m.d.comb += [
                    pe.geometry.eq(run[side]), pe.index.eq(number),
                    pe.start.eq(begin & run[side].active),
                ]
                for name in loads:
                    self.connect_load(m, number, getattr(pe, f"load_{name}"),
                                      getattr(loader, f"{side}_{name}"))
                port = getattr(post_processor, f"i_{side}_{number}")
                m.d.comb += [
                    port.valid.eq(pe.o.valid), port.payload.eq(pe.o.payload),
                    pe.o.ready.eq(port.ready),
                ]

        # counters
        def count(register, step):
            counter = Signal(32, name=f"{register}_count")
            m.d.sync += counter.eq(counter + step)
            with m.If(sequencer.start & ~sequencer.busy):
                m.d.sync += counter.eq(0)
            m.d.comb += getattr(registers, register).eq(counter)
            return counter

        def any_of(name, pes):
            return Cat(getattr(pe, name) for pe in pes).any() if pes else Const(0)

        count("total_cycles", sequencer.busy)
        count("jobs", sequencer.requantize | sequencer.convolve)
        count("compute_cycles", post_processor.merging)
        for side, pes in (("dense", dense), ("sparse", sparse)):
            count(f"{side}_busy", any_of("busy", pes))
            count(f"{side}_work", sum((pe.work for pe in pes), start=Const(0)))
        count("stall_cycles", any_of("starved", (*dense, *sparse)))
        count("load_stall", ~ready & ~offer.valid & ~begin & ~post_processor.merging)
        count("output_stall", post_processor.blocked)
        # The requantizer counts a pass; the passes before it are added up here.
        clipped = Signal()      # the requantizer's number is one of this chain
        before = count("saturations", Mux(
            sequencer.requantize & clipped, requantizer.saturations, 0))
        with m.If(sequencer.requantize):
            m.d.sync += clipped.eq(1)
        with m.If(sequencer.start & ~sequencer.busy):
            m.d.sync += clipped.eq(0)
        m.d.comb += registers.saturations.eq(before + Mux(clipped, requantizer.saturations, 0))
        return m

    @staticmethod
    def connect_load(m, number, load, write):
        """Pass the loader's ``write`` on to ``load`` of the PE with this number."""
        for name in load.shape().members:
            m.d.comb += load[name].eq(write[name])
        if "pes" in write.shape().members:
            m.d.comb += load.enable.eq(Mux(write.pes[number], write.enable, 0))
