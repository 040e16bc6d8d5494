"""What a run costs before it is started: parameters, floating-point operations, memory. Plain arithmetic.

D encoder width, d predictor width, N patches of an image, of them Nc in the context and Nt in a target block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cjepa_fast.config import Config, World, count_steps, shard_size

if TYPE_CHECKING:
    from cjepa_fast.config import VitShape


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
    """Bytes on one process; the activations are those kept for the backward pass.

    `peak` is not their sum: activations go while gradients come. `moment` says when it is reached.
    """

    state: float
    gradients: float
    copies: float
    target: float
    context: float
    predictor: float
    working: float
    peak: float
    moment: str


class Saving(NamedTuple):
    """How a step saves memory: the arguments of `memory_bytes`, what comes of them, and why, as a line of the log."""

    reshard: bool
    checkpoint: bool
    memory: Memory
    reason: str


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
    layers = _projector_layers(config)
    batch_norms = sum(2 * columns for _, columns in layers[:-1])
    return Parameters(
        encoder=_embedding_parameters(config) + _blocks_parameters(encoder) + 2 * width,
        predictor=(width * narrow + narrow)  # embedding
        + narrow  # mask token
        + _blocks_parameters(predictor)
        + 2 * narrow  # norm
        + (narrow * width + width),  # projection back
        projector=sum(rows * columns for rows, columns in layers) + batch_norms,
        positions=(model.image_size // model.patch_size) ** 2 * (width + narrow),
    )


def memory_bytes(
    config: Config, world: World, context_tokens: float, target_tokens: float, *, reshard: bool = False,
    checkpoint: bool = False,
) -> Memory:  # fmt: skip
    """Memory of one process, without the allocator's slack, workspaces of libraries and the CUDA context.

    S processes share one copy of the state, one process computes `part` images at a time (`runtime.accumulate`).

    state: fp32 weights and two Adam moments of what is trained, fp32 weights of the target encoder, over S, and the
        images that wait, as bytes.
    gradients: fp32, over S.
    copies: weights as they are multiplied, in `model.precision`. ZeRO-2 keeps all that is trained, ZeRO-3 (`reshard`)
        two units; beside them stand what gathering and reducing a unit pass through. A lone process has 16-bit copies
        of all weights.
    target, context, predictor: what stays of each phase until the backward pass. A block keeps its input, that of
        its second half, both norms' outputs, q, k, v, the attention's output, and the MLP's hidden values before and
        after GELU: (8 + 2 mlp_ratio) D values a token, compiled or not, for attention that does not store its matrix;
        with `checkpoint` its input alone. The predictor's first and last block spare some. Of the
        target encoder its output stays, of all rows in the worst case.
    working: what the block at work holds beyond that.

    CUDA graphs (`runtime.cuda_graph`) count at most: their common memory holds the activations of a step and each one's
    predictions and targets, beside the activations of steps that warm up.
    """
    model, runtime = config.model, config.runtime
    encoder, predictor = _shapes(config)
    count = parameters(config)
    patches, blocks = (model.image_size // model.patch_size) ** 2, config.mask.num_targets
    shards, several = shard_size(config, world), world.size > 1
    size = 2 if model.precision == "bf16" else 4
    images = config.optim.batch_size / world.size
    part = images / runtime.accumulate
    context_rows, target_rows = part * context_tokens, part * blocks * target_tokens
    rows = part * blocks * (context_tokens + target_tokens)  # of the predictor

    waiting = images * (runtime.prefetch + 1) * 3 * model.image_size**2
    state = (12 * count.trained + 4 * count.encoder) / shards + waiting
    gradients = 4 * count.trained / shards

    units = [_blocks_parameters(shape) * min(runtime.fsdp_blocks / shape.depth, 1) for shape in (encoder, predictor)]
    passing = cast = held = 0.0
    if several:
        cast = size * (min(2 * max(units), count.trained) if reshard else count.trained)
        # a unit gathered flat, its gradients as autograd leaves them, and twice flat in fp32 on their way out
        passing = max(units) * (size + size + 8)
    elif size == 2:  # not of the patch embedding and the mask token
        held = size * (2 * (count.encoder - _embedding_parameters(config)) + count.predictor - predictor.width)

    def kept(shape: VitShape, tokens: float) -> float:
        hidden = round(shape.width * shape.mlp_ratio)
        everything = tokens * (size * (8 * shape.width + 2 * hidden) + 4 * shape.heads + 16)
        return shape.depth * (tokens * size * shape.width if checkpoint else everything)

    def working_on(shape: VitShape, tokens: float) -> float:
        """Of the block in its backward pass: gradients of the residual and of the hidden values; what is recomputed."""
        hidden = round(shape.width * shape.mlp_ratio)
        again = (7 * shape.width + 2 * hidden) if checkpoint else 0
        return tokens * size * (shape.width + hidden + again)

    wide, narrow = encoder.width, predictor.width
    narrow_hidden, spared = round(narrow * predictor.mlp_ratio), 0.0
    if config.model.predictor_context == "per_target" and not checkpoint:
        spared += size * 2 * narrow * (rows - context_rows - patches)  # input and norm of copies
    # of the last block: output; queries and what follows the attention, but for a copy of target rows
    spared += size * narrow * (rows - target_rows)
    if not checkpoint:
        spared += size * ((4 * narrow + 2 * narrow_hidden) * (rows - target_rows) - narrow * target_rows)
    target = size * wide * patches * images
    pixels = 3 * model.patch_size**2 * context_rows * size
    context = kept(encoder, context_rows) + 2 * size * wide * context_rows + pixels
    loss = 8 * wide * target_rows  # predictions and targets in fp32
    regularised = _regularisation_bytes(config, world)
    predicted = (
        kept(predictor, rows) - spared + size * (narrow * (rows + target_rows) + wide * target_rows) + loss
        + regularised
    )  # fmt: skip

    # of the parts that came before; a CUDA graph's keep their memory
    before = gradients if runtime.accumulate > 1 or runtime.cuda_graph == "on" else 0.0
    hidden = round(wide * encoder.mlp_ratio)
    moments = {
        "target encoder": size * part * patches * (2 * wide + 2 * hidden) + before,
        "loss": context + predicted + 4 * wide * patches * part + before,
        "projector's backward": context + predicted + max(before, 4 * count.projector / shards),
        "predictor's backward": context
        + predicted
        - loss
        - regularised
        + working_on(predictor, rows)
        + max(before, 4 * count.projector / shards),
        "context encoder's backward": context
        + working_on(encoder, context_rows)
        + max(before, 4 * (count.predictor + count.projector) / shards),
        "end of backward": working_on(encoder, context_rows) + gradients,
    }
    moments = {name: bytes + (0.0 if name == "end of backward" else cast) for name, bytes in moments.items()}
    moment = max(moments, key=lambda name: moments[name])
    working = max(working_on(predictor, rows), working_on(encoder, context_rows))
    peak = state + held + passing + target + moments[moment]
    if runtime.cuda_graph == "on":
        from cjepa_fast.engine.graphs import MOST

        peak += target + moments[moment] - before - cast + MOST * (size * wide * target_rows + target)
    return Memory(state, gradients, cast + held + passing, target, context, predicted, working, peak, moment)


ROOM = 0.9  # of a GPU's memory is planned with; the rest is for the CUDA context, NCCL, workspaces and fragments


def save_memory(
    config: Config, world: World, memory_gb: float | None, context_tokens: float, target_tokens: float
) -> Saving:
    """What `runtime.reshard` and `runtime.checkpoint_activations` come to on a device of `memory_gb` 10^9 bytes.

    "auto" takes the cheapest that fits: nothing; ZeRO-3, more communication; recomputing, a third more work; both.
    """
    runtime, sharded = config.runtime, shard_size(config, world) > 1
    reshards = {"auto": (False, True) if sharded else (False,), "never": (False,), "always": (sharded,)}[
        runtime.reshard
    ]
    checkpoints = {"auto": (False, True), "off": (False,), "on": (True,)}[runtime.checkpoint_activations]
    choices = [(reshard, checkpoint) for checkpoint in checkpoints for reshard in reshards]
    found = [
        memory_bytes(config, world, context_tokens, target_tokens, reshard=reshard, checkpoint=checkpoint)
        for reshard, checkpoint in choices
    ]
    if memory_gb is None:
        index, fits = 0, ""
    else:
        fitting = [index for index, memory in enumerate(found) if memory.peak <= ROOM * memory_gb * 1e9]
        index = fitting[0] if fitting else min(range(len(found)), key=lambda index: found[index].peak)
        limit = f"{ROOM:.0%} of {memory_gb:.0f} GB"
        if not fitting:
            fits = f", more than {limit}: raise runtime.accumulate if it runs out of memory"
        elif index == 0:
            fits = f", within {limit}"
        else:
            fits = f", as {found[0].peak / 1e9:.1f} GB would exceed {limit}"
    (reshard, checkpoint), memory = choices[index], found[index]
    names = [("ZeRO-3" if reshard else "ZeRO-2")] if sharded else []
    names.append("activations recomputed" if checkpoint else "activations kept")
    return Saving(reshard, checkpoint, memory, f"{', '.join(names)}: about {memory.peak / 1e9:.1f} GB a process{fits}")


def layout(config: Config, world: World) -> str:
    """How the state lies over the processes, for people."""
    shards = shard_size(config, world)
    if world.size == 1:
        return "state whole on one process"
    why = " (auto)" if config.runtime.shard_size is None else ""
    copies = world.size // shards
    spread = f"state in {shards} shards" if shards > 1 else "state not sharded"
    return f"{spread}, {copies} {'copies' if copies > 1 else 'copy'}{why}"


def report(
    config: Config, num_images: int, world: World, mean_context_tokens: float, mean_target_tokens: float,
    memory_gb: float | None = None,
) -> str:  # fmt: skip
    """The tables that `--check` prints.

    Raises UserError if a batch holds more than `num_images`.
    """
    steps = count_steps(config, num_images)
    count = parameters(config)
    tokens = {"context_tokens": mean_context_tokens, "target_tokens": mean_target_tokens}
    cost = gflop_per_image(config, **tokens)
    saving = save_memory(config, world, memory_gb, **tokens)
    memory = saving.memory
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
        f"steps    {steps.total:,} of {batch} images ({world.size} x {batch // world.size}),"
        f" {steps.per_epoch:,} per epoch, {steps.total / steps.per_epoch:.4g} epochs,"
        f" warm-up {steps.warmup:,}",
        f"work     {_flop(cost.total * batch)} per step, {_flop(cost.total * batch * steps.total)} in all",
        f"layout   {layout(config, world)}; {saving.reason}",
        f"memory   {_gb(memory.peak)} GB at the peak ({memory.moment}): state {_gb(memory.state)},"
        f" gradients {_gb(memory.gradients)}, copies {_gb(memory.copies)}; activations:"
        f" context {_gb(memory.context)}, predictor {_gb(memory.predictor)}, targets {_gb(memory.target)},"
        f" at work {_gb(memory.working)}",
    ]
    return "\n".join(lines)


def _gb(number: float) -> str:
    return f"{number / 1e9:.2f}"


def _flop(giga: float) -> str:
    for unit in ("GFLOP", "TFLOP", "PFLOP"):
        if giga < 1000:
            return f"{giga:.3g} {unit}"
        giga /= 1000
    return f"{giga:,.3g} EFLOP"


def _shapes(config: Config) -> tuple[VitShape, VitShape]:
    """The encoder's and the predictor's."""
    from cjepa_fast.config import VitShape, encoder_shape

    model = config.model
    encoder = encoder_shape(model.encoder)
    return encoder, VitShape(model.predictor_width, model.predictor_depth, model.predictor_heads or encoder.heads)


def _embedding_parameters(config: Config) -> int:
    """Of the patch embedding."""
    return (3 * config.model.patch_size**2 + 1) * _shapes(config)[0].width


def _regularisation_bytes(config: Config, world: World) -> float:
    """What projector and VICReg terms keep for the backward pass, all in fp32."""
    from cjepa_fast.ops import variance_covariance_form

    layers, pairs = _projector_layers(config), config.loss.vicreg_views == "target_blocks"
    if not layers:
        return 0.0
    images, width, hidden = config.optim.batch_size // world.size, layers[0][0], layers[-1][1]
    blocks = config.mask.num_targets
    if variance_covariance_form(images, hidden, world.size, 4) == "gram":
        # a rank's part of the matrix, and the rows of all ranks
        matrix = images * world.size * (images + (hidden if world.size > 1 else 0))
    else:
        matrix = hidden**2
    rows = images * (blocks if pairs else 2)
    return 4 * (rows * (width + (2 * len(layers) - 1) * hidden) + (blocks if pairs else 1) * matrix)


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
