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

// Turns the maps of a batch, [N, C, P] to [N, P, C] if `to_rows`, else back, and their type, in one pass.
template <typename T, typename In, typename Out>
void turn_maps(const In* in, int64_t images, int64_t channels, int64_t positions, bool to_rows, Out* out) {
  constexpr int64_t kBlock = 256;  // of positions
  const int64_t blocks = (positions + kBlock - 1) / kBlock, size = channels * positions;
  const auto turn = DK_BEST(transpose<T, In, Out>);
  at::parallel_for(0, images * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / blocks * size, first = unit % blocks * kBlock;
      const int64_t count = std::min(kBlock, positions - first);
      if (to_rows) {
        turn(in + image + first, positions, channels, count, nullptr, out + image + first * channels, channels);
      } else {
        turn(in + image + first * channels, channels, count, channels, nullptr, out + image + first, positions);
      }
    }
  });
}

// [N, H, W, C] from a map of any type and memory format.
template <typename T>
at::Tensor channels_last_map(const at::Tensor& map) {
  if (map.is_contiguous(at::MemoryFormat::ChannelsLast) || !map.is_contiguous()) {
    return widen<T>(map, at::MemoryFormat::ChannelsLast);
  }
  const int64_t channels = map.size(1), positions = map.size(2) * map.size(3);
  at::Tensor to =
      at::empty(map.sizes(), map.options().dtype(c10::CppTypeToScalarType<T>::value), at::MemoryFormat::ChannelsLast);
  T* out = to.mutable_data_ptr<T>();
  if constexpr (std::is_same_v<T, float>) {
    if (map.scalar_type() == at::kBFloat16) {
      turn_maps<T>(map.const_data_ptr<at::BFloat16>(), map.size(0), channels, positions, true, out);
      return to;
    }
  }
  const at::Tensor from = map.to(c10::CppTypeToScalarType<T>::value);
  turn_maps<T>(from.const_data_ptr<T>(), map.size(0), channels, positions, true, out);
  return to;
}

// The way back: a channels-last map in the type and memory format of `like`, which has its sizes.
template <typename T>
at::Tensor map_like(const at::Tensor& map, const at::Tensor& like) {
  const auto format = like.suggest_memory_format();
  if (format != at::MemoryFormat::Contiguous) {
    return map.to(like.scalar_type()).contiguous(format);
  }
  const int64_t channels = map.size(1), positions = map.size(2) * map.size(3);
  const T* in = map.const_data_ptr<T>();
  if constexpr (std::is_same_v<T, float>) {
    if (like.scalar_type() == at::kBFloat16) {
      at::Tensor to = at::empty(map.sizes(), like.options(), format);
      turn_maps<T>(in, map.size(0), channels, positions, false, to.mutable_data_ptr<at::BFloat16>());
      return to;
    }
  }
  at::Tensor to = at::empty(map.sizes(), map.options(), format);
  turn_maps<T>(in, map.size(0), channels, positions, false, to.mutable_data_ptr<T>());
  return to.to(like.scalar_type());
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
