"""Verilog and its description."""

import re

from amaranth.back import verilog

from .parts import collect

__all__ = ["emit"]


def emit(component, name):
    """Verilog text of ``component`` as module ``name``, every part once, innermost first."""
    modules = [*collect(component).items(), (name, component)]
    return "\n".join(
        fold_initial_values(verilog.convert(part, name=module, emit_src=False))
        for module, part in modules)


def fold_initial_values(text):
    """``text`` with the line per word that sets a memory to zero folded into a loop."""
    line = r"    (?P<name>\S+ ?)\[0\] = (?P<zero>\d+'(?:h0+|d0));\n(?:    (?P=name)\[\d+\] = (?P=zero);\n)*"

    def loop(match):
        depth = match.group(0).count("\n")
        name, zero = match.group("name"), match.group("zero")
        return (f"    for (integer word = 0; word < {depth}; word = word + 1)\n"
                f"      {name}[word] = {zero};\n")

    return re.sub(line, loop, text)
