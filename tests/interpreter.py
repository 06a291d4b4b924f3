"""A core in numpy: executes chains of descriptors on a memory, one formula an operand.

It shares nothing with `sim.lowering`: every formula here is written from the description of the
memory layouts, for single elements, so that either can be wrong alone. The arithmetic is golden's.
"""

import numpy as np
import torch

from golden import detector, epilogue
from golden.convolution import accumulate
from golden.requantizer import Codes, Format, requantize
from hw import descriptor
from hw.descriptor import Kind


class Interpreter:
    """Memory, detector and work of a core.

    Members
    -------
    bytes : (memory bytes,) uint8
    counts : detector entries
    read, written : (memory words,) bool, the words touched since `clear`
    """

    def __init__(self, config, words=None):
        self.config = config
        self.width = config.port_width // 8                       # bytes of a word
        self.bytes = np.zeros((words or 1 << config.address_width) * self.width, np.uint8)
        self.counts = np.zeros(config.detector_depth, np.int64)
        self.clear()

    def clear(self):
        self.read = np.zeros(len(self.bytes) // self.width, bool)
        self.written = self.read.copy()

    def load(self, first, words):
        self.bytes[first * self.width:(first + len(words)) * self.width] = words.ravel()

    def dump(self, first, count):
        part = self.bytes[first * self.width:(first + count) * self.width]
        return part.reshape(-1, self.width).copy()

    def get(self, base, element, bits, signed=False):
        """Elements number ``element`` of ``bits`` bits, packed without gaps from ``base`` on."""
        element = np.asarray(element)
        place = base * self.width * 8 + element * bits
        self.read[np.unique(place // (self.width * 8))] = True
        value = np.zeros(element.shape, np.int64)
        for n in range(-(-bits // 8)):
            value |= self.bytes[place // 8 + n].astype(np.int64) << 8 * n
        if bits == 4:
            value = value >> place % 8 & 15
        return (value ^ 1 << bits - 1) - (1 << bits - 1) if signed else value

    def put(self, base, element, bits, value):
        """Write elements; see `get`."""
        element, value = np.broadcast_arrays(element, value)
        place = base * self.width * 8 + element * bits
        self.written[np.unique(place // (self.width * 8))] = True
        if bits == 4:
            for half in (0, 4):
                own = place % 8 == half
                byte = place[own] // 8
                self.bytes[byte] = self.bytes[byte] & (0xF0 >> half) | (value[own] & 15) << half
        else:
            for n in range(bits // 8):
                self.bytes[place // 8 + n] = value >> 8 * n & 255

    def fields(self, address):
        """Descriptor fields."""
        words = self.get(address, np.arange(descriptor.WORDS), 32)
        return {name: int(words[word]) >> low & (1 << bits) - 1
                for name, (word, low, bits, _) in descriptor.FIELDS.items()}

    def run(self, address, evaluation):
        """Execute the chain from word ``address`` on; returns the saturations and the descriptors.

        The descriptors are those of the chain, as dictionaries of their fields.
        """
        saturations, chain = 0, []
        while True:
            fields = self.fields(address)
            assert fields["version"] == 2 and fields["vector"] == self.config.vector
            assert fields["batch"] == fields["stride"] == 1
            self.vector, self.quad = fields["vector"], fields["vector"] // 4
            self.height, self.width_, self.format = (
                fields["height"], fields["width"], Format(fields["format"]))
            self.pixels = self.height * self.width_
            self.pixel = np.arange(self.pixels).reshape(self.height, self.width_)
            self.mx = self.format in (Format.MX8, Format.IN16)
            if Kind(fields["kind"]) == Kind.REQUANTIZE:
                saturations += self.requantize(fields, evaluation)
            else:
                self.convolve(fields, chain[-1] if chain else None)
            chain.append(fields)
            address = fields["next"]
            if not address:
                return saturations, chain

    def place(self, channels):
        """Numbers of the 16-bit elements of a tensor, (C, H, W)."""
        c = np.arange(channels)[:, None, None]
        word = (c // self.vector * self.pixels + self.pixel) * 4 + c % self.vector // self.quad
        return word * self.quad + c % self.quad

    def nibbles(self, positions, plane):
        """Numbers of the nibbles of a tile's codes, (positions, H, W)."""
        p = np.arange(positions)[:, None, None]
        word = self.pixel * (2 if self.mx else 1) + plane
        return (word * (positions // self.vector) + p // self.vector) * self.vector + (
            p % self.vector)

    def requantize(self, fields, evaluation):
        channels = [fields[name] for name in ("channels", "channels_second") if fields[name]]
        segments = [torch.tensor(self.get(fields[name], self.place(count), 16, signed=True))
                    for name, count in zip(("source", "source_second"), channels, strict=False)]
        slots = sum(-(-count // self.vector) * self.vector for count in channels)
        slots = -(-slots // 32) * 32 if self.mx else slots
        gain = offset = None
        if self.format != Format.IN16:
            entry = np.arange(slots)
            offset = torch.tensor(self.get(fields["table"], entry * 2, 32, signed=True))
            gain = torch.tensor(self.get(fields["table"], entry * 4 + 2, 16, signed=True))
        codes = requantize(segments, gain, offset, fields["shift"], bool(fields["relu"]),
                           self.format, self.vector)
        lists = self.lists(fields, codes, evaluation)
        values = codes.codes.numpy()
        destination = fields["destination"]
        for number, part in enumerate(lists):
            base = fields["permutation"] + number * (
                1 + fields["tile_channels"] * 16 // (4 * self.vector))
            positions = part.slots.numpy()
            positions = np.pad(positions, (0, -len(positions) % self.vector),
                               constant_values=0xFFFF)
            self.put(base, np.arange(self.width // 2), 16, 0)
            self.put(base, np.arange(4), 16,
                     np.array([len(part.slots), part.low, part.high, part.cut]))
            self.put(base + 1, np.arange(len(positions)), 16, positions)
            there = positions != 0xFFFF
            tile = values[part.first + np.where(there, positions, 0)] * there[:, None, None]
            for plane in range(2 if self.mx else 1):
                self.put(destination, self.nibbles(len(positions), plane), 4, tile >> 4 * plane)
            destination += len(positions) // self.vector * self.pixels * (2 if self.mx else 1)
        scales = codes.scales.numpy()
        group = np.arange(len(scales))[:, None, None]
        self.put(fields["scales"], group * self.pixels + self.pixel, 8, scales)
        if self.format != Format.IN16:
            self.put(fields["counts"], np.arange(slots), 16, codes.zero_counts.numpy())
        return codes.saturations

    def lists(self, fields, codes, evaluation):
        """Lists of all tiles, from the counts of the detector, which takes over the new ones."""
        if self.mx:
            return detector.natural_lists(codes.valid)
        base = fields["detector"]
        stored = self.counts[base:base + len(codes.valid)]
        counts = torch.tensor(stored)
        if evaluation % fields["interval"] == 0:
            stored[:] = codes.zero_counts
        options = (codes.valid, self.vector, fields["tile_channels"], fields["dense_limit"],
                   self.config.dense_pes > 0, self.config.sparse_pes > 0)
        if fields["balance"]:
            costs = detector.Costs(*(fields[f"cost_{name}"]
                                     for name in ("word", "nonzero", "group", "floor")))
            return detector.balanced_lists(counts, self.pixels, costs, *options)
        labels = detector.labels(counts, self.pixels, fields["threshold"], codes.valid)
        return detector.threshold_lists(labels, *options)

    def convolve(self, fields, before):
        """A job; the sums that it keeps are those of the next one that accumulates."""
        slots, kernel, outputs = fields["channels"], fields["kernel"], fields["outputs"]
        taps, words = kernel * kernel, -(-fields["outputs"] // self.vector)
        if fields["keep_weights"]:
            same = ("permutation", "table", "weights", "weight_scales", "channels", "outputs")
            assert all(fields[name] == before[name] for name in same)
        count = int(self.get(fields["permutation"], np.arange(4), 16)[0])
        positions = -(-count // self.vector) * self.vector
        order = self.get(fields["permutation"] + 1, np.arange(count), 16)
        values = sum(self.get(fields["source"], self.nibbles(positions, plane), 4,
                              signed=self.format == Format.A4S or (self.mx and plane)) << 4 * plane
                     for plane in range(2 if self.mx else 1))
        codes = np.zeros((slots, self.height, self.width_), np.int64)
        there = np.flatnonzero(order != 0xFFFF)
        codes[order[there]] = values[there]
        scales = self.get(fields["scales"], fields["scale_byte"] + self.pixel, 8)
        valid = torch.zeros(slots, dtype=torch.bool)
        valid[torch.tensor(order[there])] = True
        tile = Codes(torch.tensor(codes), torch.tensor(scales)[None], None, 0, valid, self.format,
                     self.vector)

        k = np.arange(words * self.vector)
        row = fields["weight_pitch"] * self.vector
        rows = (np.arange(slots)[:, None] * taps + np.arange(taps))[..., None]
        if self.mx:
            low = self.get(fields["weights"], rows * 2 * row + k, 4)
            high = self.get(fields["weights"], (rows * 2 + 1) * row + k, 4, signed=True)
            weights = low + 16 * high
        else:
            weights = self.get(fields["weights"], rows * row + k, 4, signed=True)
        weights = weights.transpose(2, 0, 1)[:outputs].reshape(outputs, slots, kernel, kernel)
        weights[:, ~valid.numpy()] = 0
        weight_scales = self.get(fields["weight_scales"], k[:, None] + (
            np.arange(taps) * fields["scale_pitch"] * self.width), 8)[:outputs, :, None]
        sums = accumulate(tile, torch.tensor(weights), torch.tensor(weight_scales))
        place = np.s_[:, fields["tile_y"]:fields["tile_y"] + fields["tile_height"],
                      fields["tile_x"]:fields["tile_x"] + fields["tile_width"]]
        sums = sums[place]
        if fields["accumulate"]:
            sums = sums + self.partial
        self.partial = None
        if fields["keep_sums"]:
            self.partial = sums
            return
        bias = self.get(fields["table"], k * 2, 32, signed=True)[:outputs]
        multiplier = self.get(fields["table"], k * 4 + 2, 16, signed=True)[:outputs]
        element = self.place(words * self.vector)[place]
        residual = None
        if fields["residual"]:
            residual = torch.tensor(self.get(fields["residual_source"], element, 16, signed=True))
            residual = residual[:outputs]
        out = epilogue.epilogue(
            sums, fields["align_shift"], torch.tensor(multiplier), fields["shift"],
            torch.tensor(bias), residual, fields["residual_multiplier"])
        padded = np.zeros((words * self.vector, *out.shape[1:]), np.int64)
        padded[:outputs] = out
        self.put(fields["destination"], element, 16, padded)
