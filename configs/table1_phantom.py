"""Table 1 on generated phantoms: separate, end-to-end and context-free training side by side, with tests.

    python -m autocontext_jax.main --config configs/table1_phantom.py --workdir runs/table1_phantom

40 phantoms to train on and 30 to compare on, with three look-alikes of each kind: cysts like the gallbladder, loops of
bowel like the stomach, vessels like the artery and the portal vein. Under 80 minutes on two cores, no accelerator.
"""

from autocontext_jax.jobs.config import default_config


def get_config():
    config = default_config()
    config.experiment = ("separate", "end_to_end", "no_context")
    config.phantom.training = 40
    config.phantom.test = 30
    config.phantom.look_alikes = 3
    config.levels.factors = (2, 1)
    config.feed.batch = 1
    config.feed.edge = 32
    config.feed.centre = "classes"
    config.feed.anywhere = 0.125
    config.spatial.rotation = 3.0
    config.spatial.elastic_sigma = 2.0
    config.model.width = 8
    config.model.momentum = 0.98
    config.loss.log_dice = 0.1
    config.loss.cross_entropy = 0.1
    config.optimizer.warmup = 50
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "cosine"
    config.train.steps = 2_000
    config.train.frozen_norm = 0.3
    config.train.checkpoint_every = 500
    config.train.validation_patches = 14
    config.predict.tile = 96
    config.predict.plane = 96
    return config
