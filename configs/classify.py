"""Classification of whole scans, from a pretrained backbone or from nothing.

    python -m alice_jax.train --config=configs/classify.py --config.data.store=DIR --config.data.labels=FILE.csv \
        --config.init_from=runs/alice --workdir=runs/classify

`configs/classify.py` is for the full-size backbone of `configs/pretrain.py`, `:tiny` for that of its `:tiny`.
`method.kind` "finetune" trains backbone and head, "probe" the head alone. docs/finetune.md describes the CSV.

With no `data.store` the built-in labelled patients are used, of whom `:tiny` learns what a scan shows.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; `variant` is "" or "tiny"."""
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/classify.py:{variant}: the only variant is tiny")
    config = ConfigDict()
    config.objective = "classification"
    config.seed = 0
    config.batch_size = 8  # scans in the global batch
    config.microbatch = 0  # scans that a device computes at once; 0: 1 on a CPU, all on an accelerator
    config.steps = 5_000
    config.precision = "auto"  # of the computation: "bfloat16", "float32", or bfloat16 on accelerators alone
    config.checkpoint_every = 500
    config.keep_checkpoints = 3
    config.log_every = 10
    config.validate_every = 500
    config.init_from = ""  # workdir of a run, or a file of `alice_jax.export`; "": random weights
    config.which = "teacher"  # of the two networks of a pretraining run; or "student"

    config.mesh = ConfigDict()  # docs/scaling.md
    config.mesh.parameters = 1  # devices that share one copy of parameters and optimizer state
    config.mesh.rules = (("", 65_536),)  # (regex, None or "parameters" for each axis, or values from which to divide)

    config.numerics = ConfigDict()  # docs/faults.md
    config.numerics.skip = 0  # updates that a run may leave out for numbers that are not finite; the next one stops it
    config.numerics.collapse = "ignore"  # nothing agrees with itself here

    config.data = ConfigDict()
    config.data.store = ""
    config.data.cache_gb = 50.0  # of this host's disk at most, for copies of what is read of a store in a bucket
    config.data.labels = ""  # CSV; "": labels.csv in the store
    config.data.label_columns = ""  # of the CSV, separated by commas; "": all
    config.data.workers = 0
    config.data.threads = 4
    config.data.timeout_s = 600.0  # a batch that takes longer ends the run
    config.data.validation_fraction = 0.25  # of each class, where the CSV has no column split
    config.data.validation_samples = 0  # 0: each held-out scan once

    config.views = ConfigDict()
    config.views.crop_shape_zyx = (64, 64, 64)  # that of the pretraining
    config.views.window_hu = (-125.0, 225.0)  # likewise
    config.views.crops = 4  # of a scan, at random places of the body

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

    config.method = ConfigDict()
    config.method.kind = "finetune"  # or "probe": a linear head on the frozen backbone

    config.optimizer = ConfigDict()
    config.optimizer.lr = 1e-4
    config.optimizer.min_lr = 1e-6
    config.optimizer.warmup = "10 %"
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip = 3.0

    if variant == "tiny":
        config.steps = 100
        config.checkpoint_every = config.validate_every = 50
        config.log_every = 5
        config.microbatch = 8
        config.data.threads = 2
        config.data.label_columns = "view"
        config.views.crop_shape_zyx = (32, 32, 32)
        config.views.crops = 2
        config.model.width = 24
        config.model.heads = (3, 6, 12, 24)
        config.model.resenc.features = (8, 16, 32, 64)
        config.model.resenc.blocks = (1, 1, 2, 2)
        config.model.primus.update(width=96, depth=4, heads=4)
        config.optimizer.lr = 1e-3
    return config.lock()
