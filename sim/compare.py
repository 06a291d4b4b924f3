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

    def between(self, what, low, high, actual):
        """Compare a single value with a range; both ends belong to it."""
        self.value(what, low if low == high else f"{low} to {high}",
                   actual if low == high or not low <= actual <= high else f"{low} to {high}")

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

    ``contents`` are (region, first word in it, words) of results; everything else is outside.
    """
    window, vector = pass_.window, lowered.shape.vector
    expected = lowering.filler(window.address, window.words, vector)
    outside = np.ones(len(expected), bool)
    for name, first, count in contents:
        begin = pass_.regions[name].address - window.address + first
        outside[begin:begin + count] = False
    places = np.flatnonzero(outside)
    comparison.array("untouched byte", expected[places], words[places], lambda n, byte: {
        "place": f"word {window.address + int(places[n])}, byte {byte}"})


def _part(pass_, words, name, count=None):
    """The first ``count`` words (default: all) of a region of the write window."""
    region = pass_.regions[name]
    first = region.address - pass_.window.address
    return words[first:first + (region.words if count is None else count)]


def compare_requantize(comparison, lowered, result, answer, words):
    """Compare a requantization pass.

    Parameters
    ----------
    comparison : Comparison
    lowered : sim.lowering.Lowered
    result : golden.layer.LayerResult
    answer : what the bench says: ``hung``, ``violations`` and registers by name
    words : (n, V/2) bytes, the write window after the pass
    """
    if not comparison.ended(answer):
        return
    shape, pass_ = lowered.shape, lowered.requantize
    vector = shape.vector
    contents = []
    block = lowering.block_words(lowered.plan.tile_channels, vector)
    lists, codes = _part(pass_, words, "permutation"), _part(pass_, words, "codes")
    done = 0
    for number, part in enumerate(result.lists):
        place = f"tile {number}" if len(result.lists) > 1 else ""
        size = _compare_list(comparison, part, lists[number * block:(number + 1) * block], vector,
                             place)
        contents.append(("permutation", number * block, size))
        size = _compare_codes(comparison, shape, result.codes, part, codes[done:], place)
        contents.append(("codes", done, size))
        done += size

    scales = np.asarray(result.codes.scales)
    actual = lowering.unpack_bytes(_part(pass_, words, "scales"), scales.shape)
    comparison.array("scale", scales, actual, lambda group, y, x: {
        "pixel": (y, x), "place": f"scale group {group}" if len(scales) > 1 else ""})
    contents.append(("scales", 0, -(-scales.size // (vector // 2))))
    if "counts" in pass_.regions:
        actual = lowering.unpack_halves(_part(pass_, words, "counts"), shape.slots)
        comparison.array("zero count", np.asarray(result.zero_counts), actual,
                         lambda slot: _slot_place(shape, slot))
        contents.append(("counts", 0, pass_.regions["counts"].words))
    comparison.value("saturations", int(result.saturations), answer["saturations"])
    _outside(comparison, lowered, pass_, contents, words)


def _compare_list(comparison, part, words, vector, place):
    """Compare the list of a tile of channels; the words that it takes."""
    slots = np.asarray(part.slots)
    expected = lowering.pack_list(slots, part.low, part.high, part.cut, vector)
    sizes, positions = lowering.unpack_list(expected, vector)
    actual_sizes, actual = lowering.unpack_list(words[:len(expected)], vector)
    for name, value in sizes.items():
        comparison.value(f"list {name}", value, actual_sizes[name], place)
    comparison.array("label", positions, actual, lambda n: {
        "place": f"{place}, position {n} of the list".removeprefix(", ")})
    return len(expected)


def _compare_codes(comparison, shape, codes, part, words, place):
    """Compare the codes of a tile of channels; the words that they take."""
    positions = np.asarray(part.positions(shape.vector))
    count = len(positions) // shape.vector * shape.planes * shape.pixels
    actual = lowering.unpack_codes(words[:count], shape.height, shape.width, shape.format,
                                   shape.vector)

    def locate(position, y, x):
        slot = int(positions[position])
        where = {"place": f"{place}, position {position} (padding)".removeprefix(", ")} if (
            slot == lowering.NO_CHANNEL) else _slot_place(shape, part.first + slot)
        return where | {"pixel": (y, x)}

    comparison.array("code", np.asarray(part.gather(codes.codes, shape.vector)), actual, locate)
    return count


def _slot_place(shape, slot):
    """Fields of a Mismatch that say where a slot is."""
    place = shape.channel(slot)
    if place is None:
        return {"place": f"slot {slot} (padding)"}
    return {"channel": place[0], "place": place[1] and f"plane {place[1]}"}


def compare_detector(comparison, lowered, expected, actual):
    """Compare the (slots,) zero counts that the detector keeps after a requantization pass."""
    comparison.array("stored zero count", expected, np.asarray(actual),
                     lambda slot: _slot_place(lowered.shape, slot))


def compare_convolve(comparison, lowered, result, work, cycles, answer, words):
    """Compare a convolution pass, after all of its jobs.

    Where the memory port has held back a sum on its way, for n cycles in all, nothing can end more
    than n cycles later than without, and the cycles of waiting say nothing more.

    Parameters
    ----------
    comparison, lowered, result, answer, words
        See `compare_requantize`.
    work, cycles : counters that are known, by name of the register; ``cycles`` are those with a
        memory port that never holds back a sum
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
    comparison.value("jobs", len(pass_.descriptors), answer["jobs"])
    for name, value in work.items():
        comparison.value(name, value, answer[name])
    for name, value in cycles.items():
        if name != "stall_cycles" or not answer["output_stall"]:
            comparison.between(name, value, value + answer["output_stall"], answer[name])
    _outside(comparison, lowered, pass_,
             [("destination", 0, pass_.regions["destination"].words)], words)
