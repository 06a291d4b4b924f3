"""The sparse PE: every cycle up to M non-zero activations, each times L output channels."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from .buffer import Buffer, WideBuffer
from .drain import delay
from .job import entry_layout, load_layout
from .lanes import SparseCodes, SparseGroup
from .pe import PE

__all__ = ["SparsePE"]


class SparsePE(PE):
    """Convolves the sparse side's part of a run, see `PE`.

    Gathers: for each output pixel, tile of lanes and tap it reads the entries of the input pixel,
    and each of an entry's M non-zeros meets the weights of L output channels in one cycle. Zeros
    take no cycle, nor do taps outside the image. The entry is read first, then its rows of weights.

    Members
    -------
    load_entries, load_weights : ``In``
        Writes of the buffers. ``load_weights.enable`` has a bit for each V output channels.
    work : ``Out(range(M + 1))``
        Non-zeros of the entry that was issued `Buffer.latency` cycles before.
    """

    side = "sparse"
    group = SparseGroup
    operand_cycles = 2 * Buffer.latency

    def __init__(self, config):
        super().__init__(config, {
            "load_entries": In(load_layout(1, config.entry_depth, entry_layout(config).size)),
            "load_weights": In(load_layout(
                config.sparse_lanes // config.vector, config.sparse_weight_depth,
                config.port_width)),
            "work": Out(range(config.sparse_rate + 1)),
        })

    def elaborate(self, platform):
        m = Module()
        config, rate, lanes = self.config, self.config.sparse_rate, self.config.sparse_lanes
        issue = self.issues(m)
        product = issue.product
        m.submodules.entries = entries = Buffer(config.entry_depth, entry_layout(config).size)
        m.submodules.codes = codes = SparseCodes(config)
        entries.connect_load(m, self.load_entries)
        m.d.comb += [
            entries.request.eq(issue.fire),
            entries.address.eq(product.address),
        ]

        # cycle 2: the entry is here; each of its non-zeros reads its row of weights
        there = Signal(data.StructLayout({"row": product.row.shape(), "empty": 1, "masked": 1}))
        m.d.comb += there.eq(delay(
            m, Cat(product.row, product.empty, product.masked), Buffer.latency, "entry"))
        found = Signal(entry_layout(config))
        counted, filled = Signal(rate), Signal(rate)
        m.d.comb += [
            found.eq(entries.data),
            counted.eq(Cat(
                ~there.empty & ~(there.masked & (found[k].position < self.geometry.high))
                for k in range(rate))),
            filled.eq(Cat(
                (found[k].code != 0) & counted[k] & entries.response for k in range(rate))),
            self.work.eq(sum(filled[k] for k in range(rate))),
        ]
        copies = []
        for k in range(rate):
            m.submodules[f"weights_{k}"] = weights = WideBuffer(
                config.sparse_weight_depth, 4 * lanes, columns=lanes // config.vector)
            weights.connect_load(m, self.load_weights)
            m.d.comb += [
                weights.request.eq(entries.response),
                weights.address.eq(there.row + found[k].position),
            ]
            copies.append(weights.data)
            # cycle 3: the codes; cycle 4: codes and weights
            code = Signal(4, name=f"code_{k}")
            m.d.sync += code.eq(Mux(counted[k], found[k].code, 0))
            m.d.comb += codes.codes[k].eq(code)

        signs = Cat(product.codes_signed, product.weights_signed)
        early = delay(m, signs, self.operand_cycles - SparseCodes.latency, "signs")
        m.d.comb += Cat(codes.codes_signed, codes.weights_signed).eq(early)
        for unit, part in enumerate(self.groups(m, issue)):
            m.d.comb += [
                part.plain.eq(codes.plain),
                part.negated.eq(codes.negated),
                part.weights.eq(Cat(
                    copy.word_select(lane, 4)
                    for lane in self.lanes_of_unit(unit) for copy in copies)),
            ]
        return m
