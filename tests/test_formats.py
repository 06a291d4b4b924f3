"""The page on formats: its examples are run, and it names every vector and every test it claims."""

import doctest
import re

import numpy


def test_examples(repository):
    failed, attempted = doctest.testfile(str(repository / "docs" / "formats.md"),
                                         module_relative=False)
    assert (failed, attempted > 20) == (0, True)


def test_names_of_vectors(repository):
    """Every file, case and name in the npz files is on the page."""
    page = (repository / "docs" / "formats.md").read_text().partition("## Test vectors")[2]
    words = set(re.findall(r"`([\w.*]+)`", page))
    patterns = [word.replace("*", r"\w+") for word in words]
    for path in (repository / "golden" / "vectors").glob("*.npz"):
        with numpy.load(path) as archive:
            names = {part for key in archive for part in key.split(".")} | {path.stem}
        for name in names - {"a4u_1", "a4u_2"}:      # between a4u_0 and a4u_3
            assert any(re.fullmatch(pattern, name) for pattern in patterns), name


def test_named_tests_exist(repository):
    page = (repository / "docs" / "formats.md").read_text()
    for name in set(re.findall(r"`(test_\w+\.py)`", page)):
        assert (repository / "tests" / name).is_file(), name
