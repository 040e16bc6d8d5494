"""Runs of earlier versions: their settings are converted, or refused with the key that has no equivalent today."""

from __future__ import annotations

from pathlib import Path

import pytest

from cjepa_fast.config import replace
from cjepa_fast.config.cli import load
from cjepa_fast.config.presets import PRESETS
from cjepa_fast.errors import UserError

LEGACY = """
model: {encoder: vit_demo, image_size: 48, patch_size: 8, predictor_depth: 1, predictor_width: 48,
  predictor_heads: null, predictor_context: per_target, depth_rescale_init: true, precision: fp32,
  target_precision: same}
mask: {mode: fixed, target_scale: [0.1, 0.17], target_aspect: [0.75, 1.5], context_scale: [0.85, 1.0],
  num_targets: 4, min_keep: 2, context_keep: 11}
loss: {prediction: smooth_l1, vicreg_weight: 0.006, sim_weight: 25.0, std_weight: 25.0, cov_weight: 1.0,
  vicreg_views: target_blocks, projector_width: 256, projector_layers: 2}
optim: {batch_size: 128, epochs: 600.0, steps: 400, lr: 0.001, start_lr: 1.0e-05, final_lr: 1.0e-06,
  warmup_epochs: 0.75, weight_decay: 0.05, final_weight_decay: 0.05, weight_decay_schedule: linear, ema: 0.996,
  final_ema: 1.0, betas: [0.9, 0.999], eps: 1.0e-08, schedule_scale: 1.0}
data: {root: [], probe_root: null, index: quick, max_pixels: 178956970, on_error: error, crop_scale: [0.7, 1.0],
  crop_ratio: [0.75, 1.3333333333333333], hflip: false, views: 1, color_jitter: [0.0, 0.0, 0.0, 0.0],
  color_jitter_p: 0.8, grayscale_p: 0.0, blur_p: [0.0], blur_sigma: [0.1, 2.0], solarize_p: [0.0],
  mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
seed: 0
runtime: {device: auto, compile: auto, kernels: auto, attention: auto, cuda_graph: 'off', masks: auto,
  predictor_targets_only: true, predictor_shared_start: true, target_union_only: true, weight_copies: true,
  accumulate: 1, fsdp_blocks: 4, shard_size: null, reshard: auto, checkpoint_activations: auto, memory_gb: null,
  data_threads: 4, prefetch: 2, hw_decoder_load: 0.65, cpu_threads: null, keep_memory: true}
run: {dir: null, log_every: 10, checkpoint_every: 200, keep_checkpoints: 3, probe_every: 100, probe_bank: 3000,
  probe_queries: 1000, tensorboard: false, wandb: null}
"""


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        ("", "", {}),
        ("projector_width: 256, projector_layers: 2", "projector_width: null, projector_layers: 2",
         {"loss.projector": ()}),
        ("projector_width: 256, projector_layers: 2", "projector_width: null, projector_layers: 3",
         {"loss.projector": (96, 96, 96)}),
        ("sim_weight: 25.0", "sim_weight: 5.0", {"loss.vicreg_coefficients": (5.0, 25.0, 1.0)}),
        ("vicreg_weight: 0.006", "vicreg_weight: 0.0", {"method": "ijepa", "loss.vicreg_weight": 0.0}),
        ("reshard: auto", "reshard: always", {}),
        ("views: 1, color_jitter: [0.0, 0.0, 0.0, 0.0],\n  color_jitter_p: 0.8, grayscale_p: 0.0",
         "views: 2, color_jitter: [0.4, 0.4, 0.2, 0.1],\n  color_jitter_p: 0.8, grayscale_p: 0.2",
         {"data.augment": "color"}),
    ],
    ids=["as it was", "projector", "deeper projector", "coefficients", "I-JEPA", "speed only", "colours"],
)  # fmt: skip
def test_runs_of_the_earlier_layout_resume(tmp_path: Path, before: str, after: str, changes: dict[str, object]) -> None:
    assert before in LEGACY
    (tmp_path / "config.yaml").write_text(LEGACY.replace(before, after) if before else LEGACY)
    command = load(["--resume", str(tmp_path)])
    assert command.config == replace(PRESETS["demo"], {"run.dir": tmp_path, **changes})


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        ("betas: [0.9, 0.999]", "betas: [0.9, 0.95]", "optim.betas"),
        ("eps: 1.0e-08", "eps: 1.0e-06", "optim.eps"),
        ("schedule_scale: 1.0", "schedule_scale: 1.25", "optim.schedule_scale"),
        ("predictor_heads: null", "predictor_heads: 2", "model.predictor_heads"),
        ("crop_ratio: [0.75, 1.3333333333333333]", "crop_ratio: [0.5, 2.0]", "data.crop_ratio"),
        ("color_jitter: [0.0, 0.0, 0.0, 0.0]", "color_jitter: [0.4, 0.4, 0.2, 0.1]", "data.color_jitter"),
        ("blur_p: [0.0]", "blur_p: [0.5]", "data.color_jitter"),
    ],
)
def test_runs_without_an_equivalent_today_are_refused(tmp_path: Path, before: str, after: str, key: str) -> None:
    assert before in LEGACY
    (tmp_path / "config.yaml").write_text(LEGACY.replace(before, after))
    with pytest.raises(UserError) as refused:
        load(["--resume", str(tmp_path)])
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / 'config.yaml'}: {key}: ") and message.splitlines() == [message]
    assert "use the version that began the run" in message
