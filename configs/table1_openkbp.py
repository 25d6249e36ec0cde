"""Table 1 on OpenKBP: separate, end-to-end and context-free training side by side on six held-out real scans.

    python -m autocontext_jax.main --config configs/table1_openkbp.py --workdir runs/table1 --config.data.root=FOLDER

The recipe of `openkbp.py`. With six scans the smallest p of a signed-rank test is 0.03, and after Holm's correction for
48 tests nothing is significant: read the differences themselves.
"""

import openkbp


def get_config():
    config = openkbp.get_config()
    config.experiment = ("separate", "end_to_end", "no_context")
    return config
