"""208 MR volumes of the hippocampus region, about 35x50x35 voxels of 1 mm: its anterior and posterior part.

    python -m autocontext_jax.main --config configs/hippocampus.py --workdir runs/hippocampus --config.data.root=FOLDER

The folder is Task04_Hippocampus of the Medical Segmentation Decathlon. 40 volumes are held out and scored: a mean Dice
of 88.5 % after 30.5 minutes on two cores that multiply bfloat16 (an AMD EPYC, Zen 5), with tests beside it.
"""

from autocontext_jax.jobs.config_files import default_config


def get_config():
    config = default_config()
    config.data.validation_fraction = 40 / 208
    config.predict.checkpoint = "latest"  # so that the volumes that are scored have chosen nothing
    config.levels.factors = (1,)
    config.loader.batch_size, config.loader.patch_size, config.loader.sampling = 4, (32, 32, 32), "classes"
    config.augmentation.rotation, config.augmentation.scaling, config.augmentation.elastic_sigma = 15.0, 0.15, 1.0
    config.augmentation.probability, config.augmentation.flip, config.predict.flip = 0.5, "x", True
    config.augmentation.noise, config.augmentation.intensity_shift, config.augmentation.intensity_scale = 0.1, 0.1, 0.1
    config.model.base_channels, config.model.depth, config.model.momentum = 16, 3, 0.98
    config.model.dtype = "bfloat16"  # twice as fast where the processor multiplies it
    config.loss.cross_entropy, config.loss.per_sample, config.loss.background = 0.5, True, False
    config.optimizer.learning_rate, config.optimizer.schedule, config.optimizer.warmup = 2e-3, "cosine", 50
    config.train.steps, config.train.checkpoint_every, config.train.frozen_batch_stats = 2_900, 580, 0.3
    return config
