// Pieces of host kernels that work on channels-last maps, a run of channels at a time.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "cpu/gemm.h"

namespace dk {

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

// Writes a [count, channels] tile of one image, with the bias added, from output position `first` on. `out` is
// [positions, channels] if channels_last, else [channels, positions].
template <typename T>
void store_tile(
    const T* tile,
    const T* bias,
    int64_t count,
    int64_t channels,
    int64_t positions,
    bool channels_last,
    int64_t first,
    T* out) {
  if (channels_last) {
    for (int64_t t = 0; t < count; ++t) {
      T* row = out + (first + t) * channels;
      for (int64_t o = 0; o < channels; ++o) {
        row[o] = tile[t * channels + o] + (bias ? bias[o] : T(0));
      }
    }
    return;
  }
  for (int64_t o = 0; o < channels; ++o) {
    T* row = out + o * positions + first;
    const T shift = bias ? bias[o] : T(0);
    for (int64_t t = 0; t < count; ++t) {
      row[t] = tile[t * channels + o] + shift;
    }
  }
}

}  // namespace dk
