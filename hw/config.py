"""The configuration of a core: everything that is fixed when Verilog is generated."""

import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

__all__ = ["Config", "ConfigError", "PRESETS", "TINY", "SMALL", "SMALL_DENSE", "load"]


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

    name: str = "custom"             # for file names and reports
    vector: int = 16                 # V: channels in a memory word and in a dense dot product
    dense_lanes: int = 8             # K: output channels of the dense PE
    dense_scale_units: int = 8       # scale operations the dense PE does in a cycle
    sparse_pes: int = 4              # sparse PEs, each on an output pixel of its own; 0: all dense
    sparse_lanes: int = 32           # L: output channels of a sparse PE
    sparse_scale_units: int = 4      # scale operations a sparse PE does in a cycle
    activation_depth: int = 8192     # words of activation codes each side can hold
    scale_depth: int = 4096          # activation scales each side can hold
    weight_depth: int = 640          # words of V x K weights in the dense PE
    sparse_weight_depth: int = 2304  # words of L weights in each sparse PE
    weight_scale_depth: int = 1024   # words of weight scales in each PE
    max_channels: int = 128          # input channel slots of a layer
    max_outputs: int = 128           # output channels of a layer
    result_depth: int = 256          # words of V/4 partial sums waiting on each side
    detector_depth: int = 8192       # zero counts kept from one evaluation to the next
    address_width: int = 22          # bits of a word address at the memory port

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "name":
                if not isinstance(value, str) or not value.replace("-", "_").isidentifier():
                    raise ConfigError(f"name must be letters, digits and '-', not {value!r}")
            elif not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"{field.name} must be an integer, not {value!r}")
            elif value < (0 if field.name == "sparse_pes" else 1):
                raise ConfigError(f"{field.name} must be positive, not {value!r}")
        if self.vector not in (16, 32):
            raise ConfigError(f"vector must be 16 or 32, not {self.vector!r}")
        for side in ("dense", "sparse"):
            lanes = getattr(self, f"{side}_lanes")
            units = getattr(self, f"{side}_scale_units")
            if not is_power_of_two(lanes):
                raise ConfigError(f"{side}_lanes must be a power of two, not {lanes!r}")
            if not is_power_of_two(units) or units > min(lanes, self.vector // 2):
                raise ConfigError(
                    f"{side}_scale_units must be a power of two of at most"
                    f" {min(lanes, self.vector // 2)} ({side}_lanes and half of vector),"
                    f" not {units!r}")
        if self.sparse_pes and self.sparse_lanes % self.vector:
            raise ConfigError(f"sparse_lanes must be a multiple of vector ({self.vector}),"
                              f" not {self.sparse_lanes!r}")
        if not self.quad <= self.dense_lanes <= self.vector:
            raise ConfigError(f"dense_lanes must be between vector / 4 ({self.quad}) and vector"
                              f" ({self.vector}), not {self.dense_lanes!r}")
        if self.sparse_pes > 4 or self.sparse_pes == 3:
            raise ConfigError(f"sparse_pes must be 0, 1, 2 or 4, not {self.sparse_pes!r}")
        for name in ("max_channels", "max_outputs"):
            value = getattr(self, name)
            if value % 32 or value > 1024:
                raise ConfigError(
                    f"{name} must be a multiple of 32 of at most 1024, not {value!r}")
        if not 10 <= self.address_width <= 28:
            raise ConfigError(
                f"address_width must be between 10 and 28, not {self.address_width!r}")
        if self.max_channels < 2 * self.vector:
            raise ConfigError(f"max_channels must be at least {2 * self.vector} (two words, which"
                              f" the network input takes), not {self.max_channels!r}")
        chunks = max(2 * self.sparse_lanes, 2 * self.dense_lanes, self.max_outputs) // self.quad
        if not is_power_of_two(self.result_depth) or self.result_depth < chunks:
            raise ConfigError(
                f"result_depth must be a power of two of at least {chunks} (two tiles of output"
                f" lanes, and max_outputs), not {self.result_depth!r}")

    @property
    def port_width(self):
        """Bits of the memory port: V codes of 4 bits."""
        return 4 * self.vector

    @property
    def quad(self):
        """16-bit values in a port word."""
        return self.vector // 4

    @property
    def multipliers(self):
        """4-bit multipliers of both sides together."""
        return self.vector * self.dense_lanes + self.sparse_pes * self.sparse_lanes

    @property
    def sum_width(self):
        """Bits of a group's integer sum: 15 * -8 over all channels, or 32 products of 8 bits."""
        return max((15 * 8 * self.max_channels).bit_length(), 20) + 1

    @property
    def accumulator_width(self):
        """Bits that hold every reachable sum of scaled groups, so that nothing ever rounds.

        W4A4: nine taps of 15*8*channels, times 15*15, shifted by at most 28.
        MXINT8: nine taps of ``max_channels/V`` groups of V products of 128*128 (a block of 32 is
        never more), shifted by at most 30.
        """
        pixel = 9 * 15 * 8 * self.max_channels * 15 * 15 << 28
        block = 9 * self.max_channels * 128 * 128 << 30
        return max(pixel, block).bit_length() + 1

    def as_dict(self):
        """Plain dictionary of the fields."""
        return asdict(self)


TINY = Config(
    name="tiny", dense_lanes=4, dense_scale_units=2, sparse_pes=1, sparse_lanes=32,
    sparse_scale_units=4, activation_depth=1024, scale_depth=1024, weight_depth=512,
    sparse_weight_depth=640, weight_scale_depth=512, max_channels=64, max_outputs=64,
    result_depth=64, detector_depth=2048, address_width=13)
"""For the ULX3S board and quick benches: 64 dense and 32 sparse multipliers."""

SMALL = Config(name="small")
"""For the layers of mnist32: 128 dense and 128 sparse multipliers."""

SMALL_DENSE = replace(
    SMALL, name="small-dense", dense_lanes=16, dense_scale_units=8, sparse_pes=0)
"""The yardstick for ``small``: the same multipliers, buffers and port, all dense."""

PRESETS = {config.name: config for config in (TINY, SMALL, SMALL_DENSE)}


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
