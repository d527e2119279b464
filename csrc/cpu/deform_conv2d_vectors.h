// Inner loops of deform_conv2d over a run of channels: part of its host kernels, for for_each_vector.h.

// out[t, 0:width] = the sampled channels; `image` points at the first channel wanted, `zeros` at a row of width zeros.
template <typename T, typename Out>
DK_TARGET void sample_rows(
    const T* image,
    int64_t pixel_stride,
    const Sample<T>* samples,
    int64_t count,
    int64_t width,
    const T* zeros,
    Out* out,
    int64_t out_stride) {
  for (int64_t t = 0; t < count; ++t, out += out_stride) {
    const T* corner[4];
    for (int k = 0; k < 4; ++k) {
      const int64_t index = samples[t].corners.index[k];
      corner[k] = index < 0 ? zeros : image + index * pixel_stride;
    }
    const T w0 = samples[t].weight[0], w1 = samples[t].weight[1], w2 = samples[t].weight[2], w3 = samples[t].weight[3];
    const T *c0 = corner[0], *c1 = corner[1], *c2 = corner[2], *c3 = corner[3];
#define DK_SAMPLE(V, NUMBER)                                                                                   \
  _Pragma("GCC unroll 4") for (int v = 0; v < NUMBER; ++v) {                                                   \
    const int64_t i = c + v * (sizeof(V) / sizeof(T));                                                         \
    const V value = w0 * read<V>(c0 + i) + w1 * read<V>(c1 + i) + w2 * read<V>(c2 + i) + w3 * read<V>(c3 + i); \
    store(value, out + i);                                                                                     \
  }
    DK_EACH_PIECE(width, DK_SAMPLE)
#undef DK_SAMPLE
  }
}

template <typename V, int kNumber, bool kScatter, typename T>
DK_INLINE void backward_vectors(
    const T* const* corner, T* const* target, const T* weight, const T* grad, T* columns, T* dots) {
  const T w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3];
  V dot[4] = {};
  _Pragma("GCC unroll 4") for (int v = 0; v < kNumber; ++v) {
    const int64_t i = v * (sizeof(V) / sizeof(T));
    const V g = read<V>(grad + i), x0 = read<V>(corner[0] + i), x1 = read<V>(corner[1] + i);
    const V x2 = read<V>(corner[2] + i), x3 = read<V>(corner[3] + i);
    dot[0] += g * x0;
    dot[1] += g * x1;
    dot[2] += g * x2;
    dot[3] += g * x3;
    write<V>(columns + i, w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3);
    if (kScatter) {
      add<V>(target[0] + i, w0 * g);
      add<V>(target[1] + i, w1 * g);
      add<V>(target[2] + i, w2 * g);
      add<V>(target[3] + i, w3 * g);
    }
  }
  add_sums<T>(dot, 4, dots);
}

// Takes the gradient of the columns apart. For each position t: dots[t, k] += sum over channels of grad * corner k,
// columns[t] = the sampled channels, and, where it is wanted, grad_image[corner k] += weight k * grad.
template <typename T, bool kScatter>
DK_TARGET void backward_rows(const BackwardRun<T>& run) {
  const T* grad = run.grad;
  T *columns = run.columns, *dots = run.dots;
  for (int64_t t = 0; t < run.count; ++t, grad += run.row_stride, columns += run.row_stride, dots += 4) {
    const Sample<T>& sample = run.samples[t];
    const T* corner[4];
    T* target[4];
#define DK_BACKWARD(V, NUMBER)                                                                          \
  {                                                                                                     \
    for (int k = 0; k < 4; ++k) {                                                                       \
      const int64_t index = sample.corners.index[k];                                                    \
      corner[k] = index < 0 ? run.zeros : run.image + index * run.pixel_stride + c;                     \
      target[k] = index < 0 || !kScatter ? run.scratch : run.grad_image + index * run.pixel_stride + c; \
    }                                                                                                   \
    backward_vectors<V, NUMBER, kScatter>(corner, target, sample.weight, grad + c, columns + c, dots);  \
  }
    DK_EACH_PIECE(run.width, DK_BACKWARD)
#undef DK_BACKWARD
  }
}
