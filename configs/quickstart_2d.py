"""A pyramid of 2D U-Nets on the axial slices of generated phantoms, no download.

    python -m autocontext_jax.main --config configs/quickstart_2d.py --workdir runs/quickstart_2d

The quick start's ladder and phantoms with `levels.rank = 2`: networks, patches and levels know one slice at a time, and
whole scans are predicted slice by slice.
"""

from autocontext_jax.jobs.config import default_config


def get_config():
    config = default_config()
    config.phantom.training = 40
    config.phantom.test = 6
    config.levels.factors = (2, 1)
    config.levels.rank = 2
    config.feed.batch = 12
    config.feed.edge = 48
    config.feed.centre = "classes"
    config.feed.anywhere = 0.125
    config.spatial.rotation = 3.0
    config.spatial.elastic_sigma = 2.0
    config.model.width = 16
    config.model.momentum = 0.95
    config.loss.log_dice = 0.1
    config.loss.cross_entropy = 0.1
    config.optimizer.warmup = 50
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "cosine"
    config.train.steps = 1_000
    config.train.checkpoint_every = 250
    config.train.validation_patches = 120
    config.predict.tile = 96
    config.predict.plane = 96
    return config
