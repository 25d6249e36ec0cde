"""Compiled programs that are kept for the next process: where, and that they give the same masks."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from random_models import with_random_weights
from small_model import DESCRIPTION_OF_SCALE

from autocontext_jax.images import scans
from autocontext_jax.inference.description import NetworkDescription
from autocontext_jax.inference.model import Model
from autocontext_jax.inference.tiling import PredictorConfig
from autocontext_jax.models.pyramid import make_pyramid
from autocontext_jax.models.unet import UNet
from autocontext_jax.runtime import keep_compiled_programs
from autocontext_jax.training.state import inference_model


@pytest.mark.parametrize(
    ("backend", "environment", "expected"),
    [
        ("gpu", {"XDG_CACHE_HOME": "/there"}, "/there/autocontext_jax"),
        ("cpu", {"XDG_CACHE_HOME": "/there"}, "/there/autocontext_jax/cpu-"),
        ("gpu", {"XDG_CACHE_HOME": "/there", "JAX_COMPILATION_CACHE_DIR": "/mine"}, None),
        ("cpu", {"XDG_CACHE_HOME": "/there", "JAX_COMPILATION_CACHE_DIR": ""}, None),
    ],
)
def test_where_compiled_programs_are_kept(monkeypatch, backend, environment, expected):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    keep_compiled_programs()
    if expected is None:
        assert updates == {}
    elif backend == "gpu":
        assert updates == {"jax_compilation_cache_dir": expected}
    else:
        assert updates["jax_compilation_cache_dir"].startswith(expected)


# The command, and how many programs it took from the cache.
COUNT_HITS = """
import sys
import jax
from autocontext_jax import main
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
status = main.main(["main", *sys.argv[1:]])
print(len(hits))
sys.exit(status)
"""


def test_kept_programs_give_the_same_mask_also_where_they_are_damaged(tmp_path):
    model, source, cache = tmp_path / "unet.autocontext", tmp_path / "scan.nii.gz", tmp_path / "cache"
    network = NetworkDescription(base_channels=4, depth=2, name="unet")
    description = dataclasses.replace(DESCRIPTION_OF_SCALE, network=network)
    pyramid = with_random_weights(
        lambda: make_pyramid(UNet, description.network.alone(), description.full_pyramid, seed=0), seed=3
    )
    pyramid = inference_model(*nnx.split(pyramid, nnx.Param, ...))
    Model(description, [pyramid], PredictorConfig()).save(model)
    voxels = np.random.default_rng(0).integers(-300, 300, (40, 70, 60), dtype=np.int16)
    scans.write_scan(source, voxels, (1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0))

    def predict(target: Path) -> tuple[np.ndarray, int]:
        run = subprocess.run(
            [sys.executable, "-c", COUNT_HITS, "--mode=predict", f"--model={model}", f"--input={source}",
             f"--output={target}"],
            env={**os.environ, "XDG_CACHE_HOME": str(cache)}, capture_output=True, encoding="utf-8", check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert "Traceback" not in run.stderr
        return scans.read_scan(target).voxels[0], int(run.stdout.split()[-1])

    first, hits = predict(tmp_path / "first.nii.gz")
    assert hits == 0
    kept = sorted(cache.rglob("*-cache"))
    assert any("predict_tiles" in file.name for file in kept)
    second, hits = predict(tmp_path / "second.nii.gz")
    assert hits >= 2  # the program of each level
    np.testing.assert_array_equal(second, first)
    assert set(kept) <= set(cache.rglob("*-cache"))
    # A program that compiles quickly may be kept at the second time only, so the files are listed again.
    for number, file in enumerate(sorted(cache.rglob("*-cache"))):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] if number % 2 else b"")
    third, hits = predict(tmp_path / "third.nii.gz")
    assert hits == 0
    np.testing.assert_array_equal(third, first)
    assert len(np.unique(first)) > 1
