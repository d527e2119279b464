// Pieces of host kernels that work on channels-last maps, a run of channels at a time.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/gemm.h"

namespace dk {

#define DK_VECTOR_FILE "cpu/vectors.h"
#include "cpu/for_each_vector.h"

// A run of at most kPanel channels that one matrix product covers: a piece of one weight group, or several whole small
// groups.
struct Panel {
  int64_t first, width;

  int64_t end() const { return first + width; }
};

inline std::vector<Panel> channel_panels(int64_t channels, int64_t group) {
  std::vector<Panel> panels;
  if (group >= kPanel) {
    for (int64_t start = 0; start < channels; start += group) {
      for (int64_t c = 0; c < group; c += kPanel) {
        panels.push_back({start + c, std::min(kPanel, group - c)});
      }
    }
  } else {
    const int64_t step = kPanel / group * group;
    for (int64_t c = 0; c < channels; c += step) {
      panels.push_back({c, std::min(step, channels - c)});
    }
  }
  return panels;
}

// Calls body(first channel, width, group) for the parts of a panel that lie in one weight group each.
template <typename Body>
void each_part(const Panel& panel, int64_t group, const Body& body) {
  for (int64_t c = panel.first; c < panel.end();) {
    const int64_t g = c / group, width = std::min(panel.end(), (g + 1) * group) - c;
    body(c, width, g);
    c += width;
  }
}

template <typename T>
at::Tensor widen(const at::Tensor& tensor, at::MemoryFormat format) {
  return tensor.to(c10::CppTypeToScalarType<T>::value).contiguous(format);
}

// Positions of tiles of at most about `tile`, evenly cut, and in whole vectors.
inline int64_t even_tile(int64_t positions, int64_t tile) {
  const int64_t tiles = (positions + tile - 1) / tile;
  return ((positions + tiles - 1) / tiles + 15) / 16 * 16;
}

// [N, H, W, C] from a map of any type and memory format.
template <typename T>
at::Tensor channels_last_map(const at::Tensor& map) {
  const bool bfloat16 = map.scalar_type() == at::kBFloat16 && std::is_same_v<T, float>;
  if (map.is_contiguous(at::MemoryFormat::ChannelsLast) || !map.is_contiguous()) {
    return widen<T>(map, at::MemoryFormat::ChannelsLast);
  }
  const at::Tensor from = bfloat16 ? map : map.to(c10::CppTypeToScalarType<T>::value);
  at::Tensor to =
      at::empty(map.sizes(), map.options().dtype(c10::CppTypeToScalarType<T>::value), at::MemoryFormat::ChannelsLast);
  constexpr int64_t kBlock = 256;  // of positions
  const int64_t channels = map.size(1), positions = map.size(2) * map.size(3);
  const int64_t blocks = (positions + kBlock - 1) / kBlock;
  const auto copy = [&](const auto* in) {
    using In = std::remove_const_t<std::remove_pointer_t<decltype(in)>>;
    const auto turn = DK_BEST(transpose<T, In, T>);
    T* out = to.mutable_data_ptr<T>();
    at::parallel_for(0, map.size(0) * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t image = unit / blocks * positions * channels, first = unit % blocks * kBlock;
        turn(
            in + image + first, positions, channels, std::min(kBlock, positions - first), nullptr,
            out + image + first * channels, channels);
      }
    });
  };
  if constexpr (std::is_same_v<T, float>) {
    if (bfloat16) {
      copy(from.const_data_ptr<at::BFloat16>());
      return to;
    }
  }
  copy(from.const_data_ptr<T>());
  return to;
}

// Writes a [count, width] tile of one image, with the bias added, from output position `first` on. `out` and `bias`
// begin at the first of these channels; `out` is [positions, channels] if channels_last, else [channels, positions].
template <typename T, typename Out>
void store_tile(
    const T* tile,
    const T* bias,
    int64_t count,
    int64_t width,
    int64_t channels,
    int64_t positions,
    bool channels_last,
    int64_t first,
    Out* out) {
  if (!channels_last) {
    DK_BEST(transpose<T, T, Out>)(tile, width, count, width, bias, out + first, positions);
    return;
  }
  for (int64_t t = 0; t < count; ++t) {
    DK_BEST(shift_row<T, Out>)(tile + t * width, bias, width, out + (first + t) * channels);
  }
}

}  // namespace dk
