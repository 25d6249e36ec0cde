"""A pyramid of 2D U-Nets on the axial slices of generated phantoms, no download.

    python -m autocontext_jax.main --config configs/quickstart_2d.py --workdir runs/quickstart_2d

The quick start's phantoms, levels and losses with `levels.spatial_dims = 2`: networks, patches and levels see one slice
at a time, and whole scans are predicted slice by slice. Time and score are not measured yet.
"""

import quickstart


def get_config():
    config = quickstart.get_config()
    config.levels.spatial_dims = 2
    # A slice costs little: more of them a step, and larger.
    config.loader.batch_size = 12
    config.loader.patch_size = (1, 48, 48)
    config.loader.background_fraction = 0.125
    config.model.base_channels = 16
    config.model.momentum = 0.95
    config.train.steps = 1_000
    config.train.checkpoint_every = 250
    config.train.validation_patches = 120
    return config
