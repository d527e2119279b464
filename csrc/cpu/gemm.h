// Small matrix products inside a parallel region, on torch's own libraries.
#pragma once

#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>
#include <torch/version.h>

#include <algorithm>

#if TORCH_VERSION_MAJOR < 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 6)
#error "dk_detection needs torch >= 2.6 (at::native::cpublas::brgemm for float)"
#endif

namespace dk {

// Columns a packed right-hand side keeps together: as wide as the register blocks of the micro-kernels behind `gemm`.
constexpr int64_t kPanel = 64;

// C[m, n] (+)= A[m, k] * B[k, n], row-major with the given row strides. Single-threaded; meant for blocks that stay in
// cache, with n <= kPanel and a dense B.
inline void gemm(
    int64_t m,
    int64_t n,
    int64_t k,
    const float* a,
    int64_t lda,
    const float* b,
    int64_t ldb,
    float* c,
    int64_t ldc,
    bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, /*is_vnni=*/false);
}

// Double serves gradient checks: torch's matrix product on views, without a fast path of its own.
inline void gemm(
    int64_t m,
    int64_t n,
    int64_t k,
    const double* a,
    int64_t lda,
    const double* b,
    int64_t ldb,
    double* c,
    int64_t ldc,
    bool accumulate) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto view = [](const double* data, int64_t rows, int64_t columns, int64_t stride) {
    return at::from_blob(const_cast<double*>(data), {rows, columns}, {stride, 1}, at::kDouble);
  };
  auto out = view(c, m, n, ldc);
  if (accumulate) {
    out.addmm_(view(a, m, k, lda), view(b, k, n, ldb));
  } else {
    at::mm_out(out, view(a, m, k, lda), view(b, k, n, ldb));
  }
}

// Copies a [k, n] matrix with strides (row_stride, column_stride) into panels of kPanel columns, each panel dense and
// row-major (the last one narrower). Panel p starts at out + p * kPanel * k.
template <typename T>
void pack_panels(const T* in, int64_t k, int64_t n, int64_t row_stride, int64_t column_stride, T* out) {
  for (int64_t first = 0; first < n; first += kPanel) {
    const int64_t width = std::min(kPanel, n - first);
    for (int64_t row = 0; row < k; ++row) {
      const T* from = in + row * row_stride + first * column_stride;
      for (int64_t column = 0; column < width; ++column) {
        *out++ = from[column * column_stride];
      }
    }
  }
}

// C[m, n] (+)= A[m, rows] * B[first_row : first_row + rows, n], B packed by pack_panels from a [k, n] matrix.
template <typename T>
void gemm_packed(
    int64_t m,
    int64_t n,
    int64_t k,
    int64_t first_row,
    int64_t rows,
    const T* a,
    int64_t lda,
    const T* packed,
    T* c,
    int64_t ldc,
    bool accumulate) {
  for (int64_t first = 0; first < n; first += kPanel) {
    const int64_t width = std::min(kPanel, n - first);
    gemm(m, width, rows, a, lda, packed + first * k + first_row * width, width, c + first, ldc, accumulate);
  }
}

}  // namespace dk
