# pytest tests/test_mutations.py
"""The bugs of mutations.py can still be made: each finds its line once, and leaves Python."""

from dataclasses import replace

import pytest
from conftest import ROOT
from mutations import BUGS, likely_files, mutated


def test_every_bug_finds_its_line_and_leaves_python():
    for bug in BUGS:
        assert "\n" not in bug.old + bug.new, bug.name
        after = mutated(bug)  # which parses it
        assert after != (ROOT / bug.file).read_text(), bug.name
        # A line that is too wide has a test of its own, which would notice the wrong thing.
        assert max(map(len, after.splitlines())) <= 100, bug.name
        for file in likely_files([bug]):
            assert (ROOT / file).is_file(), bug.name


def test_a_bug_whose_line_has_changed_stops_the_script_with_a_sentence():
    for old, count in (("no such line", 0), ("import", r"\d+")):
        lost = replace(BUGS[0], old=old)
        with pytest.raises(SystemExit, match=f"'{old}' is {count} times in repo.py"):
            mutated(lost)


def test_there_are_enough_and_each_has_a_name_of_its_own():
    assert len(BUGS) >= 45
    assert len({bug.name for bug in BUGS}) == len(BUGS)
