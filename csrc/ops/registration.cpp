// Every schema of the package, in one place. A leading underscore: not differentiable by itself.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mtp_ext, m) {
  m.def(
      "_select_rows(Tensor labels, Tensor? document_ids, Tensor? token_weights, int num_heads, int seq_len, "
      "int first_shift, int ignore_index, int vocab_size) -> (Tensor rows, Tensor counts, Tensor first_invalid)");
  m.def(
      "_loss_rows_(Tensor(a!) logits, Tensor rows, Tensor labels, Tensor head_scale, Tensor? row_scale, "
      "Tensor? lse_grad, Tensor? token_weights, Tensor? class_weights, Tensor? bias, int seq_len, int first_shift, "
      "float label_smoothing, float z_loss, float class_weight_sum, float softcap, float logit_scale, "
      "bool write_gradient, Tensor(b!) loss, Tensor(c!) lse, Tensor(d!) predicted, str stage='whole', "
      "int vocab_start=0, int? total_vocab=None, Tensor(e!)? statistics=None, Tensor(f!)? local_max=None, "
      "Tensor? class_weight_total=None) -> ()");
  // On the CPU only: the loss of all heads at once.
  m.def(
      "_fused_loss_(Tensor[] hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? document_ids, "
      "Tensor? token_weights, Tensor? class_weights, Tensor? head_weights, Tensor? row_scale, Tensor? lse_grad, "
      "float? normalizer, int seq_len, int first_shift, int ignore_index, float label_smoothing, float z_loss, "
      "float softcap, float logit_scale, int[] detach_weight, ScalarType compute_dtype, Tensor(a!) workspace, "
      "Tensor(b!)[] grad_hidden, Tensor(c!)? grad_weight, Tensor(d!)? grad_bias) -> (Tensor loss, Tensor head_loss, "
      "Tensor n_valid, Tensor denominators, Tensor losses, Tensor lse, Tensor predicted, int first_invalid)");
  m.def(
      "_plain_loss_(Tensor hidden, Tensor weight, Tensor targets, float? normalizer, int ignore_index, "
      "Tensor(a!) workspace, int chunk_rows, bool need_hidden, bool need_weight) -> (Tensor loss, Tensor? grad_hidden, "
      "Tensor? grad_weight, int first_invalid)");
  // On CUDA only; elsewhere the Python layer does the same with torch's own operators.
  m.def("_column_sum_(Tensor x, Tensor(a!) out, bool accumulate) -> ()");
  m.def("_scale_into_(Tensor x, Tensor scale, Tensor(a!) out) -> ()");
  m.def("_decode(Tensor hidden, Tensor weight, int top) -> (Tensor logits, Tensor ids, Tensor lse)");
  m.def("_rms_norm_heads(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor y, Tensor h, Tensor rstd)");
  m.def(
      "_rms_norm_heads_backward(Tensor grad_y, Tensor h, Tensor? grad_h, Tensor weight, Tensor rstd) -> "
      "(Tensor grad_x, Tensor grad_weight)");
}
