"""The anatomical embedder that mines Alice's pairs.

    python -m alice_jax.train --config=configs/embedder.py --config.data.store=DIR --workdir=runs/embedder
    python -m alice_jax.embed --store=DIR --workdir=runs/embedder

`configs/embedder.py` is the published network and recipe (SAM, arXiv 2012.02383): 33 million parameters, 20,000
steps of 8 samples, for one accelerator.
`configs/embedder.py:tiny` fits two CPU cores and a few minutes; `:small` is the same ten times as long and with
stretches. `:across` continues `:small` on pairs of patients, whose matches it takes from the embeddings in the store:

    python -m alice_jax.train --config=configs/embedder.py:across --config.data.store=DIR \
        --config.init_from=runs/embedder --workdir=runs/embedder-across

What each reaches stands in docs/measured.md.

With no `data.store` the built-in cohort is used. `init_from` names what to start from: the workdir of another run, a
SAM checkpoint, or torchvision's ResNet-18 trained on ImageNet, whose kernels are then inflated to 3-D as published (the
last two need the `torch` extra).
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; `variant` is "", "tiny", "small" or "across"."""
    if variant not in ("", "tiny", "small", "across"):
        raise ValueError(f"configs/embedder.py:{variant}: the variants are tiny, small and across")
    config = ConfigDict()
    config.objective = "embedder"
    config.seed = 0
    config.batch_size = 8  # pairs of views in the global batch
    config.microbatch = 0  # pairs that a device computes at once; 0: 1 on a CPU, all on an accelerator
    config.steps = 20_000
    config.precision = "auto"  # of the computation: "bfloat16", "float32", or bfloat16 on accelerators alone
    config.checkpoint_every = 500
    config.keep_checkpoints = 3
    config.log_every = 10
    config.validate_every = 500
    config.init_from = ""

    config.mesh = ConfigDict()  # docs/scaling.md
    config.mesh.parameters = 1  # devices that share one copy of parameters, teacher and optimizer state
    config.mesh.rules = (("", 65_536),)  # (regex, None or "parameters" for each axis, or values from which to divide)

    config.numerics = ConfigDict()  # docs/faults.md
    config.numerics.skip = 0  # updates that a run may leave out for numbers that are not finite; the next one stops it
    config.numerics.collapse = "warn"  # or "stop", or "ignore": at validation, when features are all alike
    config.numerics.variance = 0.001  # of features, at least
    config.numerics.effective_rank = 1.5  # of features, at least

    config.data = ConfigDict()
    config.data.store = ""
    config.data.spacing_mm = 2.0  # of the store; the network is trained for this one
    config.data.workers = 0
    config.data.threads = 4
    config.data.timeout_s = 600.0  # a batch that takes longer ends the run
    config.data.cache_gb = 50.0  # of this host's disk at most, for copies of what is read of a store in a bucket
    config.data.validation_fraction = 0.1
    config.data.validation_samples = 16

    config.views = ConfigDict()
    config.views.reduce = 1  # store voxels averaged into one of the network's, along each axis
    config.views.window_hu = (-1024.0, 3071.0)
    config.views.shape_zyx = (32, 96, 96)  # of a view, in the network's voxels
    config.views.shift = 0.25  # largest distance of the two centres, as a share of the view
    config.views.partner_share = 0.0  # of samples that show two patients, by the embeddings already in the store
    config.views.pairs = 100
    config.views.positive_mm = 2.0
    config.views.scale = (0.8, 1.25)
    config.views.rotation_degrees = 10.0
    config.views.bend_mm = 3.0
    config.views.bend_spacing_mm = 48.0
    config.views.stretch_mm = 0.0
    config.views.stretch_spacing_mm = 128.0
    config.views.tone_hu = 15.0
    config.views.shade_hu = 10.0
    config.views.noise_hu = 20.0
    config.views.blur_voxels = 0.7

    config.model = ConfigDict()
    config.model.channels = (64, 128, 256, 512)
    config.model.features = 128
    config.model.blocks = (2, 2, 2, 2)
    config.model.stem_kernel_zyx = (3, 7, 7)
    config.model.stem_stride_zyx = (1, 1, 1)
    config.model.stage_strides_zyx = ((1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2))
    config.model.stage_kernels_zyx = ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3))
    config.model.depth_pool = 2
    config.model.fine_kernel_zyx = (3, 3, 3)
    config.model.statistics_momentum = 0.9

    config.loss = ConfigDict()
    config.loss.candidates = 0  # cells that may become negatives, drawn at random; 0: all
    for level, ignore_mm, hard_pool, negatives, others in (
        ("fine", 3.0, 2000, 500, 0),
        ("coarse", 25.0, 250, 200, 300),
        ("joint", 3.0, 2000, 500, 0),
    ):
        config.loss[level] = ConfigDict()
        config.loss[level].weight = 0.0 if level == "joint" else 1.0
        config.loss[level].temperature = 0.5
        config.loss[level].spread_mm = 0.0  # of the positive among the cells around it; 0: one cell alone
        config.loss[level].ignore_mm = ignore_mm
        config.loss[level].hard_pool = hard_pool
        config.loss[level].negatives = negatives
        config.loss[level].other_volumes = others

    config.optimizer = ConfigDict()
    config.optimizer.kind = "sgd"  # or "adamw"
    config.optimizer.lr = 0.02
    config.optimizer.min_lr = 2e-4
    config.optimizer.warmup = "500 steps, 10 %"
    config.optimizer.weight_decay = 1e-4
    config.optimizer.momentum = 0.9  # of sgd
    config.optimizer.b2 = 0.999  # of adamw
    config.optimizer.clip = 0.0  # of the global norm of the gradients; 0: none

    config.storage = ConfigDict()
    config.storage.dims = 32  # directions kept of each vector on disk
    config.storage.shifts = 1  # how many times finer the fine cells lie than the network's, by shifted copies of a scan

    if variant in ("tiny", "small", "across"):
        config.batch_size = 2
        config.microbatch = 2
        config.steps = 150
        config.checkpoint_every = config.validate_every = 50
        config.log_every = 5
        config.data.threads = 2
        config.data.validation_samples = 4
        # Two thirds of a torso at a time, on a grid of 8 mm: whole-body context matters more here than detail.
        config.views.reduce = 2
        config.views.window_hu = (-300.0, 400.0)
        config.views.shape_zyx = (64, 64, 80)
        config.views.shift = 0.15
        config.views.pairs = 512
        config.views.positive_mm = 4.0
        config.views.scale = (0.75, 1.3)
        config.views.bend_mm = 6.0
        config.views.tone_hu = 30.0
        config.views.shade_hu = 20.0
        config.views.blur_voxels = 0.5
        config.model.channels = (16, 32, 64, 96)
        config.model.features = 32
        config.model.blocks = (1, 2, 2, 1)
        config.model.stem_kernel_zyx = (5, 5, 5)
        config.model.stem_stride_zyx = (2, 2, 2)
        config.model.stage_strides_zyx = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (1, 1, 1))
        config.model.stage_kernels_zyx = ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
        config.model.fine_kernel_zyx = (1, 1, 1)
        config.model.depth_pool = 1
        config.loss.candidates = 2048
        for level, ignore_mm in (("fine", 12.0), ("coarse", 24.0), ("joint", 12.0)):
            config.loss[level].update(
                weight=1.0, temperature=0.1, ignore_mm=ignore_mm, hard_pool=0, negatives=0, other_volumes=0
            )
        config.optimizer.kind = "adamw"
        config.optimizer.lr = 1e-2
        config.optimizer.min_lr = 2e-4
        config.optimizer.b2 = 0.99
        config.optimizer.clip = 1.0
        config.optimizer.warmup = "10 %"
        config.storage.dims = 32
    if variant in ("small", "across"):
        config.views.stretch_mm = 16.0
    if variant == "small":
        config.steps = 1500
    if variant == "across":
        config.steps = 600
        config.optimizer.lr = 5e-3
        config.views.partner_share = 0.5
    return config.lock()
