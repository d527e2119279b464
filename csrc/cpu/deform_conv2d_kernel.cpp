// Host kernels of deform_conv2d.
//
// Everything runs in float (double for double): half types are widened on entry and rounded once at the end; but where
// the processor multiplies bfloat16 matrices, the columns of the forward are rounded, too. The input
// is channels-last, so one bilinear set-up serves a whole row of channels. The forward samples a tile of columns that
// stays in cache and multiplies it at once by the packed weight. The backward gives every thread a slice of the
// channels: it alone writes that slice of the input's and the weight's gradient, so no atomics are needed and the
// result does not depend on timing; only the offset's and the mask's gradients are sums over slices, taken in a fixed
// order.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common/bilinear.h"
#include "cpu/gemm.h"
#include "cpu/panels.h"
#include "cpu/simd.h"
#include "ops/deform_conv2d.h"

namespace dk {

namespace {

// Where one tap of one output position reads, for all channels of an offset group.
template <typename T>
struct Sample {
  Corners<T> corners;
  T mask;
  T weight[4];  // corner weights times mask
};

template <typename T>
struct Problem {
  DeformConv2dSizes s;
  const T* input;   // [N, H, W, C]
  const T* offset;  // [N, D, K, 2, P]
  const T* mask;    // [N, D, K, P] or null

  const T* image(int64_t n) const { return input + n * s.height * s.width * s.in_channels; }

  // Fills samples[0, count) for the output positions from `first` on.
  void plan(int64_t n, int64_t d, int64_t tap, int64_t first, int64_t count, Sample<T>* samples) const {
    const int64_t positions = s.positions(), row = (n * s.offset_groups + d) * s.taps() + tap;
    const T* dy = offset + row * 2 * positions + first;
    const T* dx = dy + positions;
    const T* m = mask ? mask + row * positions + first : nullptr;
    int64_t oh = first / s.out_w, ow = first % s.out_w;
    for (int64_t t = 0; t < count; ++t) {
      Sample<T>& sample = samples[t];
      const T y = static_cast<T>(rest_y(s, oh, tap / s.kernel_w)) + dy[t];
      const T x = static_cast<T>(rest_x(s, ow, tap % s.kernel_w)) + dx[t];
      sample.corners = bilinear_corners(y, x, s.height, s.width);
      sample.mask = m ? m[t] : T(1);
      for (int k = 0; k < 4; ++k) {
        // A corner outside weighs nothing whatever the mask holds: 0 * infinity must not spread.
        sample.weight[k] = sample.corners.index[k] < 0 ? T(0) : sample.corners.weight[k] * sample.mask;
      }
      if (++ow == s.out_w) {
        ow = 0;
        ++oh;
      }
    }
  }
};

// What the backward of positions reads and writes, a run of channels wide.
template <typename T>
struct BackwardRun {
  const T* image;
  T* grad_image;  // null: not wanted
  int64_t pixel_stride;
  const Sample<T>* samples;
  int64_t count, width;
  const T* zeros;
  T* scratch;  // takes what falls outside the map
  const T* grad;
  T* columns;
  int64_t row_stride;  // of grad and columns
  T* dots;
};

}  // namespace

#define DK_VECTOR_FILE "cpu/deform_conv2d_vectors.h"
#include "cpu/for_each_vector.h"

namespace {

// out[t] += in[t] * factor, channel by channel: a depthwise filter's tap.
template <typename T, typename In>
DK_SIMD_CLONES void multiply_add_rows(
    const In* in, const In* factor, int64_t count, int64_t width, int64_t out_stride, T* out) {
  for (int64_t t = 0; t < count; ++t, in += width, out += out_stride) {
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) {
      out[c] += static_cast<T>(in[c]) * static_cast<T>(factor[c]);
    }
  }
}

// out = in * factor, channel by channel.
template <typename T>
DK_SIMD_CLONES void multiply_rows(
    const T* in, int64_t in_stride, const T* factor, int64_t count, int64_t width, T* out, int64_t out_stride) {
  for (int64_t t = 0; t < count; ++t, in += in_stride, out += out_stride) {
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) {
      out[c] = in[c] * factor[c];
    }
  }
}

// out += sum over t of a[t] * b[t], channel by channel.
template <typename T>
DK_SIMD_CLONES void multiply_reduce_rows(
    const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t count, int64_t width, T* out) {
  for (int64_t t = 0; t < count; ++t, a += a_stride, b += b_stride) {
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) {
      out[c] += a[c] * b[c];
    }
  }
}

bool is_depthwise(const DeformConv2dSizes& s) { return s.group_in() == 1 && s.group_out() == 1; }

// Output positions a tile holds: as many as keep `floats_per_position` values each inside a quarter megabyte, evenly
// cut.
int64_t tile_positions(int64_t positions, int64_t floats_per_position, int64_t batch) {
  constexpr int64_t kCacheFloats = 64 * 1024;
  int64_t tile = std::clamp<int64_t>(kCacheFloats / floats_per_position, 32, 256);
  // Four tiles a thread even out threads that start late.
  const int64_t wanted = 4 * at::get_num_threads();
  tile = std::min(tile, std::max<int64_t>(32, positions * batch / wanted));
  return even_tile(positions, tile);
}

// `Stored` is the type of the output and of the columns: T, or bfloat16 where the processor multiplies it.
template <typename T, typename Stored>
at::Tensor forward(
    const DeformConv2dSizes& s,
    const at::Tensor& input,
    const at::Tensor& offset,
    const std::optional<at::Tensor>& mask,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias) {
  const auto format = input.suggest_memory_format();
  const bool channels_last = format == at::MemoryFormat::ChannelsLast;
  const auto stored = c10::CppTypeToScalarType<Stored>::value;
  at::Tensor output = at::empty({s.batch, s.out_channels, s.out_h, s.out_w}, input.options().dtype(stored), format);
  if (s.batch == 0) {
    return output.to(input.scalar_type());
  }
  const at::Tensor x = channels_last_map<T>(input);
  const at::Tensor off = widen<T>(offset, at::MemoryFormat::Contiguous);
  const at::Tensor msk = mask ? widen<T>(*mask, at::MemoryFormat::Contiguous) : at::Tensor();
  const at::Tensor w = widen<T>(weight, at::MemoryFormat::Contiguous);
  const at::Tensor b = bias ? widen<T>(*bias, at::MemoryFormat::Contiguous) : at::Tensor();
  const Problem<T> problem{s, x.const_data_ptr<T>(), off.const_data_ptr<T>(), mask ? msk.const_data_ptr<T>() : nullptr};
  const T* bias_data = bias ? b.const_data_ptr<T>() : nullptr;
  Stored* out = output.mutable_data_ptr<Stored>();

  const int64_t taps = s.taps(), channels = s.in_channels, positions = s.positions();
  const int64_t group_in = s.group_in(), group_out = s.group_out(), group_rows = taps * group_in;
  const bool depthwise = is_depthwise(s);
  // Filters tap by tap: packed [taps * group_in, group_out] per group, or [taps, C] for depthwise ones.
  std::vector<Stored> packed(w.numel());
  const T* w_data = w.const_data_ptr<T>();
  if (depthwise) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        packed[tap * channels + c] = w_data[c * taps + tap];
      }
    }
  } else {
    const at::Tensor by_tap = w.view({s.groups, group_out, group_in, taps}).permute({0, 3, 2, 1}).contiguous();
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t shift = g * group_rows * group_out;
      pack_panels(by_tap.const_data_ptr<T>() + shift, group_rows, group_out, group_out, 1, packed.data() + shift);
    }
  }

  // Taps sampled before each matrix product: more taps make longer sums, as long as the columns stay in cache.
  const int64_t block = depthwise ? 1 : std::clamp<int64_t>(1024 / channels, 1, taps);
  const int64_t tile = tile_positions(positions, block * channels, s.batch);
  const int64_t tiles = (positions + tile - 1) / tile;
  const auto sample = DK_BEST(sample_rows<T, Stored>);
  at::parallel_for(0, s.batch * tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<Sample<T>> samples(tile);
    std::vector<Stored> columns(tile * block * channels);
    std::vector<T> result(tile * s.out_channels), zeros(s.offset_group_channels());
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / tiles, first = unit % tiles * tile, count = std::min(tile, positions - first);
      if (depthwise) {
        std::fill(result.begin(), result.end(), T(0));
      }
      for (int64_t tap = 0; tap < taps; tap += block) {
        const int64_t width = std::min(block, taps - tap), row = width * channels;
        for (int64_t k = 0; k < width; ++k) {
          for (int64_t d = 0; d < s.offset_groups; ++d) {
            const int64_t c = d * s.offset_group_channels();
            problem.plan(n, d, tap + k, first, count, samples.data());
            sample(
                problem.image(n) + c, channels, samples.data(), count, s.offset_group_channels(), zeros.data(),
                columns.data() + k * channels + c, row);
          }
        }
        if (depthwise) {
          multiply_add_rows(columns.data(), packed.data() + tap * channels, count, channels, channels, result.data());
        } else if (s.groups == 1) {
          gemm_packed(
              count, group_out, group_rows, tap * channels, row, columns.data(), row, packed.data(), result.data(),
              group_out, tap > 0);
        } else {
          for (int64_t g = 0; g < s.groups; ++g) {
            for (int64_t k = 0; k < width; ++k) {
              gemm_packed(
                  count, group_out, group_rows, (tap + k) * group_in, group_in,
                  columns.data() + k * channels + g * group_in, row, packed.data() + g * group_rows * group_out,
                  result.data() + g * group_out, s.out_channels, tap + k > 0);
            }
          }
        }
      }
      store_tile(
          result.data(), bias_data, count, s.out_channels, s.out_channels, positions, channels_last, first,
          out + n * s.out_channels * positions);
    }
    release_gemm<Stored>();
  });
  return output.to(input.scalar_type());
}

// The backward of one image and one slice of the channels.
template <typename T>
struct BackwardUnit {
  const Problem<T>& problem;
  const T* grad_rows;     // [P, O] of this image
  const T* grad_columns;  // [O, P] of this image
  const T* filter;        // blocks [taps][channel part][group_out, part width], see weight_block
  T* grad_image;          // [H, W, C] of this image or null
  T* grad_filter;         // like filter
  T* grad_sample;         // [D, K, 3, P]: y, x, mask; this slice's share

  void run(int64_t n, const Panel* begin, const Panel* end, int64_t tile) const {
    const DeformConv2dSizes& s = problem.s;
    const int64_t positions = s.positions(), group_channels = s.offset_group_channels();
    const int64_t low = begin->first / group_channels,
                  high = ((end - 1)->first + (end - 1)->width - 1) / group_channels + 1;
    const auto rows = grad_image ? DK_BEST(backward_rows<T, true>) : DK_BEST(backward_rows<T, false>);
    std::vector<Sample<T>> samples((high - low) * tile);
    std::vector<T> dots((high - low) * tile * 4), grad(tile * kPanel), columns(tile * kPanel), zeros(kPanel),
        scratch(kPanel);
    for (int64_t first = 0; first < positions; first += tile) {
      const int64_t count = std::min(tile, positions - first);
      for (int64_t tap = 0; tap < s.taps(); ++tap) {
        for (int64_t d = low; d < high; ++d) {
          problem.plan(n, d, tap, first, count, samples.data() + (d - low) * tile);
        }
        std::fill(dots.begin(), dots.end(), T(0));
        for (const Panel* panel = begin; panel != end; ++panel) {
          column_gradient(*panel, tap, first, count, grad.data());
          const int64_t panel_end = panel->first + panel->width;
          for (int64_t c = panel->first; c < panel_end;) {
            const int64_t d = c / group_channels, width = std::min(panel_end, (d + 1) * group_channels) - c;
            const int64_t shift = c - panel->first;
            rows(
                {problem.image(n) + c, grad_image ? grad_image + c : nullptr, s.in_channels,
                 samples.data() + (d - low) * tile, count, width, zeros.data(), scratch.data(), grad.data() + shift,
                 columns.data() + shift, kPanel, dots.data() + (d - low) * tile * 4});
            c += width;
          }
          filter_gradient(*panel, tap, first, count, columns.data());
        }
        for (int64_t d = low; d < high; ++d) {
          sample_gradient(d, tap, first, count, samples.data() + (d - low) * tile, dots.data() + (d - low) * tile * 4);
        }
      }
    }
  }

  // Start of the dense [group_out, width] block of the filter for one tap and the part of channels from c on.
  int64_t weight_block(int64_t tap, int64_t c) const {
    return (tap * problem.s.in_channels + c) * problem.s.group_out();
  }

  void column_gradient(const Panel& panel, int64_t tap, int64_t first, int64_t count, T* grad) const {
    const DeformConv2dSizes& s = problem.s;
    const T* rows = grad_rows + first * s.out_channels;
    if (is_depthwise(s)) {
      multiply_rows(
          rows + panel.first, s.out_channels, filter + weight_block(tap, panel.first), count, panel.width, grad,
          kPanel);
      return;
    }
    each_part(panel, s.group_in(), [&](int64_t c, int64_t width, int64_t g) {
      gemm(
          count, width, s.group_out(), rows + g * s.group_out(), s.out_channels, filter + weight_block(tap, c), width,
          grad + c - panel.first, kPanel, false);
    });
  }

  void filter_gradient(const Panel& panel, int64_t tap, int64_t first, int64_t count, const T* columns) const {
    const DeformConv2dSizes& s = problem.s;
    if (is_depthwise(s)) {
      multiply_reduce_rows(
          columns, kPanel, grad_rows + first * s.out_channels + panel.first, s.out_channels, count, panel.width,
          grad_filter + weight_block(tap, panel.first));
      return;
    }
    each_part(panel, s.group_in(), [&](int64_t c, int64_t width, int64_t g) {
      gemm(
          s.group_out(), width, count, grad_columns + g * s.group_out() * s.positions() + first, s.positions(),
          columns + c - panel.first, kPanel, grad_filter + weight_block(tap, c), width, true);
    });
  }

  void sample_gradient(
      int64_t d, int64_t tap, int64_t first, int64_t count, const Sample<T>* samples, const T* dots) const {
    const int64_t positions = problem.s.positions();
    T* y = grad_sample + (d * problem.s.taps() + tap) * 3 * positions + first;
    for (int64_t t = 0; t < count; ++t) {
      const Corners<T>& corners = samples[t].corners;
      const T* dot = dots + 4 * t;
      y[t] = samples[t].mask * bilinear_grad_y(corners, dot);
      y[t + positions] = samples[t].mask * bilinear_grad_x(corners, dot);
      y[t + 2 * positions] = corners.weight[0] * dot[0] + corners.weight[1] * dot[1] + corners.weight[2] * dot[2] +
                             corners.weight[3] * dot[3];
    }
  }
};

template <typename T>
DeformConv2dGradients backward(
    const DeformConv2dSizes& s,
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& offset,
    const std::optional<at::Tensor>& mask,
    const at::Tensor& weight,
    std::array<bool, 5> wanted) {
  const auto options = input.options().dtype(c10::CppTypeToScalarType<T>::value);
  const int64_t taps = s.taps(), channels = s.in_channels, positions = s.positions(), groups = s.offset_groups;
  const int64_t group_in = s.group_in(), group_out = s.group_out();
  const at::Tensor x = channels_last_map<T>(input);
  const at::Tensor off = widen<T>(offset, at::MemoryFormat::Contiguous);
  const at::Tensor msk = mask ? widen<T>(*mask, at::MemoryFormat::Contiguous) : at::Tensor();
  const at::Tensor grad_rows = channels_last_map<T>(grad_output);
  const at::Tensor grad_columns = widen<T>(grad_output, at::MemoryFormat::Contiguous);
  const Problem<T> problem{s, x.const_data_ptr<T>(), off.const_data_ptr<T>(), mask ? msk.const_data_ptr<T>() : nullptr};

  const std::vector<Panel> panels = channel_panels(s.in_channels, s.group_in());
  const int64_t threads = at::get_num_threads();
  const int64_t slices = std::min<int64_t>(panels.size(), threads);
  const int64_t blocks = std::max<int64_t>(1, std::min(s.batch, (threads + slices - 1) / slices));  // of images

  // The filter in dense blocks, one per tap and panel part.
  const at::Tensor by_tap = widen<T>(weight, at::MemoryFormat::Contiguous)
                                .view({s.groups, group_out, group_in, taps})
                                .permute({3, 0, 1, 2})
                                .contiguous();  // [K, groups, group_out, group_in]
  const auto blockwise = [&](T* dense, T* blocked, bool into_blocks) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t g = 0; g < s.groups; ++g) {
        T* rows = dense + (tap * s.groups + g) * group_out * group_in;
        for (int64_t c = 0; c < group_in; c += kPanel) {
          const int64_t width = std::min(kPanel, group_in - c);
          for (int64_t o = 0; o < group_out; ++o, blocked += width) {
            T* row = rows + o * group_in + c;
            if (into_blocks) {
              std::copy_n(row, width, blocked);
            } else {
              std::copy_n(blocked, width, row);
            }
          }
        }
      }
    }
  };
  std::vector<T> filter(by_tap.numel());
  blockwise(by_tap.mutable_data_ptr<T>(), filter.data(), true);

  at::Tensor grad_x = wanted[0] ? at::zeros_like(x) : at::Tensor();
  at::Tensor grad_filter = at::zeros({blocks, by_tap.numel()}, options);
  at::Tensor grad_sample = at::zeros({slices, s.batch, groups, taps, 3, positions}, options);
  const int64_t image_size = s.height * s.width * channels, grad_size = s.out_channels * positions;
  const int64_t sample_size = groups * taps * 3 * positions;
  const int64_t tile = std::min<int64_t>(128, positions);
  at::parallel_for(0, slices * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t slice = unit % slices, block = unit / slices;
      const Panel* first = panels.data() + panels.size() * slice / slices;
      const Panel* last = panels.data() + panels.size() * (slice + 1) / slices;
      for (int64_t n = s.batch * block / blocks; n < s.batch * (block + 1) / blocks; ++n) {
        BackwardUnit<T>{
            problem,
            grad_rows.const_data_ptr<T>() + n * grad_size,
            grad_columns.const_data_ptr<T>() + n * grad_size,
            filter.data(),
            wanted[0] ? grad_x.mutable_data_ptr<T>() + n * image_size : nullptr,
            grad_filter.mutable_data_ptr<T>() + block * by_tap.numel(),
            grad_sample.mutable_data_ptr<T>() + (slice * s.batch + n) * sample_size,
        }
            .run(n, first, last, tile);
      }
    }
  });

  DeformConv2dGradients result = no_gradients(input);
  if (wanted[0]) {
    std::get<0>(result) = map_like<T>(grad_x, input);
  }
  const at::Tensor sum = grad_sample.sum(0);
  if (wanted[1]) {
    std::get<1>(result) = at::empty(offset.sizes(), offset.options());
    std::get<1>(result).view({s.batch, groups, taps, 2, positions}).copy_(sum.narrow(3, 0, 2));
  }
  if (wanted[2]) {
    std::get<2>(result) = at::empty(mask->sizes(), mask->options());
    std::get<2>(result).view({s.batch, groups, taps, positions}).copy_(sum.select(3, 2));
  }
  if (wanted[3]) {
    at::Tensor blocked = grad_filter.sum(0), dense = at::empty_like(by_tap);
    blockwise(dense.mutable_data_ptr<T>(), blocked.mutable_data_ptr<T>(), false);
    std::get<3>(result) = at::empty(weight.sizes(), weight.options());
    std::get<3>(result).view({s.groups, group_out, group_in, taps}).copy_(dense.permute({1, 2, 3, 0}));
  }
  if (wanted[4]) {
    std::get<4>(result) = grad_rows.sum({0, 2, 3}).to(weight.scalar_type());
  }
  return result;
}

at::Tensor deform_conv2d_cpu(
    const at::Tensor& input,
    const at::Tensor& offset,
    const std::optional<at::Tensor>& mask,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation) {
  const auto s = check_deform_conv2d(input, offset, mask, weight, bias, stride, padding, dilation);
  if (input.scalar_type() == at::kDouble) {
    return forward<double, double>(s, input, offset, mask, weight, bias);
  }
  // Two channels at a time are multiplied.
  if (input.scalar_type() == at::kBFloat16 && s.group_in() % 2 == 0 && has_bfloat16_products()) {
    return forward<float, at::BFloat16>(s, input, offset, mask, weight, bias);
  }
  return forward<float, float>(s, input, offset, mask, weight, bias);
}

DeformConv2dGradients deform_conv2d_backward_cpu(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& offset,
    const std::optional<at::Tensor>& mask,
    const at::Tensor& weight,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    std::array<bool, 5> output_mask) {
  const auto s = check_deform_conv2d(input, offset, mask, weight, std::nullopt, stride, padding, dilation);
  check_deform_conv2d_grad(grad_output, input, mask, s, output_mask);
  return input.scalar_type() == at::kDouble ? backward<double>(s, grad_output, input, offset, mask, weight, output_mask)
                                            : backward<float>(s, grad_output, input, offset, mask, weight, output_mask);
}

}  // namespace

}  // namespace dk

TORCH_LIBRARY_IMPL(dk_detection, CPU, m) {
  m.impl("deform_conv2d", &dk::deform_conv2d_cpu);
  m.impl("deform_conv2d_backward", &dk::deform_conv2d_backward_cpu);
}
