"""The operators that an exported program from a file may call, by their exact names."""

from __future__ import annotations

#: ATen's operators on tensors and numbers: none reads a file, calls back or runs what it is given.
_ATEN = """
__and__: Scalar Tensor bool int
__or__: Scalar Tensor bool int
__xor__: Scalar Tensor bool int
_adaptive_avg_pool2d: default
_adaptive_avg_pool3d: default
_assert_async: default msg
_assert_scalar: default
_assert_tensor_metadata: default
_batch_norm_impl_index: default
_batch_norm_no_update: default
_batch_norm_with_update: default
_batch_norm_with_update_functional: default
_fused_rms_norm: default
_local_scalar_dense: default
_log_softmax: default
_native_batch_norm_legit: default no_stats
_native_batch_norm_legit_functional: default
_native_batch_norm_legit_no_training: default
_prelu_kernel: default
_reshape_alias: default
_scaled_dot_product_flash_attention_for_cpu: default
_softmax: default
_to_copy: default
_unsafe_index: Tensor Tensor_hacked_twin
_unsafe_view: default
_upsample_bicubic2d_aa: default vec
_upsample_bilinear2d_aa: default vec
_upsample_nearest_exact1d: default vec
_upsample_nearest_exact2d: default vec
_weight_norm: default
_weight_norm_interface: default
abs: default
abs_: default
acos: Scalar default float int
adaptive_avg_pool1d: default
adaptive_avg_pool2d: default
adaptive_avg_pool3d: default
adaptive_max_pool1d: default
adaptive_max_pool2d: default
adaptive_max_pool3d: default
add: Scalar Tensor default float float_int int int_float str
add_: Scalar Tensor
addbmm: default
addcdiv: default
addcdiv_: default
addcmul: default
addcmul_: default
addmm: default dtype
addmv: default
adjoint: default
affine_grid_generator: default
alias: default
all: bool default dim dims float int
alpha_dropout: default
amax: default
amin: default
aminmax: default
any: bool default dim dims float int
arange: default start start_step
argmax: default
argmin: default
argsort: default stable
as_strided: default
as_strided_copy: default
asin: Scalar default float int
atan: Scalar default float int
atan2: Scalar_Scalar default float float_int int int_float
avg_pool1d: default
avg_pool2d: default
avg_pool3d: default
baddbmm: default dtype
batch_norm: default
bernoulli: Tensor default p
bernoulli_: Tensor float
bilinear: default
bitwise_and: Scalar Scalar_Tensor Tensor
bitwise_not: default
bitwise_or: Scalar Scalar_Tensor Tensor
bitwise_xor: Scalar Scalar_Tensor Tensor
bmm: default dtype
broadcast_tensors: default
broadcast_to: default
cat: default
cdist: default
ceil: Scalar default float int
celu: default
celu_: default
channel_shuffle: default
chunk: default
clamp: Tensor default
clamp_: Tensor default
clamp_max: Tensor default
clamp_max_: Tensor default
clamp_min: Tensor default
clamp_min_: Tensor default
clip: Tensor default
clone: default
col2im: default
complex: default
concat: default
concatenate: default
constant_pad_nd: default
contiguous: default
conv1d: default padding
conv2d: default padding
conv3d: default padding
conv_transpose1d: default
conv_transpose2d: input
conv_transpose3d: input
convolution: default
copy: Dict_bool Dict_int default
copy_: Tensor default float int
cos: Scalar default float int
cosh: Scalar default float int
cosine_similarity: default
count_nonzero: default dim_IntList
cudnn_batch_norm: default
cumprod: default
cumsum: default
detach: default
detach_: default
detach_copy: default
diagonal: default
div: Scalar Scalar_mode Tensor Tensor_mode default float int
div_: Scalar Scalar_mode Tensor Tensor_mode
divide: Scalar Scalar_mode Tensor Tensor_mode
dot: default
dropout: default
dropout_: default
dstack: default
einsum: default sublist
elu: default
elu_: default
embedding: default
empty: memory_format
empty_like: default
empty_permuted: default
empty_strided: default
eq: Scalar Tensor Tensor_list bool bool_list default device float float_int float_list int int_float
    int_list str
erf: Scalar default float int
erfc: Scalar default float int
exp: Scalar default float int
exp_: default
expand: default
expand_as: default
expand_copy: default
expm1: Scalar default float int
eye: default m
feature_alpha_dropout: default
feature_dropout: default
fft_fft: default
fft_ifft: default
fft_irfft: default
fft_irfft2: default
fft_rfft: default
fft_rfft2: default
fill: Scalar Tensor
fill_: Scalar Tensor
flatten: using_ints
flip: default
fliplr: default
flipud: default
floor: Scalar default float int
floor_divide: Scalar default
fmax: default
fmin: default
fmod: Scalar Tensor default float float_int int int_float
frac: default
full: default
full_like: default
gather: default
ge: Scalar Tensor default float float_int int int_float str
gelu: default
gelu_: default
glu: default
grid_sampler: default
grid_sampler_2d: default
group_norm: default
gru: data input
gt: Scalar Tensor default float float_int int int_float str
hardshrink: default
hardsigmoid: default
hardsigmoid_: default
hardswish: default
hardswish_: default
hardtanh: default
hardtanh_: default
hsplit: array int
hstack: default
im2col: default
imag: default
index: Tensor Tensor_hacked_twin list_Tensor list_bool list_float list_int str
index_add: default
index_copy: default
index_put: default hacked_twin
index_put_: default hacked_twin
index_select: default
instance_norm: default
is_nonzero: default
isfinite: default float
isinf: default float
isnan: default float
item: default
layer_norm: default
le: Scalar Tensor default float float_int int int_float str
leaky_relu: default
leaky_relu_: default
lerp: Scalar Tensor
lerp_: Scalar Tensor
lift: default
lift_fresh: default
lift_fresh_copy: default
linalg_inv: default
linalg_vector_norm: default
linear: default
linspace: Scalar_Tensor Tensor_Scalar Tensor_Tensor default
log: Scalar Scalar_Scalar default float float_float float_int int int_float int_int
log10: Scalar default float int
log1p: Scalar default float int
log2: default
log_sigmoid: default
log_softmax: int
logical_and: default
logical_not: default
logical_or: default
logical_xor: default
logit: default
logsumexp: default
lstm: data input
lt: Scalar Tensor default float float_int int int_float str
mT: a default
masked_fill: Scalar Tensor
masked_fill_: Scalar Tensor
masked_scatter: default
masked_select: default
matmul: default
max: default dim other
max_pool1d: default
max_pool2d: default
max_pool2d_with_indices: default
max_pool3d: default
max_pool3d_with_indices: default
max_unpool2d: default
maximum: default
mean: default dim
median: default dim
meshgrid: default indexing
min: default dim other
minimum: default
miopen_batch_norm: default
mish: default
mish_: default
mm: default dtype
moveaxis: int intlist
movedim: int intlist
mul: Scalar Tensor default float float_int int int_float
mul_: Scalar Tensor
multiply: Scalar Tensor
mv: default
narrow: Tensor default
native_batch_norm: default
native_dropout: default
native_group_norm: default
native_layer_norm: default
ne: Scalar Tensor Tensor_list bool bool_list default device float float_int float_list int int_float
    int_list str
neg: Scalar default float int
neg_: default
new_empty: default
new_full: default
new_ones: default
new_zeros: default
nonzero: default
norm: Scalar ScalarOpt_dim ScalarOpt_dim_dtype ScalarOpt_dtype
normal: Tensor_Tensor Tensor_float float_Tensor float_float
normal_: default
numpy_T: a default
one_hot: default
ones: default
ones_like: default
outer: default
pad: default
pairwise_distance: default
permute: default
permute_copy: default
pixel_shuffle: default
pixel_unshuffle: default
pow: Scalar Scalar_Scalar Tensor_Scalar Tensor_Tensor float float_int int int_float int_to_int
pow_: Scalar Tensor
prelu: default
promote_types: default
prod: default dim_int
rand: default generator
rand_like: default generator
randint: default generator low low_generator
randn: default generator
randn_like: default generator
randperm: default generator
real: default
reciprocal: default
reflection_pad1d: default
reflection_pad2d: default
reflection_pad3d: default
relu: default
relu6: default
relu6_: default
relu_: default
remainder: Scalar Scalar_Tensor Tensor default float float_int int int_float
repeat: default
repeat_interleave: Tensor self_Tensor self_int
replication_pad1d: default
replication_pad2d: default
replication_pad3d: default
reshape: default
reshape_as: default
rms_norm: default
rnn_tanh: data input
roll: default
rot90: default
round: Scalar decimals default float int
rrelu: default
rrelu_with_noise: default
rsqrt: default
rsqrt_: default
rsub: Scalar Tensor
scalar_tensor: default
scaled_dot_product_attention: default
scatter: reduce src value value_reduce
scatter_add: default
scatter_reduce: two
select: int
select_copy: int
select_scatter: default
selu: default
selu_: default
sigmoid: default
sigmoid_: default
sign: default
silu: default
silu_: default
sin: Scalar default float int
sinh: Scalar default float int
slice: Tensor str
slice_copy: Tensor
slice_scatter: default
softmax: int
softplus: default
softshrink: default
sort: Tensor bool default float int stable
split: Tensor default sizes str
split_with_sizes: default
split_with_sizes_copy: default
sqrt: Scalar default float int
sqrt_: default
square: default
squeeze: default dim dims
squeeze_: default dim dims
squeeze_copy: default dim dims
stack: default
std: correction default dim
std_mean: correction default dim
stft: center default
sub: Scalar Tensor default float float_int int int_float
sub_: Scalar Tensor
subtract: Scalar Tensor
sum: bool default dim_IntList float int
swapaxes: default
sym_constrain_range: default
sym_constrain_range_for_size: default
sym_numel: default
sym_size: default int
sym_storage_offset: default
sym_stride: default int
t: default
take: default
take_along_dim: default
tan: Scalar default float int
tanh: Scalar default float int
tanh_: default
tensor_split: indices sections tensor_indices_or_sections
threshold: default
threshold_: default
tile: default
to: device dtype dtype_layout other prim_Device prim_dtype prim_other
topk: default
transpose: int
transpose_: default
transpose_copy: int
triangular_solve: default
tril: default
triu: default
true_divide: Scalar Tensor
trunc: default
type_as: default
unbind: int
unbind_copy: int
unflatten: int
unfold: default
uniform_: default
unsqueeze: default
unsqueeze_: default
unsqueeze_copy: default
upsample_bicubic2d: default vec
upsample_bilinear2d: default vec
upsample_linear1d: default vec
upsample_nearest1d: default vec
upsample_nearest2d: default vec
upsample_nearest3d: default vec
upsample_trilinear3d: default vec
var: correction default dim
var_mean: correction default dim
view: default dtype
view_as: default
view_as_complex: default
view_as_real: default
view_copy: default dtype
vsplit: array int
vstack: default
where: Scalar ScalarOther ScalarSelf default self
zero: default
zero_: default
zeros: default
zeros_like: default
"""
_OPERATOR = "getitem add sub mul truediv floordiv mod pow neg abs ge le gt lt eq ne and_ or_ not_"
_TORCH = "sym_int sym_float sym_max sym_min sym_not sym_sqrt sym_sum"
_MATH = "ceil floor trunc"


def _aten() -> set[str]:
    names: set[str] = set()
    for line in _ATEN.strip().replace("\n    ", " ").splitlines():
        operator, overloads = line.split(": ")
        names.update(f"torch.ops.aten.{operator}.{overload}" for overload in overloads.split())
    return names


#: Called with a graph of its own.
WITH_GRAPH = {"torch.ops.higher_order.wrap_with_set_grad_enabled"}
OPERATORS = (
    _aten()
    | {f"_operator.{name}" for name in _OPERATOR.split()}
    | {f"torch.{name}" for name in _TORCH.split()}
    | {f"math.{name}" for name in _MATH.split()}
    | WITH_GRAPH
)
