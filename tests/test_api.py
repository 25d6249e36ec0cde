"""The package as a library, in scripts of their own: public names alone, and a process that always ends."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import autocontext_jax as ac

pytestmark = pytest.mark.usefixtures("compiled_once")

ROOT = Path(__file__).parent.parent

OWN = """
import sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx

class MyNet(nnx.Module):
    def __init__(self, inputs, classes, config, *, rngs):
        self.first = nnx.Conv(inputs, 4, (3, 3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Conv(4, classes, (1, 1, 1), rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jax.nn.relu(self.norm(self.first(x)))))

def squared_error(logits, labels):
    return jnp.mean((jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1])) ** 2)

def predicted_volume(prediction, truth, spacing):
    return prediction.sum() * np.prod(spacing) / 1000
"""

# Without `if __name__ == "__main__":`, as people write scripts.
TRAIN = """
import autocontext_jax as ac
config = ac.default_config()
config.phantom.training, config.phantom.test = 3, 1
config.phantom.size, config.phantom.spacing = (40, 40, 40), (8.0, 8.0, 8.0)
config.levels.factors = (2, 1)
config.loader.patch_size, config.loader.batch_size = (16,), 2
config.model.backbone, config.model.depth = "MyNet", 2
config.loss.extra = (("squared_error", 0.5),)
config.train.steps = config.train.checkpoint_every = 20
config.train.validation_patches = 2
config.predict.tile = (32,)
networks = {"MyNet": MyNet}
ac.train(config, "run", networks=networks, losses={"squared_error": squared_error})
result = ac.evaluate("run", networks=networks, metrics={"predicted_volume": predicted_volume}, tolerance=4.0)
assert result["tolerance"] == 4.0
scores = result["cases"]["phantom_003"]["level_2"]["liver"]
assert abs(scores["predicted_volume"] - (scores["true_positives"] + scores["false_positives"]) * 0.512) < 1e-6
ac.load("run", networks=networks).save("mine.autocontext")
"""

PREDICT = """
import autocontext_jax as ac
import SimpleITK as sitk
path = "run/phantoms/imagesTs/phantom_003_0000.nii.gz"
model = ac.load("mine.autocontext", networks={"MyNet": MyNet})
mask = model.predict(path, output="out/mask.nii.gz")
image = sitk.ReadImage(path)
assert isinstance(mask, sitk.Image)
for name in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
    assert getattr(mask, name)() == getattr(image, name)(), name
array = sitk.GetArrayFromImage(mask)
evaluated = sitk.GetArrayFromImage(sitk.ReadImage("run/predictions/phantom_003.nii.gz"))
assert (array == evaluated).all(), "the model file's mask is not the run's"
assert (sitk.GetArrayFromImage(sitk.ReadImage("out/mask.nii.gz")) == array).all()
stored = sitk.GetArrayFromImage(image)
found, maps = model.predict(stored, spacing=image.GetSpacing()[::-1], probabilities=True)
assert (found == array).all() and (maps.argmax(-1) == array).all()
masks = list(model.predict_many([path, image]))
assert all((sitk.GetArrayFromImage(each) == array).all() for each in masks)
print("done", flush=True)
"""

JAX_FIRST = "import jax.numpy as jnp; print(float(jnp.ones(3).sum()))\n"
# A network of the package's own that still runs when the script ends: oneDNN is called back.
RUNNING = """
import jax.numpy as jnp
from autocontext_jax.models.convolution import convolution
kernel = jnp.ones((16, 3, 3, 3, 16))

@jax.jit
def slow(x):
    for _ in range(20):
        x = convolution(x, kernel) * 1e-3
    return x

x = jnp.ones((1, 48, 48, 48, 16))
program = slow.lower(x).compile()
result = program(x)
KEPT
print("last line", flush=True)
"""


def run(script: str, folder: Path) -> tuple[subprocess.CompletedProcess, float]:
    """The finished process, and the seconds that it took after its last line."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, path.name], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        lines, last = [], time.monotonic()
        for line in process.stdout:
            lines.append(line)
            last = time.monotonic()
        assert process.stderr is not None
        errors = process.stderr.read()
        process.wait(timeout=60)
    return subprocess.CompletedProcess(path, process.returncode, "".join(lines), errors), time.monotonic() - last


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which a script has trained its own network, scored it and saved it."""
    path = tmp_path_factory.mktemp("script")
    done, seconds = run(OWN + JAX_FIRST + TRAIN, path)
    assert done.returncode == 0, done.stderr
    assert seconds < 5
    return path


@pytest.mark.parametrize(
    ("before", "after", "status"),
    [("", "sys.exit(3)", 3), (JAX_FIRST, "raise ValueError('mine')", 1)],
    ids=["sys.exit", "exception after JAX was used"],
)
def test_a_model_file_predicts_in_a_script_that_ends(folder, before, after, status):
    done, seconds = run(OWN + before + PREDICT + after, folder)
    assert done.returncode == status, done.stderr
    assert done.stdout.endswith("done\n")
    assert ("ValueError: mine" in done.stderr) == (status == 1)
    assert seconds < 5


@pytest.mark.parametrize(
    ("kept", "after", "status"),
    [("", "", 0), ("del result", "", 0), ("", "raise ValueError('mine')", 1), ("del result", "sys.exit(3)", 3)],
)
def test_a_script_ends_while_its_programs_run(tmp_path, kept, after, status):
    """Before, Python waited for ever for a program that waited for Python."""
    # As `load` and `train` do: here it must not believe that programs now run synchronously.
    set_up = "from autocontext_jax import runtime; runtime.set_up_library(dtype='float32')\n"
    script = "import sys, jax\n" + JAX_FIRST + set_up + RUNNING.replace("KEPT", kept) + after
    done, _ = run(script, tmp_path)
    assert done.returncode == status, done.stderr
    assert "last line" in done.stdout


@pytest.mark.parametrize(("before", "asynchronous"), [("", False), (JAX_FIRST, True)])
def test_asynchronous_dispatch_is_switched_off_only_where_that_has_an_effect(tmp_path, before, asynchronous):
    script = (
        "import jax\n" + before + "from autocontext_jax import runtime\nruntime.set_up_library(dtype='float32')\n"
        "print(jax.config.values['jax_cpu_enable_async_dispatch'])\n"
    )
    done, _ = run(script, tmp_path)
    assert done.stdout.splitlines()[-1] == str(asynchronous), done.stderr


def test_a_network_that_nobody_knows_is_refused_before_anything_is_done(tmp_path):
    config = ac.default_config()
    config.model.backbone = "unett"
    config.phantom.training = 3
    with pytest.raises(ac.UserError, match=r"model\.backbone names 'unett'; expected one of unet, residual_unet, fcn"):
        ac.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config.model.backbone = "nowhere.at:All"
    with pytest.raises(ac.UserError, match=r"'nowhere\.at:All', which cannot be imported \(No module named 'nowhere'"):
        ac.train(config, tmp_path / "run")


def test_the_package_exports_what_it_says_and_imports_nothing_before_it_is_used():
    code = "import autocontext_jax as ac, sys; print(sorted(m for m in ('jax', 'SimpleITK') if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert all(getattr(ac, name).__doc__ for name in ac.__all__)
    assert set(ac.__all__) <= set(dir(ac))
    assert ac.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="lod"):
        ac.lod  # noqa: B018
