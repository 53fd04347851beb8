"""Segmentation, from a pretrained backbone or from nothing.

    python -m alice_jax.train --config=configs/segment.py --config.data.store=DIR --config.init_from=runs/alice \
        --workdir=runs/segment

`configs/segment.py` is for the backbone of `configs/pretrain.py` on one accelerator; `configs/segment.py:tiny` for that
of its `:tiny` on two CPU cores. The store needs labels (docs/prepare.md); docs/finetune.md describes every field and
what to expect. With no `data.store` the built-in cohort is used, with six of its labels.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; `variant` is "" or "tiny"."""
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/segment.py:{variant}: the only variant is tiny")
    config = ConfigDict()
    config.objective = "segmentation"
    config.seed = 0
    config.batch_size = 8  # crops in the global batch
    config.microbatch = 0  # crops that a device computes at once; 0: 1 on a CPU, all on an accelerator
    config.steps = 20_000
    config.precision = "auto"  # of the computation: "bfloat16", "float32", or bfloat16 on accelerators alone
    config.checkpoint_every = 500
    config.keep_checkpoints = 3
    config.log_every = 10
    config.validate_every = 500
    config.init_from = ""  # workdir of a run, or a file of `alice_jax.export`; "": random weights
    config.init_parts = "all"  # encoder and decoder; or "encoder"
    config.which = "teacher"  # of the two networks of a pretraining run; or "student"

    config.mesh = ConfigDict()  # docs/scaling.md
    config.mesh.parameters = 1  # devices that share one copy of parameters and optimizer state
    config.mesh.rules = (("", 65_536),)  # (regex, None or "parameters" for each axis, or values from which to divide)

    config.numerics = ConfigDict()  # docs/faults.md
    config.numerics.skip = 0  # updates that a run may leave out for numbers that are not finite; the next one stops it
    config.numerics.collapse = "ignore"  # nothing agrees with itself here

    config.data = ConfigDict()
    config.data.store = ""
    config.data.classes = ()  # names; (): all that the store has, of phantoms six
    config.data.train_scans = ""  # ids separated by commas, or a file with one on each line; "": by the next three
    config.data.fraction = 1.0  # of the labelled scans that are not held out
    config.data.shots = 0  # or so many of them
    config.data.subset_seed = 0  # which ones; fewer of one seed are always among more
    config.data.cache_gb = 50.0  # of this host's disk at most, for copies of what is read of a store in a bucket
    config.data.workers = 0
    config.data.threads = 4
    config.data.timeout_s = 600.0  # a batch that takes longer ends the run
    config.data.validation_fraction = 0.2  # of the patients, whatever the subset
    config.data.validation_samples = 64  # crops

    config.views = ConfigDict()
    config.views.crop_shape_zyx = (64, 64, 64)  # that of the pretraining
    config.views.window_hu = (-125.0, 225.0)  # likewise
    config.views.foreground = 1 / 3  # share of the crops that show a class for certain

    config.augmentation = ConfigDict()  # share of the crops, then from where to where; docs/finetune.md
    config.augmentation.rotation_degrees = (0.2, 30.0)
    config.augmentation.zoom = (0.2, 0.7, 1.4)
    config.augmentation.gamma = (0.3, 0.7, 1.5)
    config.augmentation.contrast = (0.15, 0.75, 1.25)
    config.augmentation.noise = (0.1, 0.1)
    config.augmentation.blur_voxels = (0.2, 0.5, 1.0)
    config.augmentation.flip_axes = ()  # 0 (z), 1 (y), 2 (x); any of them makes left organs look like right ones

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
    config.model.position_index = "correct"  # or "release", for weights of that mode
    config.model.remat = ()
    config.model.deep_supervision = True

    config.loss = ConfigDict()
    config.loss.dice = 1.0
    config.loss.cross_entropy = 1.0
    config.loss.batch_dice = False  # count a class over all crops that are computed at once, not in each

    config.optimizer = ConfigDict()
    config.optimizer.lr = 5e-4
    config.optimizer.min_lr = 1e-6
    config.optimizer.warmup = "50 epochs, 5 %"
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip = 3.0
    config.optimizer.freeze = "0 %"  # how long what was loaded stays as it is; "100 %": for good
    config.optimizer.pretrained_rate = 1.0  # factor on its learning rate after that
    config.optimizer.layer_decay = 1.0  # and once more for each layer between one of the encoder and its end

    if variant == "tiny":
        config.batch_size = 4
        config.microbatch = 4
        config.steps = 250
        config.checkpoint_every = config.validate_every = 50
        config.log_every = 10
        config.data.threads = 2
        config.data.validation_samples = 64
        config.views.crop_shape_zyx = (32, 32, 32)
        config.augmentation.rotation_degrees = (0.0, 30.0)
        config.augmentation.zoom = (0.0, 0.7, 1.4)
        config.augmentation.blur_voxels = (0.0, 0.5, 1.0)
        config.model.drop_path = 0.0
        config.model.width = 24
        config.model.heads = (3, 6, 12, 24)
        config.model.resenc.features = (8, 16, 32, 64)
        config.model.resenc.blocks = (1, 1, 2, 2)
        config.model.primus.update(width=96, depth=4, heads=4)
        config.optimizer.lr = 4e-3
    return config.lock()
