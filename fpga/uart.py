"""UART receiver and transmitter: 8 data bits, low bit first, no parity, one stop bit."""

from amaranth.hdl import Cat, Const, Module, Signal
from amaranth.lib import cdc, data, stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["Receiver", "Transmitter"]


def check_divisor(divisor):
    if not isinstance(divisor, int):
        raise TypeError(f"divisor must be an integer, not {divisor!r}")
    if divisor < 4:
        raise ValueError(f"divisor must be at least 4, not {divisor!r}")


class Receiver(wiring.Component):
    """Receive bytes.

    Each bit is sampled once, in its middle, counted from the falling edge of the start bit; with a
    divisor of at least 16 a sender may be 4 % fast or slow. A low level shorter than half a bit is
    no start bit. A byte comes out in the middle of its stop bit. If that is low, ``error`` is set,
    and the receiver waits for the line to go high before it looks for a start bit.

    Parameters
    ----------
    divisor : int
        Clock cycles per bit, at least 4.

    Members
    -------
    rx : ``In(1)``
        The line, high when idle; not synchronous to the clock.
    o : ``Out(stream.Signature({data: 8, error: 1}, always_ready=True))``
        Bytes; they cannot wait.

    Raises
    ------
    TypeError, ValueError
        If `divisor` is not an integer of at least 4.
    """

    def __init__(self, divisor):
        check_divisor(divisor)
        self._divisor = divisor
        super().__init__({
            "rx": In(1, init=1),
            "o": Out(stream.Signature(data.StructLayout({"data": 8, "error": 1}),
                                      always_ready=True)),
        })

    def elaborate(self, platform):
        m = Module()

        line = Signal(init=1)
        m.submodules.synchronizer = cdc.FFSynchronizer(self.rx, line, init=1)

        wait = Signal(range(self._divisor))
        left = Signal(range(8))

        def restart(cycles):
            return wait.eq(cycles - 1)

        m.d.comb += self.o.p.error.eq(~line)
        with m.If(wait != 0):
            m.d.sync += wait.eq(wait - 1)

        with m.FSM(name="receive"):
            with m.State("Idle"):
                m.d.sync += restart(self._divisor // 2)
                with m.If(~line):
                    m.next = "Start"
            with m.State("Start"):
                with m.If(line):
                    m.next = "Idle"
                with m.Elif(wait == 0):
                    m.d.sync += [restart(self._divisor), left.eq(7)]
                    m.next = "Bits"
            with m.State("Bits"):
                with m.If(wait == 0):
                    m.d.sync += [
                        restart(self._divisor),
                        self.o.p.data.eq(Cat(self.o.p.data[1:], line)),
                        left.eq(left - 1),
                    ]
                    with m.If(left == 0):
                        m.next = "Stop"
            with m.State("Stop"):
                with m.If(wait == 0):
                    m.d.comb += self.o.valid.eq(1)
                    m.next = "Idle"
                    with m.If(~line):
                        m.next = "Recover"
            with m.State("Recover"):
                with m.If(line):
                    m.next = "Idle"

        return m


class Transmitter(wiring.Component):
    """Send bytes.

    A byte is taken when the stop bit of the one before has been sent; ten bits later the next can
    be taken, so that bytes follow each other without a gap.

    Parameters
    ----------
    divisor : int
        Clock cycles per bit, at least 4.

    Members
    -------
    i : ``In(stream.Signature(8))``
        Bytes.
    tx : ``Out(1)``
        The line, high when idle; comes from a register.

    Raises
    ------
    TypeError, ValueError
        If `divisor` is not an integer of at least 4.
    """

    def __init__(self, divisor):
        check_divisor(divisor)
        self._divisor = divisor
        super().__init__({
            "i": In(stream.Signature(8)),
            "tx": Out(1, init=1),
        })

    def elaborate(self, platform):
        m = Module()

        wait = Signal(range(self._divisor))
        left = Signal(range(10))      # bits behind the one on the line
        bits = Signal(9, init=0x1FF)  # those bits, then ones

        def put(first, others, count):
            m.d.sync += [
                Cat(self.tx, bits).eq(Cat(first, others)),
                left.eq(count),
                wait.eq(self._divisor - 1),
            ]

        m.d.comb += self.i.ready.eq((wait == 0) & (left == 0))
        with m.If(wait != 0):
            m.d.sync += wait.eq(wait - 1)
        with m.Elif(left != 0):
            put(bits[0], Cat(bits[1:], Const(1, 1)), left - 1)
        with m.Elif(self.i.valid):
            put(Const(0, 1), Cat(self.i.payload, Const(1, 1)), 9)

        return m
