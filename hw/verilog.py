"""Verilog of a core and its description."""

import re

from amaranth.back import verilog

from .carry import CarryCells
from .core import Core
from .descriptor import FIELDS, VERSION, WORDS, Error, Format, Kind
from .parts import collect
from .registers import REGISTERS

__all__ = ["MODULE", "emit", "generate"]

MODULE = "sqdm_core"


def generate(config, *, carry_cells=False):
    """Verilog text of the core and a plain dictionary that describes it.

    The text depends on the arguments alone. With ``carry_cells`` the multipliers are made of ECP5
    carry cells (see `hw.carry`), which only tools for that FPGA know. The dictionary has
    ``module``, ``parameters`` (the fields of `Config`), ``derived`` widths, ``ports``,
    ``registers``, ``descriptor``, ``errors``, ``kinds`` and ``formats``.
    """
    core = Core(config)
    header = (f"// {MODULE}: SQ-DM core, configuration {config.name}\n"
              + "".join(f"//   {name} = {value}\n" for name, value in config.as_dict().items())
              + "// Clock clk; rst is synchronous and active high.\n\n")
    platform = CarryCells() if carry_cells else None
    return header + emit(core, MODULE, platform), describe(core, config)


def describe(core, config):
    """The dictionary that `generate` returns."""
    ports = [{"name": "clk", "direction": "input", "width": 1},
             {"name": "rst", "direction": "input", "width": 1}]
    for path, member, value in core.signature.flatten(core):
        ports.append({
            "name": "__".join(map(str, path)),
            "direction": "input" if member.flow.name == "In" else "output",
            "width": len(value.as_value() if hasattr(value, "as_value") else value),
        })
    return {
        "module": MODULE,
        "parameters": config.as_dict(),
        "derived": {
            "multipliers": config.multipliers,
            "port_width": config.port_width,
            "sum_width": config.sum_width,
            "accumulator_width": config.accumulator_width,
        },
        "ports": ports,
        "registers": [
            {"name": name, "number": number, "access": access, "fields": [
                {"name": field, "low": low, "bits": bits, "meaning": meaning}
                for field, (low, bits, meaning) in parts.items()]}
            for name, (number, access, parts) in REGISTERS.items()],
        "descriptor": {
            "version": VERSION,
            "words": WORDS,
            "fields": [
                {"name": name, "word": word, "low": low, "bits": bits, "meaning": meaning}
                for name, (word, low, bits, meaning) in FIELDS.items()],
        },
        "errors": {error.name: error.value for error in Error},
        "kinds": {kind.name: kind.value for kind in Kind},
        "formats": {form.name: form.value for form in Format},
    }


def emit(component, name, platform=None):
    """Verilog text of ``component`` as module ``name``, every part once, innermost first."""
    modules = [*collect(component).items(), (name, component)]
    return "\n".join(
        fold_initial_values(
            verilog.convert(part, name=module, platform=platform, emit_src=False))
        for module, part in modules)


def fold_initial_values(text):
    """``text`` with the line per word that sets a memory to zero folded into a loop."""
    line = (r"    (?P<name>\S+ ?)\[0\] = (?P<zero>\d+'(?:h0+|d0));\n"
            r"(?:    (?P=name)\[\d+\] = (?P=zero);\n)*")

    def loop(match):
        depth = match.group(0).count("\n")
        name, zero = match.group("name"), match.group("zero")
        return (f"    for (integer initial_word = 0; initial_word < {depth};"
                f" initial_word = initial_word + 1)\n"
                f"      {name}[initial_word] = {zero};\n")

    return re.sub(line, loop, text)
