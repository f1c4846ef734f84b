"""Gradient checkpointing reaches every UNet that gradients pass, and none without it: no loss would tell."""

import pytest
from diffusers import UNet2DConditionModel

from nitrofusion.train.loop import Trainer

from ..tiny import tiny_folder
from .scores import run_config

UNETS = {"nitrofusion": 2, "add": 2, "pgsb": 3, "dmd2": 3, "regression": 2}  # student, teacher, the fake score


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("recipe", UNETS)
def test_all_or_none_recompute(folder, tmp_path, recipe, on):
    trainer = Trainer(run_config(folder, tmp_path / "run", recipe, teacher_samples="online", gradient_checkpointing=on))
    parts = [trainer.student, trainer.model.unet, *vars(trainer.recipe).values()]
    unets = {id(part): part for part in parts if isinstance(part, UNet2DConditionModel)}.values()
    assert [unet.is_gradient_checkpointing for unet in unets] == [on] * UNETS[recipe]
