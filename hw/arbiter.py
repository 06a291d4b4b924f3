"""The arbiter of reads: several units at one memory port."""

from amaranth import Module, Signal
from amaranth.lib import fifo, wiring
from amaranth.lib.wiring import In, Out

from .memory_port import ReadPort

__all__ = ["ReadArbiter"]


class ReadArbiter(wiring.Component):
    """Passes on the requests of several clients and hands each its responses; adds no cycle.

    The client with the lowest number goes first; a request that is offered stays until it is taken,
    whoever else asks meanwhile. Responses come in the order of requests, so a client that does not
    take its response holds up the others: it asks only for what it can take without them. No more
    than `in_flight` requests are without a response.

    Parameters
    ----------
    config : Config
    clients : int

    Members
    -------
    i_0, i_1, ... : ``In(ReadPort(config))``
    o : ``Out(ReadPort(config))``
    owner : ``Out``
        Client whose request ``o`` shows.
    """

    in_flight = 64

    def __init__(self, config, clients):
        self.clients = clients
        super().__init__({
            **{f"i_{number}": In(ReadPort(config)) for number in range(clients)},
            "o": Out(ReadPort(config)),
            "owner": Out(range(max(2, clients))),
        })

    def elaborate(self, platform):
        m = Module()
        ports = [getattr(self, f"i_{number}") for number in range(self.clients)]
        m.submodules.owners = owners = fifo.SyncFIFO(
            width=len(self.owner), depth=self.in_flight)
        chosen, held, holder = Signal.like(self.owner), Signal(), Signal.like(self.owner)
        for number, port in reversed([*enumerate(ports)]):
            with m.If(port.request.valid):
                m.d.comb += chosen.eq(number)
        with m.If(held):
            m.d.comb += chosen.eq(holder)
        request, response = self.o.request, self.o.response
        m.d.comb += [
            self.owner.eq(chosen),
            owners.w_data.eq(chosen),
            owners.w_en.eq(request.valid & request.ready),
            owners.r_en.eq(response.valid & response.ready),
        ]
        m.d.sync += [held.eq(request.valid & ~request.ready), holder.eq(chosen)]
        with m.Switch(chosen):
            for number, port in enumerate(ports):
                with m.Case(number):
                    m.d.comb += [
                        request.valid.eq(port.request.valid & owners.w_rdy),
                        request.payload.eq(port.request.payload),
                        port.request.ready.eq(request.ready & owners.w_rdy),
                    ]
        with m.Switch(owners.r_data):
            for number, port in enumerate(ports):
                with m.Case(number):
                    m.d.comb += [
                        port.response.valid.eq(response.valid & owners.r_rdy),
                        response.ready.eq(port.response.ready & owners.r_rdy),
                    ]
        for port in ports:
            m.d.comb += port.response.payload.eq(response.payload)
        return m
