// Vectors of one instruction set: for for_each_vector.h.

template <typename T>
struct Wide {
  static constexpr int64_t kLanes = DK_VECTOR_BYTES / sizeof(T);
  typedef T Vector __attribute__((vector_size(DK_VECTOR_BYTES)));
};

// Memory holds vectors at any address: V is a vector or a single value.
template <typename V>
DK_INLINE V read(const void* at) {
  V value;
  __builtin_memcpy(&value, at, sizeof(V));
  return value;
}

template <typename V>
DK_INLINE void write(void* at, const V& value) {
  __builtin_memcpy(at, &value, sizeof(V));
}

template <typename V>
DK_INLINE void add(void* at, const V& value) {
  write<V>(at, read<V>(at) + value);
}

typedef uint32_t Bits __attribute__((vector_size(DK_VECTOR_BYTES)));
typedef uint16_t UpperBits __attribute__((vector_size(DK_VECTOR_BYTES / 2)));

// Values of another type in memory than they are computed in.
template <typename V, typename T>
DK_INLINE V load(const T* at) {
  return read<V>(at);
}

template <typename V>
DK_INLINE V load(const at::BFloat16* at) {
  if constexpr (sizeof(V) == DK_VECTOR_BYTES) {
    return (V)(__builtin_convertvector(read<UpperBits>(at), Bits) << 16);
  } else {
    return *at;
  }
}

template <typename V, typename T>
DK_INLINE void store(const V& value, T* at) {
  write<V>(at, value);
}

template <typename V>
DK_INLINE void store(const V& value, at::BFloat16* at) {
  if constexpr (sizeof(V) == DK_VECTOR_BYTES) {  // to the nearest, ties to even, NaN stays NaN
    const Bits bits = (Bits)value, nan = (Bits)(value != value);
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    write<UpperBits>(at, __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), UpperBits));
  } else {
    *at = value;
  }
}

// Calls BODY(vector type, how many) for pieces of [0, WIDTH) that begin at `c`: four vectors, one, or a single value.
#define DK_EACH_PIECE(WIDTH, BODY)                                 \
  {                                                                \
    using Vector = typename Wide<T>::Vector;                       \
    constexpr int64_t kStep = Wide<T>::kLanes;                     \
    int64_t c = 0;                                                 \
    for (; c + 4 * kStep <= WIDTH; c += 4 * kStep) BODY(Vector, 4) \
    for (; c + kStep <= WIDTH; c += kStep) BODY(Vector, 1)         \
    for (; c < WIDTH; ++c) BODY(T, 1)                              \
  }

// dots[i] += the sum of vector i.
template <typename T>
DK_INLINE void add_sums(const T* sums, int number, T* dots) {
  for (int i = 0; i < number; ++i) {
    dots[i] += sums[i];
  }
}

template <typename T>
DK_INLINE void add_sums(const typename Wide<T>::Vector* sums, int number, T* dots) {
  typedef T Quarter __attribute__((vector_size(16)));
  for (int i = 0; i < number; ++i) {
    Quarter sum = {};
    for (size_t k = 0; k < DK_VECTOR_BYTES / sizeof(Quarter); ++k) {
      sum += read<Quarter>(reinterpret_cast<const Quarter*>(sums + i) + k);
    }
    for (size_t k = 0; k < sizeof(Quarter) / sizeof(T); ++k) {
      dots[i] += sum[k];
    }
  }
}

#if !defined(__clang__)
// Exchanges rows and columns of a square, bit by bit of their numbers.
template <typename T>
DK_INLINE void transpose_square(typename Wide<T>::Vector* rows) {
  constexpr int kLanes = Wide<T>::kLanes;
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Index Indices __attribute__((vector_size(DK_VECTOR_BYTES)));
  _Pragma("GCC unroll 4") for (int bit = 1; bit < kLanes; bit *= 2) {
    Indices low, high;
    for (int j = 0; j < kLanes; ++j) {
      low[j] = j & bit ? kLanes + (j ^ bit) : j;
      high[j] = j & bit ? kLanes + j : j | bit;
    }
    _Pragma("GCC unroll 16") for (int i = 0; i < kLanes; ++i) {
      if (!(i & bit)) {
        const auto a = rows[i], b = rows[i | bit];
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i | bit] = __builtin_shuffle(a, b, high);
      }
    }
  }
}
#endif

// out[c, r] = in[r, c] + shift[c], where shift may be null.
template <typename T, typename In, typename Out>
DK_TARGET void transpose(
    const In* in, int64_t in_stride, int64_t rows, int64_t columns, const T* shift, Out* out, int64_t out_stride) {
#if !defined(__clang__)
  using Vector = typename Wide<T>::Vector;
  constexpr int64_t kLanes = Wide<T>::kLanes;
  if (rows >= kLanes && columns >= kLanes) {
    // Squares at the end begin earlier, and write again what was written. One square follows the other along the side
    // that lies together where the strides are larger.
    const bool down = out_stride > in_stride;
    const int64_t outer = down ? columns : rows, inner = down ? rows : columns;
    for (int64_t i = 0; i < outer; i += kLanes) {
      for (int64_t j = 0; j < inner; j += kLanes) {
        const int64_t r = std::min(down ? j : i, rows - kLanes), c = std::min(down ? i : j, columns - kLanes);
        Vector square[kLanes];
        for (int64_t k = 0; k < kLanes; ++k) {
          square[k] = load<Vector>(in + (r + k) * in_stride + c);
        }
        transpose_square<T>(square);
        for (int64_t k = 0; k < kLanes; ++k) {
          store<Vector>(shift ? square[k] + shift[c + k] : square[k], out + (c + k) * out_stride + r);
        }
      }
    }
    return;
  }
#endif
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      const T value = in[r * in_stride + c];
      out[c * out_stride + r] = shift ? value + shift[c] : value;
    }
  }
}

// out[c] = in[c] + shift[c], where shift may be null.
template <typename T, typename Out>
DK_TARGET void shift_row(const T* in, const T* shift, int64_t width, Out* out) {
#define DK_SHIFT(V, NUMBER)                            \
  for (int v = 0; v < NUMBER; ++v) {                   \
    const int64_t i = c + v * (sizeof(V) / sizeof(T)); \
    V value = read<V>(in + i);                         \
    if (shift) {                                       \
      value += read<V>(shift + i);                     \
    }                                                  \
    store(value, out + i);                             \
  }
  DK_EACH_PIECE(width, DK_SHIFT)
#undef DK_SHIFT
}
