"""Table 1 on generated phantoms: separate, end-to-end and context-free training side by side, with tests.

    python -m autocontext_jax.main --config configs/table1_phantom.py --workdir runs/table1_phantom

The quick start's recipe on 40 phantoms to train on and 30 to compare on, 160 voxels of 2.1 mm along each axis, with
three look-alikes of each kind: cysts like the gallbladder, loops of bowel like the stomach, vessels like the artery and
the portal vein. A 32^3 patch shows 67 mm of the body, level 1's 134 mm.

33 minutes on two cores that multiply bfloat16 (AMX), with other work on the machine; 2.5 GB. Mean Dice (%) of the 30
test phantoms: 85.7 at level 1, 87.0 with level 2 trained after it, 87.9 end to end, 52.6 without context. Each
difference has p < 0.001 (paired Wilcoxon signed-rank tests, Holm-corrected). The run was made before bfloat16's
gradient of the last bias was corrected.
"""

import quickstart


def get_config():
    config = quickstart.get_config()
    config.experiment = ("separate", "end_to_end", "no_context")
    config.phantom.test = 30
    config.phantom.size = (160, 160, 160)
    config.phantom.spacing = (2.1, 2.1, 2.1)
    config.phantom.look_alikes = 3
    config.loader.background_fraction = 0.125
    config.train.steps = 2_000
    config.train.frozen_batch_stats = 0.3
    config.model.dtype = "bfloat16"
    config.train.checkpoint_every = 500
    return config
