"""The dense PE: every cycle the dot products of a word of V channels with K output channels."""

from amaranth import Cat, Module
from amaranth.lib.wiring import In, Out

from .buffer import Buffer, WideBuffer
from .drain import delay
from .job import load_layout
from .lanes import DenseGroup, extend_codes
from .pe import PE

__all__ = ["DensePE"]


class DensePE(PE):
    """Convolves the dense side's part of a run, see `PE`.

    A word of V codes times K output channels in one cycle, zeros or not: a word of codes and a row
    of weights are read together.

    Members
    -------
    load_codes, load_weights : ``In``
        Writes of the buffers. ``load_weights.enable`` has a bit for each channel of a word.
    work : ``Out(1)``
        A word is issued.
    """

    side = "dense"
    group = DenseGroup
    operand_cycles = Buffer.latency

    def __init__(self, config):
        super().__init__(config, {
            "load_codes": In(load_layout(1, config.codes_depth, config.port_width)),
            "load_weights": In(load_layout(
                config.vector, config.weight_depth, 4 * config.dense_lanes)),
            "work": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, vector, lanes = self.config, self.config.vector, self.config.dense_lanes
        issue = self.issues(m)
        product = issue.product
        m.submodules.codes = codes = WideBuffer(config.codes_depth, config.port_width)
        m.submodules.weights = weights = WideBuffer(
            config.weight_depth, 4 * lanes * vector, columns=vector)
        codes.connect_load(m, self.load_codes)
        weights.connect_load(m, self.load_weights)
        m.d.comb += [
            self.work.eq(issue.fire & ~product.empty),
            codes.request.eq(issue.fire),
            codes.address.eq(product.address),
            weights.request.eq(issue.fire),
            weights.address.eq(product.row),
        ]

        # cycle 2: codes and weights; the sums of an empty group count for nothing, for its
        # scale is zero
        codes_signed = delay(m, product.codes_signed, self.operand_cycles, "codes_signed")
        weights_signed = delay(m, product.weights_signed, self.operand_cycles, "weights_signed")
        for unit, part in enumerate(self.groups(m, issue)):
            m.d.comb += [
                part.codes.eq(extend_codes(codes.data, codes_signed)),
                part.weights.eq(Cat(
                    weights.data.word_select(channel * lanes + lane, 4)
                    for lane in self.lanes_of_unit(unit) for channel in range(vector))),
                part.weights_signed.eq(weights_signed),
            ]
        return m
