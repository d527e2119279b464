#include "ops/checks.h"

namespace dk {

void check_int_pair(const char* name, const char* argument, at::IntArrayRef values, int64_t least) {
  TORCH_CHECK_VALUE(
      values.size() == 2 && values[0] >= least && values[1] >= least, name, ": ", argument,
      " must be two integers of at least ", least, ", got ", values);
}

void check_input_dtype(const char* name, const at::Tensor& input) {
  const auto dtype = input.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16, name, ": input is ",
      dtype, ", expected float64, float32, float16 or bfloat16");
}

void check_tensor(
    const char* name, const char* argument, const at::Tensor& tensor, const at::Tensor& input, bool same_dtype) {
  TORCH_CHECK_VALUE(
      tensor.device() == input.device(), name, ": ", argument, " is on ", tensor.device(),
      ", expected the device of input, ", input.device());
  TORCH_CHECK_TYPE(
      same_dtype ? tensor.scalar_type() == input.scalar_type() : at::isFloatingType(tensor.scalar_type()), name, ": ",
      argument, " is ", tensor.scalar_type(), ", expected ",
      same_dtype ? toString(input.scalar_type()) : "a floating-point type", " (input is ", input.scalar_type(), ")");
}

void check_grad_output(
    const char* name, const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(
      grad_output.sizes() == expected, name, ": grad_output has shape ", grad_output.sizes(), ", expected ", expected);
  check_tensor(name, "grad_output", grad_output, input, true);
}

void check_asked(const char* name, const char* argument, bool given, bool asked) {
  TORCH_CHECK_VALUE(given || !asked, name, ": a gradient of ", argument, " is asked for, but there is no ", argument);
}

}  // namespace dk
