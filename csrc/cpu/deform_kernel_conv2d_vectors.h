// Inner loops of deform_kernel_conv2d over a run of channels: part of its host kernels, for for_each_vector.h.

template <typename V, int kNumber, bool kMoved, typename T>
DK_INLINE void depthwise_vectors(
    const ForwardRun<T>& run, const DataSample<T>* data, const ScopeSample<T>* scope, int64_t c, T* out) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(T);
  const T *image = run.image + c, *filter = run.filter + c, *zeros = run.zeros;
  V sum[kNumber] = {};
  for (int64_t tap = 0; tap < run.taps; ++tap, ++data, ++scope) {
    if (!data->on_map) {
      continue;
    }
    const T* x[4];
    corner_rows(image, run.pixel_stride, *data, zeros, x);
    const T *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
    const T *f0 = filter + scope->cell[0] * run.cell_stride, *f1 = filter + scope->cell[1] * run.cell_stride;
    const T *f2 = filter + scope->cell[2] * run.cell_stride, *f3 = filter + scope->cell[3] * run.cell_stride;
    const T w0 = data->weight[0], w1 = data->weight[1], w2 = data->weight[2], w3 = data->weight[3];
    const T scale = kMoved ? T(1) : w0;
    const T b0 = scope->weight[0] * scale, b1 = scope->weight[1] * scale;
    const T b2 = scope->weight[2] * scale, b3 = scope->weight[3] * scale;
    _Pragma("GCC unroll 4") for (int v = 0; v < kNumber; ++v) {
      const int64_t i = v * kLanes;
      V value = read<V>(x0 + i);
      if (kMoved) {
        value = w0 * value + w1 * read<V>(x1 + i) + w2 * read<V>(x2 + i) + w3 * read<V>(x3 + i);
      }
      sum[v] += value * (b0 * read<V>(f0 + i) + b1 * read<V>(f1 + i) + b2 * read<V>(f2 + i) + b3 * read<V>(f3 + i));
    }
  }
  for (int v = 0; v < kNumber; ++v) {
    write<V>(out + c + v * kLanes, sum[v]);
  }
}

// Output positions of a depthwise filter: out[t, 0:width] = sum over taps of the sampled channels times the resampled
// filter.
template <typename T, bool kMoved>
DK_TARGET void depthwise_rows(
    const ForwardRun<T>& run,
    const DataSample<T>* data,
    const ScopeSample<T>* scope,
    int64_t count,
    int64_t width,
    T* out,
    int64_t out_stride) {
#define DK_DEPTHWISE(V, NUMBER)                                                                                    \
  for (int64_t t = 0; t < count; ++t) {                                                                            \
    depthwise_vectors<V, NUMBER, kMoved>(run, data + t * run.taps, scope + t * run.taps, c, out + t * out_stride); \
  }
  DK_EACH_PIECE(width, DK_DEPTHWISE)
#undef DK_DEPTHWISE
}

template <typename V, int kNumber, bool kMoved, typename T>
DK_INLINE void scatter_vectors(
    const ForwardRun<T>& run, const DataSample<T>* data, const ScopeSample<T>* scope, int64_t c, T* columns) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(T);
  const T* image = run.image + c;
  columns += c;
  for (int64_t tap = 0; tap < run.taps; ++tap, ++data, ++scope) {
    if (!data->on_map) {
      continue;
    }
    const T* x[4];
    corner_rows(image, run.pixel_stride, *data, run.zeros, x);
    const T *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
    T *s0 = columns + scope->cell[0] * run.cell_stride, *s1 = columns + scope->cell[1] * run.cell_stride;
    T *s2 = columns + scope->cell[2] * run.cell_stride, *s3 = columns + scope->cell[3] * run.cell_stride;
    const T w0 = data->weight[0], w1 = data->weight[1], w2 = data->weight[2], w3 = data->weight[3];
    const T b0 = scope->weight[0], b1 = scope->weight[1], b2 = scope->weight[2], b3 = scope->weight[3];
    _Pragma("GCC unroll 4") for (int v = 0; v < kNumber; ++v) {
      const int64_t i = v * kLanes;
      V value = w0 * read<V>(x0 + i);
      if (kMoved) {
        value += w1 * read<V>(x1 + i) + w2 * read<V>(x2 + i) + w3 * read<V>(x3 + i);
      }
      add<V>(s0 + i, b0 * value);
      add<V>(s1 + i, b1 * value);
      add<V>(s2 + i, b2 * value);
      add<V>(s3 + i, b3 * value);
    }
  }
}

// Output positions of the columns [t, cells + 1, cell_stride]: every tap's sampled channels, spread over its four
// cells.
template <typename T, bool kMoved>
DK_TARGET void scatter_rows(
    const ForwardRun<T>& run,
    const DataSample<T>* data,
    const ScopeSample<T>* scope,
    int64_t count,
    int64_t width,
    T* columns,
    int64_t row_stride) {
#define DK_SCATTER(V, NUMBER)                                                                                        \
  for (int64_t t = 0; t < count; ++t) {                                                                              \
    scatter_vectors<V, NUMBER, kMoved>(run, data + t * run.taps, scope + t * run.taps, c, columns + t * row_stride); \
  }
  DK_EACH_PIECE(width, DK_SCATTER)
#undef DK_SCATTER
}

template <typename V, int kNumber, bool kMoved, bool kDepthwise, bool kDataDots, typename T>
DK_INLINE void backward_vectors(
    const BackwardRun<T>& run,
    const T* g,
    const DataSample<T>* data,
    const ScopeSample<T>* scope,
    Margin<T>& margin,
    int64_t c,
    const T* source,
    T* target,
    T* data_dots,
    T* scope_dots) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(T);
  constexpr int kCorners = kMoved ? 4 : 1;
  for (int64_t tap = 0; tap < run.taps; ++tap, ++data, ++scope, data_dots += 4, scope_dots += 4) {
    if (!data->on_map) {
      continue;
    }
    const T *x[4], *s[4];
    T *gx[4], *t[4];
    for (int k = 0; k < 4; ++k) {
      const int64_t index = data->corners.index[k], shift = scope->cell[k] * run.cell_stride + c;
      x[k] = index < 0 ? margin.zeros : run.image + index * run.pixel_stride + c;
      gx[k] = index < 0 || !run.grad_image ? margin.scratch : run.grad_image + index * run.pixel_stride + c;
      s[k] = source + shift;
      t[k] = target + shift;
    }
    const T w0 = data->weight[0], w1 = data->weight[1], w2 = data->weight[2], w3 = data->weight[3];
    const T b0 = scope->weight[0], b1 = scope->weight[1], b2 = scope->weight[2], b3 = scope->weight[3];
    V x_dots[kCorners] = {}, s_dots[4] = {};
    _Pragma("GCC unroll 4") for (int v = 0; v < kNumber; ++v) {
      const int64_t i = v * kLanes;
      const V s0 = read<V>(s[0] + i), s1 = read<V>(s[1] + i), s2 = read<V>(s[2] + i), s3 = read<V>(s[3] + i);
      V x0 = read<V>(x[0] + i), x1, x2, x3;
      V to_cells = w0 * x0;
      if (kMoved) {
        x1 = read<V>(x[1] + i), x2 = read<V>(x[2] + i), x3 = read<V>(x[3] + i);
        to_cells += w1 * x1 + w2 * x2 + w3 * x3;
      }
      V grad = b0 * s0 + b1 * s1 + b2 * s2 + b3 * s3;
      if (kDepthwise) {  // the gradient of a column is the filter times the output's gradient: the latter is drawn out
        const V drawn = read<V>(g + c + i);
        to_cells *= drawn;
        grad *= drawn;
      }
      s_dots[0] += to_cells * s0;
      s_dots[1] += to_cells * s1;
      s_dots[2] += to_cells * s2;
      s_dots[3] += to_cells * s3;
      add<V>(t[0] + i, b0 * to_cells);
      add<V>(t[1] + i, b1 * to_cells);
      add<V>(t[2] + i, b2 * to_cells);
      add<V>(t[3] + i, b3 * to_cells);
      add<V>(gx[0] + i, w0 * grad);
      if (kDataDots) {
        x_dots[0] += grad * x0;
      }
      if (kMoved) {
        add<V>(gx[1] + i, w1 * grad);
        add<V>(gx[2] + i, w2 * grad);
        add<V>(gx[3] + i, w3 * grad);
        if (kDataDots) {
          x_dots[1] += grad * x1;
          x_dots[2] += grad * x2;
          x_dots[3] += grad * x3;
        }
      }
    }
    add_sums(s_dots, 4, scope_dots);
    if (kDataDots) {
      add_sums(x_dots, kCorners, data_dots);
    }
  }
}

// The backward of `count` output positions. Cells are read from source and written to target, `cell_rows` apart from
// one position to the next.
template <typename T, bool kMoved, bool kDepthwise, bool kDataDots>
DK_TARGET void backward_rows(
    const BackwardRun<T>& run,
    const DataSample<T>* data,
    const ScopeSample<T>* scope,
    int64_t count,
    Margin<T>& margin) {
#define DK_BACKWARD(V, NUMBER)                                                                                 \
  for (int64_t t = 0; t < count; ++t) {                                                                        \
    const int64_t first = t * run.taps;                                                                        \
    backward_vectors<V, NUMBER, kMoved, kDepthwise, kDataDots>(                                                \
        run, run.grad_output + t * run.grad_stride, data + first, scope + first, margin, c,                    \
        run.cell_source + t * run.row_stride, run.cell_target + t * run.row_stride, run.data_dots + 4 * first, \
        run.scope_dots + 4 * first);                                                                           \
  }
  DK_EACH_PIECE(run.width, DK_BACKWARD)
#undef DK_BACKWARD
}
