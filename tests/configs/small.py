"""The tiny recipe with a network of two stages, which compiles in seconds."""

from ml_collections import ConfigDict

from configs import pretrain


def get_config() -> ConfigDict:
    config = pretrain.get_config("tiny")
    with config.unlocked():
        config.update(batch_size=8, microbatch=1, steps=4, checkpoint_every=2, validate_every=4, log_every=1)
        config.views.crop_shape_zyx = (16, 16, 16)
        config.model.update(width=8, depths=(1, 1), heads=(1, 2), windows=(2, 2), head_hidden=16, bottleneck=8)
        config.model.update(prototypes=16, casa_heads=2, casa_inner=16)
    return config.lock()
