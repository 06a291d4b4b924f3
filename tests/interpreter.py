"""A core in numpy: executes descriptors on a memory, one address formula an operand.

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
        """Execute the pass at word ``address``; returns the saturations of a requantization."""
        fields = self.fields(address)
        assert fields["version"] == 1 and fields["vector"] == self.config.vector
        assert fields["batch"] == fields["stride"] == 1
        self.vector, self.quad = fields["vector"], fields["vector"] // 4
        self.height, self.width_, self.format = (
            fields["height"], fields["width"], Format(fields["format"]))
        self.pixels = self.height * self.width_
        self.pixel = np.arange(self.pixels).reshape(self.height, self.width_)
        self.channels = [fields[name] for name in ("channels", "channels_second") if fields[name]]
        self.mx = self.format in (Format.MX8, Format.IN16)
        if Kind(fields["kind"]) == Kind.REQUANTIZE:
            return self.requantize(fields, evaluation)
        return self.convolve(fields)

    def tensor(self, base, channels):
        """(C, H, W) 16-bit values."""
        c = np.arange(channels)[:, None, None]
        word = (c // self.vector * self.pixels + self.pixel) * 4 + c % self.vector // self.quad
        return self.get(base, word * self.quad + c % self.quad, 16, signed=True)

    def put_tensor(self, base, values):
        c = np.arange(len(values))[:, None, None]
        word = (c // self.vector * self.pixels + self.pixel) * 4 + c % self.vector // self.quad
        self.put(base, word * self.quad + c % self.quad, 16, values)

    def code_elements(self, positions, plane):
        """Nibble numbers of (positions, H, W) codes."""
        p = np.arange(positions)[:, None, None]
        word = p // self.vector * self.pixels + self.pixel
        if self.mx:
            word = word * 2 + plane
        return word * self.vector + p % self.vector

    def requantize(self, fields, evaluation):
        segments = [self.tensor(fields[name], count) for name, count in zip(
            ("source", "source_second"), self.channels, strict=False)]
        slots = sum(-(-count // self.vector) * self.vector for count in self.channels)
        gain = offset = None
        if self.format != Format.IN16:
            entry = np.arange(slots)
            offset = torch.tensor(self.get(fields["table"], entry * 2, 32, signed=True))
            gain = torch.tensor(self.get(fields["table"], entry * 4 + 2, 16, signed=True))
        codes = requantize([torch.tensor(x) for x in segments], gain, offset, fields["shift"],
                           bool(fields["relu"]), self.format, self.vector)
        base = fields["detector"]
        labels = torch.zeros_like(codes.valid)
        if not self.mx:
            stored = self.counts[base:base + slots]
            if self.config.sparse_pes:
                labels = detector.labels(torch.tensor(stored), self.pixels, fields["threshold"],
                                         codes.valid)
            if evaluation % fields["interval"] == 0:
                stored[:] = codes.zero_counts
        dense, sparse = detector.permutation(labels, codes.valid, self.vector, natural=self.mx)
        positions = detector.positions(dense, sparse, self.vector).numpy()
        self.put(fields["permutation"], np.arange(self.width // 2), 16, 0)
        self.put(fields["permutation"], np.arange(2), 16, np.array([len(dense), len(sparse)]))
        self.put(fields["permutation"] + 1, np.arange(len(positions)), 16, positions)
        scales = codes.scales.numpy()
        group = np.arange(len(scales))[:, None, None]
        self.put(fields["scales"], group * self.pixels + self.pixel, 8, scales)
        values = np.concatenate([codes.codes.numpy(), np.zeros((1, self.height, self.width_), int)])
        values = values[np.where(positions == 0xFFFF, -1, positions)]
        for plane in range(2 if self.mx else 1):
            self.put(fields["destination"], self.code_elements(len(positions), plane), 4,
                     values >> 4 * plane)
        if self.format != Format.IN16:
            self.put(fields["counts"], np.arange(slots), 16, codes.zero_counts.numpy())
        return codes.saturations

    def convolve(self, fields):
        dense, sparse = self.get(fields["permutation"], np.arange(2), 16)
        count = sum(-(-part // self.vector) * self.vector for part in (dense, sparse))
        positions = self.get(fields["permutation"] + 1, np.arange(count), 16)
        slots = 2 * self.vector if self.format == Format.IN16 else sum(
            -(-part // self.vector) * self.vector for part in self.channels)
        groups = -(-slots // fields["group"]) if fields["group"] else 1
        signed = self.format == Format.A4S
        values = self.get(fields["source"], self.code_elements(count, 0), 4, signed=signed)
        if self.mx:
            values = values + 16 * self.get(fields["source"], self.code_elements(count, 1), 4, True)
        codes = np.zeros((slots, self.height, self.width_), np.int64)
        there = positions != 0xFFFF
        codes[positions[there]] = values[there]
        assert not values[~there].any()
        valid = torch.zeros(slots, dtype=torch.bool)
        valid[positions[there]] = True
        group = np.arange(groups)[:, None, None]
        scales = self.get(fields["scales"], group * self.pixels + self.pixel, 8)
        codes = Codes(torch.tensor(codes), torch.tensor(scales), None, 0, valid, self.format,
                      self.vector)

        kernel, outputs = fields["kernel"], fields["outputs"]
        taps = kernel * kernel
        words = -(-outputs // self.vector)
        k = np.arange(words * self.vector)[:, None, None]
        place = np.arange(slots)[None, :, None] * taps + np.arange(taps)
        if self.mx:
            low = self.get(fields["weights"], (place * 2 * words) * self.vector + k, 4)
            high = self.get(fields["weights"], ((place * 2 + 1) * words) * self.vector + k, 4, True)
            weights = low + 16 * high
        else:
            weights = self.get(fields["weights"], place * words * self.vector + k, 4, signed=True)
        place = np.arange(taps)[None, :, None] * groups + np.arange(groups)
        weight_scales = self.get(fields["weight_scales"], place * words * self.vector + k, 8)
        weights = weights[:outputs].reshape(outputs, slots, kernel, kernel)
        acc = accumulate(codes, torch.tensor(weights), torch.tensor(weight_scales[:outputs]),
                         self.vector)
        k = np.arange(words * self.vector)
        bias = self.get(fields["table"], k * 2, 32, signed=True)[:outputs]
        multiplier = self.get(fields["table"], k * 4 + 2, 16, signed=True)[:outputs]
        residual = None
        if fields["residual"]:
            residual = self.tensor(fields["residual_source"], words * self.vector)[:outputs]
            residual = torch.tensor(residual)
        out = epilogue.epilogue(
            acc, fields["align_shift"], torch.tensor(multiplier), fields["shift"],
            torch.tensor(bias), residual, fields["residual_multiplier"])
        padded = np.zeros((words * self.vector, self.height, self.width_), np.int64)
        padded[:outputs] = out
        self.put_tensor(fields["destination"], padded)
        return 0
