"""The arbiter of reads: every client gets its own responses, in order, whoever is held up."""

import collections
import random

import pytest

from hw.arbiter import ReadArbiter
from hw.config import TINY
from tests.pe_model import STALLS, simulate


class FewReads(ReadArbiter):
    """An arbiter that lets few reads be on their way, so that a short test reaches the limit."""

    in_flight = 3


def word_at(address):
    """What memory holds."""
    return (address * 0x9E3779B97F4A7C15 + 5) & (1 << TINY.port_width) - 1


class Traffic:
    """Clients that ask and take at random, and a memory that answers in order.

    ``client_stall`` holds back requests and responses of the clients, ``request_stall`` and
    ``response_stall`` those of memory; ``quick`` clients ask all the time.
    """

    def __init__(self, ctx, dut, rng, client_stall, request_stall, response_stall, quick=()):
        self.ctx, self.dut, self.rng, self.client_stall = ctx, dut, rng, client_stall
        self.request_stall, self.response_stall, self.quick = request_stall, response_stall, quick
        self.ports = [getattr(dut, f"i_{number}") for number in range(dut.clients)]
        self.offers = [None] * dut.clients          # address that a client offers
        self.expected = [collections.deque() for _ in self.ports]
        self.flight = collections.deque()           # client and address, in order
        self.answer = self.shown = None
        self.granted = collections.Counter()
        self.most = 0

    def drive(self, asking=True):
        ctx, rng = self.ctx, self.rng
        for number, port in enumerate(self.ports):
            wants = number in self.quick or rng.random() >= self.client_stall
            if self.offers[number] is None and asking and wants:
                self.offers[number] = rng.getrandbits(TINY.address_width)
            ctx.set(port.request.valid, self.offers[number] is not None)
            ctx.set(port.request.payload,
                    rng.getrandbits(TINY.address_width) if self.offers[number] is None
                    else self.offers[number])
            ctx.set(port.response.ready, rng.random() >= self.client_stall)
        if self.answer is None and self.flight and rng.random() >= self.response_stall:
            self.answer = self.flight[0]
        ctx.set(self.dut.o.request.ready, rng.random() >= self.request_stall)
        ctx.set(self.dut.o.response.valid, self.answer is not None)
        ctx.set(self.dut.o.response.payload,
                word_at(self.answer[1]) if self.answer else rng.getrandbits(TINY.port_width))

    def check(self):
        ctx, request, response = self.ctx, self.dut.o.request, self.dut.o.response
        taken = [ctx.get(port.request.ready) and self.offers[number] is not None
                 for number, port in enumerate(self.ports)]
        given = [ctx.get(port.response.valid) for port in self.ports]
        assert sum(taken) <= 1 and sum(given) <= 1
        valid, address = ctx.get(request.valid), ctx.get(request.payload)
        if self.shown is not None:
            assert valid and (address, ctx.get(self.dut.owner)) == self.shown, "a request must stay"
        self.shown = None
        passed = None
        if valid:
            owner = ctx.get(self.dut.owner)
            assert address == self.offers[owner]
            passed = owner, address
            if not ctx.get(request.ready):
                self.shown, passed = (address, owner), None
        assert taken == [passed is not None and number == passed[0]
                         for number in range(len(self.ports))]
        client = None
        if self.answer is not None:
            client = self.answer[0]
            assert given == [number == client for number in range(len(self.ports))]
            assert ctx.get(self.ports[client].response.payload) == word_at(
                self.expected[client][0])
            assert ctx.get(response.ready) == ctx.get(self.ports[client].response.ready)
        else:
            assert not any(given)
        return passed, client

    def step(self, passed, client):
        if client is not None and self.ctx.get(self.dut.o.response.ready):
            self.expected[client].popleft()
            self.flight.popleft()
            self.answer = None
        if passed is not None:
            owner, address = passed
            self.granted[owner] += 1
            self.offers[owner] = None
            self.expected[owner].append(address)
            self.flight.append(passed)
        self.most = max(self.most, len(self.flight))
        assert self.most <= self.dut.in_flight

    async def cycle(self, asking=True):
        self.drive(asking)
        seen = self.check()
        self.step(*seen)
        await self.ctx.tick()


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("client_stall", STALLS)
@pytest.mark.parametrize("memory_stall", STALLS)
def test_traffic(clients, client_stall, memory_stall):
    """Random requests, held up on either side; at the end everyone has got everything."""
    dut = ReadArbiter(TINY, clients)

    async def bench(ctx):
        rng = random.Random(int(client_stall * 100 + memory_stall * 10))
        traffic = Traffic(ctx, dut, rng, client_stall, memory_stall, memory_stall)
        for _ in range(300):
            await traffic.cycle()
        for _ in range(3000):
            if not traffic.flight and not any(traffic.offers):
                break
            await traffic.cycle(asking=False)
        assert not any(traffic.expected)
        assert len(traffic.granted) == clients

    simulate(dut, bench)


def test_the_first_client_goes_first():
    """One that always asks leaves nothing to the others; the next one gets what it leaves."""
    dut = ReadArbiter(TINY, 3)

    async def bench(ctx):
        traffic = Traffic(ctx, dut, random.Random(1), 0.5, 0, 0, quick=(1, 2))
        for _ in range(200):
            await traffic.cycle()
        # a client that takes slowly holds up requests, but not their order
        assert traffic.granted[2] == 0 < min(traffic.granted[0], traffic.granted[1])

    simulate(dut, bench)


def test_as_many_reads_as_may_be_on_their_way():
    dut = FewReads(TINY, 2)

    async def bench(ctx):
        traffic = Traffic(ctx, dut, random.Random(2), 0, 0, 0.9)
        for _ in range(100):
            await traffic.cycle()
        assert traffic.most == FewReads.in_flight

    simulate(dut, bench)


def test_a_word_a_cycle():
    """Nothing is lost between clients that ask all the time and a memory that always answers."""
    dut = ReadArbiter(TINY, 2)

    async def bench(ctx):
        traffic = Traffic(ctx, dut, random.Random(3), 0, 0, 0)
        for _ in range(100):
            await traffic.cycle()
        assert sum(traffic.granted.values()) == 100

    simulate(dut, bench)
