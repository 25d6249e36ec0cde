"""The paper's experiment: seven abdominal organs and vessels at S = 2, factors (4, 2), 64^3 patches, batch 3.

    python -m autocontext_jax.main --config configs/abdomen_ct.py --workdir runs/abdomen --config.data.root=FOLDER

Everything is the paper's: its U-Net of 19 million parameters a level, batch normalisation, the Dice loss alone, Adam,
20,000 steps, uniform foreground centres, translation, rotation and elastic deformation. The paper's four 24 GB cards
took several days. On one H200 the training step took 7.5 GB in float32 (docs/devices.md); the whole experiment has not
been run yet. The authors report a mean organ Dice of 89.0 % at level 2 and 83.2 % at level 1 on 37 of their 377 scans,
which are not public.
"""

from autocontext_jax.jobs.config_files import default_config


def get_config():
    config = default_config()
    config.data.window = (-500.0, 500.0)
    config.levels.factors = (4, 2)
    config.levels.unit = "voxels"
    config.loader.batch_size = 3
    config.loader.patch_size = (64, 64, 64)
    config.loader.sampling = "foreground"
    config.model.base_channels = 32
    config.model.depth = 4
    config.model.norm = "batch"
    config.optimizer.learning_rate = 1e-3
    config.train.steps = 20_000
    return config
