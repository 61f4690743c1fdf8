"""What every process of the fleet has on its path: a GPU that only behaves as one, marks of who worked where.

* Where Ray gives an actor a GPU (a logical one: the node says that it has it), our code finds a usable device, computes
  by `tests/support/fake_accelerator.py`, and its results are those of a CPU.
* The file `slow` among the marks says how long each batch takes, so that there is time to take a node away; while there
  is a file `hold`, no batch begins, so that a job cannot end before a node has joined.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[3]
SITE = '''
import importlib.util, os, sys, time
from importlib.machinery import PathFinder
from pathlib import Path


def change_gpus(gpus):
    gpus.detect_gpus = lambda in_cluster=0: gpus.GpuInventory(in_cluster, in_cluster, "a stand-in")


def change_embed(embed):
    from img2parquet import models
    from img2parquet.inference import device

    def open_device(name):
        return device.Cpu() if name == "cpu" else device.Accelerator(fake().FakeApi())

    real_prepare, real_init = embed.Preparer.__call__, embed.Embedder.__init__

    def prepare(self, batch):
        mark("prepare")
        marks = Path(os.environ["FLEET_MARKS"])
        time.sleep(float((marks / "slow").read_text()))
        while (marks / "hold").exists():
            time.sleep(0.05)
        return real_prepare(self, batch)

    def init(self, work, given=None):
        mark("embed")
        kept, models.load_model = models.load_model, lambda *a, **m: kept(*a, **{{**m, "device": "cpu"}})
        try:
            real_init(self, work, given or open_device(work.device))
        finally:
            models.load_model = kept

    embed.Preparer.__call__, embed.Embedder.__init__ = prepare, init


def fake():
    spec = importlib.util.spec_from_file_location("fake_device", {fake!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mark(what):
    import ray
    node = ray.get_runtime_context().get_node_id()
    (Path(os.environ["FLEET_MARKS"]) / (what + "-" + node)).touch()


CHANGES = {{"img2parquet.inference.device_selection": change_gpus, "img2parquet.inference.steps": change_embed}}


class Late:
    """Changes a module when it is imported, which most processes of Ray's never do."""

    def find_spec(self, name, path=None, target=None):
        if name not in CHANGES:
            return None
        change, spec = CHANGES.pop(name), PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), change(module))
        return spec


sys.meta_path.insert(0, Late())
'''


def write_site(folder: Path) -> Path:
    """The folder for PYTHONPATH."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE.format(fake=str(ROOT / "tests" / "support" / "fake_accelerator.py")))
    return folder
