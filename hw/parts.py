"""Parts: components that appear many times but are one module in the Verilog.

Amaranth emits a module for every instance. A unit that repeats a lane therefore converts the lane
once and places it as an instance of that module; `hw.verilog` collects the parts of a design and
emits each of them once.
"""

from amaranth import ClockSignal, Instance, ResetSignal
from amaranth.hdl import Value
from amaranth.lib.wiring import In

__all__ = ["place", "collect"]


def place(m, name, module, part):
    """Place an instance of Verilog module ``module``, made from ``part``, in ``m``.

    Returns an interface with the members of ``part``: drive the ones it takes, read the others.
    The parent lists the part under the same module name in its ``parts``.
    """
    face = part.signature.create(path=(name,))
    ports = {}
    for path, member, value in part.signature.flatten(face):
        side = "i" if member.flow is In else "o"
        ports[f"{side}_{'__'.join(map(str, path))}"] = Value.cast(value)
    m.submodules[name] = Instance(module, i_clk=ClockSignal(), i_rst=ResetSignal(), **ports)
    return face


def collect(component):
    """Every part below ``component``: a dictionary of module names, innermost parts first.

    Raises
    ------
    ValueError
        If one module name stands for two different parts.
    """
    found = {}
    for module, part in getattr(component, "parts", {}).items():
        for inner, deeper in collect(part).items():
            _add(found, inner, deeper)
        _add(found, module, part)
    return found


def _add(found, module, part):
    if module in found and repr(found[module].signature) != repr(part.signature):
        raise ValueError(f"part {module!r} must be one component, not two with other ports")
    found.setdefault(module, part)
