"""Say in one line what this machine lacks for sqdm. Standard library only; any Python 3 runs it."""

import ctypes.util
import importlib.util
import os
import shutil
import sys
import sysconfig

TOOLS = {"g++": "the GNU C++ compiler", "make": "GNU make", "perl": "Perl 5"}
VERSION = "{}.{}".format(*sys.version_info)


def has_shared_libpython():
    """Whether cocotb will find a shared libpython for this Python."""
    names = {sysconfig.get_config_var(name) for name in ("INSTSONAME", "LDLIBRARY")} - {None}
    names = {name for name in names if not name.endswith(".a")}
    names |= {f"libpython{VERSION}{suffix}" for suffix in (".so", ".so.1.0", ".dylib")}
    library = os.path.join(sys.base_prefix, "lib")
    variables = [sysconfig.get_config_var(name) or "" for name in
                 ("LIBDIR", "LIBPL", "PYTHONFRAMEWORKPREFIX", "MULTIARCH")]
    folders = [*variables[:3], library, os.path.join(library, variables[3])]
    found = (os.path.isfile(os.path.join(folder, name)) for folder in folders for name in names)
    return any(found) or ctypes.util.find_library(f"python{VERSION}") is not None


def missing():
    """What is missing, a phrase each."""
    here = os.getcwd()
    if sys.version_info < (3, 11):
        yield f"python3 >= 3.11, not {VERSION} (name another one: make PYTHON=python3.12)"
    else:
        if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
            yield f"Python's venv (package python{VERSION}-venv)"
        if not has_shared_libpython():
            yield f"a shared libpython{VERSION} (package libpython{VERSION}, or another Python)"
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            yield f"{tool} ({package})"
    if len(here.split()) != 1:
        yield f"a path without spaces, not {here!r} (move the folder)"


if __name__ == "__main__":
    lacks = list(missing())
    if lacks:
        sys.exit("sqdm needs " + "; ".join(lacks))
