import sys

import pytest

from tests.docs.pages import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
device_cost = pytest.importorskip("device_cost")

SOURCE = r"""
template <typename T>
struct Gather {
  const float4* from;
  const int* sizes;
  T* to;
  __device__ void operator()(long long item) const {
    T local[32] = {};
    for (int i = 0; i < sizes[0]; ++i) {
      const float4 four = from[item * 7 / sizes[i] / (long long)sizes[1]];
      local[sizes[i] & 31] += four.x + four.y + four.z + four.w;
    }
    atomicAdd(to + item, local[sizes[2] & 31]);
  }
};

template <typename T>
struct Copy {
  const T* from;
  T* to;
  __device__ void operator()(long long item) const { to[item] = from[item]; }
};

template <typename Body>
__global__ void run_body(long long items, Body body) {
  for (long long item = blockIdx.x; item < items; item += gridDim.x) {
    body(item);
  }
}

template __global__ void run_body(long long, Gather<float>);
template __global__ void run_body(long long, Copy<double>);
"""


@pytest.mark.skipif(device_cost.nvcc() is None, reason="no nvcc")
@pytest.mark.skipif(device_cost.disassembler() is None, reason="no nvdisasm")
def test_reads_what_the_compiler_made(tmp_path):
    source = tmp_path / "bodies.cu"
    source.write_text(SOURCE)
    cubin = device_cost.compile_kernels(source, "sm_90", tmp_path, flags=("-O3",))
    copy, gather = device_cost.kernels(cubin, "bodies", "sm_90")
    assert (copy.name, copy.dtype, copy.loads, copy.stores, copy.atomics) == ("Copy", "float64", "1x64", "1x64", "")
    assert copy.stack_bytes == copy.divisions == copy.loop == 0 < copy.item < copy.instructions
    assert (gather.name, gather.dtype, gather.atomics) == ("Gather", "float32", "1x32")
    assert "x128" in gather.loads and gather.stack_bytes == 128
    assert gather.divisions >= gather.loop_divisions >= 1
    assert 0 < gather.loop < gather.item < gather.instructions and 0 < gather.registers < 256
    assert device_cost.compile_kernels(source, "sm_90", tmp_path, flags=("-O3",)) == cubin  # kept


def test_bytes_and_arithmetic_by_hand():
    # 2 channels on 3x4 pixels in float32: a map of 96 bytes, 108 samples of 2 channels, a table of 3 numbers for each.
    cost = device_cost.deform_conv2d_cost((1, 2, 3, 4, 1), 4)
    samples, table, weight, map_ = 108 * 2 * 4, 108 * 3 * 4, 2 * 2 * 9 * 4, 96
    sample, product = cost.forward
    assert sample.bytes == table + 4 * samples + samples and cost.columns == samples
    assert product.bytes == samples + map_ + weight and product.flops == 2 * 12 * 9 * 2 * 2
    assert cost.least_forward == 2 * map_ + table + weight


def test_columns_held_at_recorded_sizes():
    for label, cost_of in device_cost.cases().items():
        for itemsize in (2, 4, 8):
            cost = cost_of(itemsize)
            held = max(cost.forward_workspace, cost.backward_workspace)
            assert not cost.columns or held <= cost.columns / 2, label
