// Small matrix products inside a parallel region, on torch's own libraries.
#pragma once

#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>
#include <torch/version.h>

#include <algorithm>
#include <type_traits>

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

// Sums of products of bfloat16 numbers are float. B is packed by pack_panels, so k is even.
inline void gemm(
    int64_t m,
    int64_t n,
    int64_t k,
    const at::BFloat16* a,
    int64_t lda,
    const at::BFloat16* b,
    int64_t ldb,
    float* c,
    int64_t ldc,
    bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, /*is_vnni=*/true);
}

// Whether the processor multiplies bfloat16 matrices faster than float ones.
inline bool has_bfloat16_products() {
#if defined(__x86_64__) && defined(__GNUC__)
  return at::globalContext().userEnabledMkldnn() &&
         (at::native::cpublas::could_pack(at::kBFloat16) || __builtin_cpu_supports("avx512bf16"));
#else
  return false;
#endif
}

// Where a thread is done with matrix products of this type.
template <typename T>
void release_gemm() {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    at::native::cpublas::brgemm_release();
  }
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
// row-major (the last one narrower); of bfloat16, two rows at a time are interleaved, and k is even. Panel p starts at
// out + p * kPanel * k.
template <typename T, typename Packed>
void pack_panels(const T* in, int64_t k, int64_t n, int64_t row_stride, int64_t column_stride, Packed* out) {
  constexpr int64_t kTogether = std::is_same_v<Packed, at::BFloat16> ? 2 : 1;
  for (int64_t first = 0; first < n; first += kPanel) {
    const int64_t width = std::min(kPanel, n - first);
    for (int64_t row = 0; row < k; row += kTogether) {
      const T* from = in + row * row_stride + first * column_stride;
      for (int64_t column = 0; column < width; ++column) {
        for (int64_t i = 0; i < kTogether; ++i) {
          *out++ = static_cast<Packed>(from[i * row_stride + column * column_stride]);
        }
      }
    }
  }
}

// C[m, n] (+)= A[m, rows] * B[first_row : first_row + rows, n], B packed by pack_panels from a [k, n] matrix.
template <typename T, typename Packed>
void gemm_packed(
    int64_t m,
    int64_t n,
    int64_t k,
    int64_t first_row,
    int64_t rows,
    const Packed* a,
    int64_t lda,
    const Packed* packed,
    T* c,
    int64_t ldc,
    bool accumulate) {
  for (int64_t first = 0; first < n; first += kPanel) {
    const int64_t width = std::min(kPanel, n - first);
    gemm(m, width, rows, a, lda, packed + first * k + first_row * width, width, c + first, ldc, accumulate);
  }
}

}  // namespace dk
