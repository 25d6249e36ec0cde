"""30 head-and-neck scans of OpenKBP in the nnU-Net v2 layout: seven organs at risk, 128^3 voxels of about 4x4x2.5 mm.

    python -m autocontext_jax.main --config configs/openkbp.py --workdir runs/openkbp --config.data.root=FOLDER

The organs are small (74 to 1,590 voxels) and the scans coarse, so the finest level is the scans' own grid, patches are
48^3 and organs are drawn equally often. Half an hour on two cores that multiply bfloat16; the mean Dice on the
six test scans was then 75.6 % at level 2, in a run before bfloat16's gradient of the last bias was corrected. Contours
differ from scan to scan in where cord and esophagus end.
"""

from autocontext_jax.jobs.config_files import default_config


def get_config():
    config = default_config()
    # One scan to watch: with so few, each counts. The last checkpoint is used, not the one that it likes best.
    config.data.validation_fraction = 0.05
    config.predict.checkpoint = "latest"
    config.levels.factors = (2, 1)
    config.levels.unit = "voxels"
    config.loader.batch_size = 3
    # Level 1 then sees three quarters of the scan along each axis.
    config.loader.patch_size = (48, 48, 48)
    config.loader.sampling = "classes"
    # What lies far from every organ is else never seen, and some of it is taken for one.
    config.loader.background_fraction = 0.2
    config.augmentation.rotation = 10.0
    config.augmentation.translation = 8.0
    config.augmentation.scaling = 0.1
    # Organs of a few voxels' width: without it, those of bone come out thinner than their contours.
    config.augmentation.probability = 0.5
    config.augmentation.flip = "x"
    config.augmentation.flip_pairs = ("RightParotid=LeftParotid",)
    config.augmentation.noise = 10.0
    config.augmentation.intensity_shift = 10.0
    config.augmentation.intensity_scale = 0.1
    # Of the organs only the mandible is bone.
    config.data.window = (-200.0, 300.0)
    config.model.base_channels = 8
    config.model.momentum = 0.98
    # Twice as fast where the processor multiplies it.
    config.model.dtype = "bfloat16"
    # Few patches a step: with one, the brainstem came out 1.8 times too large on held-out scans without it.
    config.train.frozen_batch_stats = 0.3
    # With the Dice itself the esophagus can vanish from the maps early and not come back.
    config.loss.log_dice = 0.1
    # Patches without organs teach by it alone: the Dice of a class that is not there has hardly a gradient.
    config.loss.cross_entropy = 0.5
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = 50
    config.train.steps = 2_800
    config.train.checkpoint_every = 280
    config.predict.flip = True
    return config
