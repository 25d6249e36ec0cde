"""Generated phantoms, no download: shows the whole job in minutes.

python -m autocontext_jax.main --config configs/quickstart.py --workdir runs/quickstart
"""

from autocontext_jax.jobs.config import default_config


def get_config():
    config = default_config()
    config.phantom.training = 24
    config.phantom.test = 6
    config.levels.factors = (2, 1)
    config.feed.batch = 2
    config.feed.edge = 32
    config.feed.centre = "classes"
    config.model.width = 8
    config.model.momentum = 0.9
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "cosine"
    config.train.steps = 500
    config.train.checkpoint_every = 100
    config.predict.tile = 96
    config.predict.plane = 96
    return config
