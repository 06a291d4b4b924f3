"""Comparison of what a core did with what golden says, element by element."""

import collections
import dataclasses

import numpy as np

from hw import descriptor
from sim import lowering

__all__ = ["Mismatch", "Comparison", "compare_requantize", "compare_detector", "compare_convolve"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mismatch:
    """The first difference of its kind in a layer call; as text, one line.

    Members
    -------
    layer, evaluation : of the layer call
    what : what differs: "output", "code", "scale", "zero count", "label", a register's name, ...
    expected, actual : values
    channel : input or output channel as the layer counts them, or None
    pixel : (y, x), or None
    place : where else, for instance "scale group 2", or ""
    different, compared : elements of this kind that differ, and that there are
    """

    layer: str
    evaluation: int
    what: str
    expected: object
    actual: object
    channel: int | None = None
    pixel: tuple | None = None
    place: str = ""
    different: int = 1
    compared: int = 1

    def __str__(self):
        parts = [f"{self.layer}, evaluation {self.evaluation}"]
        if self.channel is not None:
            parts.append(f"channel {self.channel}")
        if self.place:
            parts.append(self.place)
        if self.pixel is not None:
            parts.append(f"pixel (y {self.pixel[0]}, x {self.pixel[1]})")
        text = f"{', '.join(parts)}: {self.what} must be {self.expected}, not {self.actual}"
        if self.compared > 1:
            text += f" ({self.different} of {self.compared} differ)"
        return text


class Comparison:
    """Counts what is compared and keeps the first difference of each kind, in order.

    Members
    -------
    compared, different : elements by kind (`collections.Counter`)
    mismatches : list of Mismatch
    """

    def __init__(self, layer, evaluation):
        self.layer, self.evaluation = layer, evaluation
        self.compared, self.different = collections.Counter(), collections.Counter()
        self.mismatches = []

    def value(self, what, expected, actual, place=""):
        """Compare a single value."""
        self.compared[what] += 1
        if expected != actual:
            self.different[what] += 1
            self.mismatches.append(Mismatch(
                layer=self.layer, evaluation=self.evaluation, what=what, place=place,
                expected=expected, actual=actual))

    def array(self, what, expected, actual, locate):
        """Compare arrays; ``locate(*index)`` gives an element's place as fields of Mismatch."""
        expected = np.asarray(expected)
        self.compared[what] += expected.size
        wrong = np.argwhere(expected != actual)
        if len(wrong):
            self.different[what] += len(wrong)
            first = tuple(int(n) for n in wrong[0])
            self.mismatches.append(Mismatch(
                layer=self.layer, evaluation=self.evaluation, what=what,
                expected=int(expected[first]), actual=int(actual[first]),
                different=len(wrong), compared=expected.size, **locate(*first)))

    def ended(self, answer):
        """Compare how a pass ended; returns whether it makes sense to look at its results."""
        self.value("end of the pass", "done", "hung" if answer["hung"] else "done")
        if answer["hung"]:
            return False
        error = answer["status"] >> 8 & 255
        names = {code.value: code.name for code in descriptor.Error}
        self.value("error code", "NONE", names.get(error, error))
        self.value("status", "done", ("busy " if answer["status"] & 1 else "")
                   + ("done" if answer["status"] & 2 else "not done"))
        self.value("memory port", "as agreed", "; ".join(answer["violations"]) or "as agreed")
        return error == 0


def _outside(comparison, lowered, pass_, contents, words):
    """Compare what no result covers: a pass must leave it as it was, byte for byte.

    ``contents`` are the bytes of results by region; what a region has beyond them counts as
    outside, except for the rest of a word, which a pass may write.
    """
    window, vector = pass_.window, lowered.shape.vector
    expected = lowering.filler(window.address, window.words, vector).ravel()
    outside = np.ones(expected.size, bool)
    for name, size in contents.items():
        begin = (pass_.regions[name].address - window.address) * (vector // 2)
        outside[begin:begin + -(-size // (vector // 2)) * (vector // 2)] = False
    places = np.flatnonzero(outside)
    comparison.array("untouched byte", expected[places], words.ravel()[places], lambda n: {
        "place": f"word {window.address + int(places[n]) // (vector // 2)},"
                 f" byte {int(places[n]) % (vector // 2)}"})


def _part(pass_, words, name, count=None):
    """The first ``count`` words (default: all) of a region of the write window."""
    region = pass_.regions[name]
    first = region.address - pass_.window.address
    return words[first:first + (region.words if count is None else count)]


def compare_requantize(comparison, lowered, result, lists, answer, words):
    """Compare a requantization pass.

    Parameters
    ----------
    comparison : Comparison
    lowered : sim.lowering.Lowered
    result : golden.layer.LayerResult
    lists : dense and sparse slots in order
    answer : what the bench says: ``hung``, ``violations`` and registers by name
    words : (n, V/2) bytes, the write window after the pass
    """
    if not comparison.ended(answer):
        return
    shape, pass_ = lowered.shape, lowered.requantize
    vector, height, width = shape.vector, shape.height, shape.width
    dense, sparse = (np.asarray(part) for part in lists)
    expected = lowering.pack_permutation(dense, sparse, vector)
    positions = lowering.unpack_permutation(expected, vector)[2]

    actual = _part(pass_, words, "permutation", len(expected))
    actual_dense, actual_sparse, actual_positions = lowering.unpack_permutation(actual, vector)
    comparison.value("dense channels", len(dense), actual_dense)
    comparison.value("sparse channels", len(sparse), actual_sparse)

    def slot_place(slot):
        place = shape.channel(slot)
        if place is None:
            return {"place": f"slot {slot} (padding)"}
        return {"channel": place[0], "place": place[1] and f"plane {place[1]}"}

    def locate_position(position, y=None, x=None):
        slot = int(positions[position])
        where = {"place": f"position {position} (padding)"} if (
            slot == lowering.NO_CHANNEL) else slot_place(slot)
        return where | ({} if y is None else {"pixel": (y, x)})

    comparison.array("label", positions, actual_positions,
                     lambda n: {"place": f"position {n} of the permutation"})

    scales = np.asarray(result.codes.scales)
    actual = lowering.unpack_bytes(_part(pass_, words, "scales"), scales.shape)
    comparison.array("scale", scales, actual, lambda group, y, x: {
        "pixel": (y, x), "place": f"scale group {group}" if len(scales) > 1 else ""})

    codes = np.asarray(result.codes.codes)                          # (slots, H, W)
    padded = np.concatenate([codes, np.zeros((1, height, width), np.int64)])
    codes = padded[np.where(positions == lowering.NO_CHANNEL, -1, positions)]
    count = len(positions) // vector * shape.pixels * shape.planes
    actual = lowering.unpack_codes(_part(pass_, words, "codes", count), height, width,
                                   shape.format, vector)
    comparison.array("code", codes, actual, locate_position)

    contents = {"permutation": expected.size, "scales": scales.size, "codes": count * vector // 2}
    if "counts" in pass_.regions:
        actual = lowering.unpack_halves(_part(pass_, words, "counts"), shape.slots)
        comparison.array("zero count", np.asarray(result.zero_counts), actual, slot_place)
        contents["counts"] = shape.slots * 2
    comparison.value("saturations", int(result.saturations), answer["saturations"])
    _outside(comparison, lowered, pass_, contents, words)


def compare_detector(comparison, lowered, expected, actual):
    """Compare the (slots,) zero counts that the detector keeps after a requantization pass."""
    def locate(slot):
        place = lowered.shape.channel(slot)
        return {"place": f"slot {slot} (padding)"} if place is None else {"channel": place[0]}

    comparison.array("stored zero count", expected, np.asarray(actual), locate)


def compare_convolve(comparison, lowered, result, work, cycles, answer, words):
    """Compare a convolution pass.

    Parameters
    ----------
    comparison, lowered, result, answer, words
        See `compare_requantize`.
    work : issues of the dense and of the sparse side
    cycles : values by register name, or None where memory stalls
    """
    if not comparison.ended(answer):
        return
    shape, pass_ = lowered.shape, lowered.convolve
    outputs = np.asarray(result.output)
    actual = lowering.unpack_tensor(_part(pass_, words, "destination"), shape.height, shape.width,
                                    shape.vector)
    comparison.array("output", outputs, actual[:shape.outputs],
                     lambda channel, y, x: {"channel": channel, "pixel": (y, x)})
    padding = actual[shape.outputs:]
    comparison.array("output padding", np.zeros_like(padding), padding, lambda channel, y, x: {
        "channel": shape.outputs + channel, "pixel": (y, x)})
    for name, value in zip(("dense_work", "sparse_work"), work, strict=True):
        comparison.value(name, value, answer[name])
    for name, value in (cycles or {}).items():
        comparison.value(name, value, answer[name])
    _outside(comparison, lowered, pass_, {"destination": outputs.size and actual.size * 2}, words)
