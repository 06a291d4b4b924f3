"""golden/order.py and golden/work.py: permutations, and expected work on traces of known answer."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from golden import a4, order, policy, quantize, trace, w4, work
from golden.checkpoint import ModelError
from golden.convolution import accumulate
from golden.fake import FakeQuantized, calibrate
from golden.network import Architecture, Precond
from golden.requantizer import Format, requantize
from golden.sampler import draw_noise, sample


def made(zeros, *, calibration=None, segments=None, pixels=100, **options):
    """A layer with these zero counts, (images, evaluations, Cin)."""
    zeros = np.asarray(zeros, dtype=np.uint16)
    calibration = zeros[0] if calibration is None else np.asarray(calibration, dtype=np.uint16)
    return trace.TraceLayer(**{
        "name": "layer", "format": Format.A4U, "segments": segments or (zeros.shape[2],),
        "cout": 4, "height": 1, "width": pixels, "kernel": 1, "threshold": 32768,
        "zeros": zeros, "calibration": calibration} | options)


def whole(*layers, **options):
    """A trace of these layers, without histograms."""
    images, evaluations, _ = layers[0].zeros.shape
    return trace.Trace(**{
        "model": "made", "fingerprint": "", "seed": 0, "steps": (evaluations + 1) // 2,
        "images": images, "vector": 16, "exact": False,
        "layers": {layer.name: layer for layer in layers}} | options)


def random_layer(seed, channels=24, evaluations=5, images=2, **options):
    rng = np.random.default_rng(seed)
    return made(rng.integers(0, 101, (images, evaluations, channels)),
                calibration=rng.integers(0, 101, (evaluations, channels)), **options)


ROWS = [work.Row(*parts) for parts in itertools.product(
    ("channel", "vector"), ("oracle", "late", "static"), (False, True))]


# Expected work.

@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_without_zeros_both_sides_only_share_the_work(row):
    """All dense is as fast as any mix: 1 where the units can be divided as the multipliers are."""
    layer = made(np.zeros((1, 3, 64)))
    for share in (0.75, 0.5, 0.25):
        assert work.expected(layer, row, share).speedup == pytest.approx(1)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_uniform_zeros(row):
    """Half zeros in 64 channels, equal sides: 64 - n = n / 2, at best a time of 2 * 64 / 3."""
    speed = work.expected(made(np.full((1, 3, 64), 50)), row, 0.5)
    assert speed.dense / speed.best == pytest.approx(1.5)
    if row.cut:
        assert speed.speedup == pytest.approx(1.5, rel=0.01)
    elif row.unit == "channel":
        assert speed.speedup == pytest.approx(64 / (2 * 21.5))  # 43 sparse: 21 dense, 21.5
    else:
        assert speed.speedup == pytest.approx(64 / (2 * 24))    # 48 sparse: 16 dense, 24


def test_two_kinds_of_channels():
    """32 empty and 32 full channels: both sides share the full ones."""
    layer = made(np.repeat([[[100] * 32 + [0] * 32]], 3, 1))
    for row in ROWS:
        assert work.expected(layer, row, 0.5).speedup == pytest.approx(2)    # 16 and 16 of 64
        assert work.expected(layer, row, 0.75).speedup == pytest.approx(
            2 if row.unit == "channel" or row.cut else 64 * 0.75 / 32)
    mixed = made(np.repeat([[[100, 0] * 32]], 3, 1))
    natural, ordered = (work.expected(mixed, work.Row("vector", "oracle", False, name), 0.5, 16,
                                      order.by_mean(mixed.calibration)) for name in (None, "mean"))
    assert natural.speedup == pytest.approx(64 / (2 * 24))      # every vector half full
    assert ordered.speedup == pytest.approx(2)


def test_late_labels_pay_when_zeros_move():
    """Two channels change places once: late labels are wrong in that evaluation, static in half."""
    layer = made([[[100, 0]] * 3 + [[0, 100]] * 2], calibration=[[100, 0]] * 5)
    speeds = {knowledge: work.expected(layer, work.Row("channel", knowledge), 0.5)
              for knowledge in work.KNOWLEDGE}
    # The empty one on the sparse side: 100 pixels dense, time 200 of 200; the other way round the
    # same, as both sides are equal. With 3/4 of the multipliers dense it is 100 / 0.75.
    assert speeds["oracle"].speedup == speeds["late"].speedup == 1
    times = {knowledge: work.expected(layer, work.Row("channel", knowledge), 0.75).time / 4
             for knowledge in work.KNOWLEDGE}
    right, wrong = 100 / 0.75, 100 / 0.25
    assert times["oracle"] == pytest.approx(5 * right)
    assert times["late"] == pytest.approx(4 * right + wrong)
    assert times["static"] == pytest.approx(3 * right + 2 * wrong)


@pytest.mark.parametrize("seed", range(3))
def test_knowing_more_is_never_slower(seed):
    layer = random_layer(seed, channels=32)
    for unit, share in itertools.product(("channel", "vector"), work.RATIOS.values()):
        for cut in (False, True):
            oracle, late, static = (work.expected(layer, work.Row(unit, knowledge, cut), share)
                                    for knowledge in work.KNOWLEDGE)
            assert oracle.time <= late.time * (1 + 1e-12)
            assert oracle.time <= static.time * (1 + 1e-12)
            assert oracle.time >= oracle.best * (1 - 1e-12)
            assert 0 < late.balance <= 1 + 1e-12
        cut, uncut = (work.expected(layer, work.Row(unit, "oracle", cut), share)
                      for cut in (True, False))
        assert cut.time <= uncut.time * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_channels_against_a_search(seed):
    """Perfect labels are the best of all splits of a sorted list, counted here one by one."""
    layer, share = random_layer(seed, channels=7), 0.25
    expected = 0
    for left in layer.pixels - layer.zeros.astype(int).reshape(-1, 7):
        left = sorted(left)
        expected += min(max(100 * (7 - n) / share, sum(left[:n]) / (1 - share))
                        for n in range(8))
    speed = work.expected(layer, work.Row("channel", "oracle"), share)
    assert speed.time == pytest.approx(4 * expected)
    assert speed.dense == 4 * 700 * 10


def test_labels_of_a_threshold():
    layer = made([[[80, 10, 60, 0], [80, 60, 10, 0]]], calibration=[[80, 60, 10, 0]] * 2)
    # labels of both evaluations are late: first and second, then first and third channel
    speed = work.labelled_speed(layer, 0.5, 32768)
    first, second = max(200, 20 + 90), max(200, 20 + 90)
    assert speed.time == pytest.approx(4 * 2 * (first + second))
    assert work.labelled_speed(layer, 0.5, (1 << 17) - 1).speedup == pytest.approx(0.5)
    assert work.labelled_speed(layer, 1.0, (1 << 17) - 1).speedup == pytest.approx(1)
    assert work.labelled_speed(layer, 1.0, 0).time == float("inf")


def test_flips():
    layer = made([[[80, 0], [0, 80], [80, 0], [80, 0], [80, 0]]], calibration=[[80, 0]] * 5)
    assert work.flips(whole(layer), 0.5).tolist() == [0, 1, 1, 0]     # labels are one late
    assert work.flips(whole(layer), 0.5, 2).tolist() == [0, 0, 0, 0]  # of evaluations 0 and 2
    assert work.flips(whole(layer), 0.9).tolist() == [0, 0, 0, 0]


def test_summary():
    layers = [random_layer(n, evaluations=5, name=f"layer{n}") for n in range(2)]
    found = whole(*layers)
    facts = work.summary(found, order.orders(found), 0.4, 2)
    assert facts["zero_fraction"] == pytest.approx(
        np.mean([layer.zeros.mean() / 100 for layer in layers]))
    assert np.mean(facts["zero_fraction_of_evaluations"]) == pytest.approx(facts["zero_fraction"])
    assert [row["name"] for row in facts["work"]][:-1] == [row.name for row in work.ROWS]
    assert len({row.name for row in work.ROWS}) == len(work.ROWS)
    most = facts["work"][-1]["speedup"]
    assert most == dict.fromkeys(work.RATIOS, pytest.approx(1 / (1 - facts["zero_fraction"])))
    for row in facts["work"]:
        assert all(0 < row["speedup"][name] <= most[name] for name in most)
    assert facts["thresholds"][-1]["threshold"] is None
    assert [row["interval"] for row in facts["intervals"]] == [1, 2, 4, 8]
    assert len(facts["flips"]) == 4


# Order.

@pytest.mark.parametrize("channels", [1, 16, 24, 40, 96])
def test_orders_are_permutations(channels):
    found = whole(random_layer(channels, channels, segments=None))
    for name, by_layer in order.orders(found).items():
        assert sorted(by_layer["layer"]) == list(range(channels)), name
        assert (order.inverse(by_layer["layer"])[by_layer["layer"]] == np.arange(channels)).all()


def test_by_mean_sorts():
    layer = random_layer(1)
    means = layer.calibration.mean(0)[order.by_mean(layer.calibration)]
    assert (np.diff(means) >= 0).all()


def test_by_profile_puts_like_courses_together():
    """Channels of two courses with the same mean: only the course tells them apart."""
    rising, falling = [0, 20, 40, 60, 80], [80, 60, 40, 20, 0]
    courses = np.array([rising, falling] * 16).T
    layer = made(courses[None], calibration=courses)
    groups = order.by_profile(layer.calibration, 16).reshape(2, 16) % 2
    assert (groups == groups[:, :1]).all() and groups[0, 0] != groups[1, 0]


@pytest.mark.parametrize("signed", [False, True])
def test_pixel_scale_does_not_see_the_order(signed):
    """One scale a pixel: the same codes, scales and exact sums in any order of the channels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 24, 5, 5, generator=generator)
    weight = torch.randn(8, 24, 3, 3, generator=generator)
    turn = torch.randperm(24, generator=generator)
    back = torch.from_numpy(order.inverse(turn.numpy()))
    assert torch.equal(a4.fake_quantize(x[:, turn], signed, 0.01)[:, back],
                       a4.fake_quantize(x, signed, 0.01))
    assert torch.equal(w4.fake_quantize(weight[:, turn])[:, back], w4.fake_quantize(weight))
    assert not torch.equal(a4.fake_quantize(x[:, turn], signed, 0.01, group=16)[:, back],
                           a4.fake_quantize(x, signed, 0.01, group=16))

    # In integers, 24 channels in slots of their own order and in another one.
    pad = torch.zeros(8, dtype=torch.long)
    segment = torch.randint(-3000, 3000, (24, 5, 5), generator=generator)
    gain = torch.randint(1, 3000, (24,), generator=generator)
    offset = torch.randint(-9000, 9000, (24,), generator=generator)
    codes, scales, _ = w4.quantize(weight)
    sums = []
    for place in (torch.arange(24), turn):
        got = requantize([segment[place]], torch.cat([gain[place], pad]),
                         torch.cat([offset[place], pad]), 6, not signed,
                         Format.A4S if signed else Format.A4U, 16)
        kept = torch.nn.functional.pad(codes[:, place], (0, 0, 0, 0, 0, 8))
        sums.append((accumulate(got, kept, scales.long()), got.scales,
                     got.zero_counts[:24][torch.argsort(place)]))
    for one, other in zip(*sums, strict=True):
        assert torch.equal(one, other)


def test_units_cut_the_order():
    layer = random_layer(0, channels=24, segments=(8, 16))
    assert work.units(layer, 16).tolist() == [0] * 8 + [1] * 16      # two segments, two words
    turn = order.by_mean(layer.calibration)
    unit = work.units(layer, 16, turn)
    assert (unit[turn[:16]] == 0).all() and (unit[turn[16:]] == 1).all()
    assert dataclasses.replace(layer, segments=(24,)).channels == 24


# The permutation in a quantized model.

@pytest.fixture(scope="module")
def network():
    """A float network with random weights and up to 64 input channels."""
    torch.manual_seed(0)
    made = Precond(Architecture(resolution=8, model_channels=32, channel_mult=(1, 1), num_blocks=1))
    for value in made.parameters():
        if not value.any():
            torch.nn.init.normal_(value, std=0.1)
    return made.half().float().eval().requires_grad_(False)


def fake(network, **options):
    wanted = policy.Policy(name="", **options)
    formats = policy.formats(network.unet, wanted)
    return FakeQuantized.from_calibration(
        network, wanted, formats, calibrate(network, formats, wanted, images=1, steps=2), steps=2)


def turns(model, noise):
    """A random order of every 4-bit layer."""
    return {name: order.at_random(counts) for name, counts in order.activity(model, noise).items()}


def test_a_network_in_pixel_scale_does_not_see_the_order(network):
    """Bit for bit, whatever the order; where groups share a scale, it matters."""
    noise = draw_noise(1, network.architecture)
    for options, same in (({}, True), ({"group": 16}, False), ({"weight_group": 16}, False)):
        model = fake(network, **options)
        chosen = turns(model, noise)
        assert chosen
        changed = order.reordered(model, chosen)
        assert torch.equal(model(noise, 1.0), changed(noise, 1.0)) == same


def test_static_scales_of_channels_stay_theirs(network):
    noise = draw_noise(1, network.architecture)
    model = fake(network, static="channel")
    changed = order.reordered(model, turns(model, noise))
    assert torch.equal(model(noise, 1.0), changed(noise, 1.0))


def test_activity_counts_zeros(network):
    noise = draw_noise(2, network.architecture)
    model, seen = fake(network, group=16), []
    counts = order.activity(model, noise, lambda: seen.append(0))
    assert len(seen) == 3
    sample(lambda x, sigma: model(x, sigma, on_input=lambda name, x: seen.append(
        (name, (x == 0).sum((0, 2, 3)).numpy()))), noise, 2)
    for name in counts:
        rows = [zeros for found, zeros in seen[3:] if found == name]
        assert np.array_equal(counts[name], rows)


def test_orders_are_in_the_file(network, tmp_path):
    noise = draw_noise(1, network.architecture)
    model = fake(network, group=16)
    changed = order.reordered(model, turns(model, noise))
    path = tmp_path / "model.safetensors"
    quantize.save(changed, path)
    loaded = quantize.load(path)
    assert torch.equal(loaded(noise, 1.0), changed(noise, 1.0))
    name = next(iter(changed.orders))
    changed.orders[name][0] = changed.orders[name][1]
    quantize.save(changed, path)
    with pytest.raises(ModelError, match=rf": order of {name} must be a permutation of its chann"):
        quantize.load(path)


def test_measure(network):
    done = []
    table = order.measure(network, rows={"fine": policy.Policy(name="", group=16),
                                         "pixel": policy.Policy(name="")},
                          images=1, steps=2, progress=done.append)
    assert [(row["policy"], row["order"]) for row in table] == [
        (name, made) for name in ("fine", "pixel")
        for made in ("natural", "mean", "profile", "random")]
    assert done[-1] == 1 and done == sorted(done)
    pixel = [row["sqnr_db"] for row in table[4:]]
    assert pixel == pixel[:1] * 4
    assert len({row["sqnr_db"] for row in table[:4]}) > 1
    text = order.markdown(table)
    assert text.count("\n") == 9 and f"{pixel[0]:.2f}" in text
