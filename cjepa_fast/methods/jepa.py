"""I-JEPA and C-JEPA: predict the target encoder's embeddings of masked blocks from a context block.

I-JEPA (Assran et al., CVPR 2023, arXiv 2301.08243) has the prediction loss alone. C-JEPA (Mo & Tong, NeurIPS 2024,
arXiv 2410.19560) adds VICReg's terms on mean embeddings, appendix C: L = L_JEPA + 0.001 (25 sim + 25 std + 1 cov).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cjepa_fast.config import Config
from cjepa_fast.losses import block_vicreg, context_target_vicreg, prediction_loss
from cjepa_fast.masks import Masks
from cjepa_fast.methods import parts
from cjepa_fast.methods.protocol import Forward, Loss, Method, precise
from cjepa_fast.networks import Encoder, Predictor
from cjepa_fast.networks.heads import Projector
from cjepa_fast.networks.sequences import Layout, Selection


class Regularisation(NamedTuple):
    """C-JEPA's terms on mean embeddings.

    weights: of sim, std and cov, multiplied out: C-JEPA publishes 0.001 (25, 25, 1).
    views: "target_blocks" (Algorithm 1) or "context_target" (pseudo-code C.2).
    """

    weights: tuple[float, float, float]
    views: str


class Jepa(Method):
    """I-JEPA, or with a `projector` and a `regularisation` C-JEPA.

    The names of the networks are those of the released I-JEPA checkpoints. The target encoder starts as a copy of the
    encoder and follows it by EMA.

    Args:
        prediction: "smooth_l1" or "l2", see `cjepa_fast.losses.prediction_loss`.
        recoloured: the target encoder sees the same crop in other colours, as a second view.
        kernels: implementation of the fused operations, see `cjepa_fast.ops`.
    """

    local_terms = ("prediction",)
    masked = True

    def __init__(
        self, encoder: Encoder, predictor: Predictor, target_encoder: Encoder, projector: Projector | None = None,
        regularisation: Regularisation | None = None, *, prediction: str, recoloured: bool, kernels: str,
    ) -> None:  # fmt: skip
        super().__init__()
        assert (projector is None) == (regularisation is None)
        self.encoder, self.predictor, self.projector = encoder, predictor, projector
        self.target_encoder = target_encoder
        target_encoder.load_state_dict(encoder.state_dict())
        target_encoder.requires_grad_(False)
        self.prediction, self.regularisation, self.kernels = prediction, regularisation, kernels
        self.views = 2 if recoloured else 1
        self.batch_terms = ("sim", "std", "cov") if regularisation else ()
        self.needs_all_targets = regularisation is not None and regularisation.views == "context_target"

    @property
    def judged(self) -> Encoder:
        return self.target_encoder

    def averages(self) -> dict[Tensor, Tensor]:
        return dict(zip(self.encoder.parameters(), self.target_encoder.parameters(), strict=True))

    @torch.no_grad()
    def targets(self, images: Sequence[Tensor], masks: Sequence[Masks | None]) -> list[Tensor | None]:
        """Embed the targets of each micro-batch, see `target_embeddings`."""
        with self.target_encoder.quantised():
            return [target_embeddings(self.target_encoder, *part) for part in zip(images, masks, strict=True)]

    def forward(self, images: Tensor, masks: Masks | None, targets: Tensor | None) -> Forward:
        assert masks is not None and targets is not None
        images = images[0] if images.ndim == 5 else images
        layout = Layout(masks.offsets, len(self.encoder.pos_embed[0]) if masks.offsets is not None else None)
        context = self.encoder(images, masks.context, masks.image_of, layout)
        predictions = self.predictor(context, masks.context, masks.target, masks.offsets)
        summary = None
        if self.regularisation is not None:
            if self.regularisation.views == "target_blocks":
                summary = precise(predictions).mean(dim=2)
            else:
                means = precise(targets).mean(dim=1)
                summary = torch.stack([_context_means(context, masks, len(means)), means], dim=1)
        return Forward(summary, predictions, targets if masks.union is None else None)

    def local_loss(self, out: Forward, masks: Masks | None, targets: Tensor | None) -> Loss:
        assert masks is not None and targets is not None and out.predictions is not None
        indices = masks.target if masks.target_slot is None else masks.target_slot
        loss = prediction_loss(
            out.predictions, targets, indices, self.prediction, offsets=masks.union_offsets, impl=self.kernels
        )
        return loss, (loss,)

    def batch_loss(self, summary: Tensor) -> Loss:
        """Compute the weighted VICReg terms of the summaries, block means [B, M, D] or (context, target) [B, 2, D]."""
        assert self.projector is not None and self.regularisation is not None
        projected = self.projector(summary)
        if self.regularisation.views == "target_blocks":
            terms = block_vicreg(projected, impl=self.kernels)
        else:
            terms = context_target_vicreg(projected[:, 0], projected[:, 1].detach(), impl=self.kernels)
        sim, std, cov = (weight * term for weight, term in zip(self.regularisation.weights, terms, strict=True))
        return sim + std + cov, terms


def target_embeddings(target_encoder: Encoder, images: Tensor, masks: Masks | None = None) -> Tensor:
    """Return the target encoder's output [b, N, D], or [union_cap, D] where masks list unions of targets.

    The latter holds the embeddings of each image's target patches alone, image after image, then padding. Of two views
    [2, b, H, W, 3] the target encoder sees the second.
    """
    images = images[1] if images.ndim == 5 else images
    if masks is None or masks.union is None:
        return target_encoder(images)
    starts = masks.union_offsets
    assert starts is not None
    patches = len(target_encoder.pos_embed[0])
    image = torch.searchsorted(starts[1:], torch.arange(len(masks.union), device=starts.device), right=True)
    tokens = torch.where(masks.union < 0, 0, image * patches + masks.union)  # padding repeats a token
    longest = min(patches, masks.target[0].numel())
    return target_encoder(images, wanted=Selection(index=tokens, layout=Layout(starts, longest)))


def build(c: Config) -> Jepa:
    """Build I-JEPA or C-JEPA."""
    encoder, target_encoder, predictor = parts.encoder(c), parts.encoder(c), parts.predictor(c)
    if c.model.target_precision == "float8":
        target_encoder.use_float8(c.runtime.kernels)
    projector = regularisation = None
    if c.method == "cjepa":
        projector = parts.projector(c, encoder.width)
        sim, std, cov = (c.loss.vicreg_weight * coefficient for coefficient in c.loss.vicreg_coefficients)
        regularisation = Regularisation((sim, std, cov), c.loss.vicreg_views)
    return Jepa(
        encoder, predictor, target_encoder, projector, regularisation, prediction=c.loss.prediction,
        recoloured=c.data.augment != "none", kernels=c.runtime.kernels,
    )  # fmt: skip


def _context_means(context: Tensor, masks: Masks, images: int) -> Tensor:
    """Average the context tokens of each image: [b, Kc, D] or packed [cap, D] -> [b, D]."""
    if masks.image_of is None:
        return precise(context).mean(dim=1)
    # A product sums packed tokens without atomics, and gives the same bits for any amount of padding.
    own = masks.image_of == torch.arange(images, device=context.device)[:, None]  # [b, cap]
    return (own / own.sum(dim=1, keepdim=True)).to(precise(context).dtype) @ precise(context)
