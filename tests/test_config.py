"""The configuration: presets, rules with their texts, TOML files, derived widths."""

import re
from dataclasses import replace

import pytest

from hw.config import LARGE, MEDIUM, PRESETS, SMALL, TINY, Config, ConfigError, load


YARDSTICKS = [name for name in PRESETS if name.endswith("-dense")]


def test_presets():
    assert load("small") is SMALL
    multipliers = [(config.dense_multipliers, config.sparse_multipliers)
                   for config in (TINY, SMALL, MEDIUM, LARGE)]
    assert multipliers == [(64, 32), (128, 128), (128, 384), (1024, 3072)]
    assert [config.multipliers for config in (TINY, SMALL, MEDIUM, LARGE)] == [96, 256, 512, 4096]


@pytest.mark.parametrize("name", YARDSTICKS)
def test_a_yardstick_has_the_same_multipliers_and_buffers(name):
    """Only lanes and numbers of PEs differ, and it is all dense."""
    base, dense = PRESETS[name.removesuffix("-dense")], PRESETS[name]
    assert dense.multipliers == base.multipliers == dense.dense_multipliers
    changed = {field for field, value in dense.as_dict().items() if value != base.as_dict()[field]}
    assert {"name", "dense_lanes", "sparse_pes"} <= changed <= {
        "name", "dense_lanes", "dense_pes", "sparse_pes"}


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS.keys())
def test_accumulator_holds_the_largest_sums(config):
    most = (1 << config.accumulator_width - 1) - 1
    # nine taps of full 4-bit products with the largest scales (factor 15, shift 14 each)
    assert 9 * config.max_channels * 15 * 8 * 15 * 15 << 28 <= most
    # nine taps of 8-bit products, block exponents 15 each
    assert 9 * config.max_channels * 128 * 128 << 30 <= most
    # a group of W4A4 is a tile of channels; of MX8, a pair of nibble planes of a block
    assert 15 * 8 * config.tile_channels <= (1 << config.sum_width - 1) - 1
    assert 15 * 15 * 32 <= (1 << config.sum_width - 1) - 1


@pytest.mark.parametrize(("changes", "text"), [
    ({"vector": 8}, r"^vector must be 16 or 32, not 8$"),
    ({"dense_lanes": 12}, r"^dense_lanes must be a power of two, not 12$"),
    ({"dense_lanes": 32}, r"^dense_lanes must be at most vector \(16\), not 32$"),
    ({"dense_scale_units": 16}, (r"^dense_scale_units must be a power of two between 4"
                                 r" \(vector / 4\) and 4 \(dense_lanes\), not 16$")),
    ({"sparse_scale_units": 2}, (r"^sparse_scale_units must be a power of two between 4"
                                 r" \(vector / 4\) and 16 \(sparse_lanes\), not 2$")),
    ({"sparse_lanes": 8, "sparse_scale_units": 4},
     r"^sparse_lanes must be a multiple of vector \(16\), not 8$"),
    ({"sparse_pes": 17}, r"^sparse_pes must be at most 16, not 17$"),
    ({"sparse_pes": -1}, r"^sparse_pes must be positive, not -1$"),
    ({"dense_pes": 0, "sparse_pes": 0},
     r"^sparse_pes must be positive where dense_pes is 0, not 0$"),
    ({"sparse_rate": 3}, r"^sparse_rate must be 1, 2 or 4, not 3$"),
    ({"weight_depth": 0}, r"^weight_depth must be positive, not 0$"),
    ({"weight_depth": 1.5}, r"^weight_depth must be an integer, not 1.5$"),
    ({"weight_depth": True}, r"^weight_depth must be an integer, not True$"),
    ({"max_channels": 40}, r"^max_channels must be a multiple of 32 of at most 4096, not 40$"),
    ({"tile_channels": 288}, r"^tile_channels must be a multiple of 32 of at most 256, not 288$"),
    ({"tile_channels": 256}, r"^tile_channels must be at most max_channels \(128\), not 256$"),
    ({"tile_outputs": 256}, r"^tile_outputs must be at most max_outputs \(128\), not 256$"),
    ({"result_depth": 48}, r"^result_depth must be a power of two between 8 and 65536, not 48$"),
    ({"record_depth": 4}, r"^record_depth must be a power of two between 8 and 65536, not 4$"),
    ({"sparse_lanes": 32, "result_depth": 8},
     r"^result_depth must be at least 16 \(two tiles of sparse lanes\), not 8$"),
    ({"address_width": 30}, r"^address_width must be between 10 and 28, not 30$"),
    ({"name": "../x"}, r"^name must be letters, digits and '-', not '../x'$"),
])
def test_rules(changes, text):
    with pytest.raises(ConfigError, match=text):
        replace(TINY, **changes)


def test_toml_with_a_base(tmp_path):
    path = tmp_path / "wide.toml"
    path.write_text('base = "tiny"\nsparse_lanes = 64\n')
    assert load(path) == replace(TINY, name="wide", sparse_lanes=64)


def test_toml_without_a_base(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "other"\n')
    assert load(path) == Config(name="other")


@pytest.mark.parametrize(("text", "message"), [
    ("vector = 5\n", "vector must be 16 or 32, not 5"),
    ("lanes = 5\n", "lanes is not a field; the fields are address_width, codes_depth, "),
    ('base = "huge"\n', f"base must be one of {', '.join(PRESETS)}, not 'huge'"),
    ("vector = \n", "is not TOML: "),
])
def test_toml_errors(tmp_path, text, message):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{path}: {message}')}"):
        load(path)


def test_unknown_preset():
    text = ("preset must be one of tiny, small, small-dense, medium, medium-dense, large or the"
            " path of a .toml file, not 'smal'")
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        load("smal")


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load(tmp_path / "none.toml")
