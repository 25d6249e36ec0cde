"""Table 1 on generated phantoms: separate, end-to-end and context-free training side by side, with tests.

    python -m autocontext_jax.main --config configs/table1_phantom.py --workdir runs/table1_phantom

The quick start's recipe on 40 phantoms to train on and 30 to compare on, with three look-alikes of each kind: cysts
like the gallbladder, loops of bowel like the stomach, vessels like the artery and the portal vein. Meant for two cores
without an accelerator; time and score are not measured yet.
"""

import runpy
from pathlib import Path

# Found wherever this folder lies.
quickstart = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"]


def get_config():
    config = quickstart()
    config.experiment = ("separate", "end_to_end", "no_context")
    config.phantom.test = 30
    config.phantom.look_alikes = 3
    config.feed.anywhere = 0.125
    config.train.steps = 2_000
    config.train.frozen_norm = 0.3
    config.model.dtype = "bfloat16"
    config.train.checkpoint_every = 500
    return config
