"""The configuration of a core: everything that is fixed when Verilog is generated."""

import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

__all__ = [
    "Config", "ConfigError", "PRESETS", "TINY", "SMALL", "SMALL_DENSE", "MEDIUM", "MEDIUM_DENSE",
    "LARGE", "load",
]


class ConfigError(ValueError):
    """A configuration that cannot be built; the text names the field, the rule and the value."""


def is_power_of_two(value):
    return value > 0 and value & (value - 1) == 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Choices that are fixed when the core is generated.

    Depths count memory words; a word of activations is ``vector`` codes of 4 bits, which is also
    the width of the memory port.

    Raises
    ------
    ConfigError
        If a field breaks its rule, as "<name> must be <rule>, not <value>".
    """

    name: str = "custom"              # for file names and reports
    vector: int = 16                  # V: channels in a memory word and in a dense dot product
    dense_pes: int = 1                # dense PEs, taking output tiles in turn; 0: all sparse
    dense_lanes: int = 8              # K: output channels of a dense PE
    dense_scale_units: int = 8        # scale operations a dense PE does in a cycle
    sparse_pes: int = 1               # sparse PEs, taking output tiles in turn; 0: all dense
    sparse_lanes: int = 32            # L: output channels of a sparse PE
    sparse_rate: int = 4              # M: non-zero activations a sparse PE takes in a cycle
    sparse_scale_units: int = 16      # scale operations a sparse PE does in a cycle
    codes_depth: int = 2048           # words of V activation codes in each dense PE
    entry_depth: int = 4096           # entries of M non-zeros in each sparse PE
    record_depth: int = 1024          # records of input pixels in each PE
    weight_depth: int = 512           # words of V x K weights in each dense PE
    sparse_weight_depth: int = 2048   # words of L weights in each of a sparse PE's M copies
    weight_scale_depth: int = 256     # words of weight scales in each dense PE
    sparse_weight_scale_depth: int = 256  # words of weight scales in each sparse PE
    partial_depth: int = 1024         # words of V/4 partial sums kept from tile to tile
    result_depth: int = 32            # words of one sum a scale unit waiting in each PE
    max_channels: int = 1536          # input channel slots of a layer
    tile_channels: int = 128          # input channel slots of a tile
    max_outputs: int = 2304           # output channels of a layer
    tile_outputs: int = 64            # output channels of a tile
    detector_depth: int = 8192        # zero counts kept from one evaluation to the next
    address_width: int = 24           # bits of a word address at the memory port

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "name":
                if not isinstance(value, str) or not value.replace("-", "_").isidentifier():
                    raise ConfigError(f"name must be letters, digits and '-', not {value!r}")
            elif not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"{field.name} must be an integer, not {value!r}")
            elif value < (0 if field.name in ("dense_pes", "sparse_pes") else 1):
                raise ConfigError(f"{field.name} must be positive, not {value!r}")
        if self.vector not in (16, 32):
            raise ConfigError(f"vector must be 16 or 32, not {self.vector!r}")
        if not self.dense_pes and not self.sparse_pes:
            raise ConfigError("sparse_pes must be positive where dense_pes is 0, not 0")
        for side in ("dense", "sparse"):
            pes, lanes, units = (
                getattr(self, f"{side}_{name}") for name in ("pes", "lanes", "scale_units"))
            if pes > 16:
                raise ConfigError(f"{side}_pes must be at most 16, not {pes!r}")
            if not is_power_of_two(lanes):
                raise ConfigError(f"{side}_lanes must be a power of two, not {lanes!r}")
            if not is_power_of_two(units) or not self.quad <= units <= lanes:
                raise ConfigError(
                    f"{side}_scale_units must be a power of two between {self.quad} (vector / 4)"
                    f" and {lanes} ({side}_lanes), not {units!r}")
        if self.sparse_pes and self.sparse_lanes % self.vector:
            raise ConfigError(f"sparse_lanes must be a multiple of vector ({self.vector}),"
                              f" not {self.sparse_lanes!r}")
        if self.sparse_rate not in (1, 2, 4):
            raise ConfigError(f"sparse_rate must be 1, 2 or 4, not {self.sparse_rate!r}")
        if self.dense_lanes > self.vector:
            raise ConfigError(f"dense_lanes must be at most vector ({self.vector}),"
                              f" not {self.dense_lanes!r}")
        for name, step, most in (("tile_channels", 32, 256), ("max_channels", 32, 4096),
                                 ("tile_outputs", 32, 512), ("max_outputs", 32, 4096)):
            value = getattr(self, name)
            if value % step or value > most:
                raise ConfigError(
                    f"{name} must be a multiple of {step} of at most {most}, not {value!r}")
        for small, large in (("tile_channels", "max_channels"), ("tile_outputs", "max_outputs")):
            if getattr(self, small) > getattr(self, large):
                raise ConfigError(f"{small} must be at most {large} ({getattr(self, large)}),"
                                  f" not {getattr(self, small)!r}")
        for name in ("codes_depth", "entry_depth", "record_depth", "weight_depth",
                     "sparse_weight_depth", "weight_scale_depth", "sparse_weight_scale_depth",
                     "partial_depth", "result_depth"):
            value = getattr(self, name)
            if not is_power_of_two(value) or not 8 <= value <= 1 << 16:
                raise ConfigError(
                    f"{name} must be a power of two between 8 and {1 << 16}, not {value!r}")
        if not 10 <= self.address_width <= 28:
            raise ConfigError(
                f"address_width must be between 10 and 28, not {self.address_width!r}")
        for side in ("dense", "sparse"):
            steps = getattr(self, f"{side}_lanes") // getattr(self, f"{side}_scale_units")
            if self.result_depth < 2 * steps:
                raise ConfigError(f"result_depth must be at least {2 * steps} (two tiles of"
                                  f" {side} lanes), not {self.result_depth!r}")

    @property
    def port_width(self):
        """Bits of the memory port: V codes of 4 bits."""
        return 4 * self.vector

    @property
    def quad(self):
        """16-bit values in a port word."""
        return self.vector // 4

    @property
    def dense_multipliers(self):
        """4-bit multipliers of all dense PEs."""
        return self.dense_pes * self.vector * self.dense_lanes

    @property
    def sparse_multipliers(self):
        """4-bit multipliers of all sparse PEs."""
        return self.sparse_pes * self.sparse_lanes * self.sparse_rate

    @property
    def multipliers(self):
        """4-bit multipliers of both sides together."""
        return self.dense_multipliers + self.sparse_multipliers

    @property
    def dense_steps(self):
        """Cycles in which a dense PE's scale units work off a group."""
        return self.dense_lanes // self.dense_scale_units

    @property
    def sparse_steps(self):
        """Cycles in which a sparse PE's scale units work off a group."""
        return self.sparse_lanes // self.sparse_scale_units

    @property
    def sum_width(self):
        """Bits of a group's integer sum over a tile.

        W4A4: 15 * -8 over ``tile_channels``; MXINT8: 15 * 15 over a block of 32, a pair of nibble
        planes being a group of its own.
        """
        return max(15 * 8 * self.tile_channels, 15 * 15 * 32).bit_length() + 1

    @property
    def accumulator_width(self):
        """Bits that hold every reachable sum of scaled groups, so that nothing ever rounds.

        W4A4: nine taps of 15*8*channels, times 15*15, shifted by at most 28.
        MXINT8: nine taps of 32 products of 128*128 in each block of 32, shifted by at most 30.
        """
        pixel = 9 * 15 * 8 * self.max_channels * 15 * 15 << 28
        block = 9 * self.max_channels * 128 * 128 << 30
        return max(pixel, block).bit_length() + 1

    def as_dict(self):
        """Plain dictionary of the fields."""
        return asdict(self)


TINY = Config(
    name="tiny", dense_lanes=4, dense_scale_units=4, sparse_lanes=16, sparse_rate=2,
    sparse_scale_units=4, codes_depth=1024, entry_depth=1024, record_depth=512, weight_depth=512,
    sparse_weight_depth=2048, weight_scale_depth=128, sparse_weight_scale_depth=128,
    partial_depth=256, max_channels=128, tile_channels=64, max_outputs=128, tile_outputs=32,
    detector_depth=4096, address_width=16)
"""For the ULX3S board and quick benches: 64 dense and 32 sparse multipliers."""

SMALL = Config(name="small")
"""For the layers of mnist32: 128 dense and 128 sparse multipliers."""

SMALL_DENSE = replace(
    SMALL, name="small-dense", dense_lanes=16, sparse_pes=0)
"""The yardstick for ``small``: the same multipliers, buffers and port, all dense."""

MEDIUM = replace(
    SMALL, name="medium", sparse_pes=3, sparse_weight_depth=1024,
    sparse_weight_scale_depth=64, result_depth=16, detector_depth=4096)
"""For an LFE5U-85F: 128 dense and 384 sparse multipliers."""

MEDIUM_DENSE = replace(
    MEDIUM, name="medium-dense", dense_pes=2, dense_lanes=16, sparse_pes=0)
"""The yardstick for ``medium``: the same multipliers, buffers and port, all dense."""

LARGE = Config(
    name="large", vector=32, dense_pes=1, dense_lanes=32, dense_scale_units=32, sparse_pes=12,
    sparse_lanes=64, sparse_rate=4, sparse_scale_units=32, tile_outputs=256, partial_depth=4096,
    weight_depth=1024, weight_scale_depth=512, sparse_weight_scale_depth=512,
    detector_depth=65536, address_width=26)
"""For ASIC and simulation: 1024 dense and 3072 sparse multipliers, vectors of 32."""

PRESETS = {config.name: config for config in (
    TINY, SMALL, SMALL_DENSE, MEDIUM, MEDIUM_DENSE, LARGE)}


def load(source):
    """Configuration from the name of a preset or the path of a TOML file.

    The file holds fields of `Config` at its top level; ``base`` may name a preset that supplies
    the others.

    Raises
    ------
    ConfigError
        If there is no such preset or file, the file is not TOML, or a field breaks its rule.
    """
    if str(source) in PRESETS:
        return PRESETS[str(source)]
    path = Path(source)
    if path.suffix != ".toml":
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)} or the path of a .toml file,"
                          f" not {str(source)!r}")
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from None
    base = table.pop("base", None)
    if base is not None and base not in PRESETS:
        raise ConfigError(f"{path}: base must be one of {', '.join(PRESETS)}, not {base!r}")
    known = {field.name for field in fields(Config)}
    for name in table:
        if name not in known:
            raise ConfigError(f"{path}: {name} is not a field; the fields are"
                              f" {', '.join(sorted(known))}")
    table.setdefault("name", path.stem)
    try:
        return replace(PRESETS[base], **table) if base else Config(**table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
