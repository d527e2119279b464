// Deformable RoI pooling for devices, in either geometry: bodies of the kernels and the order they run in, written over
// a launcher (launch.h).
//
// A work item is a (RoI, bin, class): the lanes of a warp read neighbouring channels of the same samples, so positions
// are computed once per warp, and the gradients of a part's offset and mask are sums within a warp.
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

// What all bodies know. T is the data type, A the wider type of positions and sums.
template <typename Rule, typename T, typename A>
struct RoiPoolDevice {
  RoiBins<Rule, A> rois;
  const T* input;  // [N, cells, H, W, C], C the number of output channels; null if it is not read

  DK_HOST_DEVICE const RoiPoolSizes& sizes() const { return rois.s; }

  DK_HOST_DEVICE int64_t items() const { return sizes().rois * sizes().bins() * sizes().classes; }

  struct Item {
    int64_t row;  // of an output [n * bins, C]
    int64_t cls;
    int64_t first, last;  // channels of the class
    int64_t plane;        // first pixel of the (image, cell), in pixels
    Bin<A> bin;
    A scale;  // what a sample contributes to the bin
  };

  DK_HOST_DEVICE Item item(int64_t roi, int64_t ph, int64_t pw, int64_t cls) const {
    const RoiPoolSizes& s = sizes();
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
  DK_HOST_DEVICE Item item(int64_t index) const {
    const RoiPoolSizes& s = sizes();
    const int64_t row = index / s.classes;
    return item(row / s.bins(), row / s.pooled_w % s.pooled_h, row % s.pooled_w, index % s.classes);
  }

  // Calls body(y, x, corners) for every sample of the bin that lies on the map.
  template <typename Body>
  DK_HOST_DEVICE void each_sample(const Bin<A>& bin, const Body& body) const {
    const int64_t height = sizes().height, width = sizes().width;
    for (int64_t iy = bin.y.first; iy < bin.y.last; ++iy) {
      const A at_y = Rule::position(bin.y, iy);
      if (!Rule::sees(at_y, height)) {
        continue;
      }
      const ClampedAxis<A> y = clamp_to_map(at_y, height);
      for (int64_t ix = bin.x.first; ix < bin.x.last; ++ix) {
        const A at_x = Rule::position(bin.x, ix);
        if (Rule::sees(at_x, width)) {
          const ClampedAxis<A> x = clamp_to_map(at_x, width);
          body(y, x, clamped_corners(y, x, width));
        }
      }
    }
  }
};

template <typename Rule, typename T, typename A, int kWidth>
struct PoolBins {
  RoiPoolDevice<Rule, T, A> p;
  T* output;  // [n, bins, C]

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t index, const Lanes& lanes) const {
    const int64_t channels = p.sizes().channels;
    const auto it = p.item(index);
    for (int64_t c = it.first + lanes.index() * kWidth; c < it.last; c += lanes.count() * kWidth) {
      const T* pixels = p.input + it.plane * channels + c;
      A sum[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        // An invalid RoI gets here only where its values could not be checked: it must not pass for a result.
        sum[i] = it.bin.valid ? A(0) : std::numeric_limits<A>::quiet_NaN();
      }
      p.each_sample(it.bin, [&](const ClampedAxis<A>&, const ClampedAxis<A>&, const Corners<A>& corners) {
        for (int k = 0; k < 4; ++k) {
          const auto value = Vector<T, kWidth>::load(pixels + corners.index[k] * channels);
          const A weight = corners.weight[k] * it.scale;
          for (int i = 0; i < kWidth; ++i) {
            sum[i] += weight * static_cast<A>(value.value[i]);
          }
        }
      });
      Vector<T, kWidth> out;
      for (int i = 0; i < kWidth; ++i) {
        out.value[i] = static_cast<T>(sum[i]);
      }
      out.store(output + it.row * channels + c);
    }
  }
};

// Gradients of offset and mask. A work item is a (RoI, class, part): its warp adds up the bins, samples and channels.
template <typename Rule, typename T, typename A, int kWidth>
struct PartGradient {
  RoiPoolDevice<Rule, T, A> p;
  const T* grad_output;  // [n, bins, C]
  A* grad_offset;        // [n, classes, 2, parts] or null
  A* grad_mask;          // [n, classes, parts] or null

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t index, const Lanes& lanes) const {
    const RoiPoolSizes& s = p.sizes();
    const int64_t roi = index / s.parts() / s.classes, cls = index / s.parts() % s.classes;
    const int64_t i = index / s.part_w % s.part_h, j = index % s.part_w;
    A by_y = 0, by_x = 0, by_mask = 0;
    for (int64_t ph = first_bin(i, s.part_h, s.pooled_h); ph < first_bin(i + 1, s.part_h, s.pooled_h); ++ph) {
      for (int64_t pw = first_bin(j, s.part_w, s.pooled_w); pw < first_bin(j + 1, s.part_w, s.pooled_w); ++pw) {
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
    const int64_t channels = p.sizes().channels;
    const T* pixels = p.input + it.plane * channels;
    const T* grad_row = grad_output + it.row * channels;
    A slope_y = 0, slope_x = 0, sum = 0;
    p.each_sample(it.bin, [&](const ClampedAxis<A>& y, const ClampedAxis<A>& x, const Corners<A>& corners) {
      A dot[4] = {};
      for (int64_t c = it.first + lanes.index() * kWidth; c < it.last; c += lanes.count() * kWidth) {
        const auto grad = Vector<T, kWidth>::load(grad_row + c);
        for (int k = 0; k < 4; ++k) {
          const auto value = Vector<T, kWidth>::load(pixels + corners.index[k] * channels + c);
          for (int i = 0; i < kWidth; ++i) {
            dot[k] += static_cast<A>(grad.value[i]) * static_cast<A>(value.value[i]);
          }
        }
      }
      slope_y += y.moves ? bilinear_grad_y(corners, dot) : A(0);
      slope_x += x.moves ? bilinear_grad_x(corners, dot) : A(0);
      for (int k = 0; k < 4; ++k) {
        sum += corners.weight[k] * dot[k];
      }
    });
    if (it.bin.valid) {
      by_y += slope_y * it.scale * it.bin.y.per_unit;
      by_x += slope_x * it.scale * it.bin.x.per_unit;
      by_mask += sum / (it.bin.y.count * it.bin.x.count);
    }
  }
};

// Gradient of the input, scattered with atomics: fast, the order of the sums is left to chance.
template <typename Rule, typename T, typename A>
struct ScatterRoiGradient {
  RoiPoolDevice<Rule, T, A> p;
  const T* grad_output;  // [n, bins, C]
  A* grad_input;         // [N, cells, H, W, C]

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t index, const Lanes& lanes) const {
    const int64_t channels = p.sizes().channels;
    const auto it = p.item(index);
    const T* grad_row = grad_output + it.row * channels;
    A* pixels = grad_input + it.plane * channels;
    p.each_sample(it.bin, [&](const ClampedAxis<A>&, const ClampedAxis<A>&, const Corners<A>& corners) {
      for (int64_t c = it.first + lanes.index(); c < it.last; c += lanes.count()) {
        const A grad = static_cast<A>(grad_row[c]) * it.scale;
        for (int k = 0; k < 4; ++k) {
          add_atomically(pixels + corners.index[k] * channels + c, corners.weight[k] * grad);
        }
      }
    });
  }
};

// The deterministic way to the same gradient, in three bodies. First, the number of contributions each item makes.
template <typename Rule, typename T, typename A>
struct CountContributions {
  RoiPoolDevice<Rule, T, A> p;
  int64_t* counts;  // [items]

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t index, const Lanes& lanes) const {
    if (lanes.index() != 0) {
      return;
    }
    int64_t count = 0;
    p.each_sample(
        p.item(index).bin, [&](const ClampedAxis<A>&, const ClampedAxis<A>&, const Corners<A>&) { count += 4; });
    counts[index] = count;
  }
};

// Second, for every contribution of items [first, ...) the pixel it goes to, numbered within (image, cell, class)
// planes, the item it comes from and its weight. No item lists more than it counted, even if rounding would differ.
template <typename Rule, typename T, typename A>
struct ListContributions {
  RoiPoolDevice<Rule, T, A> p;
  int64_t first;
  const int64_t* ends;    // [items]: where each item's contributions end, counted from those of the first item of all
  const int64_t* counts;  // [items]
  int64_t* pixels;
  int64_t* items;
  A* weights;

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t local, const Lanes& lanes) const {
    if (lanes.index() != 0) {
      return;
    }
    const RoiPoolSizes& s = p.sizes();
    const int64_t index = first + local, map = s.height * s.width;
    const auto it = p.item(index);
    const int64_t plane = it.plane * s.classes + it.cls * map;
    int64_t at = ends[index] - counts[index] - (ends[first] - counts[first]);
    const int64_t end = at + counts[index];
    p.each_sample(it.bin, [&](const ClampedAxis<A>&, const ClampedAxis<A>&, const Corners<A>& corners) {
      for (int k = 0; k < 4 && at < end; ++k, ++at) {
        pixels[at] = plane + corners.index[k];
        items[at] = index;
        weights[at] = corners.weight[k] * it.scale;
      }
    });
  }
};

// Third, each pixel gathers its contributions.
template <typename T, typename A>
struct GatherRoiGradient {
  RoiPoolSizes s;
  const T* grad_output;  // [n, bins, C]
  const int64_t* items;
  const A* weights;
  Contributions from;
  A* grad_input;  // [N, cells, H, W, C]

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t at, const Lanes& lanes) const {
    if (!from.begins(at)) {
      return;
    }
    const int64_t pixel = from.pixels[at];
    const int64_t map = s.height * s.width, plane = pixel / map / s.classes, cls = pixel / map % s.classes;
    const int64_t first = cls * s.class_channels(), last = first + s.class_channels();
    A* row = grad_input + (plane * map + pixel % map) * s.channels;
    for (; from.continues(at, pixel); ++at) {
      const int64_t i = from.order[at];
      const A weight = weights[i];
      const T* grad_row = grad_output + items[i] / s.classes * s.channels;
      for (int64_t c = first + lanes.index(); c < last; c += lanes.count()) {
        row[c] += weight * static_cast<A>(grad_row[c]);
      }
    }
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
        msk(mask ? mask->to(wide.dtype()).contiguous() : at::Tensor()),
        p{{s, boxes.template const_data_ptr<A>(), off.defined() ? off.template const_data_ptr<A>() : nullptr,
           msk.defined() ? msk.template const_data_ptr<A>() : nullptr},
          x.defined() ? x.template const_data_ptr<T>() : nullptr} {}

  at::Tensor forward(const char* name) const {
    check_roi_values<Launcher, A>(name, boxes, s);
    at::Tensor out = at::empty({s.rois, s.pooled_h, s.pooled_w, s.channels}, narrow);
    with_width(out, [&](auto width) {
      Launcher::run(p.items(), PoolBins<Rule, T, A, decltype(width)::value>{p, out.template mutable_data_ptr<T>()});
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
      input_gradient(name, grad_data, sum.template mutable_data_ptr<A>());
      std::get<0>(result) = sum.permute({0, 4, 1, 2, 3}).to(narrow.dtype());
    }
    if (wanted[1] || wanted[2]) {
      const int64_t parts = s.rois * s.classes * s.parts();
      const at::Tensor by_offset = wanted[1] ? at::empty(off.sizes(), wide) : at::Tensor();
      const at::Tensor by_mask = wanted[2] ? at::empty(msk.sizes(), wide) : at::Tensor();
      with_width(grad, [&](auto width) {
        Launcher::run(
            parts, PartGradient<Rule, T, A, decltype(width)::value>{
                       p, grad_data, wanted[1] ? by_offset.template mutable_data_ptr<A>() : nullptr,
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
  at::Tensor channels_innermost(const at::Tensor& input) const {
    return input.reshape({s.batch, s.channels, s.cells(), s.height, s.width}).permute({0, 2, 3, 4, 1}).contiguous();
  }

  // Sixteen bytes at a time where the channels allow it.
  template <typename Body>
  void with_width(const at::Tensor& other, const Body& body) const {
    constexpr int kWide = 16 / sizeof(T);
    const auto aligned = [](const at::Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; };
    if (s.class_channels() % kWide == 0 && aligned(x) && aligned(other)) {
      body(std::integral_constant<int, kWide>{});
    } else {
      body(std::integral_constant<int, 1>{});
    }
  }

  void input_gradient(const char* name, const T* grad_output, A* grad_input) const {
    if (!at::globalContext().deterministicAlgorithms()) {
      Launcher::run(p.items(), ScatterRoiGradient<Rule, T, A>{p, grad_output, grad_input});
      return;
    }
    TORCH_CHECK(
        Launcher::may_wait(), name,
        ": the deterministic gradient of the input cannot be recorded in a CUDA graph, as the size of its workspace "
        "depends on the RoIs; record it without torch.use_deterministic_algorithms(True)");
    const auto integers = narrow.dtype(at::kLong);
    const at::Tensor counts = at::empty({p.items()}, integers);
    Launcher::run(p.items(), CountContributions<Rule, T, A>{p, counts.mutable_data_ptr<int64_t>()});
    const at::Tensor ends = counts.cumsum(0);
    const at::Tensor host_counts = counts.cpu();
    const int64_t* count = host_counts.const_data_ptr<int64_t>();
    const int64_t pixel_numbers = s.batch * s.cells() * s.classes * s.height * s.width;
    for (int64_t first = 0, last = 0; first < p.items(); first = last) {
      // As many items as fit, one at least.
      int64_t total = 0;
      do {
        total += count[last++];
      } while (last < p.items() && total + count[last] <= kContributions);
      const at::Tensor pixels = at::full({total}, pixel_numbers, integers), items = at::empty({total}, integers);
      const at::Tensor weights = at::empty({total}, wide);
      Launcher::run(
          last - first, ListContributions<Rule, T, A>{
                            p, first, ends.const_data_ptr<int64_t>(), counts.const_data_ptr<int64_t>(),
                            pixels.mutable_data_ptr<int64_t>(), items.mutable_data_ptr<int64_t>(),
                            weights.template mutable_data_ptr<A>()});
      gather<Launcher>(pixels, pixel_numbers, [&](const Contributions& from) {
        return GatherRoiGradient<T, A>{
            s, grad_output, items.const_data_ptr<int64_t>(), weights.template const_data_ptr<A>(), from, grad_input};
      });
    }
  }

  RoiPoolSizes s;
  at::TensorOptions narrow, wide;
  at::Tensor x, boxes, off, msk;
  RoiPoolDevice<Rule, T, A> p;
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
