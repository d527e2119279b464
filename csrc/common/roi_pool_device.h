// Deformable RoI pooling for devices, in either geometry: bodies of the kernels and the order they run in, written over
// a launcher (launch.h).
//
// A work item is a (RoI, bin, class): the lanes of a warp read neighbouring channels of the same pixels. Weights of
// rows and columns are independent of each other, so those of all samples on a row or a column of pixels are added up
// first, in memory that the warp shares, and each pixel is visited once. The gradients of a part's offset and mask are
// sums within a warp.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/bilinear.h"
#include "common/check_rois.h"
#include "common/contributions.h"
#include "common/launch.h"
#include "common/roi_sampling.h"

namespace dk {

// The rows, or the columns, that samples lie on.
template <typename A, typename I>
struct RoiLines {
  static constexpr int kSamples = 8;  // along an axis at a time

  I pixel[2 * kSamples];
  A weight[2 * kSamples], slope[2 * kSamples];  // summed over the samples; the slope is the weight's by the position
  int count;

  DK_HOST_DEVICE void add(I at, A by, A by_slope) {
    // Neighbouring samples share their pixels, in whichever direction they go.
    const int same = count > 0 && pixel[count - 1] == at   ? count - 1
                     : count > 1 && pixel[count - 2] == at ? count - 2
                                                           : count;
    weight[same] = by + (same < count ? weight[same] : A(0));
    slope[same] = by_slope + (same < count ? slope[same] : A(0));
    pixel[same] = at;
    count += same == count;
  }
};

// What all bodies know. T is the data type, A the wider type of positions and sums, I the type of indices.
template <typename Rule, typename T, typename A, typename I>
struct RoiPoolDevice {
  RoiBins<Rule, A, I> rois;
  const T* input;  // [N, cells, H, W, C], C the number of output channels; null if it is not read

  struct Shared {
    RoiLines<A, I> rows, columns;
  };

  DK_HOST_DEVICE const RoiPoolSizesOf<I>& sizes() const { return rois.s; }

  struct Item {
    I row;  // of an output [n * bins, C]
    I cls;
    I first, last;  // channels of the class
    I plane;        // first pixel of the (image, cell), in pixels
    Bin<A, I> bin;
    A scale;  // what a sample contributes to the bin
  };

  DK_HOST_DEVICE Item item(I roi, I ph, I pw, I cls) const {
    const auto& s = sizes();
    Item it;
    it.row = (roi * s.pooled_h + ph) * s.pooled_w + pw;
    it.cls = cls;
    it.first = cls * s.class_channels();
    it.last = it.first + s.class_channels();
    it.bin = rois.bin(roi, cls, ph, pw);
    it.plane = (it.bin.image * s.cells() + it.bin.cell) * s.height * s.width;
    it.scale = it.bin.mask / (it.bin.y.count * it.bin.x.count);
    return it;
  }

  // Classes are fastest: their channels are neighbours.
  DK_HOST_DEVICE Item item(I index) const {
    const auto& s = sizes();
    const I row = index / s.classes, roi = row / s.bins(), bin = row - roi * s.bins(), ph = bin / s.pooled_w;
    return item(roi, ph, bin - ph * s.pooled_w, index - row * s.classes);
  }

  // Calls body(shared) for the rows and columns of some of the bin's samples, until it has seen all of them.
  template <typename Lanes, typename Body>
  DK_HOST_DEVICE void each_lines(const Bin<A, I>& bin, const Lanes& lanes, const Body& body) const {
    constexpr int kSamples = RoiLines<A, I>::kSamples;
    auto& shared = lanes.template shared<Shared>();
    for (int64_t y = bin.y.first; y < bin.y.last; y += kSamples) {
      for (int64_t x = bin.x.first; x < bin.x.last; x += kSamples) {
        lanes.sync();
        for (int axis = lanes.index(); axis < 2; axis += lanes.count()) {
          if (axis == 0) {
            find(bin.y, y, sizes().height, shared.rows);
          } else {
            find(bin.x, x, sizes().width, shared.columns);
          }
        }
        lanes.sync();
        body(shared);
      }
    }
  }

 private:
  DK_HOST_DEVICE static void find(const BinAxis<A>& axis, int64_t first, I length, RoiLines<A, I>& lines) {
    lines.count = 0;
    const int64_t end = first + RoiLines<A, I>::kSamples, last = end < axis.last ? end : axis.last;
    DK_NO_UNROLL
    for (int64_t sample = first; sample < last; ++sample) {
      const A position = Rule::position(axis, sample);
      if (Rule::sees(position, length)) {
        const ClampedAxis<A, I> at = clamp_to_map(position, length);
        const A slope = at.moves ? A(1) : A(0);
        lines.add(at.low, 1 - at.fraction, -slope);
        lines.add(at.high, at.fraction, slope);
      }
    }
  }
};

template <typename Rule, typename T, typename A, typename I, int kWidth>
struct PoolBins {
  using Device = RoiPoolDevice<Rule, T, A, I>;
  using Shared = typename Device::Shared;

  Device p;
  T* output;  // [n, bins, C]

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t index, const Lanes& lanes) const {
    const I channels = p.sizes().channels, width = p.sizes().width;
    const auto it = p.item(static_cast<I>(index));
    for (I base = it.first; base < it.last; base += lanes.count() * kWidth) {
      const I c = base + lanes.index() * kWidth;
      A sum[kWidth];
      DK_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        // An invalid RoI gets here only where its values could not be checked: it must not pass for a result.
        sum[i] = it.bin.valid ? A(0) : std::numeric_limits<A>::quiet_NaN();
      }
      p.each_lines(it.bin, lanes, [&](const Shared& lines) {
        for (int row = 0; c < it.last && row < lines.rows.count; ++row) {
          const I line = (it.plane + lines.rows.pixel[row] * width) * channels + c;
          const A weight = lines.rows.weight[row] * it.scale;
          DK_NO_UNROLL
          for (int column = 0; column < lines.columns.count; ++column) {
            const auto value = Vector<T, kWidth>::load(p.input + line + lines.columns.pixel[column] * channels);
            const A factor = weight * lines.columns.weight[column];
            DK_UNROLL
            for (int i = 0; i < kWidth; ++i) {
              sum[i] += factor * static_cast<A>(value.value[i]);
            }
          }
        }
      });
      if (c < it.last) {
        store_narrow<kWidth>(sum, output + it.row * channels + c);
      }
    }
  }
};

// Gradients of offset and mask. A work item is a (RoI, class, part): its warp adds up the bins, samples and channels.
template <typename Rule, typename T, typename A, typename I, int kWidth>
struct PartGradient {
  using Device = RoiPoolDevice<Rule, T, A, I>;
  using Shared = typename Device::Shared;

  Device p;
  const T* grad_output;  // [n, bins, C]
  A* grad_offset;        // [n, classes, 2, parts] or null
  A* grad_mask;          // [n, classes, parts] or null

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t number, const Lanes& lanes) const {
    const auto& s = p.sizes();
    const I index = static_cast<I>(number), both = index / s.parts(), part = index - both * s.parts();
    const I roi = both / s.classes, cls = both - roi * s.classes, i = part / s.part_w, j = part - i * s.part_w;
    A by_y = 0, by_x = 0, by_mask = 0;
    for (I ph = first_bin(i, s.part_h, s.pooled_h); ph < first_bin(i + 1, s.part_h, s.pooled_h); ++ph) {
      for (I pw = first_bin(j, s.part_w, s.pooled_w); pw < first_bin(j + 1, s.part_w, s.pooled_w); ++pw) {
        add_bin(p.item(roi, ph, pw, cls), lanes, by_y, by_x, by_mask);
      }
    }
    by_y = lanes.sum(by_y);
    by_x = lanes.sum(by_x);
    by_mask = lanes.sum(by_mask);
    if (lanes.index() == 0) {
      if (grad_offset) {
        A* shift = grad_offset + p.rois.offset_index(index);
        shift[0] = by_x;
        shift[s.parts()] = by_y;
      }
      if (grad_mask) {
        grad_mask[index] = by_mask;
      }
    }
  }

  template <typename Item, typename Lanes>
  DK_HOST_DEVICE void add_bin(const Item& it, const Lanes& lanes, A& by_y, A& by_x, A& by_mask) const {
    const I channels = p.sizes().channels, width = p.sizes().width;
    A slope_y = 0, slope_x = 0, sum = 0;
    p.each_lines(it.bin, lanes, [&](const Shared& lines) {
      for (I c = it.first + lanes.index() * kWidth; c < it.last; c += lanes.count() * kWidth) {
        A grad[kWidth];
        widen(Vector<T, kWidth>::load(grad_output + it.row * channels + c), grad);
        for (int row = 0; row < lines.rows.count; ++row) {
          const I line = (it.plane + lines.rows.pixel[row] * width) * channels + c;
          A weighted = 0, sloped = 0;
          DK_NO_UNROLL
          for (int column = 0; column < lines.columns.count; ++column) {
            const auto value = Vector<T, kWidth>::load(p.input + line + lines.columns.pixel[column] * channels);
            A dot = 0;
            DK_UNROLL
            for (int k = 0; k < kWidth; ++k) {
              dot += grad[k] * static_cast<A>(value.value[k]);
            }
            weighted += lines.columns.weight[column] * dot;
            sloped += lines.columns.slope[column] * dot;
          }
          slope_y += lines.rows.slope[row] * weighted;
          slope_x += lines.rows.weight[row] * sloped;
          sum += lines.rows.weight[row] * weighted;
        }
      }
    });
    if (it.bin.valid) {
      by_y += slope_y * it.scale * it.bin.y.per_unit;
      by_x += slope_x * it.scale * it.bin.x.per_unit;
      by_mask += sum / (it.bin.y.count * it.bin.x.count);
    }
  }
};

// Gradient of the input, scattered with atomics: fast, the order of the sums is left to chance. kWidth channels a lane
// allow atomics on as many, if the GPU has them.
template <typename Rule, typename T, typename A, typename I, int kWidth>
struct ScatterRoiGradient {
  using Device = RoiPoolDevice<Rule, T, A, I>;
  using Shared = typename Device::Shared;

  Device p;
  const T* grad_output;  // [n, bins, C]
  A* grad_input;         // [N, cells, H, W, C]

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t index, const Lanes& lanes) const {
    constexpr int kAtOnce = atomic_width<A, kWidth>();
    const I channels = p.sizes().channels, width = p.sizes().width;
    const auto it = p.item(static_cast<I>(index));
    p.each_lines(it.bin, lanes, [&](const Shared& lines) {
      for (I c = it.first + lanes.index() * kAtOnce; c < it.last; c += lanes.count() * kAtOnce) {
        A grad[kAtOnce];
        widen(Vector<T, kAtOnce>::load(grad_output + it.row * channels + c), grad);
        for (int row = 0; row < lines.rows.count; ++row) {
          A* line = grad_input + (it.plane + lines.rows.pixel[row] * width) * channels + c;
          const A weight = lines.rows.weight[row] * it.scale;
          for (int column = 0; column < lines.columns.count; ++column) {
            add_atomically<kAtOnce>(
                line + lines.columns.pixel[column] * channels, weight * lines.columns.weight[column], grad);
          }
        }
      }
    });
  }
};

// The deterministic way to the same gradient. First, the number of contributions each item makes.
template <typename Rule, typename T, typename A, typename I>
struct CountContributions {
  using Device = RoiPoolDevice<Rule, T, A, I>;
  using Shared = typename Device::Shared;

  Device p;
  int64_t* counts;  // [items]

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t index, const Lanes& lanes) const {
    int64_t count = 0;
    p.each_lines(p.item(static_cast<I>(index)).bin, lanes, [&](const Shared& lines) {
      count += lines.rows.count * lines.columns.count;
    });
    if (lanes.index() == 0) {
      counts[index] = count;
    }
  }
};

// Second, for every contribution of items [first, ...) the pixel it goes to, numbered within (image, cell, class)
// planes, the item it comes from and its weight. No item lists more than it counted, even if rounding would differ.
template <typename Rule, typename T, typename A, typename I>
struct ListContributions {
  using Device = RoiPoolDevice<Rule, T, A, I>;
  using Shared = typename Device::Shared;

  Device p;
  int64_t first;
  const int64_t* ends;    // [items]: where each item's contributions end, counted from those of the first item of all
  const int64_t* counts;  // [items]
  int64_t* pixels;
  int64_t* items;
  A* weights;

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t local, const Lanes& lanes) const {
    const auto& s = p.sizes();
    const int64_t index = first + local, map = static_cast<int64_t>(s.height) * s.width;
    const auto it = p.item(static_cast<I>(index));
    const int64_t plane = static_cast<int64_t>(it.plane) * s.classes + it.cls * map;
    int64_t at = ends[index] - counts[index] - (ends[first] - counts[first]);
    const int64_t end = at + counts[index];
    p.each_lines(it.bin, lanes, [&](const Shared& lines) {
      const int columns = lines.columns.count, count = lines.rows.count * columns;
      for (int one = lanes.index(); one < count && at + one < end; one += lanes.count()) {
        const int row = one / columns, column = one - row * columns;
        pixels[at + one] = plane + lines.rows.pixel[row] * s.width + lines.columns.pixel[column];
        items[at + one] = index;
        weights[at + one] = lines.rows.weight[row] * it.scale * lines.columns.weight[column];
      }
      at += count;
    });
  }
};

// Third, each pixel gathers its contributions.
template <typename T, typename A, typename I>
struct RoiContributions {
  RoiPoolSizesOf<I> s;
  I class_channels;
  const T* grad_output;  // [n, bins, C]
  const int64_t* items;
  A* grad_input;  // [N, cells, H, W, C]

  DK_HOST_DEVICE Target<A> target(int64_t pixel) const {
    const I map = s.height * s.width, both = static_cast<I>(pixel) / map, plane = both / s.classes;
    const I cls = both - plane * s.classes, place = static_cast<I>(pixel) - both * map;
    return {grad_input + (plane * map + place) * s.channels + cls * class_channels, class_channels};
  }

  DK_HOST_DEVICE const T* row(int64_t number) const {
    const I item = static_cast<I>(items[number]), bin = item / s.classes;
    return grad_output + bin * s.channels + (item - bin * s.classes) * class_channels;
  }

  template <int kWidth>
  DK_HOST_DEVICE void load(const T* row, int64_t c, A (&value)[kWidth]) const {
    widen(Vector<T, kWidth>::load(row + c), value);
  }
};

// The operator in geometry Rule for data type T on whatever Launcher runs on.
template <typename Launcher, typename Rule, typename T>
class RoiPoolPipeline {
 public:
  using A = at::opmath_type<T>;

  RoiPoolPipeline(
      const RoiPoolSizes& sizes,
      const at::Tensor& input,
      const at::Tensor& rois,
      const std::optional<at::Tensor>& offset,
      const std::optional<at::Tensor>& mask,
      bool reads_input)
      : s(sizes),
        narrow(input.options()),
        wide(narrow.dtype(c10::CppTypeToScalarType<A>::value)),
        x(reads_input ? channels_innermost(input) : at::Tensor()),
        boxes(rois.to(wide.dtype()).contiguous()),
        off(offset ? offset->to(wide.dtype()).contiguous() : at::Tensor()),
        msk(mask ? mask->to(wide.dtype()).contiguous() : at::Tensor()) {}

  at::Tensor forward(const char* name) const {
    check_roi_values<Launcher, A>(name, boxes, s);
    at::Tensor out = at::empty({s.rois, s.pooled_h, s.pooled_w, s.channels}, narrow);
    dispatch(out, [&](auto index, auto width) {
      using I = decltype(index);
      Launcher::run(
          items(), PoolBins<Rule, T, A, I, decltype(width)::value>{device<I>(), out.template mutable_data_ptr<T>()});
    });
    return out.permute({0, 3, 1, 2});  // [n, C, pooled_h, pooled_w]
  }

  // `input` must be read if gradients of offset or mask are wanted.
  RoiPoolGradients backward(const char* name, const at::Tensor& grad_output, std::array<bool, 3> wanted) const {
    const at::Tensor grad = grad_output.permute({0, 2, 3, 1}).contiguous();  // [n, pooled_h, pooled_w, C]
    const T* grad_data = grad.template const_data_ptr<T>();
    RoiPoolGradients result = no_roi_pool_gradients(narrow);
    if (wanted[0]) {
      at::Tensor sum = at::zeros({s.batch, s.cells(), s.height, s.width, s.channels}, wide);
      input_gradient(name, grad, sum.template mutable_data_ptr<A>());
      std::get<0>(result) = sum.permute({0, 4, 1, 2, 3}).to(narrow.dtype());
    }
    if (wanted[1] || wanted[2]) {
      const int64_t parts = s.rois * s.classes * s.parts();
      const at::Tensor by_offset = wanted[1] ? at::empty(off.sizes(), wide) : at::Tensor();
      const at::Tensor by_mask = wanted[2] ? at::empty(msk.sizes(), wide) : at::Tensor();
      dispatch(grad, [&](auto index, auto width) {
        using I = decltype(index);
        Launcher::run(
            parts, PartGradient<Rule, T, A, I, decltype(width)::value>{
                       device<I>(), grad_data, wanted[1] ? by_offset.template mutable_data_ptr<A>() : nullptr,
                       wanted[2] ? by_mask.template mutable_data_ptr<A>() : nullptr});
      });
      if (wanted[1]) {
        std::get<1>(result) = by_offset;
      }
      if (wanted[2]) {
        std::get<2>(result) = by_mask;
      }
    }
    return result;
  }

 private:
  int64_t items() const { return s.rois * s.bins() * s.classes; }

  at::Tensor channels_innermost(const at::Tensor& input) const {
    return input.reshape({s.batch, s.channels, s.cells(), s.height, s.width}).permute({0, 2, 3, 4, 1}).contiguous();
  }

  template <typename I>
  RoiPoolDevice<Rule, T, A, I> device() const {
    return {
        {s.as<I>(), boxes.template const_data_ptr<A>(), off.defined() ? off.template const_data_ptr<A>() : nullptr,
         msk.defined() ? msk.template const_data_ptr<A>() : nullptr},
        x.defined() ? x.template const_data_ptr<T>() : nullptr};
  }

  // Calls body(I{}, width) with the types that fit the sizes, and `other`, which the body reads or writes.
  template <typename Body>
  void dispatch(const at::Tensor& other, const Body& body) const {
    const int64_t map = s.batch * s.cells() * s.height * s.width;
    const int64_t numbers =
        std::max(s.pooled_h * std::max(s.group, s.part_h), s.pooled_w * std::max(s.group, s.part_w));
    with_index<Launcher>(
        {x, boxes, off, msk, other},
        {map * s.channels, map * s.classes, items(), s.rois * s.classes * s.parts(), numbers + s.samples},
        [&](auto index) { with_width<T>({s.class_channels()}, {x, other}, [&](auto width) { body(index, width); }); });
  }

  void input_gradient(const char* name, const at::Tensor& grad, A* grad_input) const {
    const T* grad_output = grad.template const_data_ptr<T>();
    const bool sorts = at::globalContext().deterministicAlgorithms();
    TORCH_CHECK(
        !sorts || Launcher::may_wait(), name,
        ": the deterministic gradient of the input cannot be recorded in a CUDA graph, as the size of its workspace "
        "depends on the RoIs; record it without torch.use_deterministic_algorithms(True)");
    dispatch(grad, [&](auto index, auto width) {
      using I = decltype(index);
      constexpr int kWidth = decltype(width)::value;
      if (sorts) {
        gather_gradient<I, kWidth>(grad_output, grad_input);
      } else {
        Launcher::run(items(), ScatterRoiGradient<Rule, T, A, I, kWidth>{device<I>(), grad_output, grad_input});
      }
    });
  }

  template <typename I, int kWidth>
  void gather_gradient(const T* grad_output, A* grad_input) const {
    const auto p = device<I>();
    const auto integers = narrow.dtype(at::kLong);
    const at::Tensor counts = at::empty({items()}, integers);
    Launcher::run(items(), CountContributions<Rule, T, A, I>{p, counts.mutable_data_ptr<int64_t>()});
    const at::Tensor ends = counts.cumsum(0);
    const at::Tensor host_counts = counts.cpu();
    const int64_t* count = host_counts.const_data_ptr<int64_t>();
    for (int64_t first = 0, last = 0; first < items(); first = last) {
      // As many items as fit, one at least.
      int64_t total = 0;
      do {
        total += count[last++];
      } while (last < items() && total + count[last] <= Launcher::limits.contributions);
      const ContributionList list(total, s.batch * s.cells() * s.classes * s.height * s.width, wide);
      const at::Tensor from = at::empty({total}, integers);
      Launcher::run(
          last - first, ListContributions<Rule, T, A, I>{
                            p, first, ends.const_data_ptr<int64_t>(), counts.const_data_ptr<int64_t>(),
                            list.pixels.template mutable_data_ptr<int64_t>(), from.mutable_data_ptr<int64_t>(),
                            list.weights.template mutable_data_ptr<A>()});
      gather<Launcher, A, kWidth>(
          list,
          RoiContributions<T, A, I>{
              s.as<I>(), static_cast<I>(s.class_channels()), grad_output, from.const_data_ptr<int64_t>(), grad_input});
    }
  }

  RoiPoolSizes s;
  at::TensorOptions narrow, wide;
  at::Tensor x, boxes, off, msk;
};

// Dispatch on the data type and the caller's memory format and dtypes, for arguments that have been checked.
template <typename Launcher, typename Rule>
at::Tensor roi_pool_device(
    const char* name,
    const RoiPoolSizes& s,
    const at::Tensor& input,
    const at::Tensor& rois,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask) {
  at::Tensor output;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "roi_pool", [&] {
    output =
        RoiPoolPipeline<Launcher, Rule, scalar_t>(s, input, rois, offset, mask, /*reads_input=*/true).forward(name);
  });
  return output.contiguous(input.suggest_memory_format());
}

template <typename Launcher, typename Rule>
RoiPoolGradients roi_pool_backward_device(
    const char* name,
    const RoiPoolSizes& s,
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& rois,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    std::array<bool, 3> output_mask) {
  check_roi_pool_grad(name, grad_output, input, offset, mask, s, output_mask);
  RoiPoolGradients result;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "roi_pool", [&] {
    const RoiPoolPipeline<Launcher, Rule, scalar_t> pipeline(
        s, input, rois, offset, mask, /*reads_input=*/output_mask[1] || output_mask[2]);
    result = pipeline.backward(name, grad_output, output_mask);
  });
  if (output_mask[0]) {
    std::get<0>(result) = std::get<0>(result).reshape(input.sizes()).contiguous(input.suggest_memory_format());
  }
  if (output_mask[1]) {
    std::get<1>(result) = std::get<1>(result).to(offset->scalar_type());
  }
  if (output_mask[2]) {
    std::get<2>(result) = std::get<2>(result).to(mask->scalar_type());
  }
  return result;
}

}  // namespace dk
