"""The short version of the mutation run: every fault can be put in, and a killed and a survived one are told apart."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from tests.harness.mutation.__main__ import SOURCE, Bench, faults_in
from tests.harness.mutation.areas import AREAS
from tests.harness.mutation.operators import faults_of, sample

ROOT = Path(__file__).parents[3]
CODE = '''
LIMIT = 5

def first(names: list[int], least: int = 3) -> int:
    """The first name that is long enough."""
    for name in names:
        if name >= least and not name % 2:
            log.info("found %d", name)
            return divmod(min(name, 7), 9)
    raise ValueError(f"é: none of {len(names) + 1}")
'''
EXPECTED = {
    "name >= least -> (name > least)", "not name % 2 -> (name % 2)", "name % 2 -> (name * 2)",
    "name >= least and (not name % 2) -> (name >= least or not name % 2)",
    "2 -> 3", "2 -> 1", "7 -> 8", "7 -> 6", "9 -> 10", "9 -> 8",
    "name >= least and (not name % 2) -> (not (name >= least and (not name % 2)))",
    "return divmod(min(name, 7), 9) -> pass", "divmod(min(name, 7), 9) -> (divmod(9, min(name, 7)))",
    "min(name, 7) -> (max(name, 7))",
    "raise ValueError(f'é: none of {len(names) + 1}') -> pass",
}  # fmt: skip


def test_faults_are_in_code_that_gives_results_and_not_in_words() -> None:
    faults = faults_of("a.py", CODE)
    assert {fault.key.removeprefix("a.py first: ") for fault in faults} == EXPECTED
    for fault in faults:
        ast.parse(fault.applied_to(CODE))


def test_a_sample_has_every_operator_and_stays_when_other_lines_change() -> None:
    faults = faults_of("a.py", CODE)
    operators = {fault.operator for fault in faults}
    chosen = sample(faults, 0, len(operators))
    assert {fault.operator for fault in chosen} == operators
    later = sample(faults_of("a.py", "import os\n" + CODE), 0, len(operators))
    assert [fault.key for fault in later] == [fault.key for fault in chosen]
    assert sample(faults, 1, 5) != sample(faults, 0, 5)


@pytest.mark.parametrize("area", AREAS)
def test_every_fault_can_be_put_in_and_every_test_exists(area: str) -> None:
    faults = faults_in(area, seed=0, count=7)
    assert len({fault.key for fault in faults}) == len(faults) >= 7
    for fault in faults:
        source = (SOURCE / fault.file).read_text()
        assert fault.applied_to(source) != source
        ast.parse(fault.applied_to(source))
    for test in AREAS[area].tests:
        assert (ROOT / "tests" / test).is_file()


@pytest.mark.slow
def test_a_fault_is_killed_by_its_test_and_survives_another(tmp_path: Path) -> None:
    shutil.copytree(SOURCE, tmp_path / "img2parquet", ignore=shutil.ignore_patterns("__pycache__"))
    bench, before = Bench(tmp_path), (SOURCE / "dataset/part_file.py").read_bytes()
    fault = next(fault for fault in faults_in("write", 0, 0) if "order of arrival" in fault.key)
    with bench.fault(fault):
        assert "test_batches_may_arrive_in_any_order" in bench.run(("dataset/test_part_file.py",), limit_s=300)
        assert bench.run(("dataset/test_listing.py",), limit_s=300) == ""
    assert (SOURCE / "dataset/part_file.py").read_bytes() == before
    assert (tmp_path / "img2parquet/dataset/part_file.py").read_bytes() == before
