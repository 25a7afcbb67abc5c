"""The model: layers cut into phases, each with its own forward and backward. Knows local sizes,
never a rank.

model        Model, build_model, forward, backward, forward_loss, forward_backward, logits
pieces       ModelPart, whole_model, Piece: what a virtual stage holds, and named tensors inside
    parameters
saved        SavedActivations (protocol), KeepEverything: names of what lives from forward to
    backward
context      MicrobatchContext, Statistics: what a phase may touch besides its inputs
phase        Phase (protocol), ComputePhase, CommunicationPhase
layers       the phases of dense and MoE layers, and what travels between them
ends         EmbeddingPhase, HeadPhase
loss         Loss (protocol), CrossEntropy: what the head computes of a microbatch
attention    LatentAttention (MLA), Rotary
routing      Router, choose_experts, update_correction_bias, load_violation
feed_forward FeedForward, RoutedExperts
dispatcher   Dispatcher, Routing, Route (protocols), Results, LocalDispatcher
init         initialise: weights as a function of (seed, tensor name)
"""
