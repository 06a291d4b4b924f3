"""The configuration: presets, rules with their texts, TOML files, derived widths."""

import re
from dataclasses import replace

import pytest

from hw.config import PRESETS, SMALL, SMALL_DENSE, TINY, Config, ConfigError, load


def test_presets():
    assert load("small") is SMALL
    assert SMALL.multipliers == SMALL_DENSE.multipliers == 256
    assert SMALL_DENSE.sparse_pes == 0
    shared = ("activation_depth", "scale_depth", "max_channels", "max_outputs", "port_width")
    assert all(getattr(SMALL, name) == getattr(SMALL_DENSE, name) for name in shared)


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS.keys())
def test_accumulator_holds_the_largest_sums(config):
    most = (1 << config.accumulator_width - 1) - 1
    # nine taps of full 4-bit products with the largest scales (factor 15, shift 14 each)
    assert 9 * config.max_channels * 15 * 8 * 15 * 15 << 28 <= most
    # nine taps of 8-bit products, block exponents 15 each
    assert 9 * config.max_channels * 128 * 128 << 30 <= most
    assert 15 * 8 * config.max_channels <= (1 << config.sum_width - 1) - 1
    assert 32 * 128 * 128 <= (1 << config.sum_width - 1) - 1


@pytest.mark.parametrize(("changes", "text"), [
    ({"vector": 8}, r"^vector must be 16 or 32, not 8$"),
    ({"dense_lanes": 12}, r"^dense_lanes must be a power of two, not 12$"),
    ({"dense_lanes": 2, "dense_scale_units": 2},
     r"^dense_lanes must be between vector / 4 \(4\) and vector \(16\), not 2$"),
    ({"dense_scale_units": 16}, r"^dense_scale_units must be a power of two of at most 4 "),
    ({"sparse_lanes": 8, "sparse_scale_units": 4},
     r"^sparse_lanes must be a multiple of vector \(16\), not 8$"),
    ({"sparse_pes": 3}, r"^sparse_pes must be 0, 1, 2 or 4, not 3$"),
    ({"sparse_pes": -1}, r"^sparse_pes must be positive, not -1$"),
    ({"weight_depth": 0}, r"^weight_depth must be positive, not 0$"),
    ({"weight_depth": 1.5}, r"^weight_depth must be an integer, not 1.5$"),
    ({"weight_depth": True}, r"^weight_depth must be an integer, not True$"),
    ({"max_channels": 40}, r"^max_channels must be a multiple of 32 of at most 1024, not 40$"),
    ({"vector": 32, "dense_lanes": 8, "max_channels": 32},
     r"^max_channels must be at least 64 \(two words, which the network input takes\), not 32$"),
    ({"result_depth": 48}, r"^result_depth must be a power of two of at least 16 "),
    ({"result_depth": 8}, r"^result_depth must be a power of two of at least 16 "),
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
    ("lanes = 5\n", "lanes is not a field; the fields are activation_depth, "),
    ('base = "huge"\n', "base must be one of tiny, small, small-dense, not 'huge'"),
    ("vector = \n", "is not TOML: "),
])
def test_toml_errors(tmp_path, text, message):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{path}: {message}')}"):
        load(path)


def test_unknown_preset():
    with pytest.raises(ConfigError, match=r"^preset must be one of tiny, small, small-dense or the"
                                          r" path of a .toml file, not 'smal'$"):
        load("smal")


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load(tmp_path / "none.toml")
