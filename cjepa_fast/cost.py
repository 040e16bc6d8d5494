"""What a run costs before it is started: parameters, floating-point operations, memory. Plain arithmetic.

D encoder width, d predictor width, N patches of an image, of them Nc in the context and Nt in a target block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cjepa_fast.config import Config, count_steps

if TYPE_CHECKING:
    from cjepa_fast.vit import VitShape


class Cost(NamedTuple):
    """GFLOP per image of a training step: the target encoder runs forward, the rest forward and backward."""

    context: float
    target: float
    predictor: float
    projector: float

    @property
    def total(self) -> float:
        return sum(self)


class Parameters(NamedTuple):
    """Numbers of trained parameters; the target encoder repeats `encoder`. `positions` are fixed tables."""

    encoder: int
    predictor: int
    projector: int
    positions: int

    @property
    def trained(self) -> int:
        return self.encoder + self.predictor + self.projector


class Memory(NamedTuple):
    """Bytes on one process."""

    state: float
    copies: float
    activations: float

    @property
    def total(self) -> float:
        return sum(self)


def gflop_per_image(config: Config, *, context_tokens: float, target_tokens: float) -> Cost:
    """Model FLOP of a training step over its images; 2 FLOP per multiply-add, backward = 2 x forward.

    The method is counted, not an implementation: recomputation is not added, and work that ours leaves out
    without changing the result (patch embedding of dropped patches, predictor outputs of context rows) is not
    taken off. Norms, activations and losses, below 1 %, are left out.

    Args:
        context_tokens, target_tokens: mean Nc and Nt. Attention is taken at the mean; its quadratic cost adds
            less than 0.2 % for the published block sizes.
    """
    model, loss = config.model, config.loss
    encoder, predictor = _shapes(config)
    width, narrow = encoder.width, predictor.width
    patches, blocks = (model.image_size // model.patch_size) ** 2, config.mask.num_targets
    embed = 2 * 3 * model.patch_size**2 * width  # per patch; has no gradient with respect to the image
    context = 3 * _blocks_flop(encoder, context_tokens) + embed * (patches + context_tokens)
    target = _blocks_flop(encoder, patches) + embed * patches
    predicted = 3 * (
        blocks * _blocks_flop(predictor, context_tokens + target_tokens)
        + 2 * width * narrow * context_tokens
        + 2 * narrow * width * blocks * target_tokens
    )
    projected = 0.0
    if loss.vicreg_weight:
        views = blocks if loss.vicreg_views == "target_blocks" else 2
        projected = 3 * 2 * views * sum(rows * columns for rows, columns in _projector_layers(config))
    return Cost(*(flop / 1e9 for flop in (context, target, predicted, projected)))


def parameters(config: Config) -> Parameters:
    """Exact parameter counts of the networks that `config` builds."""
    model = config.model
    encoder, predictor = _shapes(config)
    width, narrow = encoder.width, predictor.width
    embed = 3 * model.patch_size**2 * width + width
    layers = _projector_layers(config)
    batch_norms = sum(2 * columns for _, columns in layers[:-1])
    return Parameters(
        encoder=embed + _blocks_parameters(encoder) + 2 * width,
        predictor=(width * narrow + narrow)  # embedding
        + narrow  # mask token
        + _blocks_parameters(predictor)
        + 2 * narrow  # norm
        + (narrow * width + width),  # projection back
        projector=sum(rows * columns for rows, columns in layers) + batch_norms,
        positions=(model.image_size // model.patch_size) ** 2 * (width + narrow),
    )


def memory_bytes(config: Config, *, world_size: int, context_tokens: float, target_tokens: float) -> Memory:
    """Estimated memory of one process, without the allocator's slack, workspaces and the CUDA context.

    Assumes
    state: fp32 weights, gradients and two Adam moments of what is trained, fp32 weights of the target
        encoder, all sharded over the processes;
    copies: what is trained in `model.precision`, kept from forward to backward on every process (ZeRO-2), and
        one unit of target blocks; none for a single process in fp32;
    activations: 34 D bytes per token and block, for bf16 and attention that does not store its matrix (twice
        that for fp32), kept for one of `runtime.accumulate` parts of the batch; one block of the target
        encoder; the images waiting, as bytes.
    """
    model, runtime = config.model, config.runtime
    encoder, predictor = _shapes(config)
    count = parameters(config)
    patches, blocks = (model.image_size // model.patch_size) ** 2, config.mask.num_targets
    size = 2 if model.precision == "bf16" else 4
    state = (16 * count.trained + 4 * count.encoder) / world_size

    copies = 0.0
    if size == 2 or world_size > 1:
        unit = min(runtime.fsdp_blocks if world_size > 1 else 1, encoder.depth)
        copies = size * (count.trained + _blocks_parameters(encoder) * unit / encoder.depth)

    images = config.optim.batch_size / world_size
    part = images / runtime.accumulate
    per_width = 34 * size / 2
    activations = (
        per_width
        * part
        * (
            encoder.width * (encoder.depth * context_tokens + patches)
            + predictor.width * predictor.depth * blocks * (context_tokens + target_tokens)
        )
        + images * (runtime.prefetch + 1) * 3 * model.image_size**2
    )
    return Memory(state, copies, activations)


def report(
    config: Config, num_images: int, world_size: int, mean_context_tokens: float, mean_target_tokens: float
) -> str:
    """The tables that `--check` prints.

    Raises UserError if a batch holds more than `num_images`.
    """
    steps = count_steps(config, num_images)
    count = parameters(config)
    tokens = {"context_tokens": mean_context_tokens, "target_tokens": mean_target_tokens}
    cost = gflop_per_image(config, **tokens)
    memory = memory_bytes(config, world_size=world_size, **tokens)
    batch, patches = config.optim.batch_size, (config.model.image_size // config.model.patch_size) ** 2
    rows = [
        ("context encoder", f"{count.encoder:,}", cost.context),
        ("target encoder", "its average", cost.target),
        ("predictor", f"{count.predictor:,}", cost.predictor),
        ("projector", f"{count.projector:,}", cost.projector),
        ("total trained", f"{count.trained:,}", cost.total),
    ]
    lines = [f"{'':16}{'parameters':>14}{'GFLOP/image':>14}{'share':>8}"]
    lines += [f"{name:16}{number:>14}{flop:>14.3f}{flop / cost.total:>8.1%}" for name, number, flop in rows]
    lines += [
        "GFLOP: forward and backward (3 x forward), the target encoder forward only",
        "",
        f"tokens   {patches} per image, {mean_context_tokens:.1f} in the context,"
        f" {config.mask.num_targets} x {mean_target_tokens:.1f} targets",
        f"steps    {steps.total:,} of {batch} images ({world_size} x {batch // world_size}),"
        f" {steps.per_epoch:,} per epoch, {steps.total / steps.per_epoch:.4g} epochs,"
        f" warm-up {steps.warmup:,}",
        f"work     {_flop(cost.total * batch)} per step, {_flop(cost.total * batch * steps.total)} in all",
        f"memory   about {memory.total / 2**30:.2f} GiB per process: state {memory.state / 2**30:.2f},"
        f" copies {memory.copies / 2**30:.2f}, activations {memory.activations / 2**30:.2f}",
    ]
    return "\n".join(lines)


def _flop(giga: float) -> str:
    for unit in ("GFLOP", "TFLOP", "PFLOP"):
        if giga < 1000:
            return f"{giga:.3g} {unit}"
        giga /= 1000
    return f"{giga:,.3g} EFLOP"


def _shapes(config: Config) -> tuple[VitShape, VitShape]:
    """The encoder's and the predictor's."""
    from cjepa_fast.vit import VitShape, encoder_shape

    model = config.model
    encoder = encoder_shape(model.encoder)
    return encoder, VitShape(model.predictor_width, model.predictor_depth, model.predictor_heads or encoder.heads)


def _projector_layers(config: Config) -> list[tuple[int, int]]:
    """Input and output width of each linear layer; none where the loss has no use for the projector."""
    if not config.loss.vicreg_weight:
        return []
    width = _shapes(config)[0].width
    hidden = config.loss.projector_width or width
    return [(width, hidden)] + [(hidden, hidden)] * (config.loss.projector_layers - 1)


def _blocks_flop(shape: VitShape, tokens: float) -> float:
    """Forward pass of all blocks over one sequence: (8 + 4 mlp_ratio) D^2 n + 4 n^2 D each."""
    width, hidden = shape.width, round(shape.width * shape.mlp_ratio)
    return shape.depth * ((8 * width**2 + 4 * width * hidden) * tokens + 4 * tokens**2 * width)


def _blocks_parameters(shape: VitShape) -> int:
    width, hidden = shape.width, round(shape.width * shape.mlp_ratio)
    attention = (3 * width**2 + 3 * width) + (width**2 + width)
    mlp = (width * hidden + hidden) + (hidden * width + width)
    return shape.depth * (attention + mlp + 2 * 2 * width)
