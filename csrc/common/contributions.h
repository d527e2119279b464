// Sums in a fixed order: contributions to the pixels of a map are sorted by pixel, and one work item adds up those that
// lie together. What a deterministic backward does instead of atomics.
#pragma once

#include <ATen/ATen.h>

#include "common/launch.h"

namespace dk {

// Contributions as a body lists them: for each the pixel it goes to and its weight. `none` is the pixel of those that
// go nowhere, larger than any other. Of the most that are sorted at a time (launch.h) the keys, their sorted copy,
// their places, their weights and what the sort itself needs take some 200 MB.
struct ContributionList {
  at::Tensor pixels, weights;
  int64_t none;

  ContributionList(int64_t count, int64_t none, const at::TensorOptions& wide)
      : pixels(at::full({count}, none, wide.dtype(at::kLong))), weights(at::empty({count}, wide)), none(none) {}
};

// Adds up the contributions to a pixel. A work item is a contribution; that of the first of a pixel's does the work.
// `Source` has
//   Target<A> target(int64_t pixel)   where the sum goes: `channels` values from `row` on
//   Row row(int64_t number)           what is needed to read the contribution of that number, once for all channels
//   void load<kWidth>(Row, channel, A value[kWidth])
template <typename A>
struct Target {
  A* row;
  int64_t channels;
};

template <typename A, int kWidth, typename Source>
struct GatherContributions {
  Source source;
  const int64_t* pixels;  // [count], sorted
  const int64_t* order;   // [count]: the number of each before it was sorted
  const A* weights;       // [count], by number
  int64_t count, none;

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t at, const Lanes& lanes) const {
    const int64_t pixel = pixels[at];
    if (pixel == none || (at > 0 && pixels[at - 1] == pixel)) {
      return;
    }
    const Target<A> target = source.target(pixel);
    for (int64_t c = lanes.index() * kWidth; c < target.channels; c += lanes.count() * kWidth) {
      auto sum = Vector<A, kWidth>::load(target.row + c);
      for (int64_t i = at; i < count && pixels[i] == pixel; ++i) {
        const int64_t number = order[i];
        const A weight = weights[number];
        A value[kWidth];
        source.template load<kWidth>(source.row(number), c, value);
        for (int k = 0; k < kWidth; ++k) {
          sum.value[k] += weight * value[k];
        }
      }
      sum.store(target.row + c);
    }
  }
};

template <typename Launcher, typename A, int kWidth, typename Source>
void gather(const ContributionList& list, const Source& source) {
  const auto [sorted, order] = at::sort(list.pixels, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  Launcher::run(
      list.pixels.numel(),
      GatherContributions<A, kWidth, Source>{
          source, sorted.template const_data_ptr<int64_t>(), order.template const_data_ptr<int64_t>(),
          list.weights.template const_data_ptr<A>(), list.pixels.numel(), list.none});
}

}  // namespace dk
