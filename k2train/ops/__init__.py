"""Numerics: functions of tensors, in plain PyTorch, with explicit backward passes that save on
purpose.

    dtypes         cast, accumulation_dtype, and the types a config can name
    weight_grad    WeightGradQueue, WeightGradSlot, GradientSink, RowRun, PlainGradients,
                   add_product
    bf16_products  products of BF16 with FP32 results, added to sums in place: what weight gradients
                   take on CUDA
    linear         linear: y = x W^T with the weight gradient queued
    grouped        grouped_linear, grouped_mm, GroupedProduct: the experts' products; te_grouped has
                   Transformer Engine's
    attention      causal_attention: output and per-head max logit; attention_tiles,
                   attention_triton (kernels in attention_kernels), attention_cudnn and
                   te_attention are the ways to compute it
    backend        OpsBackend, choose_backend: which way a run takes
    row_max        stock_largest_logits; row_max_triton has kernels: the max logits beside cuDNN's
                   attention
    norm           inverse_rms, rms_norm; norm_triton has kernels
    swiglu         swiglu, weighted_swiglu; swiglu_triton has kernels
    rotary         rotary_queries, rotary_keys, rotary_tables, RotaryTables, softmax_scale: rotary
                   embedding with YaRN
    embedding      EmbeddingWeightGrad
    cross_entropy  linear_cross_entropy: head and loss, a chunk of logits at a time
    permute        sort_slots, sum_slots, sum_order, sum_copies: tokens to expert-sorted rows and
                   back
    fp8            quantise, dequantise, Fp8Tensor: storage in 1 x 128 tiles; fp8_triton has the
                   kernels
    kernels        gpu_kernels: where the Triton kernels can run; launchable, registered: operations
                   of torch's registry
    routing        chosen_weights, sequence_balance_loss, attach_loss

`*_reference` functions are the same from stock operations, for tests.
"""
