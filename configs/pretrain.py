"""Alice pretraining on unlabelled CT.

    python -m alice_jax.train --config=configs/pretrain.py --config.data.store=DIR --workdir=runs/pretrain

`configs/pretrain.py` is the full-size model for one accelerator or, slowly, a computer without one.
`configs/pretrain.py:pod` is the paper's recipe: 64 pairs in a global batch, 8 on each of 8 devices.
`configs/pretrain.py:release` computes what the authors' code does, with the settings of its README.
`configs/pretrain.py:tiny` fits two CPU cores: the built-in cohort in about two minutes.

`model.backbone` chooses the network (docs/backbones.md): nnformer, the authors', resenc or primus.

With no `data.store` the built-in cohort is used. Durations are "N steps", "N epochs", "N %" of the run, or the
shortest of several, separated by commas.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; `variant` is "", "pod", "release" or "tiny"."""
    if variant not in ("", "pod", "release", "tiny"):
        raise ValueError(f"configs/pretrain.py:{variant}: the variants are pod, release and tiny")
    config = ConfigDict()
    config.objective = "alice"
    config.seed = 0
    config.batch_size = 8  # pairs in the global batch
    config.microbatch = 0  # pairs that a device computes at once; 0: 1 on a CPU, all on an accelerator
    config.steps = 100_000
    config.precision = "auto"  # of the computation: "bfloat16", "float32", or bfloat16 on accelerators alone
    config.checkpoint_every = 500
    config.keep_checkpoints = 3
    config.log_every = 10
    config.validate_every = 500

    config.mesh = ConfigDict()  # docs/scaling.md
    config.mesh.parameters = 1  # devices that share one copy of parameters, teacher and optimizer state
    config.mesh.rules = (("", 65_536),)  # (regex, None or "parameters" for each axis, or values from which to divide)

    config.numerics = ConfigDict()  # docs/faults.md
    config.numerics.skip = 0  # updates that a run may leave out for numbers that are not finite; the next one stops it
    config.numerics.collapse = "warn"  # or "stop", or "ignore": at validation, when features are all alike
    config.numerics.entropy = (0.02, 0.995)  # of the teacher, as shares of the largest possible; outside: collapse
    config.numerics.variance = 0.001  # of features, at least
    config.numerics.effective_rank = 1.5  # of features, at least

    config.data = ConfigDict()
    config.data.store = ""
    config.data.workers = 0  # processes that mine pairs; 0: threads of the training process
    config.data.threads = 4  # per process
    config.data.timeout_s = 600.0  # a batch that takes longer ends the run
    config.data.cache_gb = 50.0  # of this host's disk at most, for copies of what is read of a store in a bucket
    config.data.validation_fraction = 0.1  # of the scans, never trained on
    config.data.validation_samples = 16
    config.data.patients = ""  # file that says which patient a scan is of, where the headers do not (docs/mining.md)

    config.views = ConfigDict()
    config.views.kind = "mined"  # or "random": the same crops without matching
    config.views.partners = "region"  # scans that show what the query shows; or "any"
    config.views.same_patient = "avoid"  # nor copies of one scan; or "allow"
    config.views.threshold = 0.7  # score from which a match is accepted,
    config.views.cycle_mm = 10.0  # if it also leads back to within this distance of the query's point
    config.views.agreeing = 0.1  # and this share of the weight of the point's neighbours agrees
    config.views.tries_per_partner = 5  # points, then another partner is drawn
    config.views.tries = 100  # points in all, then the pair is weak:
    config.views.weak = "keep"  # the best try; or "down-weight" it, or "redraw": start anew with another query, twice
    config.views.weak_weight = 0.25  # of a down-weighted pair's losses
    config.views.crop_shape_zyx = (64, 64, 64)
    config.views.mask_ratio = 0.75

    config.model = ConfigDict()
    config.model.backbone = "nnformer"  # or "resenc", or "primus"
    config.model.width = 48  # of nnformer, as are depths, heads, windows and drop_path
    config.model.depths = (2, 2, 2, 2)
    config.model.heads = (6, 12, 24, 48)
    config.model.windows = (4, 4, 8, 4)
    config.model.drop_path = 0.2
    config.model.resenc = ConfigDict()
    config.model.resenc.features = (32, 64, 128, 256, 320)  # for crops of 64; for 128 one more stage: 320, 6
    config.model.resenc.blocks = (1, 3, 4, 6, 6)
    config.model.primus = ConfigDict()  # size S; B is 792, 12, 12, M 864, 16, 12 and L 1056, 24, 16
    config.model.primus.width = 396
    config.model.primus.depth = 12
    config.model.primus.heads = 6
    config.model.primus.drop_path = 0.2
    config.model.remat = ()  # stages computed again for gradients, such as (0,): an accelerator's memory for time
    config.model.head_hidden = 2048
    config.model.bottleneck = 256
    config.model.prototypes = 512
    config.model.casa_heads = 8
    config.model.casa_inner = 2048

    config.method = ConfigDict()
    config.method.mode = "paper"  # or "release": what the authors' code computes
    config.method.teacher_momentum = (0.996, 1.0)  # for thousands of steps: it averages over the last 250
    config.method.teacher_temperature = (0.03, 0.04)  # see the README on why not the release's
    config.method.temperature_warmup = "50 epochs, 10 %"
    config.method.freeze_last_layer = "1 epochs, 10 %"

    config.loss = ConfigDict()
    config.loss.invariance = 1.0
    config.loss.alignment = 1.0
    config.loss.reconstruction = 10.0

    config.optimizer = ConfigDict()
    config.optimizer.lr = 7e-5  # the paper's 2e-4 for 64 pairs, by the square root of the batch
    config.optimizer.min_lr = 1e-6
    config.optimizer.warmup = "50 epochs, 10 %"
    config.optimizer.weight_decay = (0.04, 0.4)
    config.optimizer.clip = 3.0

    if variant == "pod":
        config.batch_size = 64
        config.optimizer.lr = 2e-4
    if variant == "release":
        config.method.mode = "release"
        config.method.teacher_temperature = (0.008, 0.01)
        config.method.temperature_warmup = "30 epochs"
        config.method.freeze_last_layer = "1 epochs"
        config.optimizer.lr = 5e-5  # times batch_size / 256 in this mode, so that the "decay" to min_lr is a rise
        config.optimizer.min_lr = 1e-4
        config.optimizer.warmup = "50 epochs"
    if variant == "tiny":
        config.batch_size = 4
        config.steps = 100
        config.checkpoint_every = config.validate_every = 25
        config.log_every = 5
        config.data.threads = 2
        config.data.validation_samples = 8
        config.microbatch = 4
        config.views.crop_shape_zyx = (32, 32, 32)
        config.model.width = 24
        config.model.heads = (3, 6, 12, 24)
        config.model.resenc.features = (8, 16, 32, 64)
        config.model.resenc.blocks = (1, 1, 2, 2)
        config.model.primus.update(width=96, depth=4, heads=4)
        config.model.head_hidden = 256
        config.model.bottleneck = 64
        config.model.casa_inner = 256
        config.optimizer.lr = 1e-3
    return config.lock()
