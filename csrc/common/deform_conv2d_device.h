// deform_conv2d for devices: bodies of the kernels, and the order they run in, written over a launcher (launch.h).
//
// A warp takes an output position, in one offset group: its lanes first prepare a tap each, then read neighbouring
// channels of all taps. Columns are made for a chunk of output positions at a time and handed to a matrix product;
// their buffer is bounded whatever the sizes. The backward goes over the gradient of the columns once, for input,
// offset and mask, and leaves the columns that the weight's gradient needs in its place. A depthwise filter is applied
// to the samples as they are taken, without columns.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/OpMathType.h>

#include <algorithm>

#include "common/contributions.h"
#include "common/launch.h"
#include "common/samples.h"
#include "ops/deform_conv2d.h"

namespace dk {

// What all bodies know. T is the data type, A the wider type of positions and sums, I the type of indices.
template <typename T, typename A, typename I>
struct DeformConv2dDevice {
  DeformConv2dSizesOf<I> s;
  I taps, positions, group_in, group_channels;  // of a weight group, of an offset group
  const T* input;                               // [N, H, W, C]
  const A* offset;                              // [N, D, K, 2, P]
  const A* mask;                                // [N, D, K, P] or null
  I first;                                      // the chunk: output positions [first, first + count) of the N * P
  I count;

  struct Place {
    I local, n, index, oh, ow;  // number in the chunk, image, position in its map, row and column
  };

  // Work items of a chunk are (position, offset group), the group fastest.
  DK_HOST_DEVICE int64_t items() const { return static_cast<int64_t>(count) * s.offset_groups; }

  DK_HOST_DEVICE Place place(I local) const {
    const I n = (first + local) / positions, index = (first + local) - n * positions, oh = index / s.out_w;
    return {local, n, index, oh, index - oh * s.out_w};
  }

  // Number of the (tap, group)'s plane of `positions` values in offset (two each) and mask.
  DK_HOST_DEVICE I plane(const Place& at, I group, I tap) const {
    return (at.n * s.offset_groups + group) * taps + tap;
  }

  DK_HOST_DEVICE Sample<A, I> sample(const Place& at, I group, I tap) const {
    const I i = tap / s.kernel_w, number = plane(at, group, tap);
    const A* shift = offset + number * 2 * positions + at.index;
    const A y = static_cast<A>(rest_y(s, at.oh, i)) + shift[0];
    const A x = static_cast<A>(rest_x(s, at.ow, tap - i * s.kernel_w)) + shift[positions];
    return {
        bilinear_corners(y, x, s.height, s.width), mask ? mask[number * positions + at.index] : A(1),
        at.n * s.height * s.width, s.in_channels};
  }

  // Prepares taps [begin, end) of a position.
  template <typename Lanes>
  DK_HOST_DEVICE void prepare(
      const Place& at, I group, I begin, I end, Sample<A, I> (&table)[kTable], const Lanes& lanes) const {
    lanes.sync();
    for (I tap = begin + lanes.index(); tap < end; tap += lanes.count()) {
      table[tap - begin] = sample(at, group, tap);
    }
    lanes.sync();
  }

  DK_HOST_DEVICE I batch_end(I begin) const { return begin + kTable < taps ? begin + kTable : taps; }

  // Columns are [groups, count, taps, C / groups]: one matrix per weight group. Channel c of the first tap:
  DK_HOST_DEVICE I column(I local, I c) const {
    const I group = s.groups == 1 ? 0 : c / group_in;
    return (group * count + local) * taps * group_in + c - group * group_in;
  }
};

// columns = the sampled, modulated input.
template <typename T, typename A, typename I, int kWidth>
struct SampleColumns {
  DeformConv2dDevice<T, A, I> p;
  T* columns;
  Rows rows;

  struct Shared {
    Sample<A, I> table[kTable];
  };

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    auto& table = lanes.template shared<Shared>().table;
    const I local = static_cast<I>(item) / p.s.offset_groups, group = static_cast<I>(item) - local * p.s.offset_groups;
    const auto at = p.place(local);
    const I start = group * p.group_channels, stop = start + p.group_channels;
    const int row = rows.number(lanes), at_once = rows.at_once(lanes), step = rows.lanes_of_a_row() * kWidth;
    for (I begin = 0; begin < p.taps; begin += kTable) {
      const I end = p.batch_end(begin);
      p.prepare(at, group, begin, end, table, lanes);
      for (I c = start + rows.lane(lanes) * kWidth; c < stop; c += step) {
        T* column = columns + p.column(local, c);
        DK_NO_UNROLL
        for (I tap = begin + row; tap < end; tap += at_once) {
          const Sample<A, I> sample = table[tap - begin];
          Vector<T, kWidth> value[4];
          sample.load(p.input + c, value);
          A sum[kWidth];
          sample.weigh(value, sum);
          store_narrow<kWidth>(sum, column + tap * p.group_in);
        }
      }
    }
  }
};

// The forward of a depthwise filter.
template <typename T, typename A, typename I, int kWidth>
struct ApplyDepthwise {
  DeformConv2dDevice<T, A, I> p;
  const T* filter;  // [taps, C]
  T* output;        // [N, P, C]

  struct Shared {
    Sample<A, I> table[kTable];
  };

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    auto& table = lanes.template shared<Shared>().table;
    const I local = static_cast<I>(item) / p.s.offset_groups, group = static_cast<I>(item) - local * p.s.offset_groups;
    const auto at = p.place(local);
    const I start = group * p.group_channels, stop = start + p.group_channels;
    for (I base = start; base < stop; base += lanes.count() * kWidth) {
      const I c = base + lanes.index() * kWidth;
      A sum[kWidth] = {};
      for (I begin = 0; begin < p.taps; begin += kTable) {
        const I end = p.batch_end(begin);
        if (base == start || p.taps > kTable) {
          p.prepare(at, group, begin, end, table, lanes);
        }
        DK_NO_UNROLL
        for (I tap = begin; c < stop && tap < end; ++tap) {
          const Sample<A, I> sample = table[tap - begin];
          Vector<T, kWidth> value[4];
          sample.load(p.input + c, value);
          A sampled[kWidth], factor[kWidth];
          sample.weigh(value, sampled);
          widen(Vector<T, kWidth>::load(filter + tap * p.s.in_channels + c), factor);
          DK_UNROLL
          for (int i = 0; i < kWidth; ++i) {
            sum[i] += sampled[i] * factor[i];
          }
        }
      }
      if (c < stop) {
        store_narrow<kWidth>(sum, output + (p.first + local) * p.s.in_channels + c);
      }
    }
  }
};

// The gradient of the columns, from a matrix product ...
template <typename T, typename A, typename I>
struct ColumnGradient {
  const T* grad_columns;

  template <int kWidth, typename Device>
  DK_HOST_DEVICE void load(const Device& p, I local, I tap, I c, A (&grad)[kWidth]) const {
    widen(Vector<T, kWidth>::load(grad_columns + p.column(local, c) + tap * p.group_in), grad);
  }
};

// ... or, depthwise, the filter times the gradient of the output.
template <typename T, typename A, typename I>
struct DepthwiseColumnGradient {
  const T* filter;       // [taps, C]
  const T* grad_output;  // [N, P, C]

  template <int kWidth, typename Device>
  DK_HOST_DEVICE void load(const Device& p, I local, I tap, I c, A (&grad)[kWidth]) const {
    A factor[kWidth];
    widen(Vector<T, kWidth>::load(filter + tap * p.s.in_channels + c), factor);
    widen(Vector<T, kWidth>::load(grad_output + (p.first + local) * p.s.in_channels + c), grad);
    DK_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      grad[i] *= factor[i];
    }
  }
};

// All gradients that follow from that of the columns, and the columns. The input's is scattered with atomics: fast, the
// order of the sums is left to chance.
template <typename T, typename A, typename I, int kWidth, typename Columns>
struct SampleGradients {
  DeformConv2dDevice<T, A, I> p;
  Columns grad_columns;
  Rows rows;
  T* columns;      // or null; may lie where their gradient does
  A* grad_input;   // [N, H, W, C] or null
  A* grad_offset;  // [N, D, K, 2, P] or null
  A* grad_mask;    // [N, D, K, P] or null

  struct Shared {
    Sample<A, I> table[kTable];
    A dots[kTable][4];
    Scatter<A, kWidth> scatter;
  };

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    auto& shared = lanes.template shared<Shared>();
    const I local = static_cast<I>(item) / p.s.offset_groups, group = static_cast<I>(item) - local * p.s.offset_groups;
    const auto at = p.place(local);
    const I start = group * p.group_channels, stop = start + p.group_channels;
    const int row = rows.number(lanes), at_once = rows.at_once(lanes), step = rows.lanes_of_a_row() * kWidth;
    const bool reads = columns || grad_offset || grad_mask;
    for (I begin = 0; begin < p.taps; begin += kTable) {
      const I end = p.batch_end(begin);
      p.prepare(at, group, begin, end, shared.table, lanes);
      DK_NO_UNROLL
      for (I some = begin; some < end; some += at_once) {
        const I tap = some + row;
        const bool active = tap < end;
        const Sample<A, I> sample = shared.table[active ? tap - begin : 0];
        A dot[4] = {};
        DK_NO_UNROLL
        for (I base = start; base < stop; base += step) {
          const I c = base + rows.lane(lanes) * kWidth;
          A grad[kWidth] = {};
          if (active && c < stop) {
            grad_columns.template load<kWidth>(p, local, tap, c, grad);
            if (reads) {
              Vector<T, kWidth> value[4];
              sample.load(p.input + c, value);
              sample.add_dots(grad, value, dot);
              if (columns) {
                A sum[kWidth];
                sample.weigh(value, sum);
                store_narrow<kWidth>(sum, columns + p.column(local, c) + tap * p.group_in);
              }
            }
          }
          if (grad_input) {
            shared.scatter(grad, sample, active, base, stop, rows, grad_input, lanes);
          }
        }
        if (grad_offset || grad_mask) {
          lanes.sums(dot, rows.lanes_of_a_row(), active ? shared.dots[tap - begin] : nullptr);
        }
      }
      if (grad_offset || grad_mask) {
        lanes.sync();
        for (I tap = begin + lanes.index(); tap < end; tap += lanes.count()) {
          const auto& sample = shared.table[tap - begin];
          const A* dot = shared.dots[tap - begin];
          const I plane = p.plane(at, group, tap);
          if (grad_offset) {
            A* shift = grad_offset + plane * 2 * p.positions + at.index;
            shift[0] = sample.mask * bilinear_grad_y(sample, dot);
            shift[p.positions] = sample.mask * bilinear_grad_x(sample, dot);
          }
          if (grad_mask) {
            grad_mask[plane * p.positions + at.index] = sample.by_mask(dot);
          }
        }
      }
    }
  }
};

// Gradient of a depthwise filter: a warp adds up one tap over a block of output positions, for as many channels as its
// lanes take at once; the blocks are added afterwards. Work items are (block, tap, slice of channels), the slice
// fastest.
template <typename T, typename A, typename I, int kWidth>
struct DepthwiseFilterGradient {
  DeformConv2dDevice<T, A, I> p;
  const T* grad_output;  // [N, P, C]
  I block;               // positions of a block
  A* partial;            // [blocks, taps, C]

  static constexpr int kSlice = 32 * kWidth;

  struct Shared {
    Sample<A, I> table[kTable];
  };

  DK_HOST_DEVICE I slices_of_a_group() const { return (p.group_channels + kSlice - 1) / kSlice; }
  DK_HOST_DEVICE I slices() const { return slices_of_a_group() * p.s.offset_groups; }

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    auto& table = lanes.template shared<Shared>().table;
    const I rest = static_cast<I>(item) / slices(), slice = static_cast<I>(item) - rest * slices();
    const I number = rest / p.taps, tap = rest - number * p.taps, group = slice / slices_of_a_group();
    const I start = group * p.group_channels + (slice - group * slices_of_a_group()) * kSlice;
    const I group_end = (group + 1) * p.group_channels, stop = start + kSlice < group_end ? start + kSlice : group_end;
    const I last = (number + 1) * block < p.count ? (number + 1) * block : p.count;
    for (I base = start; base < stop; base += lanes.count() * kWidth) {
      const I c = base + lanes.index() * kWidth;
      A sum[kWidth] = {};
      for (I begin = number * block; begin < last; begin += kTable) {
        const I end = begin + kTable < last ? begin + kTable : last;
        lanes.sync();
        for (I local = begin + lanes.index(); local < end; local += lanes.count()) {
          table[local - begin] = p.sample(p.place(local), group, tap);
        }
        lanes.sync();
        DK_NO_UNROLL
        for (I local = begin; c < stop && local < end; ++local) {
          const Sample<A, I> sample = table[local - begin];
          Vector<T, kWidth> value[4];
          sample.load(p.input + c, value);
          A sampled[kWidth], grad[kWidth];
          sample.weigh(value, sampled);
          widen(Vector<T, kWidth>::load(grad_output + (p.first + local) * p.s.in_channels + c), grad);
          DK_UNROLL
          for (int i = 0; i < kWidth; ++i) {
            sum[i] += sampled[i] * grad[i];
          }
        }
      }
      if (c < stop) {
        store_narrow<kWidth>(sum, partial + (number * p.taps + tap) * p.s.in_channels + c);
      }
    }
  }
};

// The deterministic way to the input's gradient. First, for every (position, offset group, tap, corner) the pixel it
// touches, numbered within (image, offset group) planes.
template <typename T, typename A, typename I>
struct ListCorners {
  DeformConv2dDevice<T, A, I> p;
  int64_t* pixels;  // [items, taps, 4]
  A* weights;       // [items, taps, 4]

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    const I local = static_cast<I>(item) / p.s.offset_groups, group = static_cast<I>(item) - local * p.s.offset_groups;
    const auto at = p.place(local);
    list_corners(
        item * p.taps * 4, p.taps, at.n, at.n * p.s.offset_groups + group, p.s.height * p.s.width, p.s.in_channels,
        pixels, weights, lanes, [&](I tap) { return p.sample(at, group, tap); });
  }
};

// Then each pixel gathers its contributions from the gradient of the columns.
template <typename T, typename A, typename I, typename Columns>
struct CornerContributions {
  DeformConv2dDevice<T, A, I> p;
  Columns grad_columns;
  A* grad_input;  // [N, H, W, C]

  struct Row {
    I local, tap, start;
  };

  DK_HOST_DEVICE Target<A> target(int64_t pixel) const {
    const I plane = p.s.height * p.s.width, map = static_cast<I>(pixel) / plane, n = map / p.s.offset_groups;
    const I start = (map - n * p.s.offset_groups) * p.group_channels;
    return {grad_input + (n * plane + static_cast<I>(pixel) - map * plane) * p.s.in_channels + start, p.group_channels};
  }

  DK_HOST_DEVICE Row row(int64_t number) const {
    const I all = static_cast<I>(number) / 4, item = all / p.taps, local = item / p.s.offset_groups;
    return {local, all - item * p.taps, (item - local * p.s.offset_groups) * p.group_channels};
  }

  template <int kWidth>
  DK_HOST_DEVICE void load(const Row& row, int64_t c, A (&value)[kWidth]) const {
    grad_columns.template load<kWidth>(p, row.local, row.tap, row.start + static_cast<I>(c), value);
  }
};

// The operator for data type T on whatever Launcher runs on.
template <typename Launcher, typename T>
class DeformConv2dPipeline {
 public:
  using A = at::opmath_type<T>;

  DeformConv2dPipeline(
      const DeformConv2dSizes& sizes,
      const at::Tensor& input,
      const at::Tensor& offset,
      const std::optional<at::Tensor>& mask,
      const at::Tensor& weight)
      : s(sizes),
        wide(input.options().dtype(c10::CppTypeToScalarType<A>::value)),
        x(input.contiguous(at::MemoryFormat::ChannelsLast)),
        off(offset.to(wide.dtype()).contiguous()),
        msk(mask ? mask->to(wide.dtype()).contiguous() : at::Tensor()),
        // [taps, C] if depthwise, else [groups, O / groups, taps * C / groups], channels fastest
        filter(
            s.depthwise() ? weight.reshape({s.in_channels, s.taps()}).t().contiguous()
                          : weight.permute({0, 2, 3, 1}).reshape({s.groups, s.group_out(), s.taps() * s.group_in()})) {}

  at::Tensor forward(const std::optional<at::Tensor>& bias) const {
    at::Tensor out;
    if (s.depthwise()) {
      out = at::empty({s.batch, s.out_h, s.out_w, s.out_channels}, x.options());
      dispatch(out, [&](auto index, auto width) {
        using I = decltype(index);
        const auto p = device<I>(0, total());
        Launcher::run(
            p.items(), ApplyDepthwise<T, A, I, decltype(width)::value>{
                           p, filter.template const_data_ptr<T>(), out.template mutable_data_ptr<T>()});
      });
    } else {
      out = at::empty({s.groups, total(), s.group_out()}, x.options());
      const at::Tensor transposed = filter.transpose(1, 2);
      const int64_t step = chunk(/*sorts=*/false);
      for (int64_t first = 0; first < total(); first += step) {
        const int64_t count = std::min(step, total() - first);
        at::Tensor part = out.narrow(1, first, count), columns = at::empty(column_sizes(count), x.options());
        sample(first, columns);
        at::bmm_out(part, columns, transposed);
      }
      out = out.permute({1, 0, 2}).reshape({s.batch, s.out_h, s.out_w, s.out_channels});
    }
    return bias ? out.add_(*bias) : out;  // [N, outH, outW, O]
  }

  DeformConv2dGradients backward(
      const at::Tensor& grad_output, const at::Tensor& weight, std::array<bool, 5> wanted) const {
    const at::Tensor rows = grad_output.permute({0, 2, 3, 1}).contiguous();  // [N, outH, outW, O]
    Gradients sums;
    if (wanted[0]) {
      sums.input = at::zeros({s.batch, s.height, s.width, s.in_channels}, wide);
    }
    if (wanted[1]) {
      sums.offset = at::empty(off.sizes(), wide);
    }
    if (wanted[2]) {
      sums.mask = at::empty(msk.sizes(), wide);
    }
    at::Tensor grad_filter;
    const bool follows = wanted[0] || wanted[1] || wanted[2];
    const int64_t step = chunk(/*sorts=*/wanted[0] && at::globalContext().deterministicAlgorithms());
    if (s.depthwise()) {
      for (int64_t first = 0; follows && first < total(); first += step) {
        dispatch(rows, [&](auto index, auto width) {
          using I = decltype(index);
          const DepthwiseColumnGradient<T, A, I> grad{
              filter.template const_data_ptr<T>(), rows.template const_data_ptr<T>()};
          gradients<decltype(width)::value>(
              device<I>(first, std::min(step, total() - first)), grad, sums, /*columns=*/nullptr);
        });
      }
      if (wanted[3]) {
        grad_filter = depthwise_filter_gradient(rows);
      }
    } else {
      const at::Tensor grad = rows.view({total(), s.groups, s.group_out()}).transpose(0, 1).contiguous();
      if (wanted[3]) {
        grad_filter = at::zeros(filter.sizes(), wide);
      }
      at::Tensor columns;
      for (int64_t first = 0; (follows || wanted[3]) && first < total(); first += step) {
        const int64_t count = std::min(step, total() - first);
        const at::Tensor part = grad.narrow(1, first, count);  // [groups, count, O / groups]
        if (!columns.defined() || columns.size(1) != count) {
          columns = at::empty(column_sizes(count), x.options());
        }
        if (follows) {
          at::bmm_out(columns, part, filter);
          dispatch(columns, [&](auto index, auto width) {
            using I = decltype(index);
            T* data = columns.template mutable_data_ptr<T>();
            gradients<decltype(width)::value>(
                device<I>(first, count), ColumnGradient<T, A, I>{data}, sums, wanted[3] ? data : nullptr);
          });
        } else {
          sample(first, columns);
        }
        if (wanted[3]) {
          grad_filter += at::bmm(part.transpose(1, 2), columns).to(wide.dtype());
        }
      }
    }

    DeformConv2dGradients result = no_gradients(x);
    if (wanted[0]) {
      std::get<0>(result) = sums.input.permute({0, 3, 1, 2}).to(x.scalar_type());
    }
    if (wanted[1]) {
      std::get<1>(result) = sums.offset;
    }
    if (wanted[2]) {
      std::get<2>(result) = sums.mask;
    }
    if (wanted[3]) {
      std::get<3>(result) = at::empty(weight.sizes(), weight.options());
      if (s.depthwise()) {
        std::get<3>(result).view({s.in_channels, s.taps()}).copy_(grad_filter.t());
      } else {
        std::get<3>(result).copy_(
            grad_filter.view({s.out_channels, s.kernel_h, s.kernel_w, s.group_in()}).permute({0, 3, 1, 2}));
      }
    }
    if (wanted[4]) {
      std::get<4>(result) = rows.view({total(), s.out_channels}).to(wide.dtype()).sum(0).to(weight.scalar_type());
    }
    return result;
  }

 private:
  struct Gradients {
    at::Tensor input, offset, mask;
  };

  static A* data(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.template mutable_data_ptr<A>() : nullptr;
  }

  int64_t total() const { return s.batch * s.positions(); }

  // Output positions at a time: as many as have room in the columns, which a depthwise convolution has not, and, where
  // they are sorted, among the contributions.
  int64_t chunk(bool sorts) const {
    const int64_t columns = s.depthwise() ? 0 : s.taps() * s.in_channels * static_cast<int64_t>(sizeof(T));
    const int64_t listed = sorts ? s.taps() * s.offset_groups * 4 : 0;
    return chunk_of<Launcher>(total(), columns, /*buffers=*/1, listed);
  }

  std::array<int64_t, 3> column_sizes(int64_t count) const { return {s.groups, count, s.taps() * s.group_in()}; }

  template <typename I>
  DeformConv2dDevice<T, A, I> device(int64_t first, int64_t count) const {
    return {
        s.as<I>(),
        static_cast<I>(s.taps()),
        static_cast<I>(s.positions()),
        static_cast<I>(s.group_in()),
        static_cast<I>(s.offset_group_channels()),
        x.template const_data_ptr<T>(),
        off.template const_data_ptr<A>(),
        msk.defined() ? msk.template const_data_ptr<A>() : nullptr,
        static_cast<I>(first),
        static_cast<I>(count)};
  }

  // Calls body(I{}, width) with the types that fit the sizes, and `other`, which the body reads or writes.
  template <typename Body>
  void dispatch(const at::Tensor& other, const Body& body) const {
    with_index<Launcher>({x, off, msk, filter, other}, {s.reach(), total() * s.offset_groups}, [&](auto index) {
      const int64_t group = s.depthwise() ? s.in_channels : s.group_in();
      with_width<T>({s.offset_group_channels(), group}, {x, other, filter}, [&](auto width) { body(index, width); });
    });
  }

  // columns [groups, count, taps * C / groups] = the samples of the positions from `first` on.
  void sample(int64_t first, const at::Tensor& columns) const {
    dispatch(columns, [&](auto index, auto width) {
      using I = decltype(index);
      constexpr int kWidth = decltype(width)::value;
      const auto p = device<I>(first, columns.size(1));
      Launcher::run(
          p.items(), SampleColumns<T, A, I, kWidth>{p, columns.template mutable_data_ptr<T>(), rows<kWidth>()});
    });
  }

  template <int kWidth>
  Rows rows() const {
    return rows_of<Launcher>(s.offset_group_channels() / kWidth);
  }

  template <int kWidth, typename I, typename Columns>
  void gradients(
      const DeformConv2dDevice<T, A, I>& p, const Columns& grad_columns, const Gradients& sums, T* columns) const {
    const bool sorts = sums.input.defined() && at::globalContext().deterministicAlgorithms();
    if (sorts) {  // before the columns are overwritten
      const ContributionList list(p.items() * s.taps() * 4, s.batch * s.offset_groups * s.height * s.width, wide);
      Launcher::run(
          p.items(),
          ListCorners<T, A, I>{
              p, list.pixels.template mutable_data_ptr<int64_t>(), list.weights.template mutable_data_ptr<A>()});
      gather<Launcher, A, kWidth>(list, CornerContributions<T, A, I, Columns>{p, grad_columns, data(sums.input)});
    }
    if (columns || sums.offset.defined() || sums.mask.defined() || !sorts) {
      Launcher::run(
          p.items(), SampleGradients<T, A, I, kWidth, Columns>{
                         p, grad_columns, rows<kWidth>(), columns, sorts ? nullptr : data(sums.input),
                         data(sums.offset), data(sums.mask)});
    }
  }

  // [taps, C]
  at::Tensor depthwise_filter_gradient(const at::Tensor& grad_rows) const {
    at::Tensor partial;
    dispatch(grad_rows, [&](auto index, auto width) {
      using I = decltype(index);
      DepthwiseFilterGradient<T, A, I, decltype(width)::value> body{
          device<I>(0, total()), grad_rows.template const_data_ptr<T>(), 0, nullptr};
      const auto blocks = blocks_of<Launcher>(total(), s.taps() * body.slices(), s.taps() * s.in_channels * sizeof(A));
      body.block = static_cast<I>(blocks.size);
      partial = at::empty({blocks.count, s.taps(), s.in_channels}, wide);
      body.partial = partial.template mutable_data_ptr<A>();
      Launcher::run(blocks.count * s.taps() * body.slices(), body);
    });
    return partial.sum(0);
  }

  DeformConv2dSizes s;
  at::TensorOptions wide;
  at::Tensor x, off, msk, filter;
};

// Entry points for every backend: checks, dispatch on the data type, the caller's memory format and dtypes.
template <typename Launcher>
at::Tensor deform_conv2d_device(
    const at::Tensor& input,
    const at::Tensor& offset,
    const std::optional<at::Tensor>& mask,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation) {
  const auto s = check_deform_conv2d(input, offset, mask, weight, bias, stride, padding, dilation);
  const DeviceScope<Launcher> scope(input.device());
  at::Tensor output;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "deform_conv2d", [&] {
    output = DeformConv2dPipeline<Launcher, scalar_t>(s, input, offset, mask, weight).forward(bias);
  });
  return output.permute({0, 3, 1, 2}).contiguous(input.suggest_memory_format());
}

template <typename Launcher>
DeformConv2dGradients deform_conv2d_backward_device(
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
  const DeviceScope<Launcher> scope(input.device());
  DeformConv2dGradients result;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "deform_conv2d_backward", [&] {
    result = DeformConv2dPipeline<Launcher, scalar_t>(s, input, offset, mask, weight)
                 .backward(grad_output, weight, output_mask);
  });
  if (output_mask[0]) {
    std::get<0>(result) = std::get<0>(result).contiguous(input.suggest_memory_format());
  }
  if (output_mask[1]) {
    std::get<1>(result) = std::get<1>(result).to(offset.scalar_type());
  }
  if (output_mask[2]) {
    std::get<2>(result) = std::get<2>(result).to(mask->scalar_type());
  }
  return result;
}

}  // namespace dk
