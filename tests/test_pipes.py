# pytest tests/test_pipes.py
"""A reader that goes away, `| head`, ends no run and is told nothing."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, grid, read_jsonl

import repo
from plumbing.errors import LastingStream

FEW = ("--device", "cpu", "--steps", "2", "--batch_size", "4", "--eval_samples", "1",
       "--max_eval_prompts", "4", "--max_response_length", "8")


def broken_pipe():
    """A stream whose reader has gone; each line is sent at once."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", buffering=1)


def test_a_run_whose_readers_are_gone_does_all_it_would_do(monkeypatch, tmp_path, family):
    streams = broken_pipe(), broken_pipe()
    with pytest.raises(BrokenPipeError):
        broken_pipe().write("a line\n")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", LastingStream(streams[0]))
        patch.setattr(sys, "stderr", LastingStream(streams[1]))  # where the progress bar is
        code = repo.main([*FEW, "--output_dir", str(tmp_path / "out")])
        print("a last word")
        sys.stdout.flush()
    assert code == 0
    assert len(read_jsonl(tmp_path / "out" / "metrics.jsonl")) == 2
    assert (tmp_path / "out" / "summary.json").is_file()
    for stream in streams:
        stream.close()  # without a complaint about what was never read


def test_a_lasting_stream_is_the_stream_as_long_as_there_is_a_reader():
    reader, writer = os.pipe()
    stream = LastingStream(os.fdopen(writer, "w", buffering=1))
    assert stream.write("a line\n") == 7
    stream.flush()
    assert os.read(reader, 100) == b"a line\n"
    assert stream.fileno() == writer and not stream.isatty()
    os.close(reader)
    assert stream.write("another\n") == 8
    stream.close()


COMPANIONS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("companions/*.py"))
              if "__main__" in path.read_text()]
SCRIPTS = ("repo.py", "-m kernels.bench", *COMPANIONS)


@pytest.mark.parametrize("script, both", grid(SCRIPTS, (False, True), telling=[("repo.py", True)]))
def test_a_script_whose_reader_is_gone_says_nothing_of_it(script, both):
    pipe = broken_pipe()
    process = subprocess.Popen(
        [sys.executable, *script.split(), "--help"], cwd=ROOT, text=True,
        stdout=pipe, stderr=pipe if both else subprocess.PIPE)
    pipe.close()
    _, said = process.communicate(timeout=300)
    assert not said
    assert process.returncode in (0, -13)  # the bench ends as other tools do
