"""Write the feature maps of a backbone, one column for each chosen stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from img2parquet.outputs import ColumnName, TensorOutput


class FeatureMaps(TensorOutput):
    """Write feature maps: (B, C, h, w) -> FixedSizeList of C x h x w in the column `feature_maps_<stage>`."""

    kind: Literal["feature_maps"] = "feature_maps"
    name: ColumnName = Field("feature_maps", description="Prefix of the stages' column names.")
    stages: tuple[ColumnName, ...] = Field(
        min_length=1, description="Stages to write, named as in the reference's `out_features`: `stem`, `stage1`, ..."
    )

    @field_validator("stages")
    @classmethod
    def _each_once(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(stages)) < len(stages):
            raise ValueError(f"a stage is listed twice: {list(stages)}")
        return stages

    def features_of_columns(self) -> dict[str, str]:
        return {f"{self.name}_{stage}": f"feature_maps:{stage}" for stage in self.stages}
