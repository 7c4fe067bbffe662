"""Frozen pretrained towers and evaluation nets that several models share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyzoo.core.lazy import attach

if TYPE_CHECKING:
    from polyzoo.towers.classifier import Classifier as Classifier
    from polyzoo.towers.classifier import load_classifier as load_classifier
    from polyzoo.towers.conse import Conse as Conse
    from polyzoo.towers.conse import crop_boxes as crop_boxes
    from polyzoo.towers.dinov2 import DinoV2 as DinoV2
    from polyzoo.towers.dinov2 import DinoV2Config as DinoV2Config
    from polyzoo.towers.dinov2 import Features as Features
    from polyzoo.towers.dinov2 import load_dinov2 as load_dinov2
    from polyzoo.towers.features import picture_features as picture_features
    from polyzoo.towers.folders import FolderDistance as FolderDistance
    from polyzoo.towers.folders import compare_folders as compare_folders
    from polyzoo.towers.judge import PromptJudge as PromptJudge
    from polyzoo.towers.judge import Retrieval as Retrieval
    from polyzoo.towers.metrics import kernel_distance as kernel_distance
    from polyzoo.towers.pictures import central_square as central_square
    from polyzoo.towers.pictures import image_batch as image_batch
    from polyzoo.towers.proposals import propose as propose
    from polyzoo.towers.retrieval import recall_at as recall_at
    from polyzoo.towers.ridge import RidgeMap as RidgeMap
    from polyzoo.towers.text import TextTower as TextTower
    from polyzoo.towers.text import load_text_tower as load_text_tower

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Classifier": ".classifier",
        "PromptJudge": ".judge",
        "Retrieval": ".judge",
        "compare_folders": ".folders",
        "FolderDistance": ".folders",
        "picture_features": ".features",
        "Conse": ".conse",
        "DinoV2": ".dinov2",
        "DinoV2Config": ".dinov2",
        "Features": ".dinov2",
        "RidgeMap": ".ridge",
        "TextTower": ".text",
        "central_square": ".pictures",
        "crop_boxes": ".conse",
        "image_batch": ".pictures",
        "kernel_distance": ".metrics",
        "load_classifier": ".classifier",
        "load_dinov2": ".dinov2",
        "load_text_tower": ".text",
        "propose": ".proposals",
        "recall_at": ".retrieval",
    },
)
