// Checks that all operators share. They raise ValueError or TypeError and name the operator and the argument.
#pragma once

#include <ATen/ATen.h>

namespace dk {

// Two integers, (vertical, horizontal), of at least `least`.
void check_int_pair(const char* name, const char* argument, at::IntArrayRef values, int64_t least);

// A data type that there are kernels for.
void check_input_dtype(const char* name, const at::Tensor& input);

// On the device of `input`, and of its data type or, where that need not be, of any floating-point type.
void check_tensor(
    const char* name, const char* argument, const at::Tensor& tensor, const at::Tensor& input, bool same_dtype);

void check_grad_output(
    const char* name, const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef expected);

// A gradient is asked for only of what there is.
void check_asked(const char* name, const char* argument, bool given, bool asked);

}  // namespace dk
