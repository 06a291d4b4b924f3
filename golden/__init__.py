"""Golden model: the network in float, its quantized form, and the integers that the RTL equals."""
