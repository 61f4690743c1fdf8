"""One job with grey, RGBA, masked, uncropped and resized-mask models, from Parquet to Parquet, on both runners."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image

import img2parquet
from img2parquet.errors import JobError
from img2parquet.job import parse_job
from tests.inference.test_masked_outputs import VIT, N
from tests.models import oracle
from tests.outputs.test_loss import segmenter

COUNT, ODD = 10, 4  # images, of which this one has another size
LEVELS = {1: {"image_mean": 0.4, "image_std": 0.3}, 4: {"image_mean": [0.5] * 4, "image_std": [0.5] * 4}, 3: {}}
PROCESSORS: dict[str, dict[str, Any]] = {
    "grey": {"size": 32, **LEVELS[1]}, "rgba": {"do_resize": False, **LEVELS[4]}, "maps": {"size": 32},
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Image.Image], Any]:
    """Two shards of RGBA images with masks, three checkpoints, their references, the images and the masks."""
    folder, draw = tmp_path_factory.mktemp("unusual"), np.random.default_rng(0)
    sizes = [(40, 32) if n == ODD else (32, 32) for n in range(COUNT)]
    images = [Image.fromarray(draw.integers(0, 256, (*size, 4), np.uint8)) for size in sizes]
    mask_BN = draw.random((COUNT, N)) < 0.4
    (folder / "in").mkdir()
    for shard, rows in enumerate((range(5), range(5, COUNT))):
        columns = {"image": [png(images[n]) for n in rows], "id": [f"k{n}" for n in rows]}
        table = pa.table({**columns, "hidden": [mask_BN[n].tolist() for n in rows]})
        pq.write_table(table, folder / "in" / f"{shard}.parquet")
    models = {
        "grey": transformers.ViTMSNModel(transformers.ViTMSNConfig(**VIT, num_channels=1), use_mask_token=True),
        "rgba": transformers.ViTModel(transformers.ViTConfig(**VIT, num_channels=4)),
        "maps": segmenter(use_auxiliary_head=False),
    }
    for name, model in models.items():
        oracle.saved(model, folder / name)
        written = {"image_processor_type": "ViTImageProcessor", **PROCESSORS[name]}
        (folder / name / "preprocessor_config.json").write_text(json.dumps(written))
    return folder, models, images, mask_BN


def png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def document(folder: Path, output: Path, **more: Any) -> dict[str, Any]:
    masked = {"kind": "tokens", "name": "masked", "mask_column": "hidden"}
    outputs: dict[str, list[dict[str, Any]]] = {
        "grey": [{"kind": "embedding"}, masked],
        "rgba": [{"kind": "embedding"}],
        "maps": [{"kind": "segmentation", "size": [9, 12]}],
    }
    return {
        "input": {"kind": "parquet", "uris": [f"{folder}/in/*.parquet"], "key": "id", "keep": ["hidden"]},
        "models": [{"model": str(folder / name), "name": name, "outputs": outputs[name]} for name in outputs],
        "output": {"uri": str(output)},
        "preprocess": "pil",
        "dtype": "float32",
        "reject_limit": 0.5,
        "resources": {"workers": 1, "batch_size": 4},
        **more,
    }


def parts(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.glob("model=*/*.parquet"))}


def rows(output: Path, model: str) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in img2parquet.open_results(str(output), model).to_table().to_pylist()}


def pixels(name: str, image: Image.Image) -> torch.Tensor:
    processor = transformers.ViTImageProcessorPil.from_dict(PROCESSORS[name])
    return processor(image, return_tensors="pt")["pixel_values"]


def on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def test_every_row_equals_the_reference(given: Any, tmp_path: Path) -> None:
    folder, models, images, mask_BN = given
    summary = img2parquet.run(parse_job(document(folder, tmp_path)), "local")
    assert summary.rows_in == COUNT and summary.rejected == {"wrong_size": 1}
    grey, rgba, maps = (rows(tmp_path, name) for name in ("grey", "rgba", "maps"))
    assert set(maps) == set(grey) == set(rgba) | {f"k{ODD}"}
    [reject] = img2parquet.read_rejects(str(tmp_path)).to_pylist()
    assert (reject["model"], reject["key"], reject["stage"]) == ("rgba", f"k{ODD}", "preprocess")
    assert "32 x 40 is not resized (`do_resize: false`" in reject["message"]
    for n, image in enumerate(images):
        x_1CHW = pixels("grey", on_white(image).convert("L"))
        mask_1N = torch.from_numpy(mask_BN[n : n + 1])
        hidden = oracle.reference(models["grey"], x_1CHW, bool_masked_pos=mask_1N).last_hidden_state
        whole = oracle.reference(models["grey"], x_1CHW).last_hidden_state[:, 0]
        row = grey[f"k{n}"]
        mine = {"masked": torch.tensor(row["masked"]).reshape(hidden.shape), "v": torch.tensor([row["embedding"]])}
        oracle.agree(mine, {"masked": hidden, "v": whole})
        if n != ODD:
            theirs = oracle.reference(models["rgba"], pixels("rgba", image)).pooler_output
            oracle.agree({"v": torch.tensor([rgba[f"k{n}"]["embedding"]])}, {"v": theirs})
        out = oracle.reference(models["maps"], pixels("maps", on_white(image)))
        [ids_HW] = transformers.BeitImageProcessorPil().post_process_semantic_segmentation(out, target_sizes=[(9, 12)])
        ours_HW = np.asarray(Image.open(io.BytesIO(maps[f"k{n}"]["mask"])))
        assert ours_HW.shape == (9, 12) and (ours_HW == ids_HW.numpy()).mean() > 0.98


def test_workers_and_runners_change_no_byte(given: Any, ray_cluster: str, tmp_path: Path) -> None:
    folder = given[0]
    made = {}
    for runner, workers in (("local", 1), ("local", 3), ("ray", 2)):
        output = tmp_path / f"{runner}-{workers}"
        job = document(folder, output, resources={"workers": workers, "batch_size": 4})
        img2parquet.run(parse_job(job), runner)
        made[runner, workers] = parts(output)
    assert len({json.dumps(sorted(one)) for one in made.values()}) == 1
    assert made["local", 3] == made["local", 1] and made["ray", 2] == made["local", 1]


def test_a_job_in_float16(given: Any, tmp_path: Path) -> None:
    folder = given[0]
    for dtype in ("float32", "float16"):
        img2parquet.run(parse_job(document(folder, tmp_path / dtype, dtype=dtype)), "local")
    exact, near = (rows(tmp_path / dtype, "grey") for dtype in ("float32", "float16"))
    far = [np.abs(np.subtract(near[key]["embedding"], exact[key]["embedding"])).max() for key in exact]
    assert 1e-6 < max(far) < 0.02
    identities = json.loads((tmp_path / "float16" / "_run.json").read_text())["identities"]
    assert identities["grey"]["dtype"] == "float16"


def test_a_mask_column_that_is_not_kept_is_refused(given: Any, tmp_path: Path) -> None:
    job = document(given[0], tmp_path)
    job["input"]["keep"] = []
    with pytest.raises(JobError, match=r"output `tokens` reads the column `hidden`, which `input\.keep` does not list"):
        parse_job(job)
