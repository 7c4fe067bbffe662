"""The `polyzoo regionspot` commands. Torch-free: what a command runs is imported only then."""

from __future__ import annotations

from polyzoo.core.cli import Command, CommandGroup
from polyzoo.regionspot.options import (
    CacheConfig,
    ConvertConfig,
    EvalConfig,
    InferConfig,
    PrepareConfig,
)
from polyzoo.regionspot.presets import PRESETS, RegionSpotTrainConfig

GROUP = CommandGroup(
    summary="Names for any region of any image",
    commands={
        "infer": Command(
            summary="Name the regions of images: given boxes, points, or found automatically",
            config=InferConfig,
            run="polyzoo.regionspot.infer:main",
            render="polyzoo.regionspot.infer:render",
        ),
        "prepare": Command(
            summary="Make the material of which training scenes are composed",
            config=PrepareConfig,
            run="polyzoo.regionspot.prepare:main",
        ),
        "cache": Command(
            summary="Compute SAM's region tokens and small images once, to train from them",
            config=CacheConfig,
            run="polyzoo.regionspot.cache:main",
        ),
        "train": Command(
            summary="Train the module between the frozen towers",
            config=RegionSpotTrainConfig,
            run="polyzoo.regionspot.train:main",
            render="polyzoo.regionspot.train:render",
            presets=PRESETS,
        ),
        "eval": Command(
            summary="Measure names on annotated images: top-1, top-5, COCO and LVIS AP",
            config=EvalConfig,
            run="polyzoo.regionspot.evaluate:main",
            render="polyzoo.regionspot.evaluate:render",
        ),
        "convert": Command(
            summary="Convert published weights of RegionSpot, SAM or CLIP",
            config=ConvertConfig,
            run="polyzoo.regionspot.convert:main",
        ),
    },
)
