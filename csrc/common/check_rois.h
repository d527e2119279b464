// The check of what RoIs hold, on the machine they lie on.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <atomic>
#include <cstdint>

#include "common/launch.h"
#include "common/roi_sampling.h"

namespace dk {

// Raises ValueError for `roi` = rois[number], which is_valid_roi refuses in numbers of the operator's type.
[[noreturn]] inline void raise_invalid_roi(
    const char* name, int64_t number, at::ArrayRef<double> roi, const RoiPoolSizes& s) {
  TORCH_CHECK_VALUE(
      names_image(roi.data(), s), name, ": rois[", number, "] = ", roi, " has batch index ", roi[0],
      ", expected an integer in [0, ", s.batch, ")");
  TORCH_CHECK_VALUE(
      false, name, ": rois[", number, "] = ", roi, " has coordinates that are not finite, or not once scaled by ",
      s.spatial_scale);
}

// Raises ValueError for the first RoI that is_valid_roi refuses. For RoIs on the host.
template <typename A>
void check_roi_values(const char* name, const at::Tensor& rois, const RoiPoolSizes& s) {
  const A* roi = rois.const_data_ptr<A>();
  for (int64_t number = 0; number < s.rois; ++number, roi += 5) {
    if (!is_valid_roi(roi, s)) {
      const std::array<double, 5> values = {roi[0], roi[1], roi[2], roi[3], roi[4]};
      raise_invalid_roi(name, number, values, s);
    }
  }
}

// A report of an invalid RoI, in one word so that it is read whole: number of the call, whether its batch index is at
// fault, number of the RoI. 0: none.
struct RoiReport {
  uint64_t word;

  DK_HOST_DEVICE static RoiReport make(uint32_t call, bool names_image, int64_t roi) {
    return {uint64_t{call} << 32 | uint64_t{!names_image} << 31 | (static_cast<uint64_t>(roi) & 0x7fffffff)};
  }
  uint32_t call() const { return static_cast<uint32_t>(word >> 32); }
  bool batch_index() const { return word >> 31 & 1; }
  int64_t roi() const { return static_cast<int64_t>(word & 0x7fffffff); }
};

// Calls of RoI operators on devices, of this process: their numbers, and the names of the last ones.
class RoiCalls {
 public:
  static uint32_t begin(const char* name) {
    uint32_t call = ++count;
    call = call == 0 ? ++count : call;  // 0 is no call
    names[call % kNames] = name;
    return call;
  }

  // Raises ValueError for a report of the call that has just begun or of an earlier one.
  [[noreturn]] static void raise(RoiReport report, uint32_t now) {
    const uint32_t ago = now - report.call();
    const char* name = ago < kNames ? names[report.call() % kNames].load() : nullptr;
    TORCH_CHECK_VALUE(
        false, name ? name : "a RoI operator", ": rois[", report.roi(), "] of an earlier call, ", ago,
        " RoI poolings on devices before this one, ",
        report.batch_index() ? "has a batch index that is none of its input's"
                             : "has coordinates that are not finite, or not once scaled",
        "; its results are NaN. Devices are not waited for: with the environment variable CUDA_LAUNCH_BLOCKING=1 the "
        "call itself raises");
  }

 private:
  static constexpr uint32_t kNames = 1024;
  static inline std::atomic<uint32_t> count{0};
  static inline std::atomic<const char*> names[kNames]{};
};

template <typename A>
struct ReportInvalidRois {
  RoiPoolSizes s;
  const A* rois;
  uint32_t call;
  volatile uint64_t* report;  // in memory that the host sees

  static constexpr int64_t kRois = 32;  // of an item

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    const int64_t end = (item + 1) * kRois < s.rois ? (item + 1) * kRois : s.rois;
    for (int64_t number = item * kRois + lanes.index(); number < end; number += lanes.count()) {
      const A* roi = rois + number * 5;
      if (!is_valid_roi(roi, s) && *report == 0) {  // an earlier report is not written over
        *report = RoiReport::make(call, names_image(roi, s), number).word;
      }
    }
  }
};

// The same for RoIs on a device, without waiting for it: an invalid RoI of this call is found where the device has
// already come to it, else by the next call of a RoI operator on any device. Its results are NaN, its gradients 0.
// Kernels that a CUDA graph replays report as well.
template <typename Launcher, typename A>
void check_roi_values(const char* name, const at::Tensor& rois, const RoiPoolSizes& s) {
  std::atomic<uint64_t>& reported = Launcher::report();
  const uint32_t call = RoiCalls::begin(name);
  const auto raise_reported = [&] {
    const RoiReport report{reported.load(std::memory_order_relaxed) == 0 ? 0 : reported.exchange(0)};
    if (report.word == 0) {  // or another thread has taken it
      return;
    }
    if (report.call() != call) {
      RoiCalls::raise(report, call);
    }
    const at::Tensor row = rois.select(0, report.roi()).to(at::kCPU, at::kDouble);
    raise_invalid_roi(name, report.roi(), {row.const_data_ptr<double>(), 5}, s);
  };
  raise_reported();
  Launcher::run(
      (s.rois + ReportInvalidRois<A>::kRois - 1) / ReportInvalidRois<A>::kRois,
      ReportInvalidRois<A>{s, rois.const_data_ptr<A>(), call, Launcher::report_from_device()});
  raise_reported();
}

}  // namespace dk
