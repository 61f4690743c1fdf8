"""List the areas of the package that get faults, each with the tests that should notice: fast and close ones first."""

from __future__ import annotations

from typing import NamedTuple


class Area(NamedTuple):
    """files: below the package. tests: below `tests/`, in the order in which they are run.

    A test that starts a process with a PYTHONPATH of its own tests the package as it is, and does not help."""

    files: tuple[str, ...]
    tests: tuple[str, ...]


AREAS = {
    "commit": Area(
        ("dataset/commit.py",),
        ("dataset/test_commit.py", "dataset/test_listing.py", "engine/test_session.py"),
    ),
    "session": Area(
        ("engine/part_collector.py", "engine/committer.py", "engine/run_report.py", "engine/session.py"),
        ("engine/test_part_collector.py", "engine/test_session.py", "engine/test_driver.py"),
    ),
    "write": Area(("dataset/part_file.py",), ("dataset/test_part_file.py", "results/test_verify.py")),
    "finalize": Area(
        ("dataset/finalize.py",),
        ("engine/test_session.py", "dataset/test_extension.py", "results/test_verify.py"),
    ),
    "plan": Area(
        ("dataset/plan.py", "dataset/packed_parts.py"),
        ("dataset/test_plan.py", "dataset/test_listing.py", "dataset/test_commit.py", "engine/test_driver.py"),
    ),
    "storage": Area(
        ("storage/__init__.py", "storage/disk.py", "storage/s3.py", "storage/retry.py"),
        ("storage/test_disk.py", "storage/test_write_hooks.py", "storage/test_store.py", "storage/test_retry.py"),
    ),
    "tar": Area(
        ("read/tar.py", "read/tar_samples.py"),
        ("read/test_tar.py", "read/test_webdataset.py", "read/test_broken_shards.py"),
    ),
    "decode": Area(
        ("images/decode.py", "images/headers.py", "images/orientation.py"),
        ("images/test_orientation.py", "images/test_decode.py", "images/test_file_metadata.py", "images/test_tiff.py"),
    ),
    "formats": Area(
        ("images/tiff.py", "images/bmp.py", "images/png_chunks.py", "images/jpeg_repair.py"),
        (
            "images/test_bmp.py",
            "images/test_png_chunks.py",
            "images/test_jpeg_repair.py",
            "images/test_tiff.py",
            "images/test_decode.py",
        ),
    ),
    "preprocess": Area(("images/preprocess.py",), ("images/test_preprocess.py", "images/test_fast.py")),
    "labels": Area(
        ("outputs/labels.py", "outputs/score_function.py"),
        ("outputs/test_outputs.py", "whole_jobs/test_problem_types.py"),
    ),
    "segmentation": Area(
        ("outputs/segmentation.py", "outputs/resize_maps.py"),
        ("outputs/test_segmentation.py", "outputs/test_outputs.py"),
    ),
}
