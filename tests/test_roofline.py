"""What compiled programs need: counts of programs small enough to count by hand, and of the real ones."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import roofline
from common import make_pyramid
from jax import lax

from autocontext_jax.models import convolution
from autocontext_jax.planning import compiled, devices, hlo_text
from autocontext_jax.planning.costs import (
    COLLECTIVE,
    DATA,
    ELEMENTWISE,
    FILTER,
    FORWARD,
    LAYOUT,
    PRODUCT,
    instruction_costs,
    roofline_seconds,
)

pytestmark = pytest.mark.usefixtures("compiled_quickly")

GPU = """HloModule jit_step, is_scheduled=true

%fused (p0: bf16[4,10], p1: f32[10]) -> bf16[2,10] {
  %p0 = bf16[4,10]{1,0} parameter(0)
  %part = bf16[2,10]{1,0} slice(%p0), slice={[0:2], [0:10]}
  %p1 = f32[10]{0} parameter(1)
  %wide = f32[2,10]{1,0} broadcast(%p1), dimensions={1}
  %narrow = bf16[2,10]{1,0} convert(%wide)
  ROOT %sum = bf16[2,10]{1,0} add(%part, %narrow)
}

ENTRY %main (a: bf16[1,8,8,8,4], k: bf16[6,3,3,3,4], x: bf16[4,10], b: f32[10]) -> bf16[2,10] {
  %a = bf16[1,8,8,8,4]{4,3,2,1,0} parameter(0)
  %k = bf16[6,3,3,3,4]{4,3,2,1,0} parameter(1)
  %x = bf16[4,10]{1,0} parameter(2)
  %b = f32[10]{0} parameter(3)
  %conv = (bf16[1,8,8,8,6]{4,3,2,1,0}, u8[0]{0}) custom-call(%a, %k), window={size=3x3x3 pad=1_1x1_1x1_1}, dim_labels=b012f_o012i->b012f, custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/conv"}
  %out = bf16[1,8,8,8,6]{4,3,2,1,0} get-tuple-element(%conv), index=0
  %turned = bf16[10,4]{1,0} transpose(%x), dimensions={1,0}
  ROOT %fusion = bf16[2,10]{1,0} fusion(%x, %b), kind=kLoop, calls=%fused
}
"""  # noqa: E501


def test_bytes_flops_and_kinds_of_a_program_by_hand():
    costs = {cost.instruction.name: cost for cost in instruction_costs(hlo_text.parse(GPU))}
    assert list(costs) == ["conv", "turned", "fusion"]
    voxels, taps = 8**3, 27
    assert costs["conv"].kind == FORWARD
    assert costs["conv"].bytes == 2 * (voxels * 4 + 6 * taps * 4 + voxels * 6)
    assert costs["conv"].flops == 2 * voxels * 6 * taps * 4
    assert costs["conv"].dtype == "bf16"
    assert (costs["turned"].kind, costs["turned"].bytes) == (LAYOUT, 2 * 40 * 2)
    # Of %x only the slice is read.
    assert (costs["fusion"].kind, costs["fusion"].bytes) == (ELEMENTWISE, 20 * 2 + 10 * 4 + 20 * 2)


def test_a_compiled_program_has_the_flops_of_its_convolution_and_names_its_source():
    def function(x, k):
        y = lax.conv_general_dilated(x, k, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "ODHWI", "NDHWC"))
        return jnp.sum(y * y)

    shapes = jax.ShapeDtypeStruct((1, 6, 6, 6, 2), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 3, 2), jnp.float32)
    module = hlo_text.parse(jax.jit(function).lower(*shapes).compile().as_text())
    costs = instruction_costs(module)
    convolutions = [cost for cost in costs if cost.kind == FORWARD]
    assert sum(cost.flops for cost in costs) == 2 * 6**3 * 27 * 2 * 3
    assert len(convolutions) == 1
    assert Path(module.source(convolutions[0].origin)[0][0]).name == Path(__file__).name


BACKWARD = """HloModule jit_step, is_scheduled=true

ENTRY %main (x: bf16[2,8,8,8,4], g: bf16[2,8,8,8,6], k: bf16[6,3,3,3,4]) -> (bf16[2,8,8,8,4], bf16[6,3,3,3,4]) {
  %x = bf16[2,8,8,8,4]{4,3,2,1,0} parameter(0)
  %g = bf16[2,8,8,8,6]{4,3,2,1,0} parameter(1)
  %k = bf16[6,3,3,3,4]{4,3,2,1,0} parameter(2)
  %data = (bf16[2,8,8,8,4]{4,3,2,1,0}, u8[0]{0}) custom-call(%g, %k), window={size=3x3x3}, dim_labels=b012f_o012i->b012f, custom_call_target="__cudnn$convBackwardInput"
  %filter = (bf16[6,3,3,3,4]{4,3,2,1,0}, u8[0]{0}) custom-call(%x, %g), window={size=3x3x3}, dim_labels=b012f_o012i->b012f, custom_call_target="__cudnn$convBackwardFilter"
  %sum = bf16[6,3,3,3,4]{4,3,2,1,0} get-tuple-element(%filter), index=0
  %sent = bf16[6,3,3,3,4]{4,3,2,1,0} all-reduce-start(%sum), to_apply=%add
  ROOT %done = bf16[6,3,3,3,4]{4,3,2,1,0} all-reduce-done(%sent)
}
"""  # noqa: E501


def test_backward_convolutions_and_collectives_by_hand():
    costs = {cost.instruction.name: cost for cost in instruction_costs(hlo_text.parse(BACKWARD))}
    assert {name: cost.kind for name, cost in costs.items()} == {
        "data": DATA,
        "filter": FILTER,
        "sent": COLLECTIVE,
    }
    assert costs["data"].flops == costs["filter"].flops == 2 * (2 * 8**3) * 6 * 27 * 4
    kernel = 6 * 27 * 4 * 2
    assert (costs["sent"].bytes, costs["sent"].link_bytes) == (2 * kernel, kernel)
    h100, _ = devices.accelerator_and_count("h100")
    assert roofline_seconds(costs["sent"], h100, 8) == 2 * 7 / 8 * kernel / h100.link


TPU = """HloModule jit_step, is_scheduled=true

%fused (p0: f32[4,8], p1: f32[1,8]) -> f32[4,8] {
  %p0 = f32[4,8]{1,0:T(8,128)} parameter(0)
  %p1 = f32[1,8]{1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %updated = f32[4,8]{1,0:T(8,128)} dynamic-update-slice(%p0, %p1, %zero, %zero)
}

ENTRY %main (a: f32[3,130], u: f32[1,8], x: bf16[5,5,5,16,1,1,1], k: bf16[2,2,2,6,16,1,1]) -> f32[4,8] {
  %a = f32[3,130]{1,0:T(8,128)} parameter(0)
  %u = f32[1,8]{1,0:T(8,128)} parameter(1)
  %x = bf16[5,5,5,16,1,1,1]{3,2,1,0,6,5,4} parameter(2)
  %k = bf16[2,2,2,6,16,1,1]{4,3,2,1,0,6,5} parameter(3)
  %near = (f32[3,130]{1,0:T(8,128)S(1)}, f32[3,130]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %here = f32[3,130]{1,0:T(8,128)S(1)} copy-done(%near)
  %sent = f32[3,130]{1,0:T(8,128)S(1)} all-reduce(%here), to_apply=%add
  %buffer = f32[4,8]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %conv = bf16[5,5,5,2,2,2,6]{6,5,4,3,2,1,0} convolution(%x, %k), window={size=1x1x2x2x2 pad=0_0x0_0x1_1x1_1x1_1}, dim_labels=01bf234_234oi01->01b234f, metadata={op_name="jit(step)/dot_general"}
  ROOT %written = f32[4,8]{1,0:T(8,128)} fusion(%buffer, %u), kind=kLoop, calls=%fused
}
"""  # noqa: E501


def test_a_tpus_tiles_vector_memory_and_matrix_products_by_hand():
    costs = {cost.instruction.name: cost for cost in instruction_costs(hlo_text.parse(TPU))}
    assert list(costs) == ["near", "sent", "conv", "written"]
    # Tiles of 8 x 128 values pad 3 x 130 to 8 x 256; what is written to vector memory is not the main memory's.
    assert (costs["near"].kind, costs["near"].bytes) == (LAYOUT, 8 * 256 * 4)
    # What another memory sends passes the link all the same.
    assert (costs["sent"].bytes, costs["sent"].link_bytes) == (0, 8 * 256 * 4)
    # A deconvolution written as a convolution that slides along no axis.
    assert (costs["conv"].kind, costs["conv"].flops) == (PRODUCT, 2 * 5**3 * 8 * 6 * 16)
    # An update in place reads and writes what it updates: one tile each way.
    assert (costs["written"].kind, costs["written"].bytes) == (LAYOUT, 2 * 8 * 128 * 4)


@pytest.mark.parametrize("program", ["train", "predict"])
def test_the_real_programs_are_read_to_the_end(program, monkeypatch):
    monkeypatch.setattr(convolution, "onednn_type", lambda dtype: None)  # foreign calls have no FLOPs to read
    jax.clear_caches()  # other tests may have traced the same layers with oneDNN
    make_model = functools.partial(make_pyramid, levels=2, classes=3, width=2)
    programs = {
        "train": compiled.TrainingStep(make_model, patch_size=(16, 16, 16), batch_size=1),
        "predict": compiled.TilePrediction(make_model, tile=(16, 16, 16), plane=32),
    }
    lowered, elsewhere = programs[program].lower(np.array(jax.devices("cpu")[:1]))
    module = hlo_text.parse(lowered.compile().as_text())
    found = instruction_costs(module)
    assert sum(cost.bytes for cost in found) > 0
    assert any("unet.py" in roofline.source_lines(module, cost) for cost in found)
    assert (elsewhere > 0) == (program == "predict")  # the coarser level's slabs
    rows = {row["kind"]: row for row in roofline.table(found, [1e-6] * len(found))}
    assert rows["total"]["kernels"] == len(found)
    parts = [rows["floor: convolutions and products alone"], rows["around them"]]
    assert rows["total"]["GB"] == pytest.approx(sum(part["GB"] for part in parts))


def test_a_loop_costs_its_trips():
    def function(x):
        return lax.fori_loop(0, 5, lambda i, x: jnp.sin(x) + i, x)

    executable = jax.jit(function).lower(jax.ShapeDtypeStruct((1024,), jnp.float32)).compile()
    costs = instruction_costs(hlo_text.parse(executable.as_text()))
    assert sum(cost.bytes for cost in costs if cost.instruction.opcode == "fusion") >= 5 * 2 * 4096


@pytest.mark.parametrize("most", [0, 1, 5, 6, 64])
def test_the_largest_that_fits(most):
    tried = []

    def fits(number):
        tried.append(number)
        return number <= most

    assert compiled.largest(fits, start=3) == most
    assert len(tried) == len(set(tried))


def test_roofline_takes_the_longer_of_computing_and_moving():
    cost = instruction_costs(hlo_text.parse(GPU))[0]
    h100, _ = devices.accelerator_and_count("h100")
    assert roofline_seconds(cost, h100, 1) == max(cost.flops / h100.peak["bf16"], cost.bytes / h100.bandwidth)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h100", ("h100", 1)),
        ("h100x8", ("h100", 8)),
        ("v5e-4", ("v5e", 4)),
        ("rtx4090", ("rtx4090", 1)),
        ("rtx4090x2", ("rtx4090", 2)),
    ],
)
def test_names_of_targets(name, expected):
    assert devices.split_name(name) == expected


def test_an_unknown_target_ends_the_script_with_one_line():
    script = Path(roofline.__file__)
    run = subprocess.run([sys.executable, script, "--device", "b200"], capture_output=True, encoding="utf-8")
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert "expected one of h100" in line


@pytest.mark.parametrize("name", ["h100x3", "x8", ""])
def test_an_unknown_target_ends_in_one_line(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["roofline.py", "--device", name])
    monkeypatch.setattr(roofline, "compile_for_absent_devices", lambda: None)
    with pytest.raises(SystemExit) as ended:
        roofline.run(roofline.main)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected one of h100" in line


def test_gpu_description_names_the_figures():
    text = devices.gpu_text("a100")
    assert "core_count: 108" in text
    assert f"device_memory_size: {80 * 1024**3}" in text
    assert np.isclose(devices.ACCELERATORS["a100"].usable, 0.75 * 80 * 1024**3)
