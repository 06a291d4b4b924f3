"""The sizes of a layer call on a core, and the error of a layer that a core cannot run."""

import dataclasses

import numpy as np

from hw.descriptor import Format

__all__ = ["BLOCK", "FitError", "Shape"]

BLOCK = 32   # slots that share a scale in MX8 and IN16, and the tile of their channels


class FitError(ValueError):
    """A layer that a core cannot run; the text says which rule it breaks and by how much.

    ``error`` is the code of `hw.descriptor.Error` with which the core would refuse it.
    """

    def __init__(self, error, message):
        super().__init__(message)
        self.error = error


def _ceil(value, step):
    return -(-value // step)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a layer call on a core.

    Members
    -------
    format : hw.descriptor.Format
    kernel, height, width : of the convolution
    channels : tuple of the segments' channels
    outputs : output channels
    vector : V
    residual : bool, whether a tensor is added to the output
    """

    format: Format
    kernel: int
    height: int
    width: int
    channels: tuple
    outputs: int
    vector: int
    residual: bool

    @classmethod
    def of(cls, call, config):
        """Shape of ``call`` on the core of ``config``."""
        requantization, convolution = call.requantization, call.convolution
        _, height, width = np.shape(requantization.segments[0])
        return cls(
            format=Format(int(requantization.format)), kernel=int(convolution.kernel),
            height=height, width=width,
            channels=tuple(len(segment) for segment in requantization.segments),
            outputs=len(convolution.weight_codes), vector=config.vector,
            residual=convolution.residual is not None)

    @property
    def mx(self):
        """Whether codes and weights have two nibbles, and scales are for blocks of 32 slots."""
        return self.format in (Format.MX8, Format.IN16)

    @property
    def labelled(self):
        """Whether the detector keeps counts of the channels, to divide them between both sides."""
        return not self.mx

    @property
    def pixels(self):
        return self.height * self.width

    @property
    def taps(self):
        return self.kernel * self.kernel

    @property
    def border(self):
        """Rows above and below that an output row needs."""
        return self.kernel // 2

    @property
    def planes(self):
        """Port words of V codes."""
        return 2 if self.mx else 1

    @property
    def segment_slots(self):
        """Slots of each segment of the 16-bit input."""
        return [_ceil(count, self.vector) * self.vector for count in self.channels]

    @property
    def slots(self):
        """Slots of the codes; the network input has blocks of 32 for each half of a value."""
        if self.format == Format.IN16:
            return 2 * _ceil(self.channels[0], BLOCK) * BLOCK
        slots = sum(self.segment_slots)
        return _ceil(slots, BLOCK) * BLOCK if self.mx else slots

    @property
    def group_size(self):
        """The descriptor's ``group``: slots that share a scale, or 0 for all."""
        return BLOCK if self.mx else 0

    @property
    def groups(self):
        """Scales of a pixel."""
        return self.slots // BLOCK if self.mx else 1

    @property
    def output_words(self):
        """Port words of V output channels."""
        return _ceil(self.outputs, self.vector)

    @property
    def output_slots(self):
        """Output channels with padding."""
        return self.output_words * self.vector

    def tiles(self, tile_channels):
        """(first slot, slots, positions) of each tile of ``tile_channels`` input slots.

        Positions are those that hold a slot: in MX8 and IN16 all of them, else the channels.
        """
        found = []
        for first in range(0, self.slots, tile_channels):
            size = min(tile_channels, self.slots - first)
            found.append((first, size, size if self.mx else self._channels(first, first + size)))
        return found

    def _channels(self, first, limit):
        """Channels in the slots from ``first`` up to ``limit``."""
        count, base = 0, 0
        for channels, slots in zip(self.channels, self.segment_slots, strict=True):
            count += max(0, min(limit, base + channels) - max(first, base))
            base += slots
        return count

    def channel(self, slot):
        """(channel, half) of a slot, or None; half is "hi" or "lo" for the network input."""
        if self.format == Format.IN16:
            half, number = divmod(slot, self.slots // 2)
            return (number, ("hi", "lo")[half]) if number < self.channels[0] else None
        base = 0
        for count, slots in zip(self.channels, self.segment_slots, strict=True):
            if slot < slots:
                return (base + slot, "") if slot < count else None
            slot -= slots
            base += count
        return None
