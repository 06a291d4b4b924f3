"""Lint of the emitted Verilog: Verilator's -Wall with the waivers that the emitter needs."""

from hw.verilog import MODULE, generate
from sim.verilator import Waiver, lint

__all__ = ["WAIVERS", "lint_core"]

WAIVERS = (
    Waiver("DECLFILENAME", "*", "one file holds all modules"),
    Waiver("WIDTHEXPAND", "*", "the emitter extends operands by Verilog's own rules, as its cells"
           " ask for; Amaranth has fixed every width before"),
    Waiver("WIDTHTRUNC", "*", "the same for results: Amaranth assigns to the width of the target"),
    Waiver("UNUSEDSIGNAL", "*", "fields of structures get a name each, read or not"),
    Waiver("PROCASSINIT", "*", "registers have an initial value and a reset, which FPGAs use both"),
    Waiver("CASEINCOMPLETE", "*", "the emitter assigns a default before each case, so that no"
           " latch comes of it; yosys checks that there is none"),
    Waiver("CASEOVERLAP", "*", "a priority choice is emitted as casez, the first match counts"),
    Waiver("VARHIDDEN", "*", "a signal may have the name of the unit that it is in"),
    Waiver("CMPCONST", "*", "each number is compared with a limit; the largest is never below it"),
    Waiver("SYMRSVDWORD", "*'interrupt'", "the usual name of that port"),
)
"""Accepted warnings; anything else is an error of ours."""


def lint_core(config):
    """Warnings on the core of ``config`` that no waiver covers, and waivers that cover nothing."""
    text, _ = generate(config)
    return lint({f"{MODULE}.v": text}, MODULE, WAIVERS)
