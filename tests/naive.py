"""Slow forms of golden's arithmetic in plain Python integers and fractions, one loop a sum.

They are written from docs/formats.md and share no code with golden. Tensors are nested lists.
"""

from fractions import Fraction

import numpy

A4U, A4S, MX8, IN16 = range(4)
E4M3_CODES = range(127)


def round_half_even(x, n=0):
    """Python rounds fractions to nearest, ties to even."""
    return round(Fraction(x) / 2 ** n)


def clip(x, low, high):
    return max(low, min(high, x))


def e4m3_value(code):
    """OCP 8-bit floating point, E4M3: bias 7, subnormals with exponent field 0."""
    exponent, mantissa = code >> 3, code & 7
    if exponent == 0:
        return Fraction(mantissa, 8) * Fraction(2) ** -6
    return (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


VALUES = [e4m3_value(code) for code in E4M3_CODES]
UNITS = [int(value * 512) for value in VALUES]    # every value is a multiple of the smallest


def e4m3_encode(value):
    """Nearest of all codes, the even one of two equally near; 448 for anything above."""
    above, below = 512 * value.numerator, value.denominator
    return min(E4M3_CODES, key=lambda code: (abs(UNITS[code] * below - above), code & 1))


def slot_list(channels, vector, format):
    """(segment, channel) of each slot, or None where there is no channel."""
    order = []
    for segment, count in enumerate(channels):
        order += [(segment, channel) for channel in range(count)]
        while len(order) % vector:
            order.append(None)
    while format in (MX8, IN16) and len(order) % 32:
        order.append(None)
    return order


def gather(image):
    """Neighbourhoods (9 C, H, W) of the pixels of `image` (C, H, W), tap by tap."""
    height, width = len(image[0]), len(image[0][0])

    def pixel(plane, row, column):
        inside = 0 <= row < height and 0 <= column < width
        return plane[row][column] if inside else 0

    return [[[pixel(plane, row + ky - 1, column + kx - 1) for column in range(width)]
             for row in range(height)] for ky in range(3) for kx in range(3) for plane in image]


def add_planes(planes):
    """Images (C, H, W): each pixel of `planes` (9 C, H, W) added where its tap reads it from."""
    count, height, width = len(planes) // 9, len(planes[0]), len(planes[0][0])
    out = [[[0] * width for _ in range(height)] for _ in range(count)]
    for number, plane in enumerate(planes):
        tap, k = divmod(number, count)
        for row, line in enumerate(plane):
            for column, value in enumerate(line):
                y, x = row - (tap // 3 - 1), column - (tap % 3 - 1)
                if 0 <= y < height and 0 <= x < width:
                    out[k][y][x] += value
    return out


def requantize(segments, gain, offset, shift, relu, format, vector):
    """Dictionary with codes, scales, zero_counts, saturations and valid."""
    order = slot_list([len(segment) for segment in segments], vector, format)
    height, width = len(segments[0][0]), len(segments[0][0][0])
    valid = [slot is not None for slot in order] * (2 if format == IN16 else 1)
    groups = len(valid) // 32 if format in (MX8, IN16) else 1
    codes = [[[0] * width for _ in range(height)] for _ in valid]
    scales = [[[0] * width for _ in range(height)] for _ in range(groups)]
    saturations = 0
    for row in range(height):
        for column in range(width):
            pixel, clipped = [], []
            for slot, where in enumerate(order):
                x = 0 if where is None else segments[where[0]][where[1]][row][column]
                if format == IN16:
                    exact, limit = x, 32639
                elif where is None:
                    exact, limit = 0, 0
                else:
                    exact, limit = round_half_even(x * gain[slot], shift) + offset[slot], 2**23 - 1
                pixel.append(clip(exact, -limit, limit))
                clipped.append(pixel[-1] != exact)
            if relu:
                pixel = [max(y, 0) for y in pixel]
            coded, scaled, saturated = quantize_pixel(pixel, clipped, format)
            saturations += saturated
            for slot, code in enumerate(coded):
                codes[slot][row][column] = code
            for group, scale in enumerate(scaled):
                scales[group][row][column] = scale
    zeros = [0 if format == IN16 else sum(code == 0 for line in plane for code in line)
             for plane in codes]
    return {"codes": codes, "scales": scales, "zero_counts": zeros, "saturations": saturations,
            "valid": valid}


def quantize_pixel(pixel, clipped, format):
    """Codes of all slots, scale codes of all groups, and the number of clipped groups."""
    if format == IN16:
        low = [(y + 128) % 256 - 128 for y in pixel]
        blocks = len(pixel) // 32
        return ([(y - part) // 256 for y, part in zip(pixel, low)] + low,
                [8] * blocks + [0] * blocks, any(clipped))
    if format == MX8:
        codes, scales, saturated = [], [], 0
        for start in range(0, len(pixel), 32):
            block = pixel[start:start + 32]
            coded, scale = mx_block(block)
            codes += coded
            scales.append(scale)
            saturated += any(clipped[start:start + 32])
        return codes, scales, saturated
    n = 15 if format == A4U else 7
    scale = e4m3_encode(Fraction(max(abs(y) for y in pixel), n * 1024))
    step = VALUES[scale] * 1024
    codes = [0 if step == 0 else clip(round_half_even(y / step), -n, n) for y in pixel]
    return codes, [scale], any(clipped)


def mx_block(block):
    """Codes and stored exponent of one block of integers."""
    amax = max(abs(y) for y in block)
    if amax < 128:
        return [0] * len(block), 0
    lead = amax.bit_length() - 1
    codes = [clip(round_half_even(y, lead - 6), -127, 127) for y in block]
    return codes, lead - 7


def channel_lists(counts, valid, pixels, threshold, costs, vector, tile_channels, dense_limit,
                  dense, sparse):
    """Lists of all tiles of A4, a dictionary as of the test vectors; balanced with `costs`."""
    tiles = [range(first, min(first + tile_channels, len(valid)))
             for first in range(0, len(valid), tile_channels)]
    found = {name: [] for name in ("first", "size", "count", "low", "high", "cut", "slots")}
    for tile in tiles:
        slots = [slot for slot in tile if valid[slot]]
        low = high = len(slots) if dense else 0
        cut = 0
        if dense and sparse and costs:
            zeros = {slot: min(counts[slot], pixels) for slot in slots}
            step = 1
            while pixels // step >= 64:     # at most 64 buckets
                step *= 2
            slots.sort(key=lambda slot: (zeros[slot] // step, slot))
            low, high, cut = balance([pixels - zeros[slot] for slot in slots], pixels, costs,
                                     vector, dense_limit)
        elif dense and sparse:
            full = [slot for slot in slots
                    if Fraction(counts[slot], pixels) < Fraction(threshold, 65536)]
            slots = full + [slot for slot in slots if slot not in full]
            low = high = min(len(full), dense_limit * vector)
        found["first"].append(tile[0])
        found["size"].append(len(tile))
        found["count"].append(len(slots))
        found["low"].append(low)
        found["high"].append(high)
        found["cut"].append(cut)
        found["slots"] += [slot - tile[0] for slot in slots] + [65535] * (-len(slots) % vector)
    return found


def natural_lists(valid):
    """Lists of MX8 and IN16: blocks of 32 slots as they are."""
    firsts = range(0, len(valid), 32)
    full = [32] * len(firsts)
    return {"first": list(firsts), "size": full, "count": full, "low": full, "high": full,
            "cut": [0] * len(firsts),
            "slots": [slot % 32 if ok else 65535 for slot, ok in enumerate(valid)]}


def balance(nonzeros, pixels, costs, vector, limit):
    """Ends of the dense side's positions at some and at other pixels, and the share of these.

    The times of both sides are lines between whole words; the split is where they cross.
    """
    word, nonzero, group, floor = costs
    count = -(-len(nonzeros) // vector)
    ends = min(count, limit)

    def dense(words):
        return words * word * pixels

    def sparse(words):
        left = nonzeros[words * vector:]
        return max(sum(left) * nonzero + pixels * group, pixels * floor) if left else 0

    words = 0
    while words < ends and dense(words + 1) <= sparse(words + 1):
        words += 1
    part = Fraction(0)
    if words < ends:
        up, down = dense(words + 1) - dense(words), sparse(words) - sparse(words + 1)
        part = Fraction(sparse(words) - dense(words), up + down)
        assert dense(words) + part * up == sparse(words) - part * down and 0 <= part < 1
    cut = part * 256 // 1
    low = min(words * vector, len(nonzeros))
    return low, min((words + 1) * vector, len(nonzeros)) if cut else low, cut


def is_high(pixel, cut):
    """Whether positions between both ends are the dense side's: `cut` of 256 pixels, evenly."""
    return (pixel + 1) * cut // 256 > pixel * cut // 256


def taps(kernel, height, width, row, column):
    """(tap, row, column) of each input pixel of an output pixel that lies in the image."""
    for ky in range(kernel):
        for kx in range(kernel):
            y, x = row + ky - kernel // 2, column + kx - kernel // 2
            if 0 <= y < height and 0 <= x < width:
                yield ky * kernel + kx, y, x


def accumulate(codes, scales, format, weight_codes, weight_scales, kernel):
    """Exact sums as integers in the accumulator's unit, product by product."""
    height, width, slots = len(codes[0]), len(codes[0][0]), len(codes)
    size = 32 if format in (MX8, IN16) else slots
    acc = []
    for weights, weight_scale in zip(weight_codes, weight_scales):
        plane = []
        for row in range(height):
            plane.append([])
            for column in range(width):
                total = 0
                for tap, y, x in taps(kernel, height, width, row, column):
                    for slot in range(slots):
                        code = codes[slot][y][x] * weights[slot][tap // kernel][tap % kernel]
                        if code == 0:
                            continue
                        both = scales[slot // size][y][x], weight_scale[tap][slot // size]
                        if format in (MX8, IN16):
                            total += code * 2 ** sum(both)
                        else:
                            total += code * UNITS[both[0]] * UNITS[both[1]]
                plane[-1].append(total)
        acc.append(plane)
    return acc


def work(codes, format, lists, kernel, outputs, dense_lanes, sparse_lanes, vector, share, runs):
    """Issues of either side, counted one by one; `lists` as of `channel_lists`."""
    height, width = len(codes[0]), len(codes[0][0])
    sides, place = [0, 0], 0
    for first, count, low, high, cut in zip(
            *(lists[name] for name in ("first", "count", "low", "high", "cut"))):
        slots = [first + slot if slot != 65535 else None
                 for slot in lists["slots"][place:place + count]]
        place += -(-count // vector) * vector
        for row, rows, column, columns in runs:
            number = 0
            for r in range(row, row + rows):
                for c in range(column, column + columns):
                    ends = high if is_high(number, cut) else low
                    number += 1
                    for _, y, x in taps(kernel, height, width, r, c):
                        here = [0 if slot is None else codes[slot][y][x] for slot in slots]
                        if format in (MX8, IN16):
                            issues = 4 * (count // vector), 2 * sum(
                                (code % 16 != 0) + (code // 16 != 0) for code in here)
                            dense_pixel = share > 0 and number % share == 0
                            issues = (issues[0], 0) if dense_pixel else (0, issues[1])
                        else:
                            issues = -(-ends // vector), sum(code != 0 for code in here[ends:])
                        sides[0] += issues[0] * -(-outputs // dense_lanes)
                        sides[1] += issues[1] * -(-outputs // sparse_lanes)
    return tuple(sides)


def epilogue(acc, align_shift, multiplier, scale_shift, bias, residual=None,
             residual_multiplier=0):
    """Results of all output channels from nested lists."""
    out = []
    for k, plane in enumerate(acc):
        out.append([])
        for row, line in enumerate(plane):
            out[-1].append([])
            for column, total in enumerate(line):
                a = clip(round_half_even(total, align_shift), -2**31, 2**31 - 1)
                u = round_half_even(a * multiplier[k], scale_shift) + bias[k]
                if residual is not None:
                    u += residual[k][row][column] * residual_multiplier * 4
                out[-1][-1].append(clip(round_half_even(u, 16), -2**15, 2**15 - 1))
    return out


def float_codes(group, n, unsigned, fixed):
    """Codes and step of one A4 or W4 group of float32 numbers, one float32 operation at a time."""
    one = numpy.float32
    magnitudes = [max(one(x), one(0)) if unsigned else abs(one(x)) for x in group]
    scale = one(max(magnitudes)) / (one(n) * one(fixed))
    step = one(float(e4m3_value(e4m3_encode(Fraction(float(scale)))))) * one(fixed)
    if step == 0:
        return [0] * len(group), step
    codes = [clip(round(Fraction(float(one(x) / step))), 0 if unsigned else -n, n) for x in group]
    return codes, step


def float_block(block, bottom=None):
    """Codes and exponent of one MXINT8 block of floats, by exact comparison with powers of two."""
    values = [Fraction(float(x)) for x in block]
    amax = max(abs(x) for x in values)
    if amax == 0:
        return [0] * len(block), None
    exponent = 200
    while Fraction(2) ** exponent > amax:
        exponent -= 1
    if bottom is not None:
        if exponent < bottom:
            return [0] * len(block), None
        exponent = min(exponent, bottom + 15)
    return [clip(round(x / Fraction(2) ** (exponent - 6)), -127, 127) for x in values], exponent
