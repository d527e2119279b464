// Host kernels of deformable RoI pooling, in either geometry.
//
// The samples of a bin form a grid, so their bilinear weights factor: the bin's value is the sum over some pixel rows
// and columns of row weight * column weight * pixel. A bin thus visits each pixel once, however many samples share it,
// and each visit serves a whole row of channels. Everything runs in float (double for double): half types are widened
// on entry and rounded once at the end.
//
// The backward has two parts without any sharing between threads: the gradients of offset and mask belong to a RoI
// each; that of the input is cut into slices of the channels, each written by one thread, which visits the RoIs in
// their order. So no atomics are needed, and the result depends neither on timing nor on the number of threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "common/check_rois.h"
#include "common/launch.h"
#include "common/roi_sampling.h"
#include "cpu/simd.h"

namespace dk {

// One pixel row (or column) that a bin looks at: its weight in the mean, and what the weight gains when the bin moves
// by a pixel.
template <typename T>
struct Line {
  int64_t index;
  T weight, slope;
};

template <typename Rule, typename T>
void find_lines(const BinAxis<T>& axis, int64_t map_length, std::vector<Line<T>>& lines) {
  lines.clear();
  const T share = 1 / axis.count;
  const auto add = [&](int64_t index, T weight, T slope) {
    // Neighbouring samples share lines, and those are among the last ones.
    for (size_t back = 1; back <= std::min<size_t>(lines.size(), 3); ++back) {
      Line<T>& line = lines[lines.size() - back];
      if (line.index == index) {
        line.weight += weight;
        line.slope += slope;
        return;
      }
    }
    lines.push_back({index, weight, slope});
  };
  for (int64_t i = axis.first; i < axis.last; ++i) {
    const T position = Rule::position(axis, i);
    if (!Rule::sees(position, map_length)) {
      continue;
    }
    const ClampedAxis<T> at = clamp_to_map(position, map_length);
    add(at.low, (1 - at.fraction) * share, at.moves ? -share : T(0));
    if (at.moves) {
      add(at.high, at.fraction * share, share);
    }
  }
}

// out += the weighted sum of four rows.
template <typename T>
DK_SIMD_CLONES void add_four_rows(const T* const rows[4], const T weights[4], int64_t width, T* out) {
  const T w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
  const T *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
#pragma omp simd
  for (int64_t c = 0; c < width; ++c) {
    out[c] += w0 * r0[c] + w1 * r1[c] + w2 * r2[c] + w3 * r3[c];
  }
}

template <typename T>
DK_SIMD_CLONES void add_row(const T* row, T weight, int64_t width, T* out) {
#pragma omp simd
  for (int64_t c = 0; c < width; ++c) {
    out[c] += weight * row[c];
  }
}

template <typename T>
DK_SIMD_CLONES T dot_rows(const T* a, const T* b, int64_t width) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < width; ++c) {
    sum += a[c] * b[c];
  }
  return sum;
}

template <typename Rule, typename T>
class RoiPoolCpu {
 public:
  RoiPoolCpu(
      const RoiPoolSizes& sizes,
      const at::Tensor& input,
      const at::Tensor& rois,
      const std::optional<at::Tensor>& offset,
      const std::optional<at::Tensor>& mask,
      bool reads_input)
      : s(sizes),
        wide(input.options().dtype(c10::CppTypeToScalarType<T>::value)),
        x(reads_input ? channels_innermost(widen(input)) : at::Tensor()),
        boxes(widen(rois).contiguous()),
        off(offset ? widen(*offset).contiguous() : at::Tensor()),
        msk(mask ? widen(*mask).contiguous() : at::Tensor()),
        bins{
            s, boxes.template const_data_ptr<T>(), off.defined() ? off.template const_data_ptr<T>() : nullptr,
            msk.defined() ? msk.template const_data_ptr<T>() : nullptr} {}

  void check_rois(const char* name) const { check_roi_values<T>(name, boxes, s); }

  at::Tensor forward(bool channels_last) const {
    const at::Tensor output = at::empty(
        {s.rois, s.channels, s.pooled_h, s.pooled_w}, wide,
        channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
    T* out = output.template mutable_data_ptr<T>();
    const T* pixels = x.template const_data_ptr<T>();
    const int64_t channels = s.channels, width = s.class_channels(), size = s.bins() * channels;
    at::parallel_for(0, s.rois, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      std::vector<T> pooled(channels_last ? 0 : size);
      for (int64_t roi = begin; roi < end; ++roi) {
        T* rows = channels_last ? out + roi * size : pooled.data();  // [bins, C]
        std::fill_n(rows, size, T(0));
        each_bin(roi, scratch, [&](const Bin<T>& bin, int64_t number, int64_t cls) {
          const T* plane = pixels + plane_of(bin) + cls * width;
          const T* at[4];
          T weights[4];
          int filled = 0;
          for (const Line<T>& row : scratch.rows) {
            for (const Line<T>& column : scratch.columns) {
              at[filled] = plane + (row.index * s.width + column.index) * channels;
              weights[filled] = row.weight * column.weight * bin.mask;
              if (++filled == 4) {
                add_four_rows(at, weights, width, rows + number * channels + cls * width);
                filled = 0;
              }
            }
          }
          for (int k = 0; k < filled; ++k) {
            add_row(at[k], weights[k], width, rows + number * channels + cls * width);
          }
        });
        if (!channels_last) {
          transpose(rows, out + roi * size);
        }
      }
    });
    return output;
  }

  RoiPoolGradients backward(const at::Tensor& grad_output, std::array<bool, 3> wanted) const {
    const at::Tensor grad = widen(grad_output).permute({0, 2, 3, 1}).contiguous();  // [n, pooled_h, pooled_w, C]
    RoiPoolGradients result;
    if (wanted[0]) {
      std::get<0>(result) = input_gradient(grad).permute({0, 4, 1, 2, 3});
    }
    if (wanted[1] || wanted[2]) {
      std::tie(std::get<1>(result), std::get<2>(result)) = part_gradients(grad);
    }
    return result;
  }

 private:
  struct Scratch {
    std::vector<Line<T>> rows, columns;
  };

  at::Tensor channels_innermost(const at::Tensor& input) const {
    return input.reshape({s.batch, s.channels, s.cells(), s.height, s.width}).permute({0, 2, 3, 4, 1}).contiguous();
  }

  static at::Tensor widen(const at::Tensor& tensor) { return tensor.to(c10::CppTypeToScalarType<T>::value); }

  // Where the plane of pixels that a bin reads begins in x.
  int64_t plane_of(const Bin<T>& bin) const {
    return (bin.image * s.cells() + bin.cell) * s.height * s.width * s.channels;
  }

  // Calls body(bin, number of the bin, class) for all bins of a RoI, their lines in `scratch`.
  template <typename Body>
  void each_bin(int64_t roi, Scratch& scratch, const Body& body) const {
    for (int64_t cls = 0; cls < s.classes; ++cls) {
      for (int64_t ph = 0; ph < s.pooled_h; ++ph) {
        for (int64_t pw = 0; pw < s.pooled_w; ++pw) {
          const Bin<T> bin = bins.bin(roi, cls, ph, pw);
          find_lines<Rule>(bin.y, s.height, scratch.rows);
          find_lines<Rule>(bin.x, s.width, scratch.columns);
          body(bin, ph * s.pooled_w + pw, cls);
        }
      }
    }
  }

  // [bins, C] to [C, bins], in blocks that stay in cache.
  void transpose(const T* rows, T* out) const {
    constexpr int64_t kBlock = 16;
    for (int64_t first = 0; first < s.channels; first += kBlock) {
      const int64_t last = std::min(first + kBlock, s.channels);
      for (int64_t bin = 0; bin < s.bins(); ++bin) {
        for (int64_t c = first; c < last; ++c) {
          out[c * s.bins() + bin] = rows[bin * s.channels + c];
        }
      }
    }
  }

  std::pair<at::Tensor, at::Tensor> part_gradients(const at::Tensor& grad) const {
    const at::Tensor grad_offset = at::zeros({s.rois, s.classes, 2, s.parts()}, wide);
    const at::Tensor grad_mask = at::zeros({s.rois, s.classes, s.parts()}, wide);
    T* by_offset = grad_offset.template mutable_data_ptr<T>();
    T* by_mask = grad_mask.template mutable_data_ptr<T>();
    const T* pixels = x.template const_data_ptr<T>();
    const T* grad_rows = grad.template const_data_ptr<T>();
    const int64_t channels = s.channels, width = s.class_channels();
    at::parallel_for(0, s.rois, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t roi = begin; roi < end; ++roi) {
        each_bin(roi, scratch, [&](const Bin<T>& bin, int64_t number, int64_t cls) {
          const T* plane = pixels + plane_of(bin) + cls * width;
          const T* grad_row = grad_rows + (roi * s.bins() + number) * channels + cls * width;
          T sum = 0, slope_y = 0, slope_x = 0;
          for (const Line<T>& row : scratch.rows) {
            for (const Line<T>& column : scratch.columns) {
              const T dot = dot_rows(grad_row, plane + (row.index * s.width + column.index) * channels, width);
              sum += row.weight * column.weight * dot;
              slope_y += row.slope * column.weight * dot;
              slope_x += row.weight * column.slope * dot;
            }
          }
          T* shift = by_offset + bins.offset_index(bin.part);
          shift[0] += bin.mask * bin.x.per_unit * slope_x;
          shift[s.parts()] += bin.mask * bin.y.per_unit * slope_y;
          by_mask[bin.part] += sum;
        });
      }
    });
    return {grad_offset, grad_mask};
  }

  // [N, cells, H, W, C]
  at::Tensor input_gradient(const at::Tensor& grad) const {
    const at::Tensor result = at::zeros({s.batch, s.cells(), s.height, s.width, s.channels}, wide);
    if (s.rois == 0) {
      return result;
    }
    T* pixels = result.template mutable_data_ptr<T>();
    const T* grad_rows = grad.template const_data_ptr<T>();
    std::vector<std::vector<int64_t>> rois_of(s.batch);
    for (int64_t roi = 0; roi < s.rois; ++roi) {
      rois_of[static_cast<int64_t>(boxes.template const_data_ptr<T>()[roi * 5])].push_back(roi);
    }
    // Slices of whole cache lines, as many as the threads need. A slice works on one image, and within each class, as
    // every class has bins of its own.
    const int64_t channels = s.channels, width = s.class_channels();
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t wanted = (at::get_num_threads() + s.batch - 1) / s.batch;
    const int64_t slices = std::clamp<int64_t>((width + kLine - 1) / kLine, 1, wanted);
    const int64_t slice_width = ((width + slices - 1) / slices + kLine - 1) / kLine * kLine;
    at::parallel_for(0, s.batch * slices, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t first = unit % slices * slice_width, last = std::min(first + slice_width, width);
        for (const int64_t roi : rois_of[unit / slices]) {
          if (first >= last) {
            break;
          }
          each_bin(roi, scratch, [&](const Bin<T>& bin, int64_t number, int64_t cls) {
            T* plane = pixels + plane_of(bin) + cls * width + first;
            const T* grad_row = grad_rows + (roi * s.bins() + number) * channels + cls * width + first;
            for (const Line<T>& row : scratch.rows) {
              for (const Line<T>& column : scratch.columns) {
                add_row(
                    grad_row, row.weight * column.weight * bin.mask, last - first,
                    plane + (row.index * s.width + column.index) * channels);
              }
            }
          });
        }
      }
    });
    return result;
  }

  RoiPoolSizes s;
  at::TensorOptions wide;
  at::Tensor x;  // [N, cells, H, W, C], if it is read at all
  at::Tensor boxes, off, msk;
  RoiBins<Rule, T> bins;
};

// Entry points for arguments that have been checked: dispatch, and the caller's memory format and dtypes.
template <typename Rule>
at::Tensor roi_pool_cpu(
    const char* name,
    const RoiPoolSizes& s,
    const at::Tensor& input,
    const at::Tensor& rois,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask) {
  const bool channels_last = input.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  const auto run = [&](auto zero) {
    const RoiPoolCpu<Rule, decltype(zero)> kernel(s, input, rois, offset, mask, /*reads_input=*/true);
    kernel.check_rois(name);
    return kernel.forward(channels_last).to(input.scalar_type());
  };
  return input.scalar_type() == at::kDouble ? run(double()) : run(float());
}

template <typename Rule>
RoiPoolGradients roi_pool_backward_cpu(
    const char* name,
    const RoiPoolSizes& s,
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& rois,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    std::array<bool, 3> output_mask) {
  check_roi_pool_grad(name, grad_output, input, offset, mask, s, output_mask);
  const auto run = [&](auto zero) {
    const RoiPoolCpu<Rule, decltype(zero)> kernel(s, input, rois, offset, mask, output_mask[1] || output_mask[2]);
    kernel.check_rois(name);
    return kernel.backward(grad_output, output_mask);
  };
  const RoiPoolGradients wide = input.scalar_type() == at::kDouble ? run(double()) : run(float());
  const auto narrow = [](const at::Tensor& gradient, const at::Tensor& like) {
    return gradient.reshape(like.sizes()).to(like.scalar_type());
  };
  RoiPoolGradients result = no_roi_pool_gradients(input.options());
  if (output_mask[0]) {
    std::get<0>(result) = narrow(std::get<0>(wide), input).contiguous(input.suggest_memory_format());
  }
  if (output_mask[1]) {
    std::get<1>(result) = narrow(std::get<1>(wide), *offset);
  }
  if (output_mask[2]) {
    std::get<2>(result) = narrow(std::get<2>(wide), *mask);
  }
  return result;
}

}  // namespace dk
