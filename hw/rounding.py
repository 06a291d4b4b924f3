"""Named narrowing steps as expressions: the only places where the hardware drops bits of a value.

Twins of the functions of the same names in ``golden.rounding``.
"""

from amaranth.hdl import Cat, Const, Mux, Value, signed, unsigned

__all__ = ["round_half_even", "saturate"]


def round_half_even(value, shift):
    """``value`` divided by 2 to the power ``shift``, rounded to nearest, ties to even.

    Parameters
    ----------
    value : value-castable
        Signed or unsigned.
    shift : int or unsigned value-castable
        At most 31; 0 leaves the value as it is.

    Returns
    -------
    Value
        As signed as ``value`` and one bit wider.

    Raises
    ------
    ValueError
        If the shift is negative, or can exceed 31.
    TypeError
        If the shift is a signed value.
    """
    value = Value.cast(value)
    if isinstance(shift, int):
        if not 0 <= shift <= 31:
            raise ValueError(f"shift must be between 0 and 31, not {shift!r}")
        most = shift
    else:
        shift = Value.cast(shift)
        if shift.shape().signed:
            raise TypeError(f"shift must be unsigned, not {shift.shape()!r}")
        if len(shift) > 5:
            raise ValueError(f"shift must be at most 5 bits wide, not {len(shift)!r}")
        most = (1 << len(shift)) - 1
    if most == 0:
        floor, carry = value, Const(0, 1)
    else:
        # The point stands above bit `most`: a constant shift moves it, a variable one the bits.
        scaled = extended(value, most + 1) if isinstance(shift, int) else (value << most) >> shift
        floor = scaled[most:].as_signed() if value.shape().signed else scaled[most:]
        half, sticky, odd = scaled[most - 1], scaled[:most - 1].any(), scaled[most]
        carry = half & (sticky | odd)
    shape = signed(len(value) + 1) if value.shape().signed else unsigned(len(value) + 1)
    return cast(floor + carry, shape)


def saturate(value, bits, symmetric=False):
    """``value`` clipped to the range of a signed number of ``bits`` bits.

    With ``symmetric`` the most negative number of that range is left out.

    Raises
    ------
    ValueError
        If ``bits`` is less than 2.
    """
    if not isinstance(bits, int) or bits < 2:
        raise ValueError(f"bits must be an integer of at least 2, not {bits!r}")
    value = Value.cast(value)
    high = (1 << bits - 1) - 1
    low = -high if symmetric else -high - 1
    kept = cast(value, signed(bits))
    return Mux(value > high, Const(high, signed(bits)),
               Mux(value < low, Const(low, signed(bits)), kept))


def extended(value, width):
    """``value`` with its sign (or zeros) repeated to at least ``width`` bits."""
    missing = width - len(value)
    if missing <= 0:
        return value
    filler = value[-1].replicate(missing) if value.shape().signed else Const(0, missing)
    wide = Cat(value, filler)
    return wide.as_signed() if value.shape().signed else wide


def cast(value, shape):
    """``value``'s low bits as ``shape``."""
    bits = extended(value, shape.width)[:shape.width]
    return bits.as_signed() if shape.signed else bits
