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
from amaranth.lib import data, memory

from hw import core, rounding, scale_unit
from hw.descriptor import Format, Kind
from hw.drain import scale_rows_of
from hw.job import record_layout, run_layout
from hw.verilog import emit

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
    """A fault of the function ``place``, which the components ``called_by`` call."""
    def register(fault):
        number_of(fault)
        FUNCTIONS[place] = fault
        for component in called_by:
            COMPONENTS.setdefault(component, [])
        return fault
    return register


def local(m, name):
    """The only signal with this name that the module assigns.

    Raises
    ------
    AttributeError
        If there is none, or more than one.
    """
    found = [signal for signal in m._driving if signal.name == name]
    if len(found) != 1:
        raise AttributeError(f"{name} must be one signal of the component, not {len(found)}")
    return found[0]


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


# Memory: addresses and windows.

@inside("hw.core.Core")
def weight_rows_too_close(m, core):
    """The weights of two slots are read from one word closer together."""
    m.d.comb += m.submodules.loader.layer.slot_pitch.eq(
        m.submodules.sequencer.layer.slot_pitch - 1)


@inside("hw.core.Requantizer")
def tiles_of_codes_on_each_other(m, requantizer):
    """The codes of every tile of channels are written where those of the first one are."""
    m.d.comb += m.submodules.writer.tiles.payload.offset.eq(0)


@inside("hw.requantizer.CodeWriter")
def codes_do_not_move_on(m, writer):
    """The words of a pixel after the first one of a tile are written where that one is."""
    first, after = local(m, "fresh"), local(m, "next_word")
    m.d.sync += after.eq(Mux(first, data.View(
        writer.write.payload.shape(), local(m, "composed")).address, after))


@inside("hw.core.PostProcessor")
def residual_of_the_pixel_before(m, post_processor):
    """The residual is read one pixel too early; the first pixel's own stays."""
    pixel = m.submodules.residual_walk.pixel
    m.d.comb += m.submodules.residual_mapper.pixel.eq(Mux(pixel == 0, 0, pixel - 1))


@inside("hw.core.Core")
def rows_of_a_job_at_the_top(m, core):
    """The results of every job are written from the first row of the image on."""
    layer = m.submodules.post_processor.layer
    m.d.comb += layer.origin.eq(layer.tile_x)


@inside("hw.core.Core")
def read_window_one_word_short(m, core):
    """The guard refuses the last word of the read window."""
    arbiter, layer = m.submodules.arbiter, m.submodules.sequencer.layer
    with m.If(arbiter.o.request.payload == layer.read_limit - 1):
        m.d.comb += m.submodules.guard.read_inside.eq(0)


@inside("hw.core.Core")
def write_window_one_word_long(m, core):
    """The guard lets the word after the write window pass."""
    write, layer = m.submodules.guard.write.request, m.submodules.sequencer.layer
    with m.If(write.payload.address == layer.write_limit):
        m.d.comb += m.submodules.guard.write_inside.eq(1)


@inside("hw.core.Core")
def scale_fills_its_word(m, core):
    """A requantization pass writes whole words, of which a scale is one byte."""
    with m.If(m.submodules.sequencer.layer.kind == Kind.REQUANTIZE):
        m.d.comb += m.submodules.guard.write.request.payload.strobe.eq(~0)


# The walk over output pixels and taps.

@inside("hw.core.DensePE")
def border_tap_not_skipped(m, pe):
    """The dense PE takes taps below the last row, as if the image had one row more."""
    m.d.comb += m.submodules.window.geometry.height.eq(pe.geometry.height + 1)


@inside("hw.core.SparsePE")
def pixel_before_its_tap(m, pe):
    """The sparse PE takes the entries of the pixel before; the run's first pixel stays."""
    record = m.submodules.window.o.payload.record
    m.d.comb += m.submodules.issue.i.payload.record.eq(
        Mux(record == pe.geometry.records, record, record - 1))


@inside("hw.core.SparsePE")
def high_split_at_other_pixels(m, pe):
    """The sparse side has the high split as often as it should have the low one."""
    with m.If(pe.geometry.cut != 0):
        m.d.comb += m.submodules.window.geometry.cut.eq(256 - pe.geometry.cut)


@inside("hw.core.DensePE")
def null_pixel_not_skipped(m, pe):
    """The dense side gives a sum for pixels of which it has no word."""
    with m.If(pe.geometry.low == 0):
        m.d.comb += m.submodules.window.geometry.low.eq(1)


@inside("hw.core.SparsePE")
def pixel_of_the_other_side_not_skipped(m, pe):
    """The sparse side computes the pixels of MX8 that are the dense side's."""
    m.d.comb += m.submodules.window.geometry.skip.eq(0)


@inside("hw.core.SparsePE")
def chunks_beyond_the_outputs(m, pe):
    """The last tile of lanes gives sums of all its lanes."""
    m.d.comb += m.submodules.issue.i.payload.chunks.eq(pe.config.sparse_lanes // pe.config.quad)


@inside("hw.core.SparsePE")
def run_begins_a_cycle_late(m, pe):
    """The sparse PE takes a cycle more to find its first pixel."""
    late = Signal()
    m.d.sync += late.eq(pe.start)
    m.d.comb += m.submodules.window.start.eq(late)


# Groups and their pace.

@inside("hw.pe.Issue")
def early_code_counts_twice(m, issue):
    """Where the split is high, the first entry's codes below it are multiplied as well."""
    m.d.comb += issue.product.masked.eq(0)      # the dense side has no use for it


@inside("hw.pe.Issue")
def early_entries_not_left_out(m, issue):
    """Where the split is high, all entries take their cycle; their codes are masked."""
    if issue.side == "sparse":
        record = data.View(record_layout(issue.config, "sparse"), local(m, "record"))
        m.d.comb += record.skip.eq(0)


@inside("hw.pe.Issue")
def empty_group_has_operands(m, issue):
    """The sparse side's product that stands for an empty group takes the entry behind it."""
    if issue.side == "sparse":
        m.d.comb += issue.product.empty.eq(0)


@inside("hw.issue.Throttle")
def groups_a_cycle_too_far_apart(m, throttle):
    """Scaled groups keep a cycle more than their scale units take."""
    late = Signal()
    m.d.sync += late.eq(local(m, "steps_left") != 0)
    with m.If(late & throttle.group_last):
        m.d.comb += throttle.allowed.eq(0)


@inside("hw.issue.Throttle")
def groups_a_cycle_too_close(m, throttle):
    """A scaled group may end in the last cycle of the one before it."""
    with m.If((local(m, "steps_left") == 1) & ~throttle.unit_last):
        m.d.comb += throttle.allowed.eq(1)


@inside("hw.core.DensePE")
def result_credit_lost(m, pe):
    """The room of the first unit of results is not given back."""
    returned, given = m.submodules.results.returned, Signal()
    with m.If(returned):
        m.d.sync += given.eq(1)
    m.d.comb += m.submodules.issue.returned.eq(returned & given)


@inside("hw.core.DensePE")
def result_credit_too_many(m, pe):
    """A run begins with room for one unit of results more than there is."""
    m.d.comb += m.submodules.issue.returned.eq(m.submodules.results.returned | pe.start)


# Products and scales.

@inside("hw.core.SparsePE")
def weights_of_the_next_position(m, pe):
    """The weights of a position are written one row further up."""
    for number in range(pe.config.sparse_rate):
        m.d.comb += m.submodules[f"weights_{number}"].write_address.eq(
            pe.load_weights.address + 1)


@inside("hw.core.DensePE")
def dense_weights_a_row_further(m, pe):
    """The dense PE reads the weights of the next row."""
    m.d.comb += m.submodules.weights.address.eq(m.submodules.issue.product.row + 1)


@inside("hw.core.DensePE")
def first_word_of_codes_lost(m, pe):
    """The first word of the first half of the codes is not written."""
    with m.If(pe.load_codes.address == 0):
        m.d.comb += m.submodules.codes.write.eq(0)


@inside("hw.pe.Issue")
def low_nibble_taken_as_signed(m, issue):
    """The dense side takes the low nibbles of codes of 8 bits for signed ones."""
    if issue.side == "dense":
        with m.If(issue.geometry.mx):
            m.d.comb += issue.product.codes_signed.eq(1)


@inside("hw.sparse_pe.SparseCodes")
def weights_taken_as_unsigned(m, codes):
    """The highest bit of a weight counts as a positive one."""
    m.d.sync += codes.negated.eq(local(m, "values"))


@inside("hw.core.SparsePE")
def sum_of_the_group_before(m, pe):
    """The products of a group are added to the sum of the one before."""
    for unit in range(pe.config.sparse_scale_units):
        m.d.comb += local(m, f"group_{unit}__first").eq(0)


@inside("hw.core.SparsePE")
def weight_scales_of_the_next_step(m, pe):
    """Each step of a group takes the weight scales of the lanes after its own."""
    m.d.comb += m.submodules.weight_scales.address.eq(m.submodules.drain.scale_row + 1)


@instead_of("hw.drain.decode_activation_scale",
            called_by=("hw.pe.Drain",))
def planes_weigh_the_same(code, mx, power):
    """The high nibbles of codes of 8 bits count as much as the low ones."""
    return scale_unit.decode_activation_scale(code, mx, Const(0, 2))


@instead_of("hw.loader.decode_weight_scales", called_by=("hw.core.Loader",))
def weight_scale_of_mx_as_e4m3(word, mx):
    """All weight scales are decoded as those of W4A4."""
    return scale_unit.decode_weight_scales(word, Const(0, 1))


@inside("hw.lanes.ScaleUnit")
def shift_of_two_bytes_lost(m, unit):
    """The scales' shift by 16 is not carried out."""
    m.d.sync += local(m, "two_bytes").eq(0)


@inside("hw.lanes.ScaleUnit")
def sums_not_cleared(m, unit):
    """The sums of a unit of work stay, to be added to the next one's."""
    with m.If(local(m, "step_2") & local(m, "last_2")):
        m.d.sync += local(m, "ring_0").eq(local(m, "total"))


@inside("hw.pe.Drain")
def sums_do_not_move_on(m, drain):
    """All chunks of a sparse PE's unit of work are those of its first lanes."""
    if drain.side == "sparse":
        m.d.comb += drain.advance.eq(0)


# The codes of a run.

@inside("hw.loader.CodeLoader")
def lost_nonzero(m, loader):
    """The code of the last channel of a word is in no entry."""
    m.d.comb += m.submodules.compactor.i.payload.mask[-1].eq(0)


@inside("hw.code_loader.Compactor")
def zero_that_costs_a_cycle(m, compactor):
    """The code of the first channel of a word has a place in an entry even where it is zero."""
    with m.If(compactor.i.ready):
        m.d.sync += local(m, "nonzero")[0].eq(compactor.i.payload.mask[0])


@inside("hw.loader.CodeLoader")
def dense_codes_on_both_sides(m, loader):
    """The sparse side takes the dense side's codes as well."""
    m.d.comb += m.submodules.compactor.i.payload.mask.eq(-1)


@inside("hw.loader.CodeLoader")
def sparse_codes_on_both_sides(m, loader):
    """The dense side's last word has the sparse side's codes as well."""
    m.d.sync += loader.dense_codes.data.eq(loader.read.response.payload)


@inside("hw.loader.CodeLoader")
def entries_left_out_too_many(m, loader):
    """Where the split is high, one entry too many is left out."""
    record = data.View(record_layout(loader.config, "sparse"), local(m, "record"))
    out = m.submodules.compactor.o.payload
    with m.If(out.rest):
        m.d.comb += record.skip.eq(out.skip + 1)


@inside("hw.core.Loader")
def row_of_the_run_again(m, loader):
    """The codes of every row of a run are those of its first one."""
    m.d.comb += m.submodules.codes.run.row_pitch.eq(0)


@inside("hw.core.Loader")
def scale_of_the_next_pixel(m, loader):
    """Pixels get the scale one byte further."""
    m.d.comb += m.submodules.codes.run.scale_byte.eq(
        loader.layer.scale_byte + local(m, "pixel") + 1)


# Tiles, jobs and runs.

@inside("hw.core.DensePE")
def row_of_a_run_off_by_one(m, pe):
    """Runs that begin below the image's first row begin one row further down."""
    row = pe.geometry.row
    m.d.comb += m.submodules.window.geometry.row.eq(row + (row != 0))


@inside("hw.core.Loader")
def run_a_row_short(m, loader):
    """A run that does not end its job is a row shorter than its input allows."""
    codes = m.submodules.codes
    with m.If((codes.rows != codes.run.rows) & (codes.rows > 3)):
        m.d.comb += local(m, "rows_end").eq(
            loader.layer.input_last - codes.run.rows + codes.rows)


@inside("hw.core.Loader")
def half_of_the_run_before(m, loader):
    """The records of every run are looked for in the first half."""
    offered = data.View(run_layout(loader.config), local(m, "offered"))
    m.d.comb += [offered.dense.records.eq(0), offered.sparse.records.eq(0)]


@inside("hw.core.Core")
def half_given_back_too_early(m, core):
    """The loader may overwrite the operands of a run that has just begun."""
    m.d.sync += m.submodules.loader.released.eq(m.submodules.post_processor.start)


@inside("hw.core.Loader")
def weights_of_two_jobs_on_each_other(m, loader):
    """The weights of every job are loaded to the bottom, as soon as they are there."""
    weights_do_not_wait_for_room(m, loader)
    config = loader.config
    m.d.sync += [local(m, "new_dense_weights").eq(config.weight_depth),
                 local(m, "new_sparse_weights").eq(config.sparse_weight_depth)]
    m.d.comb += [local(m, f"new_{side}_weight_scales").eq(scale_rows_of(config, side))
                 for side in ("dense", "sparse")]


@inside("hw.core.Loader")
def weights_do_not_wait_for_room(m, loader):
    """Weights are loaded although they overlap those of the job that is computed."""
    for name in ("dense_weights", "dense_weight_scales", "sparse_weights",
                 "sparse_weight_scales"):
        m.d.sync += local(m, f"old_{name}").eq(0)


@inside("hw.core.Core")
def weights_of_the_job_before(m, core):
    """A job that follows another one keeps its weights."""
    layer = m.submodules.sequencer.layer
    with m.If(layer.accumulate):
        m.d.comb += m.submodules.loader.layer.keep_weights.eq(1)


@inside("hw.core.Core")
def kept_weights_loaded_again(m, core):
    """No job keeps the weights of the one before."""
    m.d.comb += m.submodules.loader.layer.keep_weights.eq(0)


@inside("hw.core.Core")
def weight_scales_to_the_wrong_side(m, core):
    """The weight scales of the sparse side are also written to the dense PE."""
    load, _ = m.submodules.dense_0.ports["load_weight_scales"]
    sparse = m.submodules.loader.sparse_weight_scales
    with m.If(sparse.enable):
        m.d.comb += load.eq(Cat(sparse.enable, sparse.address, sparse.data))


@inside("hw.core.Core")
def table_of_the_job_before(m, core):
    """The epilogue always takes the first bank of its table."""
    m.d.comb += m.submodules.post_processor.run.bank.eq(0)


@inside("hw.core.PostProcessor")
def sums_of_the_tiles_before_lost(m, post_processor):
    """The partial sums that are added are zero."""
    for lane in range(post_processor.config.quad):
        m.d.comb += local(m, f"lane_{lane}__partial").eq(0)


@inside("hw.core.PostProcessor")
def partial_sum_of_the_chunk_before(m, post_processor):
    """Partial sums are read one chunk too early."""
    m.d.comb += m.submodules.partials.address.eq(local(m, "partial") - 1)


@inside("hw.core.PostProcessor")
def share_one_pixel_early(m, post_processor):
    """The dense side's pixels of MX8 are taken one too early."""
    share, walk, turn = post_processor.layer.share, m.submodules.walk, Signal(8)
    with m.If(walk.advance & walk.pixel_last):
        m.d.sync += turn.eq(Mux(turn + 1 == share, 0, turn + 1))
    with m.If(post_processor.start):
        m.d.sync += turn.eq(1)
    with m.If(share > 1):
        m.d.comb += local(m, "dense_pixel").eq(turn + 1 == share)


@inside("hw.core.PostProcessor")
def cut_one_pixel_early(m, post_processor):
    """A sum of the dense side is expected where the split of the pixel after has one."""
    dense, walk, phase = post_processor.run.dense, m.submodules.walk, Signal(8)
    with m.If(walk.advance & walk.pixel_last):
        m.d.sync += phase.eq(phase + dense.cut)
    with m.If(post_processor.start):
        m.d.sync += phase.eq(dense.cut)
    m.d.comb += local(m, "dense_words").eq(
        Mux(phase + dense.cut >= 256, dense.high, dense.low))


@inside("hw.core.Sequencer")
def chain_ends_too_early(m, sequencer):
    """A chain ends with its first descriptor."""
    m.d.sync += sequencer.layer.next.eq(0)


@inside("hw.core.Core")
def job_begins_while_another_is_loaded(m, core):
    """A descriptor does not wait for the loader."""
    m.d.comb += m.submodules.sequencer.ready.eq(1)


# Numbers.

@instead_of("hw.quantizer.round_half_even", called_by=("hw.requantizer.QuantizerLane",))
def code_ties_away_from_even(value, shift):
    """Codes are rounded half up: their sign comes later."""
    return (value + (1 << shift - 1))[shift:]


@instead_of("hw.post_processor.round_half_even", called_by=("hw.post_processor.EpilogueLane",))
def result_cut_off(value, shift):
    """The last step of the epilogue drops its bits; the others are as they should be."""
    return value >> shift if isinstance(shift, int) else rounding.round_half_even(value, shift)


@instead_of("hw.post_processor.saturate", called_by=("hw.post_processor.EpilogueLane",))
def saturation_wraps(value, bits):
    """What does not fit loses its upper bits."""
    return value[:bits].as_signed()


@instead_of("hw.requantizer.decode", called_by=("hw.core.Requantizer",))
def subnormal_scale_as_normal(code):
    """Every E4M3 scale has a leading one."""
    return Cat(code[:3], Const(1, 1)), Cat(code[3] | ~code[3:7].any(), code[4:7])


@inside("hw.core.Requantizer")
def low_half_is_the_high_one(m, requantizer):
    """Both halves of the network input are its high bytes."""
    for lane in range(requantizer.config.quad):
        m.d.comb += local(m, f"quantizer_{lane}__low").eq(0)


# Labels, lists and counts.

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


@inside("hw.requantizer.ChannelLists")
def bucket_of_twice_the_width(m, lists):
    """A balanced list is in the order of one bit less of the counts."""
    zeros, shift = local(m, "zeros"), local(m, "shift")
    with m.If(lists.balance):
        m.d.sync += local(m, "bucket").eq((zeros >> shift)[:6] & ~1)


@inside("hw.core.Requantizer")
def cut_too_high(m, requantizer):
    """One pixel of 256 more has the high split."""
    tile = m.submodules.lists.o.payload
    with m.If(tile.cut != 0):
        m.d.comb += m.submodules.writer.tiles.payload.cut.eq(tile.cut + 1)


@inside("hw.core.Requantizer")
def split_one_channel_late(m, requantizer):
    """The first sparse channel of a list is the dense side's."""
    tile, to = m.submodules.lists.o.payload, m.submodules.writer.tiles.payload
    with m.If((tile.low == tile.high) & (tile.low != tile.count)):
        m.d.comb += [to.low.eq(tile.low + 1), to.high.eq(tile.high + 1)]


@inside("hw.core.Requantizer")
def limit_of_the_dense_side_ignored(m, requantizer):
    """The dense side may have any number of words."""
    m.d.comb += m.submodules.lists.dense_limit.eq(255)


@inside("hw.core.Requantizer")
def slots_of_the_whole_tensor(m, requantizer):
    """The lists of all tiles have the slots of the first one's."""
    m.d.comb += m.submodules.writer.tiles.payload.first.eq(0)


@inside("hw.core.Requantizer")
def entries_cost_nothing_to_fill(m, requantizer):
    """The balanced split leaves out what a pixel costs besides its non-zeros."""
    m.d.comb += m.submodules.lists.cost_group.eq(0)


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
