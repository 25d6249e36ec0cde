"""A pyramid of 2D U-Nets on the axial slices of generated phantoms, no download.

    python -m autocontext_jax.main --config configs/quickstart_2d.py --workdir runs/quickstart_2d

The quick start's phantoms, ladder and losses with `levels.rank = 2`: networks, patches and levels know one slice at a
time, and whole scans are predicted slice by slice. Time and score are not measured yet.
"""

import runpy
from pathlib import Path

# Found wherever this folder lies.
quickstart = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"]


def get_config():
    config = quickstart()
    config.levels.rank = 2
    # A slice costs little: more of them a step, and larger.
    config.feed.batch = 12
    config.feed.edge = 48
    config.feed.anywhere = 0.125
    config.model.width = 16
    config.model.momentum = 0.95
    config.train.steps = 1_000
    config.train.checkpoint_every = 250
    config.train.validation_patches = 120
    return config
