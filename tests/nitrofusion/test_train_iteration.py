"""The benchmark's straight implementation computes what the recipe computes: else its ratio says nothing."""

import argparse
import dataclasses

import torch

from benchmarks.train_iteration import Ours, Straight, difference, settings


def test_straight_and_ours_are_the_same_mathematics(tmp_path):
    asked = argparse.Namespace(
        preset="world", teacher=None, sampled_per_cell=2, iterations=3, batch_size=4, precision="fp32"
    )
    config, losses, students = settings(asked), {}, {}
    for kind in (Straight, Ours):
        runner = kind(dataclasses.replace(config, output=str(tmp_path / kind.__name__)))
        before = {name: p.detach().clone() for name, p in runner.trainer.student.named_parameters()}
        losses[kind] = [runner.step() for _ in range(4)]
        students[kind] = {name: p.detach() - before[name] for name, p in runner.trainer.student.named_parameters()}
    for name, value in difference(losses[Ours], losses[Straight]).items():
        assert value < 1e-3, name  # relative to the largest; the log rounds to six digits
    moved = torch.cat([students[Straight][name].flatten() for name in students[Ours]])
    other = torch.cat([change.flatten() for change in students[Ours].values()])
    # Adam's first steps are the gradient's sign, so a weight without a gradient may go either way.
    assert torch.nn.functional.cosine_similarity(moved, other, dim=0) > 0.99
    assert moved.norm() > 1e-4
