"""metrics.jsonl holds one object a logged step, also when a run dies and starts again."""

import json

import numpy as np

from autocontext_jax.training.logging import MetricsLog


def test_steps_after_the_checkpoint_are_dropped_and_a_torn_line_too(tmp_path):
    log = MetricsLog(tmp_path, step=0)
    for step in (1, 2, 3):
        log.scalars(step, {"loss": step / 10})
    log.image(3, "picture", np.zeros((4, 5, 3), np.uint8))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')  # the kill came here
    log = MetricsLog(tmp_path, step=2)
    log.scalars(3, {"loss": 0.5})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines()]
    assert rows == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 3, "loss": 0.5}]
    assert len(list((tmp_path / "tensorboard").iterdir())) >= 1
