"""The blocks of the model as data, without torch: a layer is a mixer and a channel.

    layer = input norm, mixer, residual, post norm, channel, residual
    mixer   latent attention (`latent_attention`) or grouped-query attention (`grouped_query`)
    channel a dense feed-forward (`feed_forward`) or a mixture of experts (`mixture_of_experts`)

Each block says in one file which tensors it has and under which Hugging Face names, which
operations it does and how many bytes they move, what it saves for the backward, and which rows
QK-Clip may shrink. Layout, estimate, model, optimizer and checkpoint read that, and ask nobody
else. `layer` puts the blocks of a config together.
"""
