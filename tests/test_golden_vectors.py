"""The committed test vectors: they can be made again, and slow loops reproduce every result."""

from fractions import Fraction

import numpy
import pytest

from golden import vectors
from golden.vectors.__main__ import main
from tests import naive

NAMES = ("rounding", "e4m3", "weights", "activations", "requantizer", "lists", "convolution",
         "epilogue", "layer")
LISTS = ("first", "size", "count", "low", "high", "cut", "slots")


@pytest.fixture(scope="module")
def committed(repository):
    """{file: {key: array}} of the committed files."""
    files = {}
    for path in sorted((repository / "golden" / "vectors").glob("*.npz")):
        with numpy.load(path) as archive:
            files[path.stem] = dict(archive)
    return files


def cases(arrays):
    """{case: {name: nested list or number}} of one file."""
    out = {}
    for key, value in arrays.items():
        case, name = key.split(".")
        out.setdefault(case, {})[name] = value.tolist()
    return out


def test_committed_are_what_is_generated(committed):
    generated = vectors.generate()
    assert sorted(committed) == sorted(generated) == sorted(NAMES)
    for name, arrays in generated.items():
        assert sorted(committed[name]) == sorted(arrays), name
        for key, value in arrays.items():
            before = committed[name][key]
            assert (before.dtype, before.shape) == (value.dtype, value.shape), (name, key)
            assert before.tobytes() == value.tobytes(), (name, key)


def test_size_and_kinds(committed, repository):
    files = (repository / "golden" / "vectors").glob("*.npz")
    assert sum(path.stat().st_size for path in files) < 500_000
    kinds = {value.dtype.name for arrays in committed.values() for value in arrays.values()}
    assert kinds == {"int64", "bool", "float32", "float64"}


def test_rounding(committed):
    c = cases(committed["rounding"])
    for x, n, result in zip(*c["round_half_even"].values()):
        assert naive.round_half_even(x, n) == result
    for x, divisor, result in zip(*c["round_half_even_quotient"].values()):
        assert round(Fraction(x, divisor)) == result
    s = c["saturate"]
    assert [naive.clip(x, -2 ** (s["bits"] - 1), 2 ** (s["bits"] - 1) - 1) for x in s["x"]] == (
        s["result"])


def test_e4m3(committed):
    c = cases(committed["e4m3"])
    for code, mantissa, exponent, value in zip(*c["decode"].values()):
        assert Fraction(value) == naive.e4m3_value(code) == mantissa * Fraction(2)**(exponent - 10)
    assert [naive.e4m3_encode(Fraction(scale)) for scale in c["encode"]["scale"]] == (
        c["encode"]["code"])
    for n in (15, 7):
        case = c[f"scale_code_{n}"]
        assert [naive.e4m3_encode(Fraction(x, n * 1024)) for x in case["amax"]] == case["code"]


def columns(w, channels):
    """(k, tap, values of all channels) of weights (Cout, channels, kernel, kernel)."""
    for k, kernel in enumerate(w):
        size = len(kernel[0])
        for tap in range(size * size):
            yield k, tap, [kernel[c][tap // size][tap % size] for c in range(channels)]


def test_weights(committed):
    for case, c in cases(committed["weights"]).items():
        channels = len(c["w"][0])
        if case.startswith("w4"):
            amax = max(abs(x) for k, tap, values in columns(c["w"], channels) for x in values)
            scale = numpy.float32(amax) / numpy.float32(7 * 448)
            assert scale == c["tensor_scale"]
            for (k, tap, values), (_, _, codes) in zip(columns(c["w"], channels),
                                                       columns(c["codes"], channels)):
                expected, step = naive.float_codes(values, 7, False, scale)
                assert codes == expected
                code = numpy.float32(float(naive.VALUES[c["scales"][k][tap][0]]))
                assert code * scale == step
            continue
        # MXINT8: the window's bottom is 15 below the exponent of the largest magnitude.
        bottom = Fraction(c["unit"]) * 64
        bottom = bottom.numerator.bit_length() - bottom.denominator.bit_length()
        found = list(columns(c["w"], channels))
        if case.startswith("in16"):     # one tap with the channels of all taps, twice
            taps = len(found) // len(c["w"])
            found = [(k, 0, sum((values for _, _, values in found[k * taps:(k + 1) * taps]), []))
                     for k in range(len(c["w"]))]
            blocks = -(-len(found[0][2]) // 32)
            found = [(k, 0, 2 * (values + [0.0] * (32 * blocks - len(values))))
                     for k, _, values in found]
        for (k, tap, values), (_, _, codes) in zip(
                found, columns(c["codes"], len(c["codes"][0])), strict=True):
            assert len(c["scales"][k][tap]) == -(-len(values) // 32)
            for group, stored in enumerate(c["scales"][k][tap]):
                expected, exponent = naive.float_block(values[group * 32:group * 32 + 32], bottom)
                assert codes[group * 32:group * 32 + len(expected)] == expected
                assert stored == (0 if exponent is None else exponent - bottom)
                assert not any(codes[group * 32 + len(expected):(group + 1) * 32])
        assert max(max(max(scales) for scales in kernel) for kernel in c["scales"]) == 15


def test_activations(committed):
    arrays = committed["activations"]
    x = arrays["x.value"]
    n, channels, height, width = x.shape
    shapes = {"pixel": (20, 1), "group": (16, 1), "block": (20, 2), "image": (20, 5),
              "power": (20, 1), "fp32": (20, 1)}
    for case, got in cases(arrays).items():
        kind, _, rest = case.partition("_")
        if kind != "a4":
            continue
        unsigned, fixed = case.endswith("unsigned"), numpy.float32(got["tensor_scale"])
        largest = 15 if unsigned else 7
        assert fixed == numpy.abs(x).max() / numpy.float32(largest * 448)
        group, block = shapes[rest.split("_")[0]]
        value = arrays[f"{case}.value"]
        for part in numpy.ndindex(n, -(-channels // group), -(-height // block),
                                  -(-width // block)):
            index = (part[0], *(slice(i * size, (i + 1) * size)
                                for i, size in zip(part[1:], (group, block, block))))
            members = x[index].flatten()
            codes, step = naive.float_codes(members.tolist(), largest, unsigned, fixed)
            if "power" in rest or "fp32" in rest:
                amax = max(members.max(), 0) if unsigned else abs(members).max()
                scale = amax / (numpy.float32(largest) * fixed)
                if "power" in rest and scale:
                    exponent = -200
                    while Fraction(2) ** exponent < Fraction(float(scale)):
                        exponent += 1
                    scale = numpy.float32(2.0 ** exponent)
                step = scale * fixed
                codes = [naive.clip(round(Fraction(float(y / step))), 0 if unsigned else -largest,
                                    largest) if step else 0 for y in members]
            expected = numpy.array(codes, numpy.float32) * step
            assert (value[index].flatten() == expected).all(), case
    for case in ("mxint8", "mxint8_window"):
        bottom = arrays["mxint8_window.bottom"] if case == "mxint8_window" else None
        for i, row, column in numpy.ndindex(n, height, width):
            codes, exponent = naive.float_block(x[i, :, row, column].tolist(), bottom)
            unit = 0 if exponent is None else 2.0 ** (exponent - 6)
            assert arrays[f"{case}.value"][i, :, row, column].tolist() == [c * unit for c in codes]
    unit, exponent = arrays["in16.scale"].item() / 512, arrays["result.exponent"].item()
    for before, wide, result in zip(x.flatten().tolist(), arrays["in16.value"].flatten().tolist(),
                                    arrays["result.value"].flatten().tolist()):
        assert wide == naive.clip(round(Fraction(before) / Fraction(unit)), -32639, 32639) * unit
        step = Fraction(2) ** exponent
        assert result == naive.clip(round(Fraction(before) / step), -32768, 32767) * step


def requantized(c):
    """What loops make of the operands of one case."""
    segments = [c[name] for name in ("segment0", "segment1") if name in c]
    return naive.requantize(segments, c["gain"], c["offset"], c["shift"], c["relu"], c["format"],
                            c["vector"])


def test_requantizer(committed):
    for case, c in cases(committed["requantizer"]).items():
        for name, value in requantized(c).items():
            assert c[name] == value, (case, name)


def test_requantizer_covers(committed):
    """The vectors hold what is easy to get wrong."""
    c = cases(committed["requantizer"])
    scales = committed["requantizer"]
    assert 0 in scales["a4u_two_segments.scales"] and 0x7E in scales["a4u_two_segments.scales"]
    assert {0, 15} <= set(scales["mx8.scales"].flatten().tolist())
    for case in ("a4s", "mx8", "in16"):
        assert c[case]["saturations"] > 0
    assert committed["requantizer"]["in16.codes"].min() == -128


def lists_of(c, vector):
    """What loops make of the counts of one case."""
    return naive.channel_lists(
        c["counts"], c["valid"], c["pixels"], c["threshold"], c["costs"], vector,
        c["tile_channels"], c["dense_limit"], c.get("dense", True), c.get("sparse", True))


def test_lists(committed):
    found = cases(committed["lists"])
    split = found.pop("split")
    for case, c in found.items():
        for name, value in lists_of(c, c["vector"]).items():
            assert c[name] == value, (case, name)
    for cut, high in zip(split["cut"], split["high"]):
        assert high == [naive.is_high(pixel, cut) for pixel in range(600)]


def test_lists_cover(committed):
    """The vectors hold what is easy to get wrong."""
    found = cases(committed["lists"])
    assert any(0 < cut < 256 for cut in found["balanced"]["cut"])
    assert any(low % 16 for low in found["threshold"]["low"])
    assert 32 in found["threshold_limited"]["low"]       # two words, the limit
    limited = found["balanced_limited"]
    assert lists_of({**limited, "dense_limit": 255}, 16)["low"] > limited["low"] == [16]
    assert max(found["balanced_32"]["high"]) > 32
    assert 65535 in found["threshold"]["slots"] and 65535 in found["balanced"]["slots"]


def test_convolution(committed):
    for case, c in cases(committed["convolution"]).items():
        acc = naive.accumulate(c["codes"], c["scales"], c["format"], c["weight_codes"],
                               c["weight_scales"], c["kernel"])
        assert c["accumulator"] == acc, case
        if c["format"] in (naive.MX8, naive.IN16):
            for name, value in naive.natural_lists(c["valid"]).items():
                assert c[name] == value, (case, name)
        work = naive.work(c["codes"], c["format"], {name: c[name] for name in LISTS}, c["kernel"],
                          len(c["weight_codes"]), c["dense_lanes"], c["sparse_lanes"], c["vector"],
                          c["share"], c["runs"])
        assert (c["dense_work"], c["sparse_work"]) == work, case
        assert min(work) > 0, case


def test_epilogue(committed):
    for case, c in cases(committed["epilogue"]).items():
        for k, (acc, aligned, scaled, biased, result) in enumerate(zip(
                c["acc"], c["aligned"], c["scaled"], c["biased"], c["result"])):
            for index in numpy.ndindex(4, 6):
                a, t, u, out = (x[index[0]][index[1]] for x in (aligned, scaled, biased, result))
                total = acc[index[0]][index[1]]
                assert a == naive.clip(naive.round_half_even(total, c["align_shift"]), -2**31,
                                       2**31 - 1), case
                assert t == naive.round_half_even(a * c["multiplier"][k], c["scale_shift"]), case
                assert u == t + c["bias"][k], case
                if "residual" in c:
                    r = c["residual"][k][index[0]][index[1]]
                    u += r * c["residual_multiplier"] * 4
                    assert u == c["added"][k][index[0]][index[1]], case
                assert out == naive.clip(naive.round_half_even(u, 16), -2**15, 2**15 - 1), case


def test_layer(committed):
    detector = None
    for case, c in cases(committed["layer"]).items():
        if c["format"] == naive.IN16:
            assert c["segment0"] == naive.gather(c["image"])
        expected = requantized(c)
        for name, value in expected.items():
            assert c[name] == value, (case, name)
        if case.startswith("a4u"):
            # Lists come from the counts that the last evaluation in the interval left behind.
            assert c["counts"] == (c["counts"] if detector is None else detector)
            detector = c["counts"]
            if c["evaluation"] % c["interval"] == 0:
                detector = c["zero_counts"]
        c["pixels"] = len(c["codes"][0]) * len(c["codes"][0][0])
        mx = c["format"] in (naive.MX8, naive.IN16)
        lists = naive.natural_lists(c["valid"]) if mx else lists_of(c, c["vector"])
        for name, value in lists.items():
            assert c[name] == value, (case, name)
        acc = naive.accumulate(expected["codes"], expected["scales"], c["format"],
                               c["weight_codes"], c["weight_scales"], c["kernel"])
        assert c["accumulator"] == acc, case
        assert c["output"] == naive.epilogue(
            acc, c["align_shift"], c["multiplier"], c["scale_shift"], c["bias"],
            c.get("residual"), c.get("residual_multiplier")), case
        if case.endswith("scattered"):
            assert c["image"] == naive.add_planes(c["output"])
            count, size = len(c["network_bias"]), len(c["bias"])
            assert size == 9 * count
            for plane in range(size):
                tap, k = divmod(plane, count)
                assert c["weight_codes"][plane] == [
                    [[taps[tap // 3][tap % 3]]] for taps in c["network_weight_codes"][k]]
                assert c["weight_scales"][plane] == [c["network_weight_scales"][k][tap]]
                assert c["bias"][plane] == (c["network_bias"][k] if tap == 4 else 0)


def test_command_writes_all_files(tmp_path):
    out = tmp_path / "deep" / "vectors"
    assert main(["--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{name}.npz" for name in NAMES)


def test_command_names_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'file'}: cannot be written: File exists\n"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]
