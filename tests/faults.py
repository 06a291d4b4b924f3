"""Deliberate faults of the hardware, all in one netlist, of which a file chooses one.

A fault is a function that adds statements to an elaborated component of ``hw``, or that stands in
for a function that such a component calls. In Amaranth the last assignment wins, so that what a
fault adds takes the place of what the component does, under the condition that the fault is
chosen. `verilog` puts subclasses with their faults in place of the components; ``hw`` knows
nothing of it. A simulator of that netlist reads the chosen fault's number from a file, see
`choose`; without the file, the netlist behaves as the one that ``hw`` gives.
"""

import contextlib
import functools
import importlib
from unittest import mock

from amaranth.hdl import Cat, Const, Instance, Mux, Signal
from amaranth.lib import memory

from hw import core, rounding
from hw.descriptor import Format, Kind
from hw.verilog import emit
from hw.walker import word_layout

__all__ = ["FAULTS", "choose", "verilog"]

FAULTS = {}        # name: number
COMPONENTS = {}    # "module.Class", where it is used: functions that add its faults
FUNCTIONS = {}     # "module.function", where it is called: its stand-in
ELABORATED = []    # signals, the chosen fault's number in the components being elaborated

CHOICE = """
module chosen_fault(output reg [7:0] number);
  integer file;
  initial begin
    number = 0;
    file = $fopen("fault", "r");
    if (file != 0) begin
      if ($fscanf(file, "%d", number) != 1) number = 0;
      $fclose(file);
    end
  end
endmodule
"""


def number_of(fault):
    """The fault's number, counted from 1."""
    return FAULTS.setdefault(fault.__name__, len(FAULTS) + 1)


def inside(place):
    """A fault of the component class that ``place``, a "module.Class", uses: f(m, component)."""
    def register(fault):
        number_of(fault)
        COMPONENTS.setdefault(place, []).append(fault)
        return fault
    return register


def instead_of(place, *, called_by):
    """A fault of the function ``place``, which the component ``called_by`` calls."""
    def register(fault):
        number_of(fault)
        FUNCTIONS[place] = fault
        COMPONENTS.setdefault(called_by, [])
        return fault
    return register


def faulty_class(component, faults, used):
    """A subclass of ``component`` with ``faults``, each only where it is chosen."""
    class Faulty(component):
        def elaborate(self, platform):
            number = Signal(8, name="chosen_fault")
            ELABORATED.append(number)
            m = super().elaborate(platform)
            ELABORATED.pop()
            m.submodules.chosen_fault = Instance("chosen_fault", o_number=number)
            for fault in faults:
                with m.If(number == number_of(fault)):
                    fault(m, self)
            used()
            return m
    return Faulty


def faulty_function(function, fault, used):
    """``function``, or ``fault`` where that is chosen."""
    def faulty(*arguments):
        used()
        chosen = ELABORATED[-1] == number_of(fault)
        right, wrong = function(*arguments), fault(*arguments)
        if isinstance(right, tuple):
            return tuple(Mux(chosen, *pair) for pair in zip(wrong, right, strict=True))
        return Mux(chosen, wrong, right)
    return faulty


@functools.cache
def verilog(config):
    """Verilog of the core with all faults, none of which is chosen.

    Raises
    ------
    AttributeError
        If ``hw`` no longer has a component, a member or a function that a fault changes.
    LookupError
        If the core no longer uses one.
    """
    unused = {*COMPONENTS, *FUNCTIONS}
    with contextlib.ExitStack() as stack:
        for places, faulty in ((COMPONENTS, faulty_class), (FUNCTIONS, faulty_function)):
            for place, change in places.items():
                module, name = place.rsplit(".", 1)
                honest = getattr(importlib.import_module(module), name)
                stack.enter_context(mock.patch(
                    place, faulty(honest, change, functools.partial(unused.discard, place))))
        text = emit(core.Core(config), "sqdm_core")
    if unused:
        raise LookupError(f"the core must use {', '.join(sorted(unused))}, which have faults")
    return text + CHOICE


def choose(name, folder):
    """Let simulations in ``folder`` have the fault ``name``."""
    (folder / "fault").write_text(f"{FAULTS[name]}\n")


# Addresses.

@inside("hw.dispatcher.WeightMapper")
def weight_mapper_off_by_one(m, mapper):
    """The rows of the weights of two slots lie one word closer together."""
    m.d.comb += mapper.address.eq(
        mapper.base + mapper.slot * (mapper.row_words - 1) + mapper.offset)


@inside("hw.code_writer.ActivationMapper")
def activation_mapper_off_by_one(m, mapper):
    """Codes of the words after the first are written one pixel too low."""
    place = mapper.word * (mapper.plane - 1) + mapper.pixel
    m.d.comb += mapper.address.eq(mapper.base + (place << mapper.unit) + mapper.sub)


@inside("hw.operands.ActivationMapper")
def pixel_before_its_tap(m, mapper):
    """A PE reads the codes of the pixel before; the image's first pixel stays."""
    pixel = Mux(mapper.pixel == 0, 0, mapper.pixel - 1)
    place = mapper.word * mapper.plane + pixel
    m.d.comb += mapper.address.eq(mapper.base + (place << mapper.unit) + mapper.sub)


@inside("hw.core.DensePE")
def border_tap_not_skipped(m, pe):
    """The dense PE takes taps below the last row, as if the image had one row more."""
    m.d.comb += m.submodules.window.geometry.height.eq(pe.geometry.height + 1)


@inside("hw.core.PostProcessor")
def residual_of_the_pixel_before(m, post_processor):
    """The residual is read one pixel too early; the first pixel's own stays."""
    pixel = m.submodules.residual_walk.pixel
    m.d.comb += m.submodules.residual_mapper.pixel.eq(Mux(pixel == 0, 0, pixel - 1))


@inside("hw.core.Core")
def read_window_one_word_short(m, core):
    """The guard refuses the last word of the read window."""
    limit = m.submodules.sequencer.layer.read_limit
    m.d.comb += m.submodules.guard.read_limit.eq(limit - 1)


@inside("hw.core.Core")
def write_window_one_word_long(m, core):
    """The guard lets the word after the write window pass."""
    limit = m.submodules.sequencer.layer.write_limit
    m.d.comb += m.submodules.guard.write_limit.eq(limit + 1)


@inside("hw.core.Core")
def scale_fills_its_word(m, core):
    """A requantization pass writes whole words, of which a scale is one byte."""
    with m.If(m.submodules.sequencer.layer.kind == Kind.REQUANTIZE):
        m.d.comb += m.submodules.guard.write.request.payload.strobe.eq(~0)


# The sparse side.

@inside("hw.sparse_pe.NonzeroWalker")
def lost_nonzero(m, walker):
    """The code of the last channel of a word is never issued."""
    word = word_layout(walker.config).size
    m.d.comb += m.submodules.queue.w_data[word + walker.config.vector - 1].eq(0)


@inside("hw.sparse_pe.NonzeroWalker")
def zero_that_costs_a_cycle(m, walker):
    """The code of the first channel of a word is issued even where it is zero."""
    word = word_layout(walker.config).size
    m.d.comb += m.submodules.queue.w_data[word].eq(1)


@inside("hw.core.Core")
def codes_to_the_wrong_side(m, core):
    """The first word of dense codes goes to the sparse PE's buffer."""
    dispatcher = m.submodules.dispatcher
    codes, _ = m.submodules.sparse_0.ports["load_codes"]
    with m.If(dispatcher.dense_codes.enable & (dispatcher.dense_codes.address == 0)):
        m.d.comb += [
            m.submodules.dense.load_codes.enable.eq(0), codes.eq(dispatcher.dense_codes)]


# The dense side.

@inside("hw.dense_pe.ScaleUnit")
def other_bank_of_partial_sums(m, unit):
    """Partial sums leave from the bank that the next tile fills."""
    _, flush = m.submodules.partial.read_ports
    m.d.comb += flush.addr.eq(unit.flush_lane | ~unit.flush_bank << len(unit.lane))


@inside("hw.core.DensePE")
def low_nibble_taken_as_signed(m, pe):
    """The low nibbles of codes of 8 bits are signed as the high ones are."""
    with m.If(pe.geometry.mx):
        for unit in range(pe.config.dense_scale_units):
            activations_signed, _ = m.submodules[f"group_{unit}"].ports["activations_signed"]
            m.d.comb += activations_signed.eq(1)


@inside("hw.core.DensePE")
def result_credit_lost(m, pe):
    """The room of the first chunk of a convolution is not given back."""
    popped = m.submodules.results.popped
    given = Signal()
    with m.If(pe.start):
        m.d.sync += given.eq(0)
    with m.If(popped):
        m.d.sync += given.eq(1)
    m.d.comb += m.submodules.throttle.popped.eq(popped & given)


@inside("hw.core.DensePE")
def result_credit_too_many(m, pe):
    """A convolution begins with room for one chunk more than there is."""
    m.d.comb += m.submodules.throttle.popped.eq(m.submodules.results.popped | pe.start)


# Numbers.

@instead_of("hw.quantizer.round_half_even", called_by="hw.requantizer.QuantizerLane")
def code_ties_away_from_even(value, shift):
    """Codes are rounded half up: their sign comes later."""
    return (value + (1 << shift - 1))[shift:]


@instead_of("hw.post_processor.round_half_even", called_by="hw.post_processor.EpilogueLane")
def result_cut_off(value, shift):
    """The last step of the epilogue drops its bits; the others are as they should be."""
    return value >> shift if isinstance(shift, int) else rounding.round_half_even(value, shift)


@instead_of("hw.post_processor.saturate", called_by="hw.post_processor.EpilogueLane")
def saturation_wraps(value, bits):
    """What does not fit loses its upper bits."""
    return value[:bits].as_signed()


@instead_of("hw.requantizer.decode", called_by="hw.core.Requantizer")
def subnormal_scale_as_normal(code):
    """Every E4M3 scale has a leading one."""
    return Cat(code[:3], Const(1, 1)), Cat(code[3] | ~code[3:7].any(), code[4:7])


# Labels and counts.

@inside("hw.requantizer.Detector")
def label_one_evaluation_late(m, detector):
    """Labels follow the counts that a pass's own have replaced; registers read right."""
    m.submodules.before = before = memory.Memory(shape=16, depth=detector.depth, init=[])
    counts = m.submodules.counts
    write, = counts.write_ports
    old = counts.read_port(domain="comb")
    keep, label = before.write_port(), before.read_port()
    limit = Signal(48)
    m.d.comb += [
        old.addr.eq(write.addr),
        keep.addr.eq(write.addr),
        keep.en.eq(write.en),
        keep.data.eq(Mux(detector.register_count_write, write.data, old.data)),
        label.addr.eq(detector.entry),
        detector.sparse.eq(Cat(Const(0, 16), label.data) >= limit),
    ]
    with m.If(detector.start):
        m.d.sync += limit.eq(detector.threshold * detector.pixels)


@inside("hw.core.Requantizer")
def update_in_spite_of_the_interval(m, requantizer):
    """Every pass with labels stores its counts."""
    form = requantizer.fields.format
    m.d.comb += m.submodules.writer.store_counts.eq(
        (form == Format.A4U) | (form == Format.A4S))


@inside("hw.core.Requantizer")
def channel_on_the_wrong_side(m, requantizer):
    """The label of slot 2 is inverted."""
    lists, entry = m.submodules.lists, Signal(16)
    m.d.sync += entry.eq(lists.detector_entry)
    with m.If(entry == requantizer.fields.detector + 2):
        m.d.comb += lists.detector_sparse.eq(~m.submodules.detector.sparse)


@inside("hw.core.Requantizer")
def zero_count_without_the_end_of_a_row(m, requantizer):
    """Zeros in the last column of the image are not counted."""
    counters, width = m.submodules.zero_counters, requantizer.fields.width
    last, column = Signal(16), Signal(16)
    m.d.comb += column.eq(last)
    with m.If(counters.row == 0):
        m.d.comb += column.eq(Mux(counters.first | (last == width - 1), 0, last + 1))
    with m.If(counters.enable):
        m.d.sync += last.eq(column)
    with m.If(column == width - 1):
        m.d.comb += counters.zeros.eq(0)


# Handshakes.

@inside("hw.core.Core")
def stuck_ready(m, core):
    """Results never find the memory ready."""
    m.d.comb += m.submodules.post_processor.write.request.ready.eq(0)


@inside("hw.core.Core")
def done_before_its_writes(m, core):
    """A pass ends without waiting for the answers to its writes."""
    m.d.comb += m.submodules.sequencer.settled.eq(1)


@inside("hw.core.MemoryGuard")
def request_changes_while_it_waits(m, guard):
    """A read has another address as long as memory is not ready."""
    with m.If(~guard.memory.read_request.ready):
        m.d.comb += guard.memory.read_request.payload.eq(guard.read.request.payload ^ 1)
