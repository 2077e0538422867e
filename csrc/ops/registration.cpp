// All schemas of the package. A leading underscore marks an op without its own autograd.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mtp_ext, m) {
  m.def(
      "_select_rows(Tensor labels, Tensor? document_ids, Tensor? token_weights, int num_heads, int seq_len, "
      "int first_shift, int ignore_index, int vocab_size, bool marked) -> (Tensor rows, Tensor counts, Tensor "
      "first_invalid)");
  m.def(
      "_loss_rows_(Tensor(a!) logits, Tensor rows, Tensor labels, Tensor?[] tensors, float[] options, "
      "float class_weight_sum, int[] sizes, bool write_gradient, Tensor(b!)[] tables, str stage, "
      "Tensor(c!)[] statistics) -> ()");
  // CPU only: the loss of all heads in one call; F.linear of a few rows.
  m.def(
      "_fused_loss_(Tensor[] hidden, Tensor weight, Tensor?[] tensors, float[] options, int[] sizes, "
      "ScalarType compute_dtype, int flags, Tensor(a!)[] sums) -> (Tensor[] results, int first_invalid)");
  m.def("_few_rows(Tensor x, Tensor weight) -> Tensor");
  // CUDA only; elsewhere the Python layer uses torch's operators.
  m.def("_column_sum_(Tensor x, Tensor(a!) out, bool accumulate) -> ()");
  m.def("_scale_into_(Tensor x, Tensor scale, Tensor(a!) out) -> ()");
  m.def("_decode(Tensor hidden, Tensor weight, int top) -> (Tensor logits, Tensor ids, Tensor lse)");
  m.def("_rms_norm_heads(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def(
      "_rms_norm_heads_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor rstd) -> "
      "(Tensor grad_x, Tensor grad_weight)");
}
