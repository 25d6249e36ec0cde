"""What the real programs need on devices that may be absent: they are compiled, not run, and the largest that fits.

Every number is one that the compiler gives for a program. Memory is without the workspace that cuDNN's chosen
algorithms may take when they run.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, Sharding, SingleDeviceSharding

from autocontext_jax.geometry import Triple, level_shape
from autocontext_jax.inference.scan_tiles import ScanTiles
from autocontext_jax.inference.tile_memory import row_bytes, tile_arguments
from autocontext_jax.inference.tile_programs import make_tile_program
from autocontext_jax.inference.tiling import PredictorConfig, gaussian
from autocontext_jax.models.pyramid import Pyramid
from autocontext_jax.runtime import compiler_options
from autocontext_jax.training.losses import Loss, LossConfig
from autocontext_jax.training.sharding import batch_sharding, replicated, state_sharding
from autocontext_jax.training.state import Batch, create_state, inference_model, make_train_step
from autocontext_jax.training.targets import CLASSES, Targets

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """The training step of a pyramid, with Adam.

    Attributes:
      make_model: makes the pyramid. It is only traced.
      patch_size: voxels (z, y, x) of a patch, the same at every level.
      batch_size: pyramid patches of each device, or of each `space` devices.
      space: devices that share the depth of their patches.
      loss: what is minimised.
      extra_losses: the functions that `loss.extra` names.
      targets: what labels mean.
      deterministic: see `runtime.compiler_options`.
    """

    make_model: Callable[[], Pyramid]
    patch_size: Triple
    batch_size: int
    space: int = 1
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    extra_losses: Mapping[str, Loss] = dataclasses.field(default_factory=dict)
    targets: Targets = CLASSES
    deterministic: bool = False

    def lower(self, devices: np.ndarray) -> tuple[Any, int]:
        """The step over all devices, not compiled yet, and 0: nothing else lies on the devices.

        Args:
          devices: [count]; a multiple of `space`.
        """
        optimizer = optax.adam(1e-3)
        model = nnx.eval_shape(self.make_model)
        graph, _ = create_state(model, optimizer)
        state = jax.eval_shape(lambda: create_state(self.make_model(), optimizer)[1])
        mesh = Mesh(devices.reshape(-1, self.space), ("data", "space"), axis_types=(AxisType.Auto,) * 2)
        shape = (self.batch_size * mesh.shape["data"], *self.patch_size)
        levels = model.config.levels
        image: Any = jax.ShapeDtypeStruct((*shape, len(model.config.image.channels)), jnp.float32)
        label: Any = jax.ShapeDtypeStruct(shape, jnp.uint8)
        batch = Batch((image,) * levels, (label,) * levels)
        whole = replicated(mesh)
        placement = state_sharding(mesh, state), whole
        step = make_train_step(
            graph, optimizer, self.loss, sharding=placement, extra_losses=self.extra_losses, targets=self.targets,
            deterministic=self.deterministic,
        )  # fmt: skip
        with jax.set_mesh(mesh):
            return step.lower(_placed(state, whole), _placed(batch, batch_sharding(mesh))), 0


@dataclasses.dataclass(frozen=True)
class TilePrediction:
    """The predictor's program for one tile of a level.

    Attributes:
      make_model: makes the pyramid.
      tile: voxels (z, y, x) of a tile.
      plane: native voxels in plane, along each axis, of the largest scan.
      level: from 1 = coarsest; None means the finest.
    """

    make_model: Callable[[], Pyramid]
    tile: Triple
    plane: int = 512
    level: int | None = None

    def lower(self, devices: np.ndarray) -> tuple[Any, int]:
        """The program on the first device, not compiled yet, and the bytes of all levels' maps beside it.

        Args:
          devices: [count].
        """
        model = inference_model(*nnx.split(self.make_model(), nnx.Param, ...))
        graph, state = nnx.split(model)
        pyramid = model.config
        level = self.level or pyramid.levels
        arguments = tile_arguments(self.tile, pyramid=pyramid, level=level)
        device = SingleDeviceSharding(devices[0])
        tiles = ScanTiles(
            PredictorConfig(tile=self.tile), pyramid, align=(8, 8, 8), blend=gaussian, bytes_a_voxel=lambda: 0.0
        )
        native = (self.tile[0], self.plane, self.plane)
        factors = tuple((2.0 ** (pyramid.levels - number),) * 3 for number in range(pyramid.levels))
        planned = tiles.plan(native, factors, np.zeros(level_shape(native, factors[0]), np.int16))
        assert planned is not None, "an image of zeros is all body"
        plan, _ = planned
        slabs = sum(row_bytes(z.size, z.stride, (y.extent, x.extent), pyramid.classes) for z, y, x in plan)
        return make_tile_program(graph, level).lower(*_placed((state, *arguments), device)), slabs


Program = TrainingStep | TilePrediction


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A program compiled for some devices.

    Attributes:
      executable: as JAX's `compile` gives it.
      bytes_beside: that lie on each device beside the program while it runs.
    """

    executable: Any
    bytes_beside: int = 0

    @property
    def text(self) -> str:
        """Its scheduled HLO, for `hlo_text.parse`."""
        return self.executable.as_text()

    @property
    def temporary_bytes(self) -> int:
        """Bytes of intermediate values, on each device."""
        return self.executable.memory_analysis().temp_size_in_bytes

    @property
    def needed_bytes(self) -> int:
        """Bytes of each device's memory that are in use while it runs."""
        return needed_bytes(self.executable) + self.bytes_beside


def compile_program(
    program: Program, devices: np.ndarray, *, options: Mapping[str, bool | str] | None = None
) -> CompiledProgram:
    """Compiles a program for devices that may be absent.

    Args:
      program: what to compile.
      devices: [count], see `devices.absent_devices`.
      options: of XLA, beside our own.

    Raises:
      jax.errors.JaxRuntimeError: XLA cannot compile it; some compilers refuse what does not fit (RESOURCE_EXHAUSTED).
    """
    lowered, beside = program.lower(devices)
    platform = devices.flat[0].platform
    # Without a device there is nothing to time kernels on.
    untimed: dict[str, bool | str] = {} if platform == "tpu" else {"xla_gpu_autotune_level": "0"}
    every = untimed | compiler_options(platform) | dict(options or {})
    return CompiledProgram(lowered.compile(compiler_options=every), beside)


def needed_bytes(executable: Any) -> int:
    """Memory of a compiled program: arguments, results that do not take an argument's place, temporaries, code."""
    memory = executable.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def largest_that_fits(
    program_of: Callable[[int], Program],
    devices: np.ndarray,
    usable: float,
    *,
    start: int,
    unit: int = 1,
    options: Mapping[str, bool | str] | None = None,
    tried: Callable[[int, int | None], None] = lambda size, needed: None,
) -> int:
    """The largest size of a program that fits a device; 0 if not even `unit` does.

    Near the device's size XLA begins to save memory, so that the need grows only roughly with the size: what is found
    fits, but one or two units above it may fit too.

    Args:
      program_of: the program of a size, such as its batch size or patch size.
      devices: see `compile_program`.
      usable: bytes of each device.
      start: the size tried first.
      unit: sizes are multiples of it.
      options: see `compile_program`.
      tried: called with each size tried and the bytes it needs; None if the compiler refuses it.
    """

    def fits(number: int) -> bool:
        needed = None
        try:
            needed = compile_program(program_of(unit * number), devices, options=options).needed_bytes
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        tried(unit * number, needed)
        return needed is not None and needed <= usable

    return unit * largest(fits, start=max(1, start // unit))


def largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest number that fits, 0 if not even 1 does: doubled from `start` until one does not, then bisected."""
    low, high = 0, start
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _placed(tree: Tree, sharding: Sharding) -> Tree:
    """Shapes and types of arrays as they lie on devices."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
