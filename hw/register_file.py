"""The register port."""

from amaranth import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .registers import REGISTERS

__all__ = ["RegisterFile"]

DETECTOR_COUNT = "detector_count"


class RegisterFile(wiring.Component):
    """Registers of `hw.registers.REGISTERS` behind the register port.

    Members
    -------
    address, write, write_data, read : ``In``
        A write takes effect at the end of its cycle.
    read_data : ``Out(32)``
        The register, in the cycle after ``read``; 0 where there is none.
    strobe_<name> : ``Out(1)``
        A writable register is written in this cycle; ``write_data`` is its value.
    read_<name> : ``Out(1)``
        ``detector_count`` is read in this cycle; its value is due in the next one.
    <name> : ``In(32)``
        Value of a readable register.
    """

    def __init__(self):
        members = {}
        for name, (_, access, _) in REGISTERS.items():
            if "read" in access:
                members[name] = In(32)
            if "write" in access:
                members[f"strobe_{name}"] = Out(1)
        super().__init__({
            "address": In(5),
            "write": In(1),
            "write_data": In(32),
            "read": In(1),
            "read_data": Out(32),
            f"read_{DETECTOR_COUNT}": Out(1),
            **members,
        })

    def elaborate(self, platform):
        m = Module()
        value, late = Signal(32), Signal()
        m.d.sync += late.eq(0)
        for name, (number, access, _) in REGISTERS.items():
            chosen = self.address == number
            if "write" in access:
                m.d.comb += getattr(self, f"strobe_{name}").eq(self.write & chosen)
            if name == DETECTOR_COUNT:
                m.d.comb += self.read_detector_count.eq(self.read & chosen)
                m.d.sync += late.eq(self.read & chosen)
        with m.If(self.read):
            m.d.sync += value.eq(0)
            with m.Switch(self.address):
                for name, (number, access, _) in REGISTERS.items():
                    if "read" in access and name != DETECTOR_COUNT:
                        with m.Case(number):
                            m.d.sync += value.eq(getattr(self, name))
        m.d.comb += self.read_data.eq(value)
        with m.If(late):
            m.d.comb += self.read_data.eq(self.detector_count)
        return m
