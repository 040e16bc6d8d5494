"""Named configurations. `--preset NAME` takes one as it is; every value can be changed by a file or a flag.

Sources, named at the numbers:
    paper   C-JEPA, Mo & Tong, NeurIPS 2024, arXiv 2410.19560, section 4.1 and appendix C
    I-JEPA  Assran et al., CVPR 2023, arXiv 2301.08243
    code    the configurations released with I-JEPA
    ours    chosen here; the reason stands beside it
"""

from __future__ import annotations

from cjepa_fast.config import Config, DataConfig, LossConfig, MaskConfig, ModelConfig, OptimConfig, RunConfig

_MASK = MaskConfig(
    mode="fixed",  # ours: the sampler that the papers describe, without the released one's quirks
    target_scale=(0.15, 0.2),  # I-JEPA
    target_aspect=(0.75, 1.5),  # I-JEPA
    context_scale=(0.85, 1.0),  # I-JEPA
    num_targets=4,  # I-JEPA, paper
    min_keep=10,  # code
)
_DATA = DataConfig(
    crop_scale=(0.3, 1.0),  # code
    hflip=False,  # code
)


def _cjepa(encoder: str, *, predictor_depth: int, epochs: float) -> Config:
    """The paper's recipe on ImageNet-1k, 224 px, patch 16."""
    return Config(
        model=ModelConfig(
            encoder=encoder,
            image_size=224,  # paper
            patch_size=16,  # paper
            predictor_depth=predictor_depth,
            predictor_width=384,  # paper
            precision="bf16",  # code; the paper does not say
        ),
        mask=_MASK,
        loss=LossConfig(
            prediction="smooth_l1",  # code, on which the paper builds; its text says l2
            vicreg_weight=0.001,  # paper
            sim_weight=25.0,  # paper
            std_weight=25.0,  # paper
            cov_weight=1.0,  # paper
            vicreg_views="target_blocks",  # paper, algorithm 1
            projector_width=None,  # ours: the paper names a projector without its shape
            projector_layers=2,  # ours
        ),
        optim=OptimConfig(
            batch_size=2048,  # paper
            epochs=epochs,
            lr=1e-3,  # paper
            start_lr=1e-4,  # paper
            final_lr=1e-6,  # paper
            warmup_epochs=15.0,  # paper
            weight_decay=0.04,  # paper
            final_weight_decay=0.4,  # paper
            weight_decay_schedule="linear",  # paper
            ema=0.996,  # paper
            final_ema=1.0,  # paper
            betas=(0.9, 0.999),  # code
        ),
        data=_DATA,
    )


def _ijepa(
    encoder: str,
    *,
    image_size: int,
    patch_size: int,
    predictor_depth: int,
    epochs: float,
    warmup_epochs: float,
) -> Config:
    """The released I-JEPA recipe."""
    return Config(
        model=ModelConfig(
            encoder=encoder,
            image_size=image_size,
            patch_size=patch_size,
            predictor_depth=predictor_depth,
            predictor_width=384,  # code
            precision="bf16",  # code
        ),
        mask=MaskConfig(
            mode="faithful",  # code
            target_scale=(0.15, 0.2),  # code
            target_aspect=(0.75, 1.5),  # code
            context_scale=(0.85, 1.0),  # code
            num_targets=4,  # code
            min_keep=10,  # code
        ),
        loss=LossConfig(prediction="smooth_l1", vicreg_weight=0.0),  # code; no VICReg in I-JEPA
        optim=OptimConfig(
            batch_size=2048,  # I-JEPA; the code says per GPU: 128 for H/14 (on 16), 16 for H/16-448 and g/16
            epochs=epochs,
            lr=1e-3,  # code
            start_lr=2e-4,  # code
            final_lr=1e-6,  # code
            warmup_epochs=warmup_epochs,
            weight_decay=0.04,  # code
            final_weight_decay=0.4,  # code
            weight_decay_schedule="cosine",  # code; I-JEPA's text says linear
            ema=0.996,  # code
            final_ema=1.0,  # code
            betas=(0.9, 0.999),  # code
            schedule_scale=1.0,  # code
        ),
        data=_DATA,
    )


PRESETS: dict[str, Config] = {
    # Letters in mosaic, about a minute on two CPU cores; without data.root the images are written to the cache.
    # Every number is ours, for a run this short; cjepa_fast/demo_data.py tells what the images are and why.
    "demo": Config(
        model=ModelConfig(
            encoder="vit_demo",
            image_size=48,
            patch_size=8,  # 36 patches
            predictor_depth=1,
            predictor_width=48,
            depth_rescale_init=True,  # without it the run passes through a near-collapse
            precision="fp32",  # CPUs gain nothing from bf16
        ),
        mask=MaskConfig(target_scale=(0.1, 0.17), min_keep=2, context_keep=11),  # of 36 patches
        loss=LossConfig(vicreg_weight=0.006, projector_width=256),  # 0.003 left one seed of five untaught
        optim=OptimConfig(
            batch_size=128,
            steps=400,  # 17 epochs of 3,000 images
            lr=1e-3,
            start_lr=1e-5,
            warmup_epochs=0.75,  # 17 steps
            weight_decay=0.05,
            final_weight_decay=0.05,
            ema=0.996,  # paper; 0.99 peaks early and then falls
        ),
        data=DataConfig(
            crop_scale=(0.7, 1.0),  # smaller crops cut the letters
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
        ),
        run=RunConfig(log_every=10, checkpoint_every=200, probe_every=100, probe_bank=3000, probe_queries=1000),
    ),
    # CIFAR-10 on two CPU cores, about eight minutes: a healthy run to look at (docs/results.md), not an accuracy.
    "cifar10_tiny": Config(
        model=ModelConfig(
            encoder="vit_pico",  # ours: width 128, depth 4, 4 heads
            image_size=32,
            patch_size=4,  # ours: 64 patches
            predictor_depth=2,  # ours
            predictor_width=64,  # ours
            precision="fp32",  # ours: CPUs gain nothing from bf16
        ),
        mask=MaskConfig(min_keep=4),  # ours: of 64 patches
        loss=LossConfig(
            vicreg_weight=0.1,  # ours: at 0.001 and lr 1e-3 features nearly collapsed in 300 steps (one seed)
            projector_width=512,  # ours
            projector_layers=2,  # ours
        ),
        optim=OptimConfig(
            batch_size=256,  # ours
            epochs=5.0,  # ours: 975 steps
            lr=5e-4,  # ours, as vicreg_weight
            start_lr=5e-5,  # ours: a tenth of lr, the paper's ratio
            final_lr=1e-6,  # paper
            warmup_epochs=0.25,  # ours: 5 % of the run
            weight_decay=0.04,  # paper
            final_weight_decay=0.04,  # ours: constant in a run this short
        ),
        data=_DATA,
        run=RunConfig(checkpoint_every=195, probe_every=195),  # once per epoch
    ),
    # CIFAR-10 on one GPU, meant to reach a real accuracy in about ten minutes. Not yet run on a GPU.
    "cifar10_small": Config(
        model=ModelConfig(
            encoder="vit_small",  # ours: 86 PFLOP in all, ten minutes at 150 TFLOP/s
            image_size=32,
            patch_size=4,  # ours: 64 patches
            predictor_depth=6,  # paper
            predictor_width=192,  # ours: half the encoder's, as 384 is for the paper's ViT-B
            precision="bf16",  # code
        ),
        mask=MaskConfig(min_keep=4),  # ours: of 64 patches
        loss=LossConfig(vicreg_weight=0.1),  # ours, as cifar10_tiny
        optim=OptimConfig(
            batch_size=1024,  # ours: 48 steps per epoch
            epochs=200.0,  # ours: 9,600 steps
            lr=5e-4,  # ours: the paper's 1e-3 at 2048, scaled to this batch
            start_lr=5e-5,  # ours: a tenth of lr, the paper's ratio
            final_lr=1e-6,  # paper
            warmup_epochs=10.0,  # ours: 5 % of the run
            weight_decay=0.04,  # paper
            final_weight_decay=0.4,  # paper
        ),
        data=DataConfig(hflip=True),  # ours: a small set needs it; the classes do not know left from right
        run=RunConfig(probe_every=480, probe_bank=50_000, probe_queries=10_000),  # every ten epochs, on everything
    ),
    # Depths and epochs of the paper's section 4.1 and tables 5 to 8; it trains no ViT-H.
    "cjepa_vit_tiny16_in1k": _cjepa("vit_tiny", predictor_depth=6, epochs=600),
    "cjepa_vit_small16_in1k": _cjepa("vit_small", predictor_depth=6, epochs=100),
    "cjepa_vit_base16_in1k": _cjepa("vit_base", predictor_depth=6, epochs=600),
    "cjepa_vit_large16_in1k": _cjepa("vit_large", predictor_depth=12, epochs=600),
    # Sizes, depths, epochs and warm-ups of the code.
    "ijepa_vit_huge14_in1k": _ijepa(
        "vit_huge", image_size=224, patch_size=14, predictor_depth=12, epochs=300, warmup_epochs=40
    ),
    "ijepa_vit_huge16_448_in1k": _ijepa(
        "vit_huge", image_size=448, patch_size=16, predictor_depth=12, epochs=300, warmup_epochs=40
    ),
    "ijepa_vit_giant16_in22k": _ijepa(
        "vit_giant", image_size=224, patch_size=16, predictor_depth=16, epochs=44, warmup_epochs=3
    ),
}
