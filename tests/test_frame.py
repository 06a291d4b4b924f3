"""The frame: command line, make, wheel, rules about the sources, and the checks themselves."""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sqdm
from tests import docs_check

ROOT = Path(__file__).parent.parent
ROOMS = ("hw", "golden", "sim", "fpga")
SOURCES = [path for room in (*ROOMS, "tests") for path in sorted((ROOT / room).rglob("*.py"))]
SOURCES.append(ROOT / "sqdm.py")
TEXTS = SOURCES + [
    path for pattern in ("*.md", "docs/**/*.md", "Makefile", "*.toml", ".ci/*", "sim/*.sv",
                         "tests/*.v") for path in sorted(ROOT.glob(pattern))]


def command(*arguments, **options):
    """Run `sqdm` in a process of its own."""
    return subprocess.run([sys.executable, str(ROOT / "sqdm.py"), *map(str, arguments)],
                          capture_output=True, text=True, **options)


# The command line

def subcommands():
    return sorted(sqdm.typer.main.get_command(sqdm.app).commands)


@pytest.mark.parametrize("arguments", [[], *([name] for name in subcommands())],
                         ids=["sqdm", *subcommands()])
def test_help_without_torch(arguments):
    code = (
        "import sys, sqdm\n"
        "sys.argv[1:] = sys.argv[1:] + ['--help']\n"
        "try:\n    sqdm.main()\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "loaded = {'torch', 'numpy', 'amaranth', 'cocotb'} & set(sys.modules)\n"
        "sys.exit(f'{loaded} must not be imported' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


@pytest.fixture(scope="session")
def generated(tmp_path_factory):
    """What `sqdm generate` writes for the smallest preset, torch not being loaded."""
    folder = tmp_path_factory.mktemp("generated")
    code = (
        "import sys, sqdm\n"
        "sys.argv[1:] = ['generate', '--preset', 'tiny', '--out', 'verilog']\n"
        "try:\n    sqdm.main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return folder / "verilog"


def test_generate(generated):
    assert sorted(path.name for path in generated.iterdir()) == ["sqdm_core.json", "sqdm_core.v"]
    text = (generated / "sqdm_core.v").read_text()
    described = json.loads((generated / "sqdm_core.json").read_text())
    assert re.search(rf"^module {described['module']}\b", text, re.MULTILINE)
    assert described["parameters"]["name"] == "tiny"
    assert str(ROOT) not in text + json.dumps(described)


@pytest.mark.parametrize(("text", "line"), [
    ("vector = 7", r"must be 16 or 32, not 7"),
    ("lanes = 4", r"lanes is not a field; the fields are .*"),
    ("vector = ", r"is not TOML: .*"),
])
def test_generate_refuses_a_wrong_configuration(text, line, tmp_path):
    (tmp_path / "core.toml").write_text(text)
    done = command("generate", "--preset", tmp_path / "core.toml", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert re.fullmatch(rf"sqdm: .*core\.toml: .*{line}\n", done.stderr)
    assert not (tmp_path / "out").exists()


def test_generate_refuses_an_unknown_preset(tmp_path):
    done = command("generate", "--preset", "absent", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert re.fullmatch(r"sqdm: preset must be one of tiny, .*, not 'absent'\n", done.stderr)


def test_version():
    assert re.fullmatch(r"sqdm \d+\.\d+\.\d+\n", command("--version").stdout)


class CheckError(Exception):
    exit_code = 1


@pytest.mark.parametrize(("error", "status", "line"), [
    (ValueError("lanes must be positive,\nnot -1"), 2, "sqdm: lanes must be positive, not -1\n"),
    (FileNotFoundError(2, "No such file", "a.toml"), 2, "sqdm: a.toml: No such file\n"),
    (CheckError("3 elements differ"), 1, "sqdm: 3 elements differ\n"),
])
def test_errors_are_one_line(error, status, line, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.delenv("SQDM_TRACEBACK", raising=False)
    monkeypatch.setattr(sqdm, "app", fail)
    with pytest.raises(SystemExit) as end:
        sqdm.main()
    assert end.value.code == status
    assert capsys.readouterr() == ("", line)
    monkeypatch.setenv("SQDM_TRACEBACK", "1")
    with pytest.raises(type(error)):
        sqdm.main()


def test_defects_keep_their_traceback(monkeypatch):
    def fail():
        raise KeyError("defect")

    monkeypatch.setattr(sqdm, "app", fail)
    with pytest.raises(KeyError):
        sqdm.main()


def test_wrong_option_is_status_2():
    done = command("train", "mnist32", "--no-such-option")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_unknown_recipe(tmp_path):
    done = command("train", "absent", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert re.fullmatch(r"sqdm: recipe must be one of .*mnist32.*, not 'absent'\n", done.stderr)
    assert not (tmp_path / "out").exists()


def test_output_folder_must_be_writable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file: output folder must be writable \(.*\); choose "):
        sqdm._output_folder(tmp_path / "file")


def test_write_is_whole_or_nothing(tmp_path, monkeypatch):
    sqdm._write(tmp_path / "a.txt", "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ValueError, match=r"a\.txt: must be writable \(No space left on device\)"):
        sqdm._write(tmp_path / "a.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


# make, and what it needs

def test_make_targets():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = re.findall(r"^([a-z-]+) {2,}\S", done.stdout, re.MULTILINE)
    assert {"demo", "test", "test-full", "bench", "verilog", "fpga", "lint"} <= set(targets)


def test_preflight_names_missing_tools(tmp_path):
    done = subprocess.run([sys.executable, ROOT / ".ci" / "preflight.py"], cwd=tmp_path,
                          env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == ("sqdm needs g++ (the GNU C++ compiler); make (GNU make);"
                           " perl (Perl 5)\n")


def test_preflight_refuses_spaces(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    done = subprocess.run([sys.executable, ROOT / ".ci" / "preflight.py"], cwd=folder,
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"sqdm needs a path without spaces, not '.*a folder' \(move .*\)\n",
                        done.stderr)


def test_preflight_accepts_this_machine():
    done = subprocess.run([sys.executable, ROOT / ".ci" / "preflight.py"], cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# pytest's own options

@pytest.fixture
def sample_tests(tmp_path):
    """Runs pytest with our conftest on one test that is skipped, one that needs data, one more."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_sample.py").write_text(
        "import pytest\n"
        "def test_plain(): pass\n"
        "def test_skipped(): pytest.skip('it says so')\n"
        "@pytest.mark.data\n"
        "def test_data(data_folder): assert data_folder.is_dir()\n")

    def run(*arguments, **variables):
        environment = {name: value for name, value in os.environ.items() if name != "SQDM_DATA"}
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c",
             ROOT / "pyproject.toml", "--rootdir", tmp_path, *arguments, tmp_path],
            env={**environment, **variables}, capture_output=True, text=True)

    return run


def test_data_tests_are_left_out_without_data(sample_tests):
    assert "1 passed, 1 skipped, 1 deselected" in sample_tests().stdout


def test_data_tests_run_with_data(sample_tests, tmp_path):
    assert "2 passed, 1 skipped" in sample_tests(SQDM_DATA=str(tmp_path)).stdout


def test_absent_data_folder_is_an_error(sample_tests, tmp_path):
    done = sample_tests(SQDM_DATA=str(tmp_path / "absent"))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "SQDM_DATA must be an existing folder, not" in done.stderr


def test_skips_can_be_failures(sample_tests):
    assert sample_tests().returncode == 0
    assert sample_tests("--fail-on-skip").returncode == 1
    assert sample_tests("--fail-on-skip", "-k", "plain").returncode == 0
    assert sample_tests("--fail-on-skip", "-n", "2").returncode == 1


# The wheel

def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {*ROOMS, "sqdm.py"}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to(ROOT)) in names


def test_wheel_runs(installed):
    assert installed("--version").stdout == command("--version").stdout


def test_wheel_generates_the_same_bytes(installed, generated):
    done = installed("generate", "--preset", "tiny", "--out", "verilog")
    assert done.returncode == 0, done.stderr
    for path in generated.iterdir():
        assert (installed.folder / "verilog" / path.name).read_bytes() == path.read_bytes()


# Rules about the sources

def imports(path):
    """Full names of what a file imports, relative ones resolved."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{name}.{alias.name}" for alias in node.names)


def offenders(paths, pattern):
    """Lines of the files that match, as "path:number: line"."""
    regex = re.compile(pattern)
    return [f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for path in paths
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if regex.search(line)]


def in_room(room):
    return [path for path in SOURCES if path.relative_to(ROOT).parts[0] == room]


@pytest.mark.parametrize(("room", "banned"), [("hw", {"torch", "golden"}), ("golden", {"hw"})])
def test_rooms_stay_apart(room, banned):
    assert [(path.name, name) for path in in_room(room) for name in imports(path)
            if name.split(".")[0] in banned] == []


def test_hardware_is_components():
    assert offenders(in_room("hw") + in_room("fpga"), r"\((\w+\.)*Elaboratable\)") == []


def test_silent_amaranth_names_are_not_used():
    banned = {"amaranth.Record", "amaranth.hdl.Record", "amaranth.sim.Tick", "amaranth.sim.Passive"}
    assert [(path.name, name) for path in SOURCES for name in imports(path)
            if name in banned] == []
    assert offenders(in_room("hw") + in_room("fpga"), r"\.ongoing\(") == []


def test_no_path_of_one_machine():
    assert offenders(TEXTS, r"(^|[^\w.])/(work|farm|root|tmp|home)/[\w.-]+") == []
    others = [path for path in TEXTS if path != ROOT / ".ci" / "run"]
    assert offenders(others, r"\.\./shared") == []


def test_no_registry_host():
    assert offenders(TEXTS, r"(pypi|pythonhosted|npmjs|debian)[.](org|com)") == []


def test_nothing_is_unfinished():
    words = "T[O]DO|F[I]XME|X{3}|raise NotImplemente[d]|not implemente[d]|place[h]older|for[ ]now"
    assert offenders([path for path in TEXTS if path.suffix in (".py", ".md", "")], words) == []


def test_file_names():
    names = [path.relative_to(ROOT) for path in TEXTS]
    assert [name for name in names if name.stem in ("utils", "util", "helpers", "misc")] == []
    assert [name for name in names if re.search(r"(^|_)(gen\d|v\d|new|old)(_|$)", name.stem)] == []


# The tables in docs/

def test_docs_agree_with_the_code():
    assert docs_check.main(write=False) == 0


def test_docs_check_sees_drift(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text("# Page\n<!-- table: registers -->\n<!-- end -->\n")
    (tmp_path / "README.md").write_text("A [page](docs/page.md).\n")
    monkeypatch.setattr(docs_check, "__file__", str(tmp_path / "tests" / "docs_check.py"))
    assert docs_check.main(write=False) == 1
    assert "page.md: its tables differ from the code; run " in capsys.readouterr().out
    assert docs_check.main(write=True) == 0
    assert docs_check.main(write=False) == 0
    assert "`identity`" in page.read_text()
    page.write_text(page.read_text().replace("`identity`", "`identify`"))
    assert docs_check.main(write=False) == 1


def test_docs_check_sees_bad_marks_and_links(tmp_path):
    with pytest.raises(ValueError, match=r"^table must be one of .*, not 'absent'$"):
        docs_check.filled("<!-- table: absent -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match=r"^every table must have a line <!-- end --> after it$"):
        docs_check.filled("<!-- table: registers -->\n")
    page = tmp_path / "page.md"
    page.write_text("[a](absent.md) [b](page.md#here) [c](https://example.org/x)")
    assert docs_check.broken_links(page) == ["absent.md"]
