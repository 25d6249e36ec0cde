"""What a trained model is: what a model file says beside its weights."""

import dataclasses

from autocontext_jax.data.augmentation_ranges import AXES
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.errors import require
from autocontext_jax.images.spec import ImageSpec
from autocontext_jax.inference.tiling import PredictorConfig
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.pyramid import PyramidConfig


@dataclasses.dataclass(frozen=True)
class ClassDescription:
    """A class of voxels.

    Attributes:
      name: as the data set calls it.
      value: of its voxels in a mask.
      color: (red, green, blue), 0 to 255, for display; () for none.
      code: of the class in a terminology, "SCHEME:VALUE:MEANING" such as "SCT:10200004:Liver"; "" for none.
      members: of a region the values of the labels that it is made up of; () for the background and ordinary classes.
    """

    name: str
    value: int
    color: tuple[int, ...] = ()
    code: str = ""
    members: tuple[int, ...] = ()

    def __post_init__(self):
        require(0 <= self.value < 2**31, self, "value", "a number from 0 to 2147483647")
        good = len(self.color) in (0, 3) and all(0 <= part <= 255 for part in self.color)
        require(good, self, "color", "three numbers from 0 to 255, or none")


@dataclasses.dataclass(frozen=True)
class NetworkDescription(NetworkConfig):
    """The network of every level.

    Attributes:
      name: of its class: one of `models.backbones`, or one that the caller passes.
    """

    name: str = "unet"


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How scans are divided into tiles unless the caller says otherwise, see `tiling.PredictorConfig`.

    Attributes:
      tile: (z, y, x) voxels, or one number for all axes; (0,) chooses boxes, which a network that normalises by each
        sample cannot have.
      margin: voxels by which a tile reaches beyond the middle between it and the next.
      crop_to_body: whether only the box around the body is predicted.
      flip: whether every tile is also predicted mirrored, along all combinations of `flip_axes`.
      flip_classes: the class that each class becomes where x is mirrored, which exchanges left and right; () if the
        network has not learned from exchanged sides.
      flip_axes: along which the network has learned from mirrored patches, letters of "zyx"; "" for none.
    """

    tile: tuple[int, ...]
    margin: int
    crop_to_body: bool
    flip: bool
    flip_classes: tuple[int, ...] = ()
    flip_axes: str = ""

    def __post_init__(self):
        PredictorConfig(self.tile, self.margin)
        axes = "".join(axis for axis in AXES if axis in self.flip_axes)
        require(axes == self.flip_axes, self, "flip_axes", f'some of the letters "{AXES}", in this order')


@dataclasses.dataclass(frozen=True)
class MemberDescription:
    """A member of an ensemble.

    Attributes:
      name: of its model, such as "fold_0".
      image: the channels, and how this member normalises them.
      training: how it was trained, for people.
      evaluation: how it was scored and how well, for people; {} if it was not.
    """

    name: str
    image: ImageSpec
    training: dict
    evaluation: dict


@dataclasses.dataclass(frozen=True)
class Description:
    """What a trained model is.

    Attributes:
      name: of the model.
      license: under which the weights may be used; "" if nobody said.
      classes: [K], background first; the number of a class in the network's output is its place here. If they are
        regions, which may overlap, the network has no output for the background, and `value` is what a mask shows of
        the last region that holds a voxel.
      network: of every level.
      pyramid: how the levels are connected.
      image: the channels, and how they are normalised; of an ensemble those of the first member.
      levels: the model's levels, coarsest first.
      trained_spacing: the smallest and the largest spacing of the training scans along each axis, mm, (z, y, x); () if
        they are not known.
      tiling: of whole scans.
      training: how it was trained, for people.
      evaluation: how it was scored and how well, for people; {} if it was not.
      members: of an ensemble, two or more, whose maps are averaged; () of a single pyramid.
    """

    name: str
    license: str
    classes: tuple[ClassDescription, ...]
    network: NetworkDescription
    pyramid: PyramidConfig
    image: ImageSpec
    levels: LevelGrids
    trained_spacing: tuple[tuple[float, float, float], ...]
    tiling: Tiling
    training: dict
    evaluation: dict
    members: tuple[MemberDescription, ...] = ()

    def __post_init__(self):
        require(2 <= len(self.classes) <= 256, self, "classes", "2 to 256 classes, background first")
        values = [entry.value for entry in self.classes]
        require(len(set(values)) == len(values) and values[0] == 0, self, "classes",
                "classes of different values, the first of which is 0")  # fmt: skip
        require(self.image.learned, self, "image", "channels of CT with a window")
        images = [member.image for member in self.members]
        same = all(image.learned and image.declared == self.image.declared for image in images)
        require(same and len(images) != 1, self, "members", "two or more with the channels of the image, or none")
        described = [bool(entry.members) for entry in self.classes]
        require(not described[0] and len(set(described[1:])) == 1, self, "classes",
                "members of all classes but the background, or of none")  # fmt: skip
        require(len(self.trained_spacing) in (0, 2), self, "trained_spacing", "the smallest and the largest, or none")
        require(self.levels.unit == "voxels" or bool(self.levels.finest_spacing), self, "levels", "a finest_spacing")
        flipped = self.tiling.flip_classes
        numbers = list(range(len(self.classes))) if "x" in self.tiling.flip_axes else []
        require(sorted(flipped) == numbers, self, "tiling",
                "a permutation of the classes as flip_classes if x is one of flip_axes, else none")  # fmt: skip
        boxes = PredictorConfig(self.tiling.tile).boxes
        require(not boxes or not self.network.normalizes_by_sample, self, "tiling",
                f"a tile with the norm {self.network.norm}, on whose size results depend")  # fmt: skip

    @property
    def regions(self) -> bool:
        """Whether the classes are regions."""
        return bool(self.classes[1].members)

    @property
    def full_pyramid(self) -> PyramidConfig:
        """The pyramid's configuration with the fields that other parts of the description determine."""
        return dataclasses.replace(
            self.pyramid,
            levels=len(self.levels.factors),
            classes=len(self.classes) - self.regions,
            activation="sigmoid" if self.regions else "softmax",
            image=self.image,
            spacing=self.levels.relative_spacing,
        )
