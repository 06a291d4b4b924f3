"""A descriptor inside the core: its fields and the sizes that follow from them."""

from amaranth.lib import data

from .descriptor import FIELDS

__all__ = ["layer_layout"]


def layer_layout(config):
    """The fields of `hw.descriptor.FIELDS` and what the sequencer derives from them.

    ``plane``: pixels of the tensor. ``slot_words``: code words of a pixel in slot order (both
    segments; two for IN16). ``output_words``: ceil(outputs / V). ``mx``: format MX8 or IN16.
    """
    words = (max(config.max_channels, config.max_outputs) // config.vector).bit_length() + 1
    return data.StructLayout({
        **{name: bits for name, (_, _, bits, _) in FIELDS.items()},
        "plane": 16,
        "slot_words": words,
        "output_words": words,
        "mx": 1,
    })
