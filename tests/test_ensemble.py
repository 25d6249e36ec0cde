"""An ensemble: what it predicts is the average of what its members do, and it goes wherever a model goes."""

import dataclasses
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from random_models import with_random_weights
from refusals import refused
from small_model import CLASSES, DESCRIPTION_OF_SCALE, NETWORKS, SCAN, WEIGHTS_OF_SCALE, Scale, described

import autocontext_jax as ac
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.images.spec import ct_image
from autocontext_jax.inference.model import Model
from autocontext_jax.inference.model_file import CARD, read_model, write_model
from autocontext_jax.models.activations import activate, logits_of
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.ensemble import Ensemble
from autocontext_jax.models.pyramid import Pyramid, PyramidConfig, context_of, make_pyramid
from autocontext_jax.models.unet import UNet
from autocontext_jax.training.state import inference_model

pytestmark = pytest.mark.usefixtures("compiled_once")

WINDOWS = ((-100.0, 100.0), (-200.0, 60.0), (-50.0, 300.0))


def scale(folder: Path, number: int = 0, levels: tuple[float, ...] = (1.0,), **changed) -> Model:
    """A model of its own weights and window."""
    rng = np.random.default_rng(number)
    names = [name for name in WEIGHTS_OF_SCALE if int(name[6]) <= len(levels)]
    weights = {name: rng.normal(0, 1, WEIGHTS_OF_SCALE[name].shape).astype(np.float32) for name in names}
    weights |= {name: weights[name] / 4 for name in names if name.endswith("bias")}  # so that masks have both classes
    made = dataclasses.replace(
        DESCRIPTION_OF_SCALE, name=f"scale_{number}", image=ct_image(WINDOWS[number]), levels=LevelGrids(levels),
        training={"steps": 3, "seed": number}, **changed,
    )  # fmt: skip
    path = folder / f"scale_{number}.autocontext"
    write_model(path, made, weights, "# scale\n")
    return ac.load(path, networks=NETWORKS)


def maps_of(model: Model) -> np.ndarray:
    return model.predict(SCAN, spacing=(1, 1, 1), probabilities=True, progress=False)[1]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_maps_of_a_level_and_the_context_of_the_next_are_averages(activation):
    """Members of trained networks, each with its own window, beside the same by hand."""

    def member(seed: int, window: tuple[float, float]) -> Pyramid:
        config = PyramidConfig(levels=2, classes=3, activation=activation, image=ct_image(window))
        network = NetworkConfig(base_channels=2, depth=1)
        made = with_random_weights(lambda: make_pyramid(UNet, network, config, seed=0), seed)
        return inference_model(*nnx.split(made, nnx.Param, ...))

    members = [member(seed, window) for seed, window in enumerate(WINDOWS)]
    together = Ensemble(members)
    rng = np.random.default_rng(0)
    images = [rng.normal(0, 200, (1, 8, 8, 8, 1)).astype(np.int16) for _ in range(2)]

    def levels(average):
        first = average(1, images[0], None)
        return first, average(2, images[1], context_of(logits_of(first, activation), activation=activation))

    by_hand = levels(
        lambda *arguments: sum(activate(each.level(*arguments), activation) for each in members) / len(members)
    )
    found = jax.jit(
        lambda together: levels(lambda *arguments: activate(together.level(*arguments), activation))
    )(together)  # fmt: skip
    for one, expected in zip(found, by_hand, strict=True):
        np.testing.assert_allclose(one, expected, atol=2e-6)
    assert np.ptp([activate(each.level(1, images[0], None), activation)[0, 4, 4, 4, 0] for each in members]) > 0.01
    for own, again in zip(members, together.members(), strict=True):
        jax.tree.map(np.testing.assert_array_equal, nnx.split(own)[1], nnx.split(again)[1])


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_logits_of_maps(activation):
    maps = np.array([[0.0, 1.0, 0.0], [1e-30, 0.25, 0.75], [0.5, 0.5, 0.0]], np.float32)
    np.testing.assert_allclose(activate(logits_of(maps, activation), activation), maps, rtol=2e-5, atol=1e-37)


def test_the_maps_of_whole_scans_are_averages(tmp_path):
    models = [scale(tmp_path, number) for number in range(3)]
    together = ac.ensemble(models, name="three")
    maps = [maps_of(model) for model in models]
    found = maps_of(together)
    np.testing.assert_allclose(found, sum(maps) / 3, atol=3e-3)  # tiles are summed in float16
    mask = together.predict(SCAN, spacing=(1, 1, 1), progress=False)
    np.testing.assert_array_equal(mask, 2 * found.argmax(-1))
    assert any((mask != model.predict(SCAN, spacing=(1, 1, 1), progress=False)).any() for model in models)
    # Each member of an ensemble counts as one.
    nested = ac.ensemble([ac.ensemble(models[:2]), models[2]])
    assert [member.name for member in nested.description.members] == ["scale_0", "scale_1", "scale_2"]
    np.testing.assert_array_equal(maps_of(nested), found)
    assert together.description.training == {"steps": 3}
    # The same model twice is that model; one alone is no ensemble.
    np.testing.assert_allclose(maps_of(ac.ensemble([models[0]] * 2)), maps[0], atol=3e-3)
    alone = ac.ensemble(models[:1], name="alone")
    assert (alone.description.name, alone.description.members) == ("alone", ())
    np.testing.assert_array_equal(maps_of(alone), maps[0])


def test_an_ensemble_is_saved_as_a_model_file(tmp_path):
    together = ac.ensemble([scale(tmp_path, number, (2.0, 1.0)) for number in (1, 0)])
    file = tmp_path / "both.autocontext"
    together.save(file)
    again = ac.load(file, networks=NETWORKS)
    assert again.description == dataclasses.replace(together.description, name="both")
    assert [member.image for member in again.description.members] == [ct_image(WINDOWS[1]), ct_image(WINDOWS[0])]
    np.testing.assert_array_equal(maps_of(again), maps_of(together))
    _, weights = read_model(file)
    assert set(weights) == {f"member_{number}/{name}" for number in (1, 2) for name in WEIGHTS_OF_SCALE}
    before = file.read_bytes()
    again.save(file)
    assert file.read_bytes() == before
    card = zipfile.ZipFile(file).read(CARD).decode()
    assert "An ensemble of 2 pyramids, each of 2 Scale networks" in card
    assert "| scale_1 | 1 | -200 to 60 |" in card
    assert "\n- steps: 3\n" in card
    assert "Intensities are clipped by each member to a range of its own." in card


def test_scans_of_one_size_share_their_programs(tmp_path):
    together = ac.ensemble([scale(tmp_path, number, (2.0, 1.0)) for number in range(2)])
    maps_of(together)
    compiled = together._predictor.compilations()
    maps_of(together)
    assert together._predictor.compilations() == compiled


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"classes": (CLASSES[0], dataclasses.replace(CLASSES[1], value=3))},
         "classes of model scale_1 is [('background', 0, ()), ('liver', 3, ())]; expected"),
        ({"pyramid": PyramidConfig(context="none")}, "pyramid.context of model scale_1 is none; expected softmax"),
        ({"tiling": dataclasses.replace(DESCRIPTION_OF_SCALE.tiling, margin=1)},
         "tiling.margin of model scale_1 is 1; expected 2"),
    ],
)  # fmt: skip
def test_models_of_different_kinds_are_refused(tmp_path, changed, message):
    models = [scale(tmp_path, 0), scale(tmp_path, 1, **changed)]
    refused(lambda: ac.ensemble(models), message, "as of model scale_0: an ensemble is of models of the same kind")


def test_what_matters_in_training_alone_may_differ(tmp_path):
    models = [scale(tmp_path, 0), scale(tmp_path, 1, pyramid=PyramidConfig(stop_gradient=True))]
    assert len(ac.ensemble(models).description.members) == 2


def test_an_ensemble_of_nothing_or_of_paths_is_refused():
    for wrong in ([], ["a.autocontext"]):
        refused(lambda wrong=wrong: ac.ensemble(wrong), f"an ensemble of {wrong}; expected one or more models")


def test_networks_of_one_name_that_differ_are_refused(tmp_path):
    class Other(Scale):
        pass

    scale(tmp_path, 1)
    other = ac.load(tmp_path / "scale_1.autocontext", networks={"Scale": Other})
    refused(lambda: ac.ensemble([scale(tmp_path, 0), other]), "different networks of the same name")


def test_a_damaged_member_is_named(tmp_path):
    file = tmp_path / "both.autocontext"
    ac.ensemble([scale(tmp_path, number) for number in range(2)]).save(file)
    description, weights = read_model(file)
    lost = {name: array for name, array in weights.items() if not name.startswith("member_2")}
    write_model(tmp_path / "lost.autocontext", description, lost, "# lost\n")
    refused(
        lambda: ac.load(tmp_path / "lost.autocontext", networks=NETWORKS),
        "the array member_2/level_1/matrix/bias is no such array; expected float32[2]",
    )
    members = [dataclasses.asdict(description)["members"][0]]
    refused(
        lambda: read_model(described(file, model__members=members)),
        "expected two or more with the channels of the image",
    )
