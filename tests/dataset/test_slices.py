"""Several drivers, each with its slice of the plan, write the same output as one driver would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from img2parquet.cli import main
from img2parquet.dataset.commit import SUCCESS, Output
from img2parquet.dataset.slices import Slice, parse_slice
from img2parquet.engine import driver
from img2parquet.engine.driver import Summary, run
from img2parquet.errors import JobError, RunMismatch
from img2parquet.job import JobSpec
from img2parquet.results.reader import status
from img2parquet.results.verify import verify
from tests.support.small_job import GOOD, ROWS, SHARDS, job_dict, small_job

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "infra/slurm/array.sbatch"


@pytest.fixture(scope="module")
def undisturbed(shards: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    uri = str(tmp_path_factory.mktemp("undisturbed"))
    run(small_job(shards, checkpoint, uri), "local")
    return parts(uri)


@pytest.fixture
def job(shards: str, checkpoint: Path, tmp_path: Path) -> JobSpec:
    return small_job(shards, checkpoint, f"{tmp_path}/out")


def parts(uri: str) -> dict[str, bytes]:
    output = Output.at(uri)
    return {name: output.store.read(entry.uri) for name, entry in output.part_files().items()}


def names(job: JobSpec) -> set[str]:
    return set(Output.at(job.output.uri).files())


@pytest.mark.parametrize("text", ["0", "1/", "/2", "a/b", "-1/2", "1/2/3", "0/0", "2/2", "5/3", "1.0/2", ""])
def test_an_invalid_slice_is_refused(text: str) -> None:
    with pytest.raises(JobError, match="shard `"):
        parse_slice(text)


def test_slices_take_each_part_once_and_overlap_where_they_share_one() -> None:
    for count in (1, 2, 3, 7):
        taken = [index for index in range(40) for one in range(count) if index in Slice(one, count)]
        assert taken == list(range(40))
    for a, b in product((Slice(i, n) for n in range(1, 7) for i in range(n)), repeat=2):
        assert a.overlaps(b) == any(index in a and index in b for index in range(60))


def test_slices_write_what_one_driver_does_and_the_last_ends_the_job(
    job: JobSpec, undisturbed: dict[str, bytes]
) -> None:
    summaries = list[Summary]()
    for index in (2, 0, 3, 1):  # whichever driver starts first stores the plan
        summaries.append(run(job, "local", shard=(index, 4)))
        assert (SUCCESS in names(job)) == (index == 1)
    assert [one.parts for one in summaries] == [1, 2, 1, 2]
    assert [one.parts_left for one in summaries] == [5, 3, 2, 0]
    assert summaries[0].left == {"0/4": 2, "1/4": 2, "3/4": 1}
    assert summaries[0].rows_in == ROWS // SHARDS and summaries[0].shard == "2/4"
    assert summaries[0].rejected == {"not_an_image": 1} and summaries[0].rows_written == {"tiny": 19}
    assert summaries[-1].rows_in == ROWS and summaries[-1].rows_written == {"tiny": GOOD}
    assert parts(job.output.uri) == undisturbed and verify(job.output.uri) == []
    again = run(job, "local", shard=(2, 4))
    assert (again.parts, again.parts_done_before, again.parts_left, again.rows_in) == (1, 1, 0, ROWS)


def test_a_slice_that_was_killed_goes_on_and_more_slices_than_parts_have_nothing_to_do(
    job: JobSpec, undisturbed: dict[str, bytes]
) -> None:
    assert run(job, "local", shard=(8, 9)).parts == 0
    first = run(job, "local", shard="0/2")
    lost = next(iter(sorted(parts(job.output.uri))))
    (Path(job.output.uri) / lost).unlink()
    again = run(job, "local", shard="0/2")
    assert (again.parts, again.parts_done_before, again.parts_left) == (3, 2, 3)
    assert (again.rows_in, again.rejected) == (first.rows_in, first.rejected)  # of the slice, not of the session
    assert run(job, "local").parts_done_before == 3  # one driver does what the slices left
    assert parts(job.output.uri) == undisturbed and verify(job.output.uri) == []


def test_slices_that_end_at_the_same_moment_end_the_job_once(
    job: JobSpec, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each driver finds every part committed and finalizes the job; those that come second agree with the first."""
    from threading import Barrier

    together, of_slice = Barrier(3), driver.of_slice

    def when_all_are_done(*arguments: Any) -> Summary | None:
        together.wait(60)
        return of_slice(*arguments)

    monkeypatch.setattr(driver, "of_slice", when_all_are_done)
    with ThreadPoolExecutor(3) as pool:
        summaries = list(pool.map(lambda index: run(job, "local", shard=(index, 3)), range(3)))
    assert [one.parts_left for one in summaries] == [0, 0, 0] and {one.rows_in for one in summaries} == {ROWS}
    assert parts(job.output.uri) == undisturbed and verify(job.output.uri) == []


def test_another_division_is_refused_while_its_parts_are_not_done(job: JobSpec) -> None:
    with pytest.raises(RunMismatch, match="another"):
        run(job, "local", shard=(0, 3))
        run(job.model_copy(update={"dtype": "bfloat16"}), "local", shard=(1, 3))  # another run identity
    lost = next(iter(sorted(parts(job.output.uri))))
    (Path(job.output.uri) / lost).unlink()  # as if 0/3 had been killed in between
    with pytest.raises(RunMismatch, match=r"--shard 0/2 overlaps --shard 0/3.* 1 uncommitted parts") as error:
        run(job, "local", shard=(0, 2))
    assert "_shard-*-of-3.json" in str(error.value)
    assert run(job, "local", shard=(1, 2)).parts == 3  # shares only committed parts
    for record in Path(job.output.uri).glob("_shard-*-of-3.json"):
        record.unlink()
    assert run(job, "local", shard=(0, 2)).parts_left == 0
    assert status(job.output.uri).is_complete and verify(job.output.uri) == []


def test_the_command_says_what_is_left(
    shards: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_job(tmp_path, shards, checkpoint, f"{tmp_path}/out")
    assert main(["run", str(file), "--runner", "local", "--shard", "3/3"]) == 2
    error = capsys.readouterr().err
    assert "slice index out of range: expected 0 to 2" in error and "slices are counted from 0: 0/3 to 2/3" in error
    assert main(["run", str(file), "--runner", "local", "--shard", "1/3"]) == 0
    said = capsys.readouterr().out
    assert "slice      1/3\n" in said and "left       4 parts (0/3: 2, 2/3: 2)" in said and "in this slice" in said


def write_job(folder: Path, shards: str, checkpoint: Path, uri: str) -> Path:
    file = folder / "job.json"
    file.write_text(json.dumps(job_dict(shards, checkpoint, uri)))
    return file


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Path]:
    """Make a folder with stand-ins for `srun` and `scontrol`, as an array task finds them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text('#!/bin/bash\n[ "$1" = --kill-on-bad-exit=1 ] && shift\nexec "$@"\n')
    (folder / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {folder}/asked\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    yield folder


def task(commands: Path, job: Path, index: int, count: int, **more: str) -> subprocess.Popen[str]:
    """Run one task of an array with the environment that Slurm gives it."""
    env = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "IMG2PARQUET": f"{sys.executable} -m img2parquet.cli",
        "SLURM_ARRAY_JOB_ID": "77",
        "SLURM_ARRAY_TASK_ID": str(index),
        "SLURM_ARRAY_TASK_COUNT": str(count),
        **more,
    }
    return subprocess.Popen(
        ["bash", str(SCRIPT), str(job)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_slurm_array_writes_what_one_driver_does(
    shards: str, checkpoint: Path, tmp_path: Path, commands: Path, undisturbed: dict[str, bytes]
) -> None:
    """Run three tasks at once, counted from 1 as some people do."""
    file = write_job(tmp_path, shards, checkpoint, f"{tmp_path}/out")
    given = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "3"}
    tasks = [task(commands, file, index, 3, **given) for index in (1, 2, 3)]
    said = [one.communicate(timeout=240)[0] for one in tasks]
    assert [one.returncode for one in tasks] == [0, 0, 0], "\n".join(said)
    assert parts(f"{tmp_path}/out") == undisturbed and verify(f"{tmp_path}/out") == []
    assert any("every part of the job is committed" in text for text in said)
    assert not (commands / "asked").exists()


def test_a_task_that_is_told_to_end_is_queued_again(tmp_path: Path, commands: Path) -> None:
    (commands / "srun").write_text("#!/bin/bash\ntrap 'exit 143' TERM\necho up\nsleep 60 >/dev/null 2>&1 & wait\n")
    one = task(commands, tmp_path, 4, 6)
    assert one.stdout is not None and one.stdout.readline() == "up\n"
    one.send_signal(signal.SIGTERM)
    one.communicate(timeout=300)
    assert one.returncode == 0 and (commands / "asked").read_text() == "requeue 77_4\n"
    (commands / "srun").write_text("#!/bin/bash\nexit 143\n")
    for more, code in (({"MOST_RESTARTS": "3", "SLURM_RESTART_COUNT": "3"}, 143), ({"SLURM_ARRAY_TASK_STEP": "2"}, 2)):
        refused = task(commands, tmp_path, 0, 6, **more)
        refused.communicate(timeout=300)
        assert refused.returncode == code
    assert (commands / "asked").read_text() == "requeue 77_4\n"
