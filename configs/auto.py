"""No decisions: everything is planned for the data set and the device at hand, see docs/planning.md.

    python -m autocontext_jax.main --config configs/auto.py --workdir runs/mine --config.data.root=FOLDER
        --config.plan.minutes=30

Every key can be set beside it, and then stays. Without plan.minutes a step is planned for a day's training.
"""

from autocontext_jax.jobs.config_files import default_config


def get_config():
    config = default_config()
    config.plan.automatic = True
    return config
