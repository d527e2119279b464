// Sums in a fixed order: contributions to the pixels of a map are sorted by pixel, and one work item adds up those that
// lie together. What a deterministic backward does instead of atomics.
#pragma once

#include <ATen/ATen.h>

#include "common/launch.h"

namespace dk {

// Contributions sorted at a time. A key, its sorted copy, its place, and what the sort itself needs: some 170 MB.
constexpr int64_t kContributions = 4 << 20;

struct Contributions {
  const int64_t* pixels;  // [count], sorted: where each contribution goes
  const int64_t* order;   // [count]: its number before it was sorted
  int64_t count;
  int64_t none;  // the pixel of those that go nowhere, larger than any other

  // Whether contribution `at` is the first of a pixel's. Its work item adds up all of them.
  DK_HOST_DEVICE bool begins(int64_t at) const {
    return pixels[at] != none && (at == 0 || pixels[at - 1] != pixels[at]);
  }

  DK_HOST_DEVICE bool continues(int64_t at, int64_t pixel) const { return at < count && pixels[at] == pixel; }
};

// Runs make_body(contributions) for contributions with pixels `keys`, one work item each.
template <typename Launcher, typename MakeBody>
void gather(const at::Tensor& keys, int64_t none, const MakeBody& make_body) {
  const auto [sorted, order] = at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  Launcher::run(
      keys.numel(), make_body(
                        Contributions{
                            sorted.template const_data_ptr<int64_t>(), order.template const_data_ptr<int64_t>(),
                            keys.numel(), none}));
}

}  // namespace dk
